"""What is found on the slices of a volume, linked from slice to slice.

Dimension key: K slices, N regions, T tracks. Boxes are xyxy in [0, 1] of a slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from downstream.volumes import Volume
from grounding.boxes import pairwise_iou
from grounding.detect import Grounder
from grounding.images import ImageError
from grounding.labels import LabelTree
from grounding.types import NOT_FOUND_LEVEL, RegionTokens, stack_region_tokens

LEAST_IOU = 0.3  # of regions on neighbouring slices that are one
GAP = 2  # a region may be missed on one slice
LEAST_MM = 3.0  # of a region along the volume; on one slice of 1 mm there is noise
AT_ONCE = 16  # slices


@dataclass(frozen=True)
class Track:
    """One region through a volume. `first`, `last`: its slices; `best`: the one of highest score; `weight`: the sum of
    its scores."""

    label: str
    first: int
    last: int
    best: int
    weight: float


@dataclass(frozen=True)
class VolumeRegions:
    """`tokens` (1, T + M): each track as it is on its best slice, then M findings that no slice shows, with their
    highest presence. `queries` of `tokens`: the highest presence on any slice."""

    tokens: RegionTokens
    tracks: list[Track]


def look_through(grounder: Grounder, volume: Volume, modality: str | None) -> VolumeRegions:
    """What the checkpoint finds on the slices, linked. Slices that are one grey are not looked at.

    Raises PhraseError for a modality that the checkpoint does not know, or a middle slice that is none of its kind.
    """
    grounder.check_modality(modality or volume.modality)
    if modality is None:
        grounder.check_familiar(volume.image(len(volume.slices) // 2))
    numbers = [k for k, pixels in enumerate(volume.slices) if pixels.min() < pixels.max()]
    if not numbers:
        raise ImageError("each slice of the volume is one grey; export it again")
    rows = []
    for start in tqdm(range(0, len(numbers), AT_ONCE), "slices", unit="batch", disable=None, leave=False):
        some = [volume.slices[k] for k in numbers[start : start + AT_ONCE]]
        rows += [detection.tokens for detection in grounder.detect(some, None, modality)]
    return join_slices(rows, numbers, grounder.tree, volume.step)


def join_slices(
    rows: Sequence[RegionTokens], numbers: Sequence[int], tree: LabelTree, step: float | None = None
) -> VolumeRegions:
    """`rows`: the region tokens (a batch of one) of the slices `numbers`. `step`: mm from slice to slice; where it is
    known, a region that is thinner than LEAST_MM along the volume is left out."""
    chains = link(rows, numbers, tree)
    if step is not None:
        chains = [chain for chain in chains if (numbers[chain[-1][0]] - numbers[chain[0][0]] + 1) * step >= LEAST_MM]
    pairs = [_track(chain, rows, numbers) for chain in chains]
    pairs.sort(key=lambda pair: -pair[0].weight)
    tracks = [track for track, _ in pairs]
    missing = _missing(rows, {track.label for track in tracks}, tree)
    return VolumeRegions(_take(rows, [place for _, place in pairs] + missing, _queries(rows)), tracks)


def link(rows: Sequence[RegionTokens], numbers: Sequence[int], tree: LabelTree) -> list[list[tuple[int, int]]]:
    """Chains of (row, region), along the volume: what is the same on slices next to each other, or next but one.

    Places must have the same label, findings be of the same kind ("left insula lesion" and "lesion": a finding's place
    may be named differently from slice to slice), with an IoU of at least LEAST_IOU; the best pairs are joined first,
    each region to one. Scores of regions are not looked at.
    """
    chains: list[list[tuple[int, int]]] = []
    for r, tokens in enumerate(rows):
        found = _found(tokens)
        near = [chain for chain in chains if numbers[r] - numbers[chain[-1][0]] <= GAP]
        pairs = []
        for c, chain in enumerate(near):
            before, i = chain[-1]
            alike = [j for j in found if _kind(tokens.labels[0][j], tree) == _kind(rows[before].labels[0][i], tree)]
            overlap = pairwise_iou(rows[before].boxes[0][[i]], tokens.boxes[0][alike])[0].tolist()
            pairs += [(value, c, j) for value, j in zip(overlap, alike, strict=True) if value >= LEAST_IOU]
        joined: dict[int, int] = {}  # region → chain
        for _, c, j in sorted(pairs, key=lambda pair: -pair[0]):
            if j not in joined and c not in joined.values():
                joined[j] = c
        for j in found:
            if j in joined:
                near[joined[j]].append((r, j))
            else:
                chains.append([(r, j)])
    return chains


def _found(tokens: RegionTokens) -> list[int]:
    return torch.nonzero(tokens.valid[0] & (tokens.levels[0] != NOT_FOUND_LEVEL)).flatten().tolist()


def _kind(label: str, tree: LabelTree) -> str:
    is_finding = label in tree.nodes and tree.is_finding(label)
    return label.rsplit("/", 1)[-1] if is_finding else label


def _track(
    chain: Sequence[tuple[int, int]], rows: Sequence[RegionTokens], numbers: Sequence[int]
) -> tuple[Track, tuple[int, int]]:
    """A chain's track, with the (row, region) that stands for it: of the label with the most score the best one."""
    scores = {(r, i): float(rows[r].scores[0, i]) for r, i in chain}
    votes: dict[str, float] = {}
    for r, i in chain:
        label = rows[r].labels[0][i]
        votes[label] = votes.get(label, 0.0) + scores[r, i]
    label = max(votes, key=lambda name: votes[name])
    best = max((place for place in chain if rows[place[0]].labels[0][place[1]] == label), key=scores.__getitem__)
    ends = numbers[chain[0][0]], numbers[chain[-1][0]]
    return Track(label, *ends, numbers[best[0]], sum(scores.values())), best


