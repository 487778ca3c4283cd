"""What a language model is told about an image's regions: by which route, from which source, and which of them.

Dimension key: B images, N regions, K region slots of a prompt. Boxes are xyxy in [0, 1].
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from grounding.boxes import area
from grounding.labels import LabelTree, normalise
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

# none: the slots stand there, masked. text: boxes and labels written out. overlay: boxes drawn on the image. crop:
# regions cut out, as further images. tokens: projected region tokens.
ROUTES = ("none", "text", "overlay", "crop", "tokens")
# "jittered:" is followed by the standard deviation in box sides, "file:" by the path of a region-token file.
SOURCES = ("predicted", "annotated", "shuffled", "random", "empty", "jittered:", "file:")
LONGEST_PHRASE = 8  # words
NO_IMAGE = -1  # image number of a free slot, and of what was looked for and not found

Extent = tuple[float, float] | None  # (height, width) of a whole image in mm; None where it is not known


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
    Chosen by `importance`. Then laid out: findings from the largest box to the smallest, other regions, not found; so
    `[rK]` of a report's largest lesion is `[r0]`. Ties keep the order of the file. `queries` are those of the named
    labels, and of the labels in the slots that were not found.
    """
    return pick_study([tokens.rows([row])], named, tree, k, vocabulary)[0]


def pick_study(
    images: Sequence[RegionTokens],
    named: Iterable[str],
    tree: LabelTree,
    k: int,
    vocabulary: Mapping[str, torch.Tensor],
) -> tuple[RegionTokens, list[int]]:
    """As `pick`, of all regions of a study's `images`, each a batch of one; and the index of each slot's image.

    The best K of the whole study are chosen; found ones are laid out image by image. A label is "not found" where no
    image has it. NO_IMAGE stands for what was not found, and for free slots.
    """
    named = frozenset(named)
    tokens, image_of = _join(images, tree)
    tokens = _with_missing(tokens, named, tree, vocabulary)
    chosen = importance(tokens, named, tree)[:k]
    labels, found = tokens.labels[0], (tokens.levels[0] != NOT_FOUND_LEVEL).tolist()
    areas = area(tokens.boxes[0]).tolist()
    finding = _findings(labels, tree)

    def place(i: int) -> tuple[bool, int, bool, float]:
        if not found[i]:
            return True, 0, False, 0.0
        return False, image_of[i], not finding[i], -areas[i] if finding[i] else 0.0

    told = named | {labels[i] for i in chosen if not found[i]}
    asked = [query for query in tokens.queries[0] if query.get("label") in told]
    order = sorted(chosen, key=place)
    numbers = [image_of[i] if found[i] else NO_IMAGE for i in order]
    return _slots(tokens, order, k, asked), numbers + [NO_IMAGE] * (k - len(order))


def importance(tokens: RegionTokens, named: Iterable[str], tree: LabelTree) -> list[int]:
    """The valid regions of a batch of one, most important first: labels that the question names (found or not),
    findings, other regions, other labels that were looked for and not found; each by falling score."""
    named, labels, scores = frozenset(named), tokens.labels[0], tokens.scores[0].tolist()
    found, finding = (tokens.levels[0] != NOT_FOUND_LEVEL).tolist(), _findings(labels, tree)

    def rank(i: int) -> tuple[int, float]:
        tier = 0 if labels[i] in named else 3 if not found[i] else 1 if finding[i] else 2
        return tier, -scores[i]

    return sorted(torch.nonzero(tokens.valid[0]).flatten().tolist(), key=rank)


def most_important(
    slots: RegionTokens, image_of_slot: Sequence[int], n: int, named: Iterable[str], tree: LabelTree
) -> tuple[RegionTokens, list[int]]:
    """The slots of a batch of one with its n most important regions alone (see `importance`), in their order, and the
    image of each slot; the others are free."""
    k, order = slots.valid.shape[1], sorted(importance(slots, named, tree)[:n])
    numbers = [image_of_slot[i] for i in order] + [NO_IMAGE] * (k - len(order))
    return _slots(slots, order, k, slots.queries[0]), numbers


def _findings(labels: Sequence[str], tree: LabelTree) -> list[bool]:
    return [label in tree.nodes and tree.is_finding(label) for label in labels]


def _join(images: Sequence[RegionTokens], tree: LabelTree) -> tuple[RegionTokens, list[int]]:
    """One batch of one of the regions of all images, and the image of each; "not found" once a label, with the highest
    score, and not where another image has it."""
    image_of = [number for number, tokens in enumerate(images) for _ in tokens.labels[0]]
    if len(images) == 1:
        return images[0], image_of
    tensors = {name: torch.cat([getattr(tokens, name) for tokens in images], 1) for name in RegionTokens.TENSORS}
    queries: dict[tuple, dict] = {}
    for query in (query for tokens in images for query in tokens.queries[0]):
        key = query.get("phrase"), query.get("label")
        queries[key] = max(queries.get(key, query), query, key=lambda one: one.get("presence") or 0.0)
    joined = RegionTokens(**tensors, labels=[sum((t.labels[0] for t in images), [])], queries=[list(queries.values())])
    absent = joined.levels[0] == NOT_FOUND_LEVEL
    seen = _with_wider([x for i, x in enumerate(joined.labels[0]) if joined.valid[0, i] and not absent[i]], tree)
    valid = joined.valid.clone()
    for i in sorted(torch.nonzero(valid[0] & absent).flatten().tolist(), key=lambda i: -joined.scores[0, i].item()):
        valid[0, i] = joined.labels[0][i] not in seen
        seen.add(joined.labels[0][i])
    return replace(joined, valid=valid), image_of


