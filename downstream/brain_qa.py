"""Questions and reports about the brain set: exact consequences of the regions (labels, masks, attributes, spacing).

    build_questions(Path("data/test/store"), Path("data/test"), seed=0)

Size of a lesion is the diameter of the circle of its mask's area, in mm, rounded to 5 mm. "The largest lesion" is asked
about only where it is the only one, or its diameter is at least 1.25 times the next one's.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from downstream.samples import ReportSample, VQASample, write_samples
from grounding.labels import LabelTree, load_label_tree
from grounding.store import open_store
from grounding.types import GroundingSample, RegionSet

CLEARLY_LARGER = 1.25  # ratio of diameters
SMALLEST_FOR_FEATURES = 12.0  # mm; below that, margin, shape and texture are hardly seen at 1 mm a pixel
SPILL = 0.05  # share of a lesion in a structure from which "no lesion there" would be arguable: then it is not asked

# Question kind -> its share of the questions, and what it takes beyond the picture (see VQASample.needs).
KINDS = {
    "presence": (0.07, "boxes"),
    "structure_presence": (0.15, "boxes"),
    "side": (0.09, "boxes"),
    "comparison": (0.09, "boxes"),
    "structure": (0.12, "boxes"),
    "count": (0.07, "boxes"),
    "size": (0.07, "boxes"),
    "brightness": (0.085, "feature"),
    "margin": (0.085, "feature"),
    "shape": (0.085, "feature"),
    "texture": (0.085, "feature"),
}
CLOSED = ("presence", "structure_presence", "side", "comparison")

# Topic -> wordings. {it}: "the lesion" or "the largest lesion"; {a}, {b}: places, or "left" and "right".
WORDINGS = {
    "presence": ("Is there a lesion?", "Is a lesion visible in this image?", "Does this image show a lesion?"),
    "structure_presence": (
        "Is there a lesion in the {a}?",
        "Does the {a} contain a lesion?",
        "Is a lesion seen in the {a}?",
    ),
    "side": (
        "Is {it} on the {a} side?",
        "Does {it} lie on the patient's {a} side?",
        "Is {it} in the {a} half of the brain?",
    ),
    "more on one side": (
        "Are there more lesions on the {a} than on the {b}?",
        "Does the {a} side have more lesions than the {b}?",
    ),
    "more than one": ("Is there more than one lesion?", "Are there several lesions?"),
    "larger": (
        "Is the lesion in the {a} larger than the one in the {b}?",
        "Does the {a} hold a larger lesion than the {b}?",
    ),
    "structure": ("Which structure contains {it}?", "In which structure is {it}?", "Where is {it}?"),
    "count": (
        "How many lesions are there?",
        "What is the number of lesions?",
        "How many lesions does this image show?",
    ),
    "size": ("How large is {it} in millimetres?", "What is the diameter of {it} in mm?", "What size is {it}?"),
    "brightness": (
        "Is {it} brighter or darker than its surroundings?",
        "Compared with its surroundings, is {it} brighter or darker?",
    ),
    "margin": ("Is the margin of {it} sharp or blurred?", "Does {it} have a sharp or a blurred margin?"),
    "shape": ("Is {it} round or irregular?", "What shape has {it}, round or irregular?"),
    "texture": ("Is {it} solid or ring-shaped?", "Does {it} look solid or ring-shaped?"),
}
# How an attribute's value is said, in answers (brightness is compared there) and in reports.
ANSWERS = {"bright": "brighter", "dark": "darker", "ring": "ring-shaped"}
WORDS = {"ring": "ring-shaped"}

NO_LESION, NORMAL = "No lesion is seen.", "Normal study."
SENTENCE = "A {size} {brightness}, {texture}, {shape} lesion with a {margin} margin in the {place}{citation}."


@dataclass(frozen=True)
class LesionView:
    """A lesion as its regions tell: index in the RegionSet, label of the place, diameter in mm (not rounded)."""

    index: int
    place: str
    diameter: float
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """A question that could be asked. Answers are balanced within a topic."""

    sample: VQASample
    topic: str


def lesions_of(regions: RegionSet, spacing: tuple[float, float] | None = None) -> list[LesionView]:
    """The lesions, largest first. spacing: mm a pixel (row, column); None counts as 1 mm.

    Raises:
        ValueError: there are lesions, but no masks or attributes (regions that a model predicted, say).
    """
    tree, (row, column) = load_label_tree(), spacing or (1.0, 1.0)
    found = [k for k, label in enumerate(regions.labels) if tree.is_finding(label)]
    if found and (regions.masks is None or regions.attributes is None):
        raise ValueError("lesions need masks and attributes to be described; give annotated regions")
    lesions = []
    for k in found:
        diameter = 2 * np.sqrt(float(rle.area(regions.masks[k])) * row * column / np.pi)
        place = regions.labels[k].rpartition("/")[0]
        lesions.append(LesionView(k, place, diameter, regions.attributes[k]))
    return sorted(lesions, key=lambda lesion: -lesion.diameter)


def size_text(diameter: float) -> str:
    """ "15 mm": rounded to 5 mm, halves up, never below 5."""
    return f"{max(5, int(diameter / 5 + 0.5) * 5)} mm"


def describe(lesion: LesionView) -> str:
    """ "15 mm, bright, ring-shaped, round, sharp"."""
    looks = [WORDS.get(value, value) for value in lesion.attributes.values()]
    return ", ".join([size_text(lesion.diameter), *looks])


def report_text(
    regions: RegionSet, citations: Mapping[int, int] | None = None, spacing: tuple[float, float] | None = None
) -> tuple[str, str]:
    """(findings, impression). citations: index of a lesion in `regions` -> K of the "[rK]" that ends its sentence."""
    tree, lesions = load_label_tree(), lesions_of(regions, spacing)
    if not lesions:
        return NO_LESION, NORMAL
    sentences = []
    for lesion in lesions:
        said = {name: WORDS.get(value, value) for name, value in lesion.attributes.items()}
        cited = f" [r{citations[lesion.index]}]" if citations and lesion.index in citations else ""
        place = tree.phrase(lesion.place)
        sentences.append(SENTENCE.format(size=size_text(lesion.diameter), place=place, citation=cited, **said))
    places = list(dict.fromkeys(tree.phrase(lesion.place) for lesion in lesions))
    where = " and ".join(filter(None, (", ".join(places[:-1]), places[-1])))
    number = "Single lesion" if len(lesions) == 1 else f"{len(lesions)} lesions"
    return " ".join(sentences), f"{number} in the {where}."


def report_for(sample: GroundingSample) -> ReportSample:
    """The report of one image, without citations; the study has the image's id."""
    findings, impression = report_text(sample.regions, spacing=sample.spacing)
    return ReportSample(
        sample.image_id, sample.patient_id, (sample.image_id,), sample.modality, None, findings, impression
    )


