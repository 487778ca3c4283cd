"""Which of the possible questions are asked, so that no answer can be guessed from a question's text, and the proof.

Within a group (topic, names, modality) all answers are asked equally often, in *blocks*: one question of each answer,
all in one wording. Whatever blocks are chosen, the answers to each text are equally frequent in each modality, so no
rule that reads the text alone can be right more often than chance. A block about looks is two regions with boxes that
are alike, so that size and place do not tell the answer either.

Dimension key: Q questions.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from downstream.region_qa_questions import FEATURES, Candidate
from downstream.samples import VQASample
from eval.priors import text_only_baseline
from eval.types import Score
from eval.vqa_slices import Patients

FEATURE_SHARE = 0.25  # of the questions, at least, that boxes and labels do not answer
ALIKE = 0.6  # most that two boxes of a block differ: sum of squares over centre (in the image's sides) and log sides
NEIGHBOURS = 5
VERSION = "1"


@dataclass(frozen=True)
class Asked:
    """A question that was chosen. chance: 1 / number of answers in its group. box: (4,) xyxy in [0, 1]."""

    sample: VQASample
    chance: float
    box: tuple[float, ...]


Block = list[Asked]
Boxed = tuple[VQASample, tuple[float, ...]]  # a question, and the box (xyxy in [0, 1]) of what it is about


def choose(candidates: Sequence[Candidate], n: int, rng: np.random.Generator) -> list[Asked]:
    """At most n questions in random order: kinds and modalities as evenly as the images allow, at least
    `FEATURE_SHARE` of them about looks where there is any such question."""
    cells: dict[tuple, list[Block]] = defaultdict(list)
    for blocks in blocks_of(candidates, rng):
        for block in blocks:
            cells[block[0].sample.question_type, block[0].sample.modality].append(block)
    taken = Counter(dict.fromkeys(cells, 0))
    features = {cell for cell in cells if cell[0] in FEATURES}
    queues = {cell: iter(sorted(cells[cell], key=lambda _: rng.random())) for cell in sorted(cells)}
    held = {cell: next(queue, None) for cell, queue in queues.items()}
    chosen: Block = []
    while open_cells := [cell for cell, block in held.items() if block and _fits(cell, block, taken, features, n)]:
        cell = min(open_cells, key=lambda c: (taken[c], c))
        chosen += held[cell] or []
        taken[cell] += len(held[cell] or [])
        held[cell] = next(queues[cell], None)
    return [chosen[k] for k in rng.permutation(len(chosen))]


def _fits(cell: tuple, block: Block, taken: Counter, features: set[tuple], n: int) -> bool:
    """Whether a block of a cell can be added. Where looks are asked about at all, the others wait for their share."""
    total = taken.total() + len(block)
    looks = sum(taken[c] for c in features)
    return total <= n and (cell in features or not features or looks >= FEATURE_SHARE * total)


def blocks_of(candidates: Sequence[Candidate], rng: np.random.Generator) -> Iterator[list[Block]]:
    """The blocks of each group that has two answers or more.

    Of the k commonest answers each is kept as often as the k-th of them occurs; k is the one that keeps most questions.
    Looks have two answers; of all ways to pair the regions, the one with the least difference of boxes in all.
    """
    groups: dict[tuple, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for k in rng.permutation(len(candidates)):
        groups[candidates[k].group][candidates[k].answer].append(candidates[k])
    for _, answers in sorted(groups.items()):
        queues = [queue for _, queue in sorted(answers.items(), key=lambda item: (-len(item[1]), item[0]))]
        kept = 1 + max(range(len(queues)), key=lambda k: ((k + 1) * len(queues[k]) if k else 0, -k))
        if kept > 1:
            looks = queues[0][0].kind in FEATURES
            rows = _paired(*queues) if looks else zip(*queues[:kept], strict=False)
            yield [[_asked(one, wording, kept) for one in row] for wording, row in enumerate(rows)]


def _paired(first: Sequence[Candidate], second: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Pairs of regions with boxes that are alike, each region once."""
    a, b = (np.array([_place(one.box) for one in queue]) for queue in (first, second))
    apart = np.square(a[:, None] - b[None]).sum(2)
    rows, columns = linear_sum_assignment(np.minimum(apart, ALIKE))
    return [(first[i], second[j]) for i, j in zip(rows, columns, strict=True) if apart[i, j] < ALIKE]