def _with_wider(labels: Iterable[str], tree: LabelTree) -> set[str]:
    there = {label for label in labels if label}
    return there | {wider for label in there if label in tree.nodes for wider in tree.broader(label)}


def _with_missing(
    tokens: RegionTokens, named: frozenset[str], tree: LabelTree, vocabulary: Mapping[str, torch.Tensor]
) -> RegionTokens:
    """`tokens` of one image, and a row "not found" for each finding that is named, known and not there."""
    there = _with_wider(tokens.labels[0], tree)
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


def _slots(tokens: RegionTokens, chosen: Sequence[int], k: int, queries: list[dict]) -> RegionTokens:
    def padded(column: torch.Tensor) -> torch.Tensor:
        out = column.new_zeros(1, k, *column.shape[2:])
        out[0, : len(chosen)] = column[0, list(chosen)]
        return out

    return RegionTokens(
        **{name: padded(getattr(tokens, name)) for name in RegionTokens.TENSORS},
        labels=[[tokens.labels[0][i] for i in chosen] + [""] * (k - len(chosen))],
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


def regions_as_text(
    tokens: RegionTokens,
    tree: LabelTree,
    extent_mm: Extent | list[Extent] = None,
    presence: bool = False,
    image_of_slot: Sequence[int] = (),
) -> str:
    """The valid slots of a batch of one, written out: "left temporal lobe lesion 15 mm at 12,40,30,55; insula; no …".

    Boxes are xyxy in percent of the image. `extent_mm` (height, width) of the whole image gives the longer side of the
    box in mm; without it no size is written. Places stand by name alone: a box is a dozen tokens, and a place has but
    one; for findings the box is what tells them apart. Of several images `extent_mm` is a list, one an image, and the
    number of a region's image (`image_of_slot`) is written, counted from 1. `presence`: see `region_name`.
    """
    several = isinstance(extent_mm, list) and len(extent_mm) > 1
    parts = []
    for i in torch.nonzero(tokens.valid[0]).flatten().tolist():
        image = image_of_slot[i] if several else 0
        name = region_name(tokens, i, tree, extent_of(extent_mm, image), presence)
        if tokens.levels[0, i] != NOT_FOUND_LEVEL:
            if not _is_place(tokens.labels[0][i], tree):
                name += f" at {','.join(f'{100 * v:.0f}' for v in tokens.boxes[0, i].tolist())}"
            name += f" in image {image + 1}" if several else ""
        parts.append(name)
    return "; ".join(parts)


def extent_of(extent_mm: Extent | list[Extent], image: int) -> Extent:
    """The extent of one image of those of a prompt; None for NO_IMAGE among several."""
    if not isinstance(extent_mm, list):
        return extent_mm
    return None if image == NO_IMAGE else extent_mm[image]


def region_name(tokens: RegionTokens, i: int, tree: LabelTree, extent_mm: Extent = None, presence: bool = False) -> str:
    """Slot `i` of a batch of one in words: "left temporal lobe lesion 15 mm", "insula", "no left insula lesion"; with
    `presence` the last is "looked for left insula lesion: not found (p 0.07)", p the probability that it is there."""
    label = tokens.labels[0][i]
    phrase = tree.phrase(label) if label in tree.nodes else label
    if tokens.levels[0, i] == NOT_FOUND_LEVEL:
        return f"looked for {phrase}: not found{_probability(tokens, i)}" if presence else f"no {phrase}"
    if extent_mm is None or _is_place(label, tree):
        return phrase
    x1, y1, x2, y2 = tokens.boxes[0, i].tolist()
    return f"{phrase} {max((y2 - y1) * extent_mm[0], (x2 - x1) * extent_mm[1]):.0f} mm"


def _probability(tokens: RegionTokens, i: int) -> str:
    """Of what was not found: as it was asked for, else the region's score; nothing where it was not looked for by
    itself (a row that `_with_missing` made)."""
    asked = [query.get("presence") for query in tokens.queries[0] if query.get("label") == tokens.labels[0][i]]
    known = [p for p in (*asked, tokens.scores[0, i].item() or None) if p is not None]
    return f" (p {known[0]:.2f})" if known else ""


def _is_place(label: str, tree: LabelTree) -> bool:
    return label in tree.nodes and not tree.is_finding(label)
