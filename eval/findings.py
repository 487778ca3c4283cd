"""Finding-level precision, recall and F1 of generated reports: are the right things said to be in the right place?

A report is read sentence by sentence with the names of the label tree; each finding that is stated and not
negated becomes (kind, structure, side), such as ("lesion", "temporal_lobe", "left"). Reports are compared as multisets.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.statistics import Statistic, bootstrap_interval, mean_score, number, paired_difference
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree, normalise, parse_side

VERSION = "1"
ASPECTS = {  # what must agree for a match
    "finding": ("kind", "structure", "side"),
    "structure": ("kind", "structure"),
    "side": ("kind", "side"),
    "count": ("kind",),
}

_LONGEST_NAME = 6  # words
_SECTION = re.compile(r"\b(findings|impression)\s*:\s*", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;!?]+(?=\s|$)|\n|,?\s+\bbut\b\s+", re.IGNORECASE)
_CITATION = re.compile(r"\[[^\]]*\]")
_NEGATED_AFTER = re.compile(r"\b(?:not (?:seen|present|visible|identified|found)|absent|excluded)\b")
_NEGATED_BEFORE = re.compile(r"\b(?:no|without|free of|negative for|absence of|neither|nor)\b")


class Finding(NamedTuple):
    """A finding that a report states. structure and side are None where it does not say."""

    kind: str
    structure: str | None
    side: str | None


def parse_findings(report: str, tree: LabelTree, kinds: Mapping[str, tuple[str, ...]] | None = None) -> list[Finding]:
    """The findings that a report states, in text order; "No lesion is seen." has none.

    With the headings "Findings:" and "Impression:" only the findings are read, since an impression repeats them.
    kinds: `kind_names(tree)`, where many reports are read.
    """
    text = _CITATION.sub(" ", findings_section(report))
    kinds = kind_names(tree) if kinds is None else kinds
    return [finding for clause in _CLAUSE.split(text) if clause for finding in _parse_clause(clause, tree, kinds)]


def finding_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, str],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
) -> dict[str, Any]:
    """Precision, recall, F1 (micro, over all findings of all reports) and report-level presence accuracy.

    predictions, references: sample_id → report; a missing prediction counts as an empty report. patients: sample_id →
    cluster. Returns {aspect: {"precision", "recall", "f1"}, "presence": Score} with the aspects of ASPECTS: "finding"
    (kind, structure and side agree), "structure" (kind and structure), "side" (kind and side), "count" (kind alone).
    "presence" is the share of reports rightly abnormal or rightly normal.
    """
    tree = tree or load_label_tree()
    ids = sorted(references)
    kinds = kind_names(tree)
    truth = {i: parse_findings(references[i], tree, kinds) for i in ids}
    said = {i: parse_findings(predictions.get(i, ""), tree, kinds) for i in ids}
    clusters = [(patients or {}).get(i, i) for i in ids]
    scores: dict[str, Any] = {}
    for aspect, fields in ASPECTS.items():
        counts = np.array([_match(said[i], truth[i], fields) for i in ids], dtype=float).reshape(-1, 3)
        scores[aspect] = _precision_recall_f1(aspect, ids, counts, clusters)
    # An empty report says nothing, so it is not a report of a normal study.
    right = [float(bool(predictions.get(i, "").strip()) and bool(said[i]) == bool(truth[i])) for i in ids]
    per_sample = [{"sample_id": i, "value": value} for i, value in zip(ids, right, strict=True)]
    scores["presence"] = mean_score("presence accuracy", VERSION, right, clusters, per_sample, "no reports")
    return scores


def compare_findings(
    a: Mapping[str, str],
    b: Mapping[str, str],
    references: Mapping[str, str],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
    aspect: str = "finding",
) -> dict[str, Any]:
    """F1 of a minus F1 of b on the same reports, with a paired, patient-clustered bootstrap interval.

    a, b, references: sample_id → report. Returns {"a", "b", "difference", "ci95", "clusters", "n"}.
    """
    tree = tree or load_label_tree()
    ids = sorted(references)
    kinds = kind_names(tree)
    truth = {i: parse_findings(references[i], tree, kinds) for i in ids}

    def counts(system: Mapping[str, str]) -> np.ndarray:
        said = [parse_findings(system.get(i, ""), tree, kinds) for i in ids]
        rows = [_match(row, truth[i], ASPECTS[aspect]) for row, i in zip(said, ids, strict=True)]
        return np.array(rows, dtype=float).reshape(-1, 3)

    return paired_difference(counts(a), counts(b), [(patients or {}).get(i, i) for i in ids], f1_of)


def f1_of(totals: np.ndarray) -> np.ndarray:
    """(..., 3) counts [tp, fp, fn] → (...) F1 = 2 tp / (2 tp + fp + fn); NaN where nothing is said and nothing true."""
    return _ratio(2 * totals[..., 0], 2 * totals[..., 0] + totals[..., 1] + totals[..., 2])


def precision_of(totals: np.ndarray) -> np.ndarray:
    """(..., 3) → (...) tp / (tp + fp)."""
    return _ratio(totals[..., 0], totals[..., 0] + totals[..., 1])


def recall_of(totals: np.ndarray) -> np.ndarray:
    """(..., 3) → (...) tp / (tp + fn)."""
    return _ratio(totals[..., 0], totals[..., 0] + totals[..., 2])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def findings_section(report: str) -> str:
    """The text under "Findings:", without headings the whole; the impression only where there is nothing else."""
    pieces = _SECTION.split(report)
    sections = dict(zip((name.lower() for name in pieces[1::2]), pieces[2::2], strict=True))
    if not sections:
        return report
    return sections.get("findings", "").strip() or pieces[0].strip() or sections.get("impression", "")


def kind_names(tree: LabelTree) -> dict[str, tuple[str, ...]]:
    """What a finding is called without a place ("lesion", "focal lesion") → its kinds, the last part of the id, in the
    order of the tree: "mass" is a lesion of the brain, and a mass of the lung."""
    kinds: dict[str, tuple[str, ...]] = {}
    for node in tree.nodes.values():
        if kind := node.finding:
            for name in map(normalise, (kind.replace("_", " "), *node.said)):
                kinds[name] = tuple(dict.fromkeys((*kinds.get(name, ()), kind)))
    return kinds


def _parse_clause(clause: str, tree: LabelTree, kinds: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """One clause: the kinds it states, each in every place it names (an ancestor of a named place adds nothing)."""
    text = normalise(clause)
    stated = _stated_kinds(text, kinds)
    if not stated:
        return []
    labels = _places(text, tree)
    places = [label for label in labels if not any(label in tree.ancestors(other) for other in labels)]
    side = {-1: "left", 1: "right", 0: None}[parse_side(clause)]
    where: list[tuple[str | None, str | None, str | None]] = [(None, None, side)]
    if places:
        where = [(label, *_structure_and_side(label, tree, side if len(places) == 1 else None)) for label in places]
    found = (Finding(_kind_at(label, named, tree), *place) for named in stated for label, *place in where)
    return list(dict.fromkeys(found))


def _kind_at(place: str | None, kinds: tuple[str, ...], tree: LabelTree) -> str:
    """Of the kinds that one name stands for, the first that the place can have."""
    return next((kind for kind in kinds if f"{place}/{kind}" in tree.nodes), kinds[0])


def _stated_kinds(text: str, kinds: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Kinds named in the text and not negated: no cue of absence before the name, nor "not seen" after it."""
    # The cues are looked for once: an answer of a megabyte may name a hundred thousand kinds.
    cue = _NEGATED_BEFORE.search(text)
    denied_from = cue.end() if cue else len(text)
    denied_to = max((cue.start() for cue in _NEGATED_AFTER.finditer(text)), default=-1)
    mentions = _mentions(text, kinds.get)
    return list(dict.fromkeys(kind for start, end, kind in mentions if start < denied_from and end > denied_to))


