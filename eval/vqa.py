"""VQA accuracy under the protocol `strict`, version 2.

An answer is right when it equals a reference after normalisation: lower case, no punctuation, no articles, full-width
characters as their plain ones (NFKC); "The answer is", "Answer:" in front of it are left out. What the reference is
decides how it is compared, in this order:
- An option: "A", "(A)", "A. liver", "liver" are one answer where the row has `options` (a list, or letter → text) or
  the reference has the letter. A letter with the text of another option is wrong.
- "yes" or "no": the first *word* of the answer decides, so "no" is never found inside "nodule". Chinese answers that
  affirm or deny (是的, 包含, 没有 ...) count as yes and no.
- A number: the answer must hold exactly one number, of the same value; digits or words up to ten. Units count only
  where both sides have one: "15 mm" = "15mm" = "1.5 cm" = "15", but not "15 cm" and not "15 %".
- A list: equal sets of items, "liver and spleen" = "spleen, liver", "left and right lung" = "right lung, left lung".
- Anything else: equal text. Names are equal that `synonyms` (phrase → name) or the label tree has for one thing, in
  the row's modality: "edema" = "oedema".
Nothing is dropped from the denominator: a missing, empty or unparsed answer is wrong, and counted. A row whose
reference is null cannot be judged; it is counted as `no_reference`.

Version 2 added options, lists, the label tree, Chinese and the lead-ins to version 1.
Known limits: "there is no lesion" is not read as "no"; a paraphrase is wrong; items of a list are compared as a set, so
that "left lung, right" and "right, left lung" are one.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from eval.statistics import mcnemar, paired_difference
from eval.types import Score
from eval.vqa_slices import Patients, cluster_of, in_order, references_of, rows_by, text_of
from grounding.labels import load_label_tree

PROTOCOL, VERSION = "strict", "2"

_YES = frozenset(("yes", "是", "是的", "对", "有", "存在", "包含", "可以", "能", "会"))
_NO = frozenset(("no", "否", "不", "不是", "没有", "无", "不存在", "不包含", "不可以", "不能", "不会"))
_ARTICLES = ("a", "an", "the")
_LEAD_IN = re.compile(
    r"[\s*_#\"']*(?:(?:the|my)\s+)?(?:(?:final|correct|best)\s+)?(?:answer|答案)[\s*_]*(?:[:：]|is\b\s*:?|是\s*[:：]?)[\s*_]*",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([a-h])\)|\[([a-h])\]|([a-h])(?:[.):、]|\Z))[\s.:]*(.*)", re.IGNORECASE | re.DOTALL
)
_BETWEEN_WORDS = re.compile(r"[^\w%]+|_")
_CONJUNCTION = re.compile(r"[,;/&，；、\n]|\band\b|和")
_SIDES = ("left", "right", "upper", "lower", "anterior", "posterior", "medial", "lateral")
_LONGEST_NAME = 200  # no label or synonym is longer
_SLICES = ("question_type", "needs", "modality", "organ", "language")

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_MILLIMETRES = {"m": 1.0, "c": 10.0}  # by the first letter of the unit: mm, millimetres, cm, centimeters ...
_UNIT = r"mm|millimet(?:re|er)s?|cm|centimet(?:re|er)s?|%|percent"
_NUMBER = re.compile(rf"(?<![\w.])(-?\d+(?:\.\d+)?|{'|'.join(_WORDS)})(?:[\s-]*({_UNIT})(?!\w)|(?![\w%]|\.\d))")
_RANGE = re.compile(r"(?<=\d)\s*[-\u2013]\s*(?=\d)")

Number = tuple[float, str | None]


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, articles out (unless there is nothing else), single spaces."""
    words = _BETWEEN_WORDS.sub(" ", _plain(text).lower()).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def numbers_in(text: str) -> list[Number]:
    """Every number of a text as (value as written, unit as written or None)."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", _RANGE.sub(" to ", text.lower()))
    return [_number(*match.groups()) for match in _NUMBER.finditer(text)]


def judge(
    prediction: str,
    references: Sequence[str],
    synonyms: Mapping[str, str] | None = None,
    options: Mapping[str, str] | Sequence[str] | None = None,
    modality: str | None = None,
) -> tuple[bool, str]:
    """(right, status); status is "ok", "empty", or "unparsed" where the answer has no form that fits the reference.

    prediction: the model's text. references: one or more accepted answers. synonyms: phrase → canonical name, both
    normalised. options: texts in order, or letter → text. modality: the image's, for names that depend on it.
    """
    text = _plain(text_of(prediction)).strip()
    if not text:
        return False, "empty"
    said = _LEAD_IN.sub("", text, count=1) if _LEAD_IN.match(text) else text
    names = _Names(synonyms or {}, modality_name(modality) if modality else None)
    choices = _choices(options, names)
    verdicts = [_judge_one(said or text, _plain(text_of(reference)), names, choices) for reference in references]
    if any(right for right, _ in verdicts):
        return True, "ok"
    return False, "unparsed" if all(status == "unparsed" for _, status in verdicts) else "ok"


def vqa_accuracy(
    predictions: Mapping[str, str], references: Sequence[Mapping], synonyms: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Accuracy overall and by kind, with patient-clustered intervals.

    predictions: sample_id → text. references: rows with sample_id, answer (or references), answer_type and, where
    known, options, patient_id and the columns of `eval.vqa_slices.SLICES`. Returns {"protocol", "version", "counts":
    {"missing", "empty", "unparsed"}} and the Scores "overall", "closed", "open", "by_question_type", "by_needs",
    "by_modality", "by_organ", "by_language"; `overall.per_sample` has every verdict.
    """
    rows = in_order(references)
    canonical = {normalise(phrase): normalise(name) for phrase, name in (synonyms or {}).items()}
    verdicts = [_verdict(row, predictions, canonical) for row in rows]
    values = np.array([np.nan if v["value"] is None else v["value"] for v in verdicts], dtype=float)
    patients, kinds = Patients.of(rows), rows_by(rows, "answer_type")
    statuses = [verdict["status"] for verdict in verdicts]
    without = {"no_reference": statuses.count("no_reference")} if "no_reference" in statuses else {}
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "overall": patients.mean("accuracy", VERSION, values, per_sample=verdicts),
        "closed": _kind(patients, values, kinds, "closed"),
        "open": _kind(patients, values, kinds, "open"),
        **patients.means_by("accuracy", VERSION, values, rows, _SLICES),
        "counts": {status: statuses.count(status) for status in ("missing", "empty", "unparsed")} | without,
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
    rows = [row for row in in_order(references) if references_of(row, "answer")]
    canonical = {normalise(phrase): normalise(name) for phrase, name in (synonyms or {}).items()}
    first, second = ([_verdict(row, system, canonical)["value"] for row in rows] for system in (a, b))
    paired = paired_difference(_with_ones(first), _with_ones(second), [cluster_of(row) for row in rows])
    return {
        **mcnemar([v > 0 for v in first], [v > 0 for v in second]),
        "a_accuracy": paired["a"],
        "b_accuracy": paired["b"],
        **{key: paired[key] for key in ("difference", "ci95", "clusters")},
    }


