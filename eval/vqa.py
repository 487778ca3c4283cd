"""VQA accuracy under the protocol `strict`, version 1.

An answer is right when it equals a reference after normalisation: lower case, no punctuation, no articles.
- Reference "yes" or "no": the first *word* of the answer decides, so "no" is never found inside "nodule".
- Reference a number: the answer must hold exactly one number, of the same value; digits or words up to ten. Units count
  only where both sides have one: "15 mm" = "15mm" = "1.5 cm" = "15", but not "15 cm" and not "15 %".
- Anything else: equal text, after `synonyms` (phrase → name) have mapped both.
Nothing is dropped from the denominator: a missing, empty or unparsed answer is wrong, and counted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.statistics import mcnemar, mean_score, paired_difference
from eval.types import Score

PROTOCOL, VERSION = "strict", "1"

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_MILLIMETRES = {"m": 1.0, "c": 10.0}  # by the first letter of the unit: mm, millimetres, cm, centimeters ...
_UNIT = r"mm|millimet(?:re|er)s?|cm|centimet(?:re|er)s?|%|percent"
_NUMBER = re.compile(rf"(?<![\w.])(-?\d+(?:\.\d+)?|{'|'.join(_WORDS)})(?:[\s-]*({_UNIT})(?!\w)|(?![\w%]|\.\d))")
_RANGE = re.compile(r"(?<=\d)\s*[-\u2013]\s*(?=\d)")

Number = tuple[float, str | None]


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, articles out, single spaces."""
    words = re.sub(r"[^\w%]+|_", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def numbers_in(text: str) -> list[Number]:
    """Every number of a text as (value as written, unit as written or None)."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", _RANGE.sub(" to ", text.lower()))
    return [_number(*match.groups()) for match in _NUMBER.finditer(text)]


def judge(prediction: str, references: Sequence[str], synonyms: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """(right, status); status is "ok", "empty", or "unparsed" where the answer has no form that fits the reference.

    prediction: the model's text. references: one or more accepted answers. synonyms: phrase → canonical name.
    """
    if not prediction.strip():
        return False, "empty"
    verdicts = [_judge_one(prediction, reference, synonyms or {}) for reference in references]
    if any(right for right, _ in verdicts):
        return True, "ok"
    return False, "unparsed" if all(status == "unparsed" for _, status in verdicts) else "ok"


def vqa_accuracy(
    predictions: Mapping[str, str], references: Sequence[Mapping], synonyms: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Accuracy overall and by kind, with patient-clustered intervals.

    predictions: sample_id → text. references: rows with sample_id, answer (or references), answer_type and, where
    known, patient_id, question_type, needs. Returns {"protocol", "version", "counts": {"missing", "empty", "unparsed"}}
    and the Scores "overall", "closed", "open", "by_question_type", "by_needs"; `overall.per_sample` has every verdict.
    """
    rows = sorted(references, key=lambda row: str(row["sample_id"]))
    canonical = {normalise(phrase): normalise(name) for phrase, name in (synonyms or {}).items()}
    verdicts = [_verdict(row, predictions, canonical) for row in rows]
    statuses = [verdict["status"] for verdict in verdicts]
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "overall": _accuracy("accuracy", rows, verdicts, per_sample=verdicts),
        "closed": _subset("closed", rows, verdicts, "answer_type", "closed"),
        "open": _subset("open", rows, verdicts, "answer_type", "open"),
        "by_question_type": _by(rows, verdicts, "question_type"),
        "by_needs": _by(rows, verdicts, "needs"),
        "counts": {status: statuses.count(status) for status in ("missing", "empty", "unparsed")},
    }


