"""The questions that one annotated image allows, with their exact answers; which of them are asked is decided later.

Left and right of the *image* are said as such; the patient's side is asked only where the label itself has one, since
a picture may be turned or mirrored. Every question that is in doubt is left out: a region that lies across a border,
two that are about as large, a measure in the middle third.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from pycocotools import mask as rle

from downstream.region_qa_looks import Measures, Thresholds, looks_of
from grounding.labels import LabelTree
from grounding.types import GroundingSample, RegionSet

CLEARLY_LARGER = 1.5625  # ratio of areas: 1.25 in diameter
CLEARLY_LONGER = 1.1  # ratio of sides, left and right of a pair
CLEARLY_PAST = 0.03  # of the image's height, between the edges of a pair
CLEARLY_MORE = 1.25  # ratio of counts
CLEARLY_APART = 0.1  # of the image's side, between two centres, or a centre and the middle
MOSTLY = 0.75  # share of a box in a half or a quadrant of the image that it is said to be in
MOST_COUNTED = 10  # nobody counts more in a picture
NEAR_BIN = 0.03  # a length this near to the border of its bin is not asked about
FEATURES = ("brightness", "texture", "margin", "shape")  # kinds that boxes and labels do not answer

# Topic -> (kind, wordings). {it}: "the polyp" or "the largest polyp"; {a}, {b}: names of labels.
TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finding": ("presence", ("Is there {a}?", "Does this image show {a}?", "Is {a} visible?")),
    "structure": ("presence", ("Is the {a} visible?", "Does this image show the {a}?")),
    "patient side": ("side", ("Is {it} on the patient's left or right side?", "On which side of the patient is {it}?")),
    "image half": (
        "side",
        ("Is {it} in the left or the right half of the image?", "Which half of the image holds {it}, left or right?"),
    ),
    "quadrant": ("quadrant", ("In which quadrant of the image is {it}?", "Which quadrant of the image holds {it}?")),
    "count": ("count", ("How many separate {a} are there?", "How many separate {a} does this image show?")),
    "several": ("count", ("Is there more than one separate {a}?", "Does this image show more than one separate {a}?")),
    "share": (
        "size",
        ("How much of the image does {it} span: less than a quarter, a quarter to a half, or more than half?",),
    ),
    "mm": ("size", ("Does {it} measure more than {a} mm across?", "Is {it} longer than {a} mm?")),
    "larger": (
        "comparison",
        ("Which is larger in this image, the {a} or the {b}?", "Does the {a} or the {b} cover the larger area?"),
    ),
    "further left": ("comparison", ("Which lies further left in the image, the {a} or the {b}?",)),
    "higher": ("comparison", ("Which lies higher in the image, the {a} or the {b}?",)),
    "wider": ("comparison", ("Which is wider in this image, the {a} or the {b}?",)),
    "taller": ("comparison", ("Which is taller in this image, the {a} or the {b}?",)),
    "reaches higher": ("comparison", ("Which reaches higher in the image, the {a} or the {b}?",)),
    "reaches lower": ("comparison", ("Which reaches lower in the image, the {a} or the {b}?",)),
    "larger of two": ("comparison", ("Of the two {a}, is the larger one further left or further right in the image?",)),
    "more": ("comparison", ("Are there more {a} than {b}?", "Does this image show more {a} than {b}?")),
    "organ": ("organ", ("Which structure contains {it}?", "In which structure is {it}?")),
    "brightness": (
        "brightness",
        (
            "Is {it} brighter or darker than its surroundings?",
            "Compared with its surroundings, is {it} brighter or darker?",
        ),
    ),
    "contrast": ("brightness", ("Does {it} stand out strongly or faintly from its surroundings?",)),
    "texture": (
        "texture",
        ("Is the texture of {it} homogeneous or heterogeneous?", "Does {it} look homogeneous or heterogeneous?"),
    ),
    "margin": ("margin", ("Is the margin of {it} sharp or blurred?", "Does {it} have a sharp or a blurred margin?")),
    "shape": ("shape", ("Is {it} round or irregular?", "What shape has {it}, round or irregular?")),
}
UNCOUNTED = ("haemorrhage", "oedema", "emphysema", "fibrosis", "pneumonia", "consolidation")
SHARES = ("less than a quarter", "a quarter to a half", "more than half")


@dataclass(frozen=True)
class Subject:
    """A region that can be named without doubt. name: "polyp", "largest polyp". area: in pixels, of its mask, or of
    its box where it has none. measures: {} without a mask."""

    index: int
    label: str
    name: str
    area: float
    is_alone: bool
    measures: Measures


@dataclass(frozen=True)
class Candidate:
    """A question that could be asked. Answers are balanced among those with one `group`. box: (4,) of the region that
    it is about, xyxy in [0, 1]."""

    sample: GroundingSample
    topic: str
    words: tuple[tuple[str, str], ...]
    answer: str
    box: tuple[float, ...]

    @property
    def kind(self) -> str:
        return TOPICS[self.topic][0]

    @property
    def group(self) -> tuple:
        return self.sample.modality, self.topic, self.words

    def text(self, wording: int) -> str:
        wordings = TOPICS[self.topic][1]
        return wordings[wording % len(wordings)].format(**dict(self.words))


def name_of(label: str, tree: LabelTree) -> str:
    return tree.phrase(label) if label in tree.nodes else label


def is_finding(label: str, tree: LabelTree) -> bool:
    """A label that the tree does not know counts as a finding."""
    return label not in tree.nodes or tree.is_finding(label)


def counted(name: str) -> str:
    """How one of it is called where it is counted: "polyp", "area of subarachnoid haemorrhage"."""
    return f"area of {name}" if name.endswith(UNCOUNTED) else name


def plural(name: str) -> str:
    if name.startswith("area of "):
        return f"areas{name[4:]}"
    if name.endswith("sis"):
        return f"{name[:-2]}es"
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return name
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2:-1] not in "aeou" else f"{name}s"


def with_article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" and not name.startswith(("uni", "ure", "ute")) else f"a {name}"


def box_of(question: str, regions: RegionSet, tree: LabelTree) -> tuple[float, ...] | None:
    """(4,) xyxy in [0, 1] of the region that a question calls "the polyp"; None where it names none."""
    named = [(len(name), k) for k, name, _ in nameable(regions, tree) if f"the {name}" in question]
    return tuple(regions.boxes[max(named)[1]].tolist()) if named else None


def areas_of(regions: RegionSet) -> list[float]:
    """Pixels of each mask, or of the box of a region without one."""
    height, width = regions.image_size
    sides = (regions.boxes[:, 2:] - regions.boxes[:, :2]) * (width, height)
    masks = regions.masks or [None] * len(regions)
    return [float(s.prod() if m is None else rle.area(m)) for s, m in zip(sides, masks, strict=True)]


def extents_of(sample: GroundingSample) -> tuple[np.ndarray, np.ndarray | None]:
    """(N,) longer side of each box as a share of the image's longer side, and in mm (None where spacing is unknown)."""
    height, width = sample.regions.image_size
    sides = (sample.regions.boxes[:, 2:] - sample.regions.boxes[:, :2]) * (width, height)
    in_mm = None if sample.spacing is None else (sides * sample.spacing[::-1]).max(1)
    return sides.max(1) / max(height, width), in_mm


