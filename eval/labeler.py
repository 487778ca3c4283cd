"""CheXpert's 14 observations of a chest radiograph's report, by rule and without weights.

The observations and their values are those of Irvin et al. 2019 (https://arxiv.org/abs/1901.07031): 1 stated, 0 denied,
-1 in doubt, None not spoken of; of several statements the positive one wins, then the uncertain one. "No Finding" is 1
where none of the twelve pathologies is stated or in doubt and the report says something that the rules know. The
phrases are our own (`configs/clinical.yaml`), and so are the rules (`eval/assertions.py`): expect small differences
from that program, which reads the impression alone; this one reads the report without history and comparison.
"""

from functools import cache, lru_cache
from typing import NamedTuple

from eval.assertions import NEGATIVE, POSITIVE, UNCERTAIN, read
from eval.phrases import Phrases, cue_rows, forms, load_phrases, words_of
from eval.report_text import sentences

VERSION = "1"
OBSERVATIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

_PATHOLOGIES = OBSERVATIONS[1:-1]
_RANK = {POSITIVE: 3, UNCERTAIN: 2, NEGATIVE: 1}


class Statement(NamedTuple):
    """An observation, its value and the sentence that it was read in."""

    observation: str
    value: int
    text: str


def label(report: str) -> dict[str, int | None]:
    """A report → {observation: 1, 0, -1 or None}, in the order of OBSERVATIONS; all None where nothing is said."""
    labels: dict[str, int | None] = dict.fromkeys(OBSERVATIONS)
    known = False
    for sentence in sentences(report):
        statements, normal = _read_sentence(sentence)
        known = known or normal or bool(statements)
        for observation, value in statements:
            if _RANK[value] > _RANK.get(labels[observation], 0):  # type: ignore[call-overload]
                labels[observation] = value
    if known and all(labels[name] not in (POSITIVE, UNCERTAIN) for name in _PATHOLOGIES):
        labels["No Finding"] = POSITIVE
    return labels


def mentions(report: str) -> list[Statement]:
    """Every statement of a report with its sentence, in the order of the text: why a label is what it is."""
    return [
        Statement(observation, value, sentence)
        for sentence in sentences(report)
        for observation, value in _read_sentence(sentence)[0]
    ]


@lru_cache(maxsize=50_000)  # reports repeat their sentences
def _read_sentence(sentence: str) -> tuple[tuple[tuple[str, int], ...], bool]:
    """((observation, value), ...) of one sentence, and whether it speaks of a normal image."""
    words = words_of(sentence)
    items = _phrases().spot(words)
    found = [
        (observation, mention.assertion)
        for mention in read(items, len(words), _pairs())
        for observation in mention.value
        if mention.assertion is not None
    ]
    denies = any("negation" in item.roles for item in items)
    normality = load_phrases()["normality"]
    normal = not {*normality["said"], *(normality["denied"] if denies else ())}.isdisjoint(words)
    return tuple(dict.fromkeys(found)), normal


@cache
def _phrases() -> Phrases:
    phrases = load_phrases()
    rows = cue_rows()
    for observation, entry in phrases["observations"].items():
        rows += [(form, "mention", (observation,)) for form in forms(entry["names"])]
        rows += [(form, "suggests", (observation,)) for form in forms(entry.get("suggests", ()))]
    rows += [(form, "mention", ()) for form in forms(phrases["ignored"])]
    return Phrases(rows)


@cache
def _pairs() -> dict[tuple[str, str], tuple[str, ...]]:
    return {
        (subject, state): (observation,)
        for observation, entry in load_phrases()["observations"].items()
        for subject, states in entry.get("pairs", {}).items()
        for state in states
    }
