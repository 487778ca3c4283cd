"""Grounded reports: is each sentence true, and does it point to the right place? RadFact, finding errors, citations.

RadFact (Bannur et al., MAIRA-2, 2024, https://arxiv.org/abs/2406.04449; https://github.com/microsoft/RadFact) asks of
each sentence of one report whether the other report entails it. Precision takes the predicted sentences, recall the
reference's:
- logical: share of the sentences that are entailed.
- spatial: share of the sentences with boxes that are entailed and whose boxes lie for more than half of their area in
  the union of the boxes of the sentences that entail them (the evidence).
- grounding: the same share, of the entailed sentences with boxes.
Each is taken a report and averaged over the reports that have such sentences; F1 is that of the two averages. RadFact
has an LLM decide; here `entails(hypothesis, evidence) -> bool` does, by rule (eval/entailment.py) unless another is
given. An LLM names its evidence; a callable does not, so the evidence is every sentence that entails by itself; where
none does, those that cannot be left out, else all. RadFact counts pixels of a 224 x 224 image (`grid=224`); areas are
exact here otherwise. A study without a prediction is left out there, and is an empty report here. Boxes are xyxy in
[0, 1].
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.areas import mostly_covered
from eval.entailment import Entails, rule_entailment
from eval.findings import findings_section
from eval.statistics import bootstrap_interval, mean_score, number
from eval.types import Score, ScoreError

PROTOCOL = "radfact"
VERSION = "1"
ASPECTS = ("logical", "spatial", "grounding")

_CITATION = re.compile(r"\s*\[r(\d{1,9})\]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_MOST_LEFT_OUT = 100  # sentences: in longer reports it would take too many calls to see which ones are needed
_LONGEST = 2000  # characters: what is longer than that is no sentence, and is read in pieces
_CORNERS = ("x_min", "y_min", "x_max", "y_max")


class Sentence(NamedTuple):
    """A sentence of a report without its citations; boxes (N, 4), None where it has none. cited: region ids."""

    text: str
    boxes: np.ndarray | None = None
    cited: tuple[int, ...] = ()


def radfact_scores(
    predictions: Mapping[str, Any],
    references: Mapping[str, Any],
    entails: Entails | None = None,
    patients: Mapping[str, str] | None = None,
    grid: int | None = None,
) -> dict[str, Any]:
    """Logical, spatial and grounding precision, recall and F1.

    predictions, references: sample_id → report in any form that `sentences_of` reads. Returns {"protocol", "version",
    aspect: {"precision", "recall", "f1"}, "counts"}; logical f1 has the sentences of each sample with their verdicts
    ({"text", "entailed", "evidence": rows of the other report, "spatial": bool or None}) in per_sample. Raises
    ScoreError for a box that is not four finite numbers in order.
    """
    entails = entails or rule_entailment()
    ids = sorted(references)
    said, truth = ({i: sentences_of(reports.get(i), i) for i in ids} for reports in (predictions, references))
    forward = {i: judge_sentences(said[i], truth[i], entails, grid) for i in ids}
    back = {i: judge_sentences(truth[i], said[i], entails, grid) for i in ids}
    clusters = [(patients or {}).get(i, i) for i in ids]
    detail = [{"sample_id": i, "predicted": forward[i], "reference": back[i]} for i in ids]
    scores: dict[str, Any] = {"protocol": PROTOCOL, "version": VERSION}
    for aspect in ASPECTS:
        precision, recall = ([share(rows[i], aspect) for i in ids] for rows in (forward, back))
        scores[aspect] = _three(aspect, precision, recall, clusters, detail if aspect == "logical" else None)
    return scores | {"counts": _counts(predictions, said, truth)}


def sentences_of(report: Any, sample_id: str = "") -> list[Sentence]:
    """The sentences of a report.

    report: None; a text; a list of {"text", "boxes"} (boxes None, or a list of xyxy or of RadFact's {"x_min", ...}); or
    a line of predictions.jsonl, {"prediction", "sentences": [{"text", "region_ids"}], "evidence": {"regions":
    [{"box"}]}}. Boxes are cut to the image. Raises ScoreError for what is none of these, or a box that is none.
    """
    if report is None or isinstance(report, str):
        return [_cited(piece, []) for piece in _pieces(report)]
    if isinstance(report, Mapping):
        regions = (report.get("evidence") or {}).get("regions") or []
        if report.get("sentences") is None:
            pieces = _pieces(report.get("prediction", report.get("report")))
            return [_grounded(_cited(piece, []), regions, sample_id) for piece in pieces]
        rows = report["sentences"]
        return [_grounded(_cited(_text(r, sample_id), r.get("region_ids") or []), regions, sample_id) for r in rows]
    if isinstance(report, Sequence):
        return [_cited(_text(row, sample_id), [])._replace(boxes=_boxes(row.get("boxes"), sample_id)) for row in report]
    raise ScoreError(f"sample {sample_id}: a report is a text or a list of sentences, not {type(report).__name__}")


def judge_sentences(
    hypotheses: Sequence[Sentence], premises: Sequence[Sentence], entails: Entails, grid: int | None = None
) -> list[dict[str, Any]]:
    """One row a hypothesis: {"text", "entailed", "evidence": rows of the premises, "spatial"}; spatial is None where
    the sentence has no boxes."""
    where: dict[str, list[int]] = {}
    for k, premise in enumerate(premises):
        where.setdefault(premise.text, []).append(k)
    found: dict[str, tuple[bool, list[int]]] = {}
    rows = []
    for sentence in hypotheses:
        if sentence.text not in found:
            entailed, texts = _evidence(sentence.text, list(where), entails)
            found[sentence.text] = entailed, sorted(k for text in texts for k in where[text])
        entailed, evidence = found[sentence.text]
        spatial = None
        if sentence.boxes is not None:
            boxes = [premises[k].boxes for k in evidence if premises[k].boxes is not None]
            spatial = bool(boxes) and mostly_covered(sentence.boxes, np.concatenate(boxes), grid)
        rows.append({"text": sentence.text, "entailed": entailed, "evidence": evidence, "spatial": spatial})
    return rows


def _evidence(hypothesis: str, texts: list[str], entails: Entails) -> tuple[bool, list[str]]:
    """(is it entailed, by which of the texts)."""
    if not texts or not entails(hypothesis, texts):
        return False, []
    alone = [text for text in texts if entails(hypothesis, [text])]
    if alone or len(texts) > _MOST_LEFT_OUT:
        return True, alone or texts
    needed = [text for k, text in enumerate(texts) if not entails(hypothesis, texts[:k] + texts[k + 1 :])]
    return True, needed or texts


def share(rows: Sequence[Mapping], aspect: str) -> float | None:
    """One of ASPECTS of one report's sentences; None where it has no sentence that counts."""
    if aspect == "logical":
        verdicts = [row["entailed"] for row in rows]
    else:
        verdicts = [
            row["spatial"] for row in rows if row["spatial"] is not None and (aspect == "spatial" or row["entailed"])
        ]
    return float(np.mean(verdicts)) if verdicts else None


def _three(
    aspect: str,
    precision: Sequence[float | None],
    recall: Sequence[float | None],
    clusters: Sequence[str],
    detail: list[dict] | None,
) -> dict[str, Score]:
    what = "sentences" if aspect == "logical" else f"{'entailed ' * (aspect == 'grounding')}sentences with boxes"
    reasons = [f"no {side} {what}" for side in ("predicted", "reference")]
    columns = [[x or 0.0 for x in precision], [float(x is not None) for x in precision]]
    columns += [[x or 0.0 for x in recall], [float(x is not None) for x in recall]]
    statistics = np.array(columns).T.reshape(-1, 4)
    value = number(f1_of_means(statistics.sum(0))) if len(statistics) else None
    per_sample = detail and [
        {**row, "value": number(f1_of_means(statistics[k])), "precision": precision[k], "recall": recall[k]}
        for k, row in enumerate(detail)
    ]
    reason = None if value is not None else reasons[0] if not any(columns[1]) else reasons[1]
    interval = None if value is None else bootstrap_interval(statistics, clusters, f1_of_means)
    f1 = Score(f"{aspect} f1", VERSION, value, len(precision), interval, len(set(clusters)), per_sample, reason)
    return {
        "precision": mean_score(f"{aspect} precision", VERSION, precision, clusters, reason=reasons[0]),
        "recall": mean_score(f"{aspect} recall", VERSION, recall, clusters, reason=reasons[1]),
        "f1": f1,
    }


def f1_of_means(totals: np.ndarray) -> np.ndarray:
    """(..., 4) sums [precision, its reports, recall, its reports] → (...) F1 of the two means; 0 where both are 0, NaN
    where one of them has no reports."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = totals[..., 0] / totals[..., 1], totals[..., 2] / totals[..., 3]
        return np.where(precision + recall == 0, 0.0, 2 * precision * recall / (precision + recall))


def _counts(predictions: Mapping, said: Mapping, truth: Mapping) -> dict[str, int]:
    counts = {"samples": len(truth), "missing predictions": sum(i not in predictions for i in truth)}
    for name, reports in (("predicted", said), ("reference", truth)):
        sentences = [sentence for report in reports.values() for sentence in report]
        counts[f"{name} sentences"] = len(sentences)
        counts[f"{name} sentences with boxes"] = sum(sentence.boxes is not None for sentence in sentences)
    return counts


def _pieces(text: Any) -> list[str]:
    """The sentences of a text; of one with headings those of its findings, which an impression only repeats."""
    sentences = filter(None, map(str.strip, _SENTENCE_END.split(findings_section(str(text or "")))))
    return [s[k : k + _LONGEST] for s in sentences for k in range(0, len(s), _LONGEST)]


def _cited(text: str, region_ids: Sequence[int]) -> Sentence:
    """The text without its `[rK]` marks, with the ids of the list and of the marks."""
    marks = (int(k) for k in _CITATION.findall(text))
    return Sentence(_CITATION.sub("", text).strip(), None, tuple(dict.fromkeys((*region_ids, *marks))))


def _grounded(sentence: Sentence, regions: Sequence[Mapping], sample_id: str) -> Sentence:
    """With the boxes of the cited regions that exist."""
    strange = [k for k in sentence.cited if not isinstance(k, int)]
    if strange:
        raise ScoreError(f"sample {sample_id}: region id {strange[0]!r}; it is the number of a region, from 0")
    boxes = [_box_of(regions[k], sample_id) for k in sentence.cited if 0 <= k < len(regions)]
    return sentence._replace(boxes=_boxes(boxes, sample_id))


def _box_of(region: Any, sample_id: str) -> Any:
    if not isinstance(region, Mapping) or region.get("box") is None:
        raise ScoreError(f'sample {sample_id}: region {str(region)[:40]} has no "box"; give {{"box", "label"}}')
    return region["box"]


def _text(row: Any, sample_id: str) -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        raise ScoreError(f'sample {sample_id}: sentence {str(row)[:40]!r} has no "text"; give {{"text", "boxes"}}')
    return row["text"]


def _boxes(boxes: Sequence | None, sample_id: str) -> np.ndarray | None:
    if boxes is None or not len(boxes):
        return None
    try:
        rows = [[box[key] for key in _CORNERS] if isinstance(box, Mapping) else list(box) for box in boxes]
        array = np.array(rows, float).reshape(len(rows), 4)
    except (KeyError, TypeError, ValueError):
        raise ScoreError(f"sample {sample_id}: boxes {str(boxes)[:60]}; a box is x1, y1, x2, y2 in [0, 1]") from None
    wrong = ~np.isfinite(array).all(1) | (array[:, 2:] < array[:, :2]).any(1)
    if wrong.any():
        row = array[int(wrong.argmax())].tolist()
        raise ScoreError(f"sample {sample_id}: box {row} is inverted or not finite; write x1, y1, x2, y2 in [0, 1]")
    return array.clip(0, 1)