def nameable(regions: RegionSet, tree: LabelTree) -> list[tuple[int, str, bool]]:
    """(index, name, is it the only one) of the one region of each label, or of its clearly largest."""
    areas, found = areas_of(regions), []
    for label in dict.fromkeys(regions.labels):
        rows = sorted((k for k, other in enumerate(regions.labels) if other == label), key=lambda k: -areas[k])
        name = name_of(label, tree)
        if len(rows) == 1:
            found.append((rows[0], name, True))
        elif areas[rows[0]] >= CLEARLY_LARGER * areas[rows[1]]:
            found.append((rows[0], f"{'larger' if len(rows) == 2 else 'largest'} {name}", False))
    return found


def candidates(
    sample: GroundingSample, subjects: Sequence[Subject], thresholds: Thresholds, tree: LabelTree
) -> Iterator[Candidate]:
    """Every question that the image allows, at most one of a topic about the same names."""
    asked = [
        *_ask_presence(sample, tree),
        *_ask_numbers(sample, tree),
        *_ask_pairs(sample, subjects, tree),
        *(row for subject in subjects for row in _ask_one(sample, subject, thresholds, tree)),
    ]
    boxes = sample.regions.boxes
    times = Counter((topic, *sorted(words.values())) for topic, words, *_ in asked)
    for topic, words, answer, index in asked:
        if times[topic, *sorted(words.values())] > 1:  # two labels of one name: nobody could tell which is meant
            continue
        box = tuple(boxes[index].tolist()) if index is not None else (0.0, 0.0, 1.0, 1.0)
        yield Candidate(sample, topic, tuple(sorted(words.items())), answer, box)