def _asked(candidate: Candidate, wording: int, answers: int) -> Asked:
    sample, text = candidate.sample, candidate.text(wording)
    # The id says what is asked, not in which order: it stays the same whatever else is asked of the image.
    mark = hashlib.sha256(repr((candidate.topic, candidate.words)).encode()).hexdigest()[:6]
    question = VQASample(
        sample_id=f"{sample.image_id}-{candidate.topic.replace(' ', '_')}-{mark}",
        image_id=sample.image_id,
        patient_id=sample.patient_id,
        image=sample.image_id,
        modality=sample.modality,
        question=text,
        answer=candidate.answer,
        answer_type="closed" if candidate.answer in ("yes", "no") else "open",
        question_type=candidate.kind,
        needs="feature" if candidate.kind in FEATURES else "boxes",
    )
    return Asked(question, 1 / answers, candidate.box)


def baselines(asked: Sequence[Asked], train: Sequence[Boxed] | None, seed: int) -> dict[str, Score]:
    """What can be had without the image, each an accuracy with its patient-clustered interval.

    "chance": 1 / number of balanced answers. "majority": the commonest answer to each text, counted in these very
    questions, so the most that a rule on the text could reach. "text_only": the nearest training questions' answers.
    "boxes_only": of the questions about looks, what the same question was answered about the regions whose boxes are
    most alike; "boxes_only_chance": chance of those. Both learn from `train`; without it from one half of the patients,
    and are asked of the other, where less than chance is to be expected: what one half has less of, the other has more.
    """
    rows = [asdict(one.sample) for one in asked]
    half = np.array([train is None and _half(row["patient_id"], seed) for row in rows], dtype=bool)
    learnt = train if train is not None else [(one.sample, one.box) for one, f in zip(asked, half, strict=True) if f]
    tested = [row for row, first in zip(rows, half, strict=True) if not first]
    patients, chances = Patients.of(rows), np.array([one.chance for one in asked])
    right = _from_boxes(asked, half, learnt)
    why = "no question about looks that training has too"
    return {
        "chance": patients.mean("chance", VERSION, chances),
        "majority": patients.mean("commonest answer to each text", VERSION, _majority(rows)),
        "text_only": text_only_baseline([asdict(question) for question, _ in learnt], tested)["overall"],
        "boxes_only": patients.mean("boxes only", VERSION, right, reason=why),
        "boxes_only_chance": patients.mean(
            "chance of those", VERSION, np.where(np.isnan(right), np.nan, chances), reason=why
        ),
    }


def _half(patient: str, seed: int) -> bool:
    return hashlib.sha256(f"{seed}/{patient}".encode()).digest()[0] < 128


def _majority(rows: Sequence[dict]) -> np.ndarray:
    """(Q,) 1 where the answer is the commonest one to its text."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        counts[row["question"]][row["answer"]] += 1
    best = {text: min(count, key=lambda answer: (-count[answer], answer)) for text, count in counts.items()}
    return np.array([float(best[row["question"]] == row["answer"]) for row in rows])


def _from_boxes(asked: Sequence[Asked], skipped: np.ndarray, learnt: Sequence[Boxed]) -> np.ndarray:
    """(Q,) 1 right, 0 wrong, NaN not asked: the vote of the five regions with the nearest boxes (centre, log sides)."""
    known: dict[tuple[str, str], list[Boxed]] = defaultdict(list)
    for question, box in learnt:
        if question.needs == "feature":
            known[question.modality, question.question].append((question, box))
    places = {key: np.array([_place(box) for _, box in row]) for key, row in known.items()}
    values = np.full(len(asked), np.nan)
    for k, one in enumerate(asked):
        key = (one.sample.modality, one.sample.question)
        if one.sample.needs == "feature" and not skipped[k] and key in known:
            far = np.square(places[key] - _place(one.box)).sum(1)
            votes = Counter(known[key][row][0].answer for row in np.argsort(far, kind="stable")[:NEIGHBOURS])
            values[k] = float(min(votes, key=lambda answer: (-votes[answer], answer)) == one.sample.answer)
    return values


def _place(box: Sequence[float]) -> np.ndarray:
    x1, y1, x2, y2 = box
    sides = np.log(np.maximum([x2 - x1, y2 - y1], 1e-3))
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, *sides])
