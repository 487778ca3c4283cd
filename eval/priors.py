"""What a VQA score is worth: what is scored without looking at the image, by answer frequencies or question text alone.

Judged by `strict` (eval/vqa.py). A model that is no better than these has not been shown to see anything. In the field:
https://arxiv.org/abs/1612.00837 (VQAv2 was balanced against such priors), https://arxiv.org/abs/2603.03437 (medical).

Dimension key: Q distinct training questions, B a block of test questions, F features.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import sparse

from eval.types import Score
from eval.vqa import judge
from eval.vqa_slices import Patients, kind_of, references_of, rows_by, text_of

VERSION = "1"
NEIGHBOURS = 5
MOST_QUESTIONS = 20_000  # distinct training questions that are compared with; more are sampled, with a seed

_BLOCK = 1024
_LONGEST = 2000  # characters of a question that count
_PIECE = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_PRIORS = {"always": None, "by_answer_type": "answer_type", "by_question_type": "question_type"}


def answer_prior(rows: Sequence[Mapping], train_rows: Sequence[Mapping] | None = None) -> dict[str, Score]:
    """Accuracy of always giving the commonest answer: of all ("always"), of the question's answer type, of its kind.

    rows: VQA references. train_rows: where answers are counted; without them, in `rows` themselves, which no model
    could know: the highest that such guessing can reach. Also "closed" and "open": by_answer_type on those questions.
    A kind that training does not have gets the commonest answer of all. Score.name says what was counted where.
    """
    where = "test" if train_rows is None else "training"
    scores = {}
    for key, column in _PRIORS.items():
        guesses = _commonest(rows if train_rows is None else train_rows, column)
        if not guesses:
            return _undefined((*_PRIORS, "closed", "open"), f"no {where} answers")
        name = f"commonest {where} answer" + (f" ({guesses[None]})" if column is None else "")
        found = _scores(name, rows, [guesses.get(_kind(row, column), guesses[None]) for row in rows])
        scores[key] = found["overall"]
        if key == "by_answer_type":
            scores |= {kind: found[kind] for kind in ("closed", "open")}
    return scores


def text_only_baseline(
    train_rows: Sequence[Mapping], rows: Sequence[Mapping], neighbours: int = NEIGHBOURS
) -> dict[str, Score]:
    """Accuracy of answering by the question's text: what the nearest training questions were answered.

    Nearness: cosine of TF-IDF vectors of words and word pairs (single characters and pairs in Chinese and Japanese).
    The nearest training questions, at least `neighbours` samples of them, vote, each sample by its nearness; a question
    that shares no word with training gets the commonest answer. No image, no model.
    Returns "overall", "closed", "open", and "seen": the share of questions that training has word for word.
    """
    answers = _by_question(train_rows)
    if not answers:
        return _undefined(("overall", "closed", "open", "seen"), "no training questions")
    asked = [_question(row) for row in rows]
    guesses = _vote(answers, sorted(set(asked)), neighbours, _commonest(train_rows, None)[None])
    seen = np.array([float(question in answers) for question in asked])
    return {
        **_scores("text only", rows, [guesses[question] for question in asked]),
        "seen": Patients.of(rows).mean("question seen in training", VERSION, seen),
    }


def _scores(name: str, rows: Sequence[Mapping], guesses: Sequence[str]) -> dict[str, Score]:
    """Accuracy of one guess a row, "overall", "closed" and "open"."""
    known: dict[tuple, float] = {}
    values = np.full(len(rows), np.nan)
    for k, (row, guess) in enumerate(zip(rows, guesses, strict=True)):
        wanted, options = references_of(row, "answer"), row.get("options") or row.get("choices")
        if wanted:
            key = (guess, *wanted, str(options), row.get("modality"))
            if key not in known:
                known[key] = float(judge(guess, wanted, None, options, text_of(row.get("modality")))[0])
            values[k] = known[key]
    patients, kinds = Patients.of(rows), rows_by(rows, "answer_type")
    parts = {
        kind: patients.mean(name, VERSION, values, kinds.get(kind, []), reason=f"no {kind} questions")
        for kind in ("closed", "open")
    }
    return {"overall": patients.mean(name, VERSION, values), **parts}


def _undefined(names: Sequence[str], reason: str) -> dict[str, Score]:
    return {name: Score(name, VERSION, None, 0, reason=reason) for name in names}


def _kind(row: Mapping, column: str | None) -> str | None:
    return None if column is None else kind_of(row, column)


def _commonest(rows: Sequence[Mapping], column: str | None) -> dict[str | None, str]:
    """Kind → its commonest answer; None → the commonest of all. Ties go to the first in the alphabet."""
    counts: dict[str | None, Counter[str]] = {}
    for row in rows:
        for answer in references_of(row, "answer")[:1]:
            for kind in {None, _kind(row, column)}:
                counts.setdefault(kind, Counter())[answer.strip().lower()] += 1
    return {kind: _winner(count) for kind, count in counts.items()}


def _winner(votes: Mapping[str, float]) -> str:
    return min(votes, key=lambda answer: (-votes[answer], answer))


def _question(row: Mapping) -> str:
    return " ".join(text_of(row.get("question"))[:_LONGEST].lower().split())


def _by_question(rows: Sequence[Mapping]) -> dict[str, Counter[str]]:
    """Question → how often it was answered what; a seeded sample of them where there are very many."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for answer in references_of(row, "answer")[:1]:
            found.setdefault(_question(row), Counter())[answer.strip().lower()] += 1
    if len(found) > MOST_QUESTIONS:
        names = sorted(found)
        kept = np.random.default_rng(0).choice(len(names), MOST_QUESTIONS, replace=False)
        found = {names[k]: found[names[k]] for k in sorted(kept)}
    return found