def questions_for(sample: GroundingSample, rng: np.random.Generator) -> list[VQASample]:
    """Every kind of question that this image allows: one of a kind, of structure_presence and comparison up to three.

    `build_questions` picks from them, so that kinds have their shares and answers are balanced.
    """
    return [candidate.sample for candidate in _candidates(sample, rng)]


def build_questions(
    store_dir: Path, out_dir: Path, seed: int, n_questions: int | None = None, n_reports: int | None = None
) -> None:
    """Write questions.jsonl and reports.jsonl for a region store, in a random order that depends on the seed alone.

    n_questions: None is five an image; fewer are written where the images do not allow so many balanced ones.
    n_reports: None is one an image.
    """
    store, rng = open_store(store_dir), np.random.default_rng(seed)
    candidates: list[Candidate] = []
    reports: list[ReportSample] = []
    for sample in (store[k] for k in range(len(store))):
        candidates += _candidates(sample, rng)
        reports.append(report_for(sample))
    questions = _choose(candidates, 5 * len(store) if n_questions is None else n_questions, rng)
    write_samples(Path(out_dir) / "questions.jsonl", questions)
    order = rng.permutation(len(reports))[:n_reports]
    write_samples(Path(out_dir) / "reports.jsonl", [reports[k] for k in order])


def _candidates(sample: GroundingSample, rng: np.random.Generator) -> list[Candidate]:
    lesions, tree = lesions_of(sample.regions, sample.spacing), load_label_tree()
    asked = [
        *_ask_presence(lesions),
        *_ask_structures(sample.regions, lesions, tree, rng),
        *_ask_comparisons(sample.regions, lesions, tree, rng),
        *_ask_largest(lesions, tree, rng),
    ]
    return [_candidate(sample, number, rng, *question) for number, question in enumerate(asked)]


def _candidate(sample, number: int, rng, kind: str, topic: str, answer: str, words: dict[str, str]) -> Candidate:
    wordings = WORDINGS[topic.partition(":")[0]]
    question = VQASample(
        sample_id=f"{sample.image_id}-q{number:02d}",
        image_id=sample.image_id,
        patient_id=sample.patient_id,
        image=sample.image_id,
        modality=sample.modality,
        question=wordings[rng.integers(len(wordings))].format(**words),
        answer=answer,
        answer_type="closed" if kind in CLOSED else "open",
        question_type=kind,
        needs=KINDS[kind][1],
    )
    return Candidate(question, topic)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# Each of the functions below yields (kind, topic, answer, words for the wording).


def _ask_presence(lesions: Sequence[LesionView]) -> Iterable[tuple]:
    yield "presence", "presence", _yes(bool(lesions)), {}
    yield "count", "count", str(len(lesions)), {}