# Each of the functions below yields (topic, words, answer, index of the region).


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _ask_presence(sample: GroundingSample, tree: LabelTree) -> Iterator[tuple]:
    """Of the labels that the source annotates exhaustively; of no other can it be known that it is absent."""
    there = set(sample.regions.labels)
    known = [label for label in there if label in tree.nodes]
    there |= {wider for label in known for wider in tree.broader(label)}
    implied = {above for label in known for above in tree.ancestors(label)} - there
    for label in sorted(set(sample.labelled) - implied):
        name = name_of(label, tree)
        topic, words = ("finding", with_article(name)) if is_finding(label, tree) else ("structure", name)
        yield topic, {"a": words}, _yes(label in there), None


def _ask_numbers(sample: GroundingSample, tree: LabelTree) -> Iterator[tuple]:
    """Findings only: an organ that a slice cuts twice is still one."""
    counts = {label: sample.regions.labels.count(label) for label in sorted(sample.labelled) if is_finding(label, tree)}
    for label, count in counts.items():
        name = name_of(label, tree)
        if 1 <= count <= MOST_COUNTED:
            yield "count", {"a": plural(counted(name))}, str(count), None
        if count:
            yield "several", {"a": counted(name)}, _yes(count > 1), None
    for (a, more), (b, fewer) in combinations(counts.items(), 2):
        if min(more, fewer) and max(more, fewer) >= CLEARLY_MORE * min(more, fewer):
            words = {"a": plural(counted(name_of(a, tree))), "b": plural(counted(name_of(b, tree)))}
            yield "more", words, _yes(more > fewer), None


def _ask_pairs(sample: GroundingSample, subjects: Sequence[Subject], tree: LabelTree) -> Iterator[tuple]:
    boxes = sample.regions.boxes
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    alone = sorted((s for s in subjects if s.is_alone), key=lambda s: s.name)
    for a, b in combinations(alone, 2):
        words = {"a": a.name, "b": b.name}
        if max(a.area, b.area) >= CLEARLY_LARGER * min(a.area, b.area):
            yield "larger", words, max((a, b), key=lambda s: s.area).name, None
        for axis, topic in enumerate(("further left", "higher")):
            if abs(centres[a.index, axis] - centres[b.index, axis]) >= CLEARLY_APART:
                yield topic, words, min((a, b), key=lambda s: centres[s.index, axis]).name, None
        if is_mirrored(a.label, b.label, tree):
            yield from _ask_mirrored(boxes, a, b)
    for label in sorted(set(sample.regions.labels)):
        rows = [k for k, other in enumerate(sample.regions.labels) if other == label]
        subject = next((s for s in subjects if s.index in rows), None)
        if subject and len(rows) == 2:
            other = rows[0] if rows[1] == subject.index else rows[1]
            apart = float(centres[subject.index, 0] - centres[other, 0])
            if abs(apart) >= CLEARLY_APART:
                words = {"a": plural(counted(name_of(label, tree)))}
                yield "larger of two", words, "left" if apart < 0 else "right", None


def is_mirrored(a: str, b: str, tree: LabelTree) -> bool:
    """Are two labels the left and the right one of a pair?"""
    both = a in tree.nodes and b in tree.nodes and tree.parent(a) == tree.parent(b)
    return both and {tree.laterality(a), tree.laterality(b)} == {"left", "right"}


def _ask_mirrored(boxes: np.ndarray, a: Subject, b: Subject) -> Iterator[tuple]:
    """Left and right of a pair, such as the lungs, by the edges of their boxes."""
    words, one, two = {"a": a.name, "b": b.name}, boxes[a.index], boxes[b.index]
    for axis, topic in enumerate(("wider", "taller")):
        side_a, side_b = (float(box[2 + axis] - box[axis]) for box in (one, two))
        if max(side_a, side_b) >= CLEARLY_LONGER * min(side_a, side_b):
            yield topic, words, (a if side_a > side_b else b).name, None
    for edge, topic in ((1, "reaches higher"), (3, "reaches lower")):
        apart = float(one[edge] - two[edge])
        if abs(apart) >= CLEARLY_PAST:
            yield topic, words, (a if (apart < 0) == (edge == 1) else b).name, None