def _vote(answers: Mapping[str, Counter[str]], asked: Sequence[str], neighbours: int, fallback: str) -> dict[str, str]:
    """Question → the answer that its nearest training questions vote for."""
    questions = sorted(answers)
    ours, theirs = _vectors(questions, asked)
    guesses = {}
    for start in range(0, len(asked), _BLOCK):
        near = (theirs[start : start + _BLOCK] @ ours.T).tocsr()
        for k, question in enumerate(asked[start : start + _BLOCK]):
            row = slice(near.indptr[k], near.indptr[k + 1])
            votes = _votes(near.indices[row], near.data[row], questions, answers, neighbours)
            guesses[question] = _winner(votes) if votes else fallback
    return guesses


def _votes(
    places: np.ndarray, nearness: np.ndarray, questions: Sequence[str], answers: Mapping[str, Counter[str]], least: int
) -> dict[str, float]:
    """Answer → summed nearness of at least `least` samples. All equally near ones vote: order does not matter."""
    votes: dict[str, float] = {}
    voters, last = 0, -1.0
    for k in _nearest(places, nearness, least):
        near = round(float(nearness[k]), 9)
        if voters >= least and near != last:
            break
        for answer, count in answers[questions[places[k]]].items():
            votes[answer] = votes.get(answer, 0.0) + near * count
            voters += count
        last = near
    return votes


def _nearest(places: np.ndarray, nearness: np.ndarray, least: int) -> Iterator[int]:
    """Indices by falling nearness, as far as `least` questions and those as near as the last of them."""
    if len(nearness) > least:
        edge = np.partition(nearness, len(nearness) - least)[len(nearness) - least]
        kept = np.flatnonzero(nearness >= edge - 1e-9)
    else:
        kept = np.arange(len(nearness))
    yield from kept[np.lexsort((places[kept], -np.round(nearness[kept], 9)))].tolist()


def _vectors(train: Sequence[str], test: Sequence[str]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """(Q, F) and (B, F) TF-IDF rows of length 1; features and their weights are those of `train`."""
    columns: dict[str, int] = {}
    for text in train:
        for feature in _features(text):
            columns.setdefault(feature, len(columns))
    ours, theirs = (_counts(texts, columns) for texts in (train, test))
    idf = np.log((1 + len(train)) / (1 + np.bincount(ours.indices, minlength=len(columns)))) + 1
    return _unit(ours, idf), _unit(theirs, idf)


def _counts(texts: Sequence[str], columns: Mapping[str, int]) -> sparse.csr_matrix:
    rows = [Counter(columns[f] for f in _features(text) if f in columns) for text in texts]
    ends = np.cumsum([0, *(len(row) for row in rows)])
    data = np.array([count for row in rows for count in row.values()], dtype=float)
    indices = np.array([column for row in rows for column in row], dtype=np.int32)
    return sparse.csr_matrix((data, indices, ends), shape=(len(texts), len(columns)))


def _unit(counts: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    weighted = counts.multiply(idf).tocsr()
    lengths = np.sqrt(weighted.multiply(weighted).sum(axis=1)).A1 if counts.shape[0] else np.zeros(0)
    return sparse.diags(1 / np.where(lengths > 0, lengths, 1)) @ weighted


def _features(text: str) -> list[str]:
    """Words and pairs of neighbours."""
    words = [piece for word in _PIECE.findall(text) for piece in _pieces(word)]
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def _pieces(word: str) -> list[str]:
    return list(word) if _UNSPACED.search(word) else [word]