class _Names:
    """What a phrase is called once synonyms and the label tree have had their say."""

    def __init__(self, synonyms: Mapping[str, str], modality: str | None) -> None:
        self.synonyms, self.modality = synonyms, modality

    def of(self, text: str) -> str:
        name = normalise(text)
        name = self.synonyms.get(name, name)
        return name if len(name) > _LONGEST_NAME else _label(name, self.modality) or name


@lru_cache(maxsize=256)
def modality_name(text: str) -> str:
    """ "X-Ray" as the label tree says it: "xray"."""
    return re.sub(r"\W|_", "", text.lower())


@lru_cache(maxsize=65536)
def _label(name: str, modality: str | None) -> str | None:
    return load_label_tree().find(name, modality=modality)


def _judge_one(prediction: str, reference: str, names: _Names, choices: Mapping[str, str]) -> tuple[bool, str]:
    chosen = _choose(prediction, reference, names, choices)
    if chosen is not None and chosen[1] == "ok":
        return chosen
    given = normalise(prediction)
    expected = _polarity(normalise(reference))
    if expected:
        first = _polarity(given.partition(" ")[0])
        return first == expected, "ok" if first else "unparsed"
    number = _whole_number(reference)
    if number is not None:
        found = numbers_in(prediction) or ([(0.0, None)] if given == "none" else [])
        return (len(found) == 1 and _same(found[0], number)), "ok" if len(found) == 1 else "unparsed"
    right = names.of(prediction) == names.of(reference) or _same_items(prediction, reference, names)
    return right, "ok" if right or chosen is None else "unparsed"