def _ask_one(sample: GroundingSample, subject: Subject, thresholds: Thresholds, tree: LabelTree) -> Iterator[tuple]:
    index, words = subject.index, {"it": f"the {subject.name}"}
    half, quadrant = place_of(sample.regions.boxes[index])
    side = tree.laterality(subject.label) if subject.label in tree.nodes else None
    if side and subject.is_alone and is_finding(subject.label, tree):
        yield from _ask_side(sample, subject, side, tree)
    if half:
        yield "image half", words, half, index
    if quadrant:
        yield "quadrant", words, quadrant, index
    yield from _ask_size(sample, subject, thresholds, words)
    if is_finding(subject.label, tree) and (organ := organ_of(sample.regions, index, tree)):
        yield "organ", words, name_of(organ, tree), index
    yield from _ask_looks(sample, subject, thresholds, tree, words)


def _ask_side(sample: GroundingSample, subject: Subject, side: str, tree: LabelTree) -> Iterator[tuple]:
    """A finding whose label has a side, named without it; where the other side has it as well, it is not asked."""
    wider = next(iter(tree.broader(subject.label)), None)
    if wider and sum(wider in tree.broader(label) for label in sample.regions.labels if label in tree.nodes) == 1:
        yield "patient side", {"it": f"the {tree.phrase(wider)}"}, side, subject.index


def _ask_size(sample: GroundingSample, subject: Subject, thresholds: Thresholds, words: dict) -> Iterator[tuple]:
    shares, in_mm = extents_of(sample)
    share, index = float(shares[subject.index]), subject.index
    if min(abs(share - edge) for edge in (0.25, 0.5)) >= NEAR_BIN:
        yield "share", words, SHARES[int(share > 0.25) + int(share > 0.5)], index
    limits = thresholds.get(f"{sample.modality}|{subject.label}", {}).get("mm")
    if in_mm is not None and limits:
        step = 5 if sum(limits) / 2 >= 10 else 1
        middle = max(step, round(sum(limits) / 2 / step) * step)
        if abs(in_mm[index] - middle) >= 0.1 * middle:
            yield "mm", words | {"a": str(middle)}, _yes(in_mm[index] > middle), index


def _ask_looks(
    sample: GroundingSample, subject: Subject, thresholds: Thresholds, tree: LabelTree, words: dict
) -> Iterator[tuple]:
    """Of an organ only brightness and texture."""
    looks = looks_of(subject.measures, thresholds, sample.modality, subject.label)
    asked = ("brightness", "contrast", "texture", "margin", "shape")
    for topic in asked if is_finding(subject.label, tree) else ("brightness", "texture"):
        if topic in looks:
            yield topic, words, looks[topic], subject.index


def place_of(box: np.ndarray) -> tuple[str | None, str | None]:
    """(4,) xyxy in [0, 1] -> ("left", "upper left"): half and quadrant of the image that hold most of it, or None."""
    x1, y1, x2, y2 = (float(v) for v in box)
    half, row = _half_of(x1, x2, "left", "right"), _half_of(y1, y2, "upper", "lower")
    return half, f"{row} {half}" if row and half else None


def _half_of(low: float, high: float, first: str, second: str) -> str | None:
    """The half of [0, 1] that holds most of a span; None for one near the middle."""
    share = min(max((0.5 - low) / (high - low), 0.0), 1.0) if high > low else float(low < 0.5)
    if abs((low + high) / 2 - 0.5) < CLEARLY_APART or 1 - MOSTLY < share < MOSTLY:
        return None
    return first if share > 0.5 else second


def organ_of(regions: RegionSet, index: int, tree: LabelTree) -> str | None:
    """Label of the smallest anatomical region that holds at least half of a region; None where there is none, or where
    a smaller one holds nearly as much."""
    areas = areas_of(regions)
    places = [k for k, label in enumerate(regions.labels) if not is_finding(label, tree)]
    for k in sorted(places, key=lambda k: areas[k]):
        held = _held(regions, index, k)
        if held >= 0.3:
            return regions.labels[k] if held >= 0.5 else None
    return None


def _held(regions: RegionSet, index: int, place: int) -> float:
    """Share of a region that lies in another, by masks where both have one, else by boxes."""
    a, b = (regions.masks[k] if regions.masks else None for k in (index, place))
    if a is not None and b is not None:
        return float(rle.area(rle.merge([a, b], intersect=True)) / max(rle.area(a), 1))
    (ax, ay, az, aw), (bx, by, bz, bw) = regions.boxes[index].tolist(), regions.boxes[place].tolist()
    shared = max(0.0, min(az, bz) - max(ax, bx)) * max(0.0, min(aw, bw) - max(ay, by))
    return shared / max((az - ax) * (aw - ay), 1e-9)
