"""What a language model is told about an image's regions: by which route, from which source, and which of them.

Dimension key: B images, N regions, K region slots of a prompt. Boxes are xyxy in [0, 1].
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from grounding.labels import LabelTree, normalise
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

# none: the slots stand there, masked. text: boxes and labels written out. tokens: projected region tokens.
ROUTES = ("none", "text", "tokens")
# "file:" is followed by the path of a region-token file (.safetensors) or of a regions.jsonl.
SOURCES = ("predicted", "annotated", "shuffled", "empty", "file:")
LONGEST_PHRASE = 8  # words


def labels_in(question: str, tree: LabelTree, modality: str | None = None) -> frozenset[str]:
    """Ids of all labels that a question about an image of `modality` names: the longest runs of words that the label
    tree knows, and each finding named in each place named ("Does the left insula contain a lesion?" asks for a left
    insula lesion)."""
    words = normalise(question).split()
    known: dict[tuple[int, int], str] = {}
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + LONGEST_PHRASE) + 1):
            label = tree.find(" ".join(words[start:end]), modality=modality)
            if label:
                known[start, end] = label
    longest = {x for (a, b), x in known.items() if not any(c <= a and b <= d and (c, d) != (a, b) for c, d in known)}
    leaves = {label.rsplit("/", 1)[1] for label in longest if tree.is_finding(label)}
    attached = {f"{place}/{leaf}" for place in longest for leaf in leaves}
    return frozenset(longest | (attached & set(tree.nodes)))


def pick(
    tokens: RegionTokens,
    row: int,
    named: Iterable[str],
    tree: LabelTree,
    k: int,
    vocabulary: Mapping[str, torch.Tensor],
) -> RegionTokens:
    """The K regions of image `row` that go into a prompt, as a batch of one, padded to (1, K) with valid = False.

    A finding that the question names and that is not among the regions takes a slot as well: looked for, not found.
    `vocabulary`: label → label vector (E) of what could have been found.
    Chosen in this order: labels that the question names (found or not), findings, other regions, other labels that were
    looked for and not found; each by falling score. Then laid out: findings from the largest box to the smallest, other
    regions, not found; so `[rK]` of a report's largest lesion is `[r0]`. Ties keep the order of the file. `queries` are
    those of the named labels.
    """
    named = frozenset(named)
    tokens, row = _with_missing(tokens.rows([row]), named, tree, vocabulary), 0
    labels, scores = tokens.labels[row], tokens.scores[row].tolist()
    found = (tokens.levels[row] != NOT_FOUND_LEVEL).tolist()
    boxes = tokens.boxes[row]
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    finding = [label in tree.nodes and tree.is_finding(label) for label in labels]

    def rank(i: int) -> tuple[int, float]:
        tier = 0 if labels[i] in named else 3 if not found[i] else 1 if finding[i] else 2
        return tier, -scores[i]

    def place(i: int) -> tuple[int, float]:
        return (0, -areas[i]) if found[i] and finding[i] else (1 if found[i] else 2, 0.0)

    chosen = sorted(torch.nonzero(tokens.valid[row]).flatten().tolist(), key=rank)[:k]
    asked = [query for query in tokens.queries[row] if query.get("label") in named]
    return _slots(tokens, row, sorted(chosen, key=place), k, asked)


def _with_missing(
    tokens: RegionTokens, named: frozenset[str], tree: LabelTree, vocabulary: Mapping[str, torch.Tensor]
) -> RegionTokens:
    """`tokens` of one image, and a row "not found" for each finding that is named, known and not there."""
    there = {label for label in tokens.labels[0] if label}
    there |= {wider for label in there if label in tree.nodes for wider in tree.broader(label)}
    missing = [x for x in sorted(named) if x in vocabulary and tree.is_finding(x) and x not in there]
    if not missing:
        return tokens
    n = len(missing)
    empty_rows = {
        name: getattr(tokens, name).new_zeros(1, n, *getattr(tokens, name).shape[2:]) for name in tokens.TENSORS
    }
    empty_rows["label_vectors"][0] = torch.stack([vocabulary[label] for label in missing])
    empty_rows["levels"][:], empty_rows["valid"][:] = NOT_FOUND_LEVEL, True
    return RegionTokens(
        **{name: torch.cat([getattr(tokens, name), rows], 1) for name, rows in empty_rows.items()},
        labels=[tokens.labels[0] + missing],
        queries=tokens.queries,
    )


def _slots(tokens: RegionTokens, row: int, chosen: Sequence[int], k: int, queries: list[dict]) -> RegionTokens:
    def padded(column: torch.Tensor) -> torch.Tensor:
        out = column.new_zeros(1, k, *column.shape[2:])
        out[0, : len(chosen)] = column[row, list(chosen)]
        return out

    return RegionTokens(
        **{name: padded(getattr(tokens, name)) for name in RegionTokens.TENSORS},
        labels=[[tokens.labels[row][i] for i in chosen] + [""] * (k - len(chosen))],
        queries=[queries],
    )


def empty(tokens: RegionTokens) -> RegionTokens:
    """The same slots with no valid region in any of them, and nothing left of what they held."""
    zeros = {name: torch.zeros_like(getattr(tokens, name)) for name in RegionTokens.TENSORS}
    nothing = [[""] * len(row) for row in tokens.labels]
    return RegionTokens(**zeros, labels=nothing, queries=[[] for _ in tokens.queries])


def features_zero(tokens: RegionTokens) -> RegionTokens:
    """The same regions without their features: boxes, labels, scores and levels only."""
    return replace(tokens, features=torch.zeros_like(tokens.features))


def shuffled(patients: Mapping[str, str], seed: int) -> dict[str, str]:
    """For each image another patient's image, each used once: image_id → image_id, the same for the same seed.

    Images are laid in a ring, patient by patient in random order, and turned by the largest patient's number of images.
    Raises ValueError where one patient has more than half of the images.
    """
    groups: dict[str, list[str]] = {}
    for image_id, patient in sorted(patients.items()):
        groups.setdefault(patient, []).append(image_id)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(patients):
        raise ValueError(f"source 'shuffled': one patient has {largest} of {len(patients)} images; give more patients")
    rng = random.Random(seed)
    order = sorted(groups)
    rng.shuffle(order)
    ring = [image_id for patient in order for image_id in rng.sample(groups[patient], len(groups[patient]))]
    return {image_id: ring[(i + largest) % len(ring)] for i, image_id in enumerate(ring)}


def regions_as_text(tokens: RegionTokens, tree: LabelTree, extent_mm: tuple[float, float] | None = None) -> str:
    """The valid slots of a batch of one, written out: "left temporal lobe lesion 15 mm at 12,40,30,55; insula; no …".

    Boxes are xyxy in percent of the image. `extent_mm` (height, width) of the whole image gives the longer side of the
    box in mm; without it no size is written. Places stand by name alone: a box is a dozen tokens, and a place has but
    one; for findings the box is what tells them apart.
    """
    parts = []
    for i in torch.nonzero(tokens.valid[0]).flatten().tolist():
        name = region_name(tokens, i, tree, extent_mm)
        if tokens.levels[0, i] != NOT_FOUND_LEVEL and not _is_place(tokens.labels[0][i], tree):
            name += f" at {','.join(f'{100 * v:.0f}' for v in tokens.boxes[0, i].tolist())}"
        parts.append(name)
    return "; ".join(parts)


def region_name(tokens: RegionTokens, i: int, tree: LabelTree, extent_mm: tuple[float, float] | None = None) -> str:
    """Slot `i` of a batch of one in words: "left temporal lobe lesion 15 mm", "insula", "no left insula lesion"."""
    label = tokens.labels[0][i]
    phrase = tree.phrase(label) if label in tree.nodes else label
    if tokens.levels[0, i] == NOT_FOUND_LEVEL:
        return f"no {phrase}"
    if extent_mm is None or _is_place(label, tree):
        return phrase
    x1, y1, x2, y2 = tokens.boxes[0, i].tolist()
    return f"{phrase} {max((y2 - y1) * extent_mm[0], (x2 - x1) * extent_mm[1]):.0f} mm"


def _is_place(label: str, tree: LabelTree) -> bool:
    return label in tree.nodes and not tree.is_finding(label)