def _missing(rows: Sequence[RegionTokens], found: set[str], tree: LabelTree) -> list[tuple[int, int]]:
    """(row, region) of each finding that was looked for and is on no slice, where its presence is highest."""
    there = found | {wider for label in found if label in tree.nodes for wider in tree.broader(label)}
    highest: dict[str, tuple[int, int]] = {}
    for r, tokens in enumerate(rows):
        for i in torch.nonzero(tokens.valid[0] & (tokens.levels[0] == NOT_FOUND_LEVEL)).flatten().tolist():
            label = tokens.labels[0][i]
            known = highest.get(label)
            if label not in there and (known is None or tokens.scores[0, i] > rows[known[0]].scores[0, known[1]]):
                highest[label] = (r, i)
    return list(highest.values())


def _queries(rows: Sequence[RegionTokens]) -> list[dict]:
    """What was looked for, each with its highest presence."""
    highest: dict[str, dict] = {}
    for query in (query for tokens in rows for query in tokens.queries[0]):
        known = highest.get(query["phrase"])
        if known is None or query["presence"] > known["presence"]:
            highest[query["phrase"]] = query
    return list(highest.values())


def _take(rows: Sequence[RegionTokens], places: Sequence[tuple[int, int]], queries: list[dict]) -> RegionTokens:
    """One batch of one with the regions at `places`."""
    stacked = stack_region_tokens(rows)
    r, i = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
    return RegionTokens(
        **{name: getattr(stacked, name)[r, i][None] for name in RegionTokens.TENSORS},
        labels=[[stacked.labels[a][b] for a, b in places]],
        queries=[queries],
    )


def best_slice(tracks: Sequence[Track], named: frozenset[str], tree: LabelTree, slices: int) -> int:
    """The slice to look at: of the track with the largest weight among those that are named, else among findings, else
    among all; without any, the middle of `slices`."""
    wider = [{track.label, *(tree.broader(track.label) if track.label in tree.nodes else ())} for track in tracks]
    asked = [track for track, names in zip(tracks, wider, strict=True) if names & named]
    findings = [track for track in tracks if track.label in tree.nodes and tree.is_finding(track.label)]
    for some in (asked, findings, tracks):
        if some:
            return max(some, key=lambda track: track.weight).best
    return slices // 2