def _ask_structures(regions: RegionSet, lesions, tree: LabelTree, rng) -> Iterable[tuple]:
    """One structure with a lesion; two without, where there are: the other side of a lesion's structure if it shows."""
    held = list(dict.fromkeys(lesion.place for lesion in lesions))
    places = [label for label in regions.labels if not tree.is_finding(label) and tree.parent(label)]
    free = [label for label in places if label not in held and not _spills(regions, lesions, label)]
    mirrored = [label for label in free if tree.laterality(label) and tree.parent(label) in map(tree.parent, held)]
    others = [label for label in free if label not in mirrored]
    for place in (
        held and [held[rng.integers(len(held))]],
        mirrored and [mirrored[rng.integers(len(mirrored))]],
        others and [others[rng.integers(len(others))]],
    ):
        for label in place:
            kind = "structure_presence"
            # Yes and no are balanced for each structure, so that its name alone says nothing.
            topic = f"{kind}:{tree.parent(label) if tree.laterality(label) else label}"
            yield kind, topic, _yes(label in held), {"a": tree.phrase(label)}


def _spills(regions: RegionSet, lesions: Sequence[LesionView], label: str) -> bool:
    structure = regions.masks[regions.labels.index(label)]
    shares = (
        rle.area(rle.merge([structure, regions.masks[lesion.index]], intersect=True))
        / rle.area(regions.masks[lesion.index])
        for lesion in lesions
    )
    return any(share >= SPILL for share in shares)


def _ask_comparisons(regions: RegionSet, lesions: Sequence[LesionView], tree: LabelTree, rng) -> Iterable[tuple]:
    if lesions:
        yield "comparison", "more than one", _yes(len(lesions) > 1), {}
    sides = [tree.laterality(lesion.place) for lesion in lesions]
    if lesions and all(sides):
        a, b = rng.permutation(["left", "right"]).tolist()
        yield "comparison", "more on one side", _yes(sides.count(a) > sides.count(b)), {"a": a, "b": b}
    alone = [lesion for lesion in lesions if [other.place for other in lesions].count(lesion.place) == 1]
    if len(alone) >= 2:
        first, second = (alone[k] for k in rng.permutation(len(alone))[:2])
        if max(first.diameter, second.diameter) >= CLEARLY_LARGER * min(first.diameter, second.diameter):
            words = {"a": tree.phrase(first.place), "b": tree.phrase(second.place)}
            yield "comparison", "larger", _yes(first.diameter > second.diameter), words


def _ask_largest(lesions: Sequence[LesionView], tree: LabelTree, rng) -> Iterable[tuple]:
    """Side, structure, size and attributes of the largest lesion, where there is no doubt which that is."""
    if not lesions or (len(lesions) > 1 and lesions[0].diameter < CLEARLY_LARGER * lesions[1].diameter):
        return
    largest, words = lesions[0], {"it": "the lesion" if len(lesions) == 1 else "the largest lesion"}
    if side := tree.laterality(largest.place):
        asked = ("left", "right")[rng.integers(2)]
        yield "side", "side", _yes(side == asked), words | {"a": asked}
    yield "structure", "structure", tree.phrase(largest.place), words
    yield "size", "size", size_text(largest.diameter), words
    if largest.diameter >= SMALLEST_FOR_FEATURES:
        for name, value in largest.attributes.items():
            yield name, name, ANSWERS.get(value, value), words


def _choose(candidates: Sequence[Candidate], n: int, rng: np.random.Generator) -> list[VQASample]:
    """n questions in random order: each kind by its share (the others make up for one that runs out)."""
    queues = {kind: _balanced([c for c in candidates if c.sample.question_type == kind], rng) for kind in KINDS}
    taken = dict.fromkeys(KINDS, 0)
    for _ in range(n):
        left = [kind for kind in KINDS if taken[kind] < len(queues[kind])]
        if not left:
            break
        taken[min(left, key=lambda kind: (taken[kind] + 1) / KINDS[kind][0])] += 1
    chosen = [sample for kind, queue in queues.items() for sample in queue[: taken[kind]]]
    return [chosen[k] for k in rng.permutation(len(chosen))]


def _balanced(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[VQASample]:
    """Shuffled so that each beginning has about as many of every answer, topic by topic.

    Where a topic has at most four answers, they become exactly equal in number; where more (structure, size), an answer
    is kept at most as often as the one at the third quartile.
    """
    groups: dict[str, dict[str, list[VQASample]]] = defaultdict(lambda: defaultdict(list))
    for k in rng.permutation(len(candidates)):
        groups[candidates[k].topic][candidates[k].sample.answer].append(candidates[k].sample)
    ranked: list[tuple[float, float, VQASample]] = []
    for topic, answers in groups.items():
        sizes = sorted(map(len, answers.values()))
        if topic not in ("structure", "size") and len(answers) < 2:
            continue
        keep = sizes[len(sizes) * 3 // 4] if len(sizes) > 4 else sizes[0]
        rows = [(rank, rng.random(), sample) for queue in answers.values() for rank, sample in enumerate(queue[:keep])]
        ranked += [((rank + tie) / keep, tie, sample) for rank, tie, sample in rows]
    return [sample for _, _, sample in sorted(ranked, key=lambda row: row[:2])]