def compare(
    a: Mapping[str, str],
    b: Mapping[str, str],
    references: Sequence[Mapping],
    synonyms: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Two systems on the same questions: exact McNemar, and the accuracy difference a - b with its clustered interval.

    a, b: sample_id → text. Returns {"n", "b", "c", "p", "a_accuracy", "b_accuracy", "difference", "ci95", "clusters"}.
    """
    rows = sorted(references, key=lambda row: str(row["sample_id"]))
    canonical = {normalise(phrase): normalise(name) for phrase, name in (synonyms or {}).items()}
    first, second = ([_verdict(row, system, canonical)["value"] for row in rows] for system in (a, b))
    paired = paired_difference(_with_ones(first), _with_ones(second), [cluster_of(row) for row in rows])
    return {
        **mcnemar([v > 0 for v in first], [v > 0 for v in second]),
        "a_accuracy": paired["a"],
        "b_accuracy": paired["b"],
        **{key: paired[key] for key in ("difference", "ci95", "clusters")},
    }


def cluster_of(row: Mapping) -> str:
    """What a sample is not independent of: its patient, else its image, else itself alone."""
    return str(row.get("patient_id") or row.get("image_id") or row["sample_id"])


def references_of(row: Mapping, key: str) -> list[str]:
    """The accepted texts of a reference row: its `references`, or its one `key`."""
    return [str(text) for text in row.get("references") or [row[key]]]


def _judge_one(prediction: str, reference: str, synonyms: Mapping[str, str]) -> tuple[bool, str]:
    expected, given = normalise(reference), normalise(prediction)
    if expected in ("yes", "no"):
        first = given.partition(" ")[0]
        return first == expected, "ok" if first in ("yes", "no") else "unparsed"
    number = _whole_number(reference)
    if number is not None:
        found = numbers_in(prediction) or ([(0.0, None)] if given == "none" else [])
        return (len(found) == 1 and _same(found[0], number)), "ok" if len(found) == 1 else "unparsed"
    return synonyms.get(given, given) == synonyms.get(expected, expected), "ok"


def _whole_number(text: str) -> Number | None:
    """The number that a reference is ("15 mm", "two"), None where it says more than that."""
    stripped = text.strip().rstrip(".").lower().replace(",", "")
    match = _NUMBER.fullmatch(stripped)
    return _number(*match.groups()) if match else None


def _number(digits: str, unit: str | None) -> Number:
    return (float(_WORDS.index(digits)) if digits in _WORDS else float(digits)), unit


def _same(a: Number, b: Number) -> bool:
    (x, x_unit), (y, y_unit) = a, b
    if x_unit is None or y_unit is None:
        return abs(x - y) < 1e-6
    (x, x_is_length), (y, y_is_length) = _in_millimetres(x, x_unit), _in_millimetres(y, y_unit)
    return x_is_length == y_is_length and abs(x - y) < 1e-6


def _in_millimetres(value: float, unit: str) -> tuple[float, bool]:
    factor = _MILLIMETRES.get(unit[0])
    return (value, False) if factor is None else (value * factor, True)


def _verdict(row: Mapping, predictions: Mapping[str, str], synonyms: Mapping[str, str]) -> dict[str, Any]:
    sample_id = str(row["sample_id"])
    if sample_id not in predictions:
        return {"sample_id": sample_id, "value": 0.0, "status": "missing"}
    right, status = judge(predictions[sample_id], references_of(row, "answer"), synonyms)
    return {"sample_id": sample_id, "value": float(right), "status": status}


def _with_ones(values: Sequence[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values]).reshape(-1, 2)


def _accuracy(name: str, rows: Sequence[Mapping], verdicts: Sequence[Mapping], per_sample=None, reason="no questions"):
    values = [verdict["value"] for verdict in verdicts]
    return mean_score(name, VERSION, values, [cluster_of(row) for row in rows], per_sample, reason)


def _subset(name: str, rows: Sequence[Mapping], verdicts: Sequence[Mapping], key: str, wanted: str) -> Score:
    kept = [k for k, row in enumerate(rows) if str(row.get(key, "")).strip().lower() == wanted]
    return _accuracy(name, [rows[k] for k in kept], [verdicts[k] for k in kept], reason=f"no {wanted} questions")


def _by(rows: Sequence[Mapping], verdicts: Sequence[Mapping], key: str) -> dict[str, Score]:
    names = sorted({str(row[key]).strip().lower() for row in rows if row.get(key)})
    return {name: _subset(name, rows, verdicts, key, name) for name in names}