def _places(text: str, tree: LabelTree) -> list[str]:
    def place(name: str) -> str | None:
        label = tree.find(name) or (tree.find(name[:-1]) if name.endswith("s") else None)
        return None if label is None or tree.is_finding(label) else label

    return list(dict.fromkeys(label for _, _, label in _mentions(text, place)))


def _mentions(text: str, look_up) -> list[tuple[int, int, Any]]:
    """(start, end, value) of the names in a normalised text, the longest first at each word, none overlapping."""
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
    found, k = [], 0
    while k < len(words):
        for last in range(min(k + _LONGEST_NAME, len(words)) - 1, k - 1, -1):
            value = look_up(text[words[k][0] : words[last][1]])
            if value is not None:
                found.append((words[k][0], words[last][1], value))
                k = last
                break
        k += 1
    return found


def _structure_and_side(label: str, tree: LabelTree, side: str | None) -> tuple[str, str | None]:
    """A place label → its name without the side ("temporal_lobe") and its side, else the side the clause names."""
    laterality = tree.laterality(label)
    return label.rpartition("/")[2].removeprefix(f"{laterality}_"), laterality or side


def _match(said: Sequence[Finding], truth: Sequence[Finding], fields: tuple[str, ...]) -> tuple[int, int, int]:
    """(tp, fp, fn) of two multisets that are compared in these fields only."""
    a, b = (Counter(tuple(getattr(f, field) for field in fields) for f in findings) for findings in (said, truth))
    tp = (a & b).total()
    return tp, a.total() - tp, b.total() - tp


def _precision_recall_f1(
    aspect: str, ids: Sequence[str], counts: np.ndarray, clusters: Sequence[str]
) -> dict[str, Score]:
    values = [number(value) for value in f1_of(counts)]
    per_sample = [
        {"sample_id": i, "value": value, "tp": int(tp), "fp": int(fp), "fn": int(fn)}
        for i, value, (tp, fp, fn) in zip(ids, values, counts, strict=True)
    ]
    metrics: tuple[tuple[str, Statistic, str], ...] = (
        ("precision", precision_of, "no findings stated"),
        ("recall", recall_of, "no true findings"),
        ("f1", f1_of, "no findings stated and none true"),
    )
    totals, scores = counts.sum(0), {}
    for name, statistic, reason in metrics:
        value = number(statistic(totals))
        interval = None if value is None else bootstrap_interval(counts, clusters, statistic)
        column = per_sample if name == "f1" else None
        scores[name] = Score(
            f"{aspect} {name}",
            VERSION,
            value,
            len(ids),
            interval,
            len(set(clusters)),
            column,
            None if value is not None else reason,
        )
    return scores