def _plain(text: str) -> str:
    """Full-width and other variants of characters as the plain ones."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _polarity(word: str) -> str | None:
    return "yes" if word in _YES else "no" if word in _NO else None


def _same_items(prediction: str, reference: str, names: _Names) -> bool:
    wanted = _items(reference)
    if len(wanted) < 2:
        return False
    said = _items(prediction)
    return len(said) > 1 and {names.of(item) for item in said} == {names.of(item) for item in wanted}


def _items(text: str) -> list[str]:
    """The items of a list; "left and right lung" are "left lung", "right lung"."""
    items = [item for part in _CONJUNCTION.split(text.lower()) if (item := normalise(part))]
    for k in range(len(items) - 2, -1, -1):
        side, _, noun = items[k + 1].partition(" ")
        if noun and items[k] in _SIDES and side in _SIDES:
            items[k] += " " + noun
    return items


def _choices(options: Mapping[str, str] | Sequence[str] | None, names: _Names) -> dict[str, str]:
    """Letter → name of its text. Letters that stand in the texts ("A. liver") are taken off."""
    if not options or isinstance(options, str):
        return {}
    if isinstance(options, Mapping):
        lettered = {str(letter).strip().lower(): text_of(text) for letter, text in options.items()}
    else:
        lettered = {chr(ord("a") + k): text_of(text) for k, text in enumerate(options)}
    found = {letter: _lettered(text) for letter, text in lettered.items()}
    return {k: names.of(found[k][1] if found[k][0] == k and found[k][1] else lettered[k]) for k in lettered}


def _lettered(text: str) -> tuple[str | None, str]:
    """ "(A) liver" → ("a", "liver"); (None, text) where no option letter leads."""
    match = _LETTER.match(text.strip())
    return (match[1] or match[2] or match[3]).lower() if match else None, match[4].strip() if match else text


def _choose(prediction: str, reference: str, names: _Names, choices: Mapping[str, str]) -> tuple[bool, str] | None:
    """The verdict of an option question, "unparsed" where the answer chooses none; None for any other question."""
    wanted, wanted_text = _lettered(reference)
    given, given_text = _lettered(prediction)
    if choices:
        wanted, given = _chosen(wanted, wanted_text, names, choices), _chosen(given, given_text, names, choices)
        return None if wanted is None else (given == wanted, "ok" if given else "unparsed")
    if wanted is None:
        return None
    if given is None:
        same = bool(wanted_text) and names.of(prediction) == names.of(wanted_text)
        return (True, "ok") if same else None if wanted_text else (False, "unparsed")
    texts = bool(wanted_text and given_text)
    return given == wanted and (not texts or names.of(given_text) == names.of(wanted_text)), "ok"


def _chosen(letter: str | None, text: str, names: _Names, choices: Mapping[str, str]) -> str | None:
    """The option that an answer names, by letter or by text; "neither" where the two disagree."""
    name = names.of(text)
    by_text = next((k for k, choice in choices.items() if choice == name), None)
    if letter not in choices:
        return by_text
    return letter if by_text in (None, letter) else "neither"


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
    references = references_of(row, "answer")
    if not references:
        return {"sample_id": sample_id, "value": None, "status": "no_reference"}
    if sample_id not in predictions:
        return {"sample_id": sample_id, "value": 0.0, "status": "missing"}
    options, modality = row.get("options") or row.get("choices"), text_of(row.get("modality"))
    right, status = judge(predictions[sample_id], references, synonyms, options, modality)
    return {"sample_id": sample_id, "value": float(right), "status": status}


def _with_ones(values: Sequence[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values]).reshape(-1, 2)


def _kind(patients: Patients, values: np.ndarray, kinds: Mapping[str, list[int]], kind: str) -> Score:
    return patients.mean(kind, VERSION, values, kinds.get(kind, []), reason=f"no {kind} questions")
