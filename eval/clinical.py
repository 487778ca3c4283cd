"""Clinical agreement of generated and reference reports, without weights: what they state, not how they word it.

`chexpert_scores` compares the 14 observations of eval/labeler.py, `entity_scores` the findings of the label tree with
their places, sides and severities (eval/entities.py), for every modality. `model_scores` asks the programs that need
weights (CheXbert, RadGraph, RaTEScore, GREEN, RadCliQ). Intervals resample patients; a missing prediction is an empty
report. What is undefined (an observation that nobody states) is left out of a mean, where scikit-learn, and so
F1CheXbert, counts it as 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from eval.assertions import POSITIVE, UNCERTAIN
from eval.entities import Entity, Reading, read_entities, same_place
from eval.labeler import FIVE, OBSERVATIONS, label
from eval.report_models import model_scores
from eval.statistics import RESAMPLES, SEED, cluster_sums, mean_score, number
from eval.types import Score

__all__ = ["ASPECTS", "PROTOCOL", "VERSION", "chexpert_scores", "entity_scores", "label_scores", "model_scores"]

PROTOCOL, VERSION = "clinical-rules", "1"
ASPECTS = ("finding", "location", "side", "severity", "all")

_BLOCK = 4_000_000  # resample counts held at once
_NOTHING = "no report states such a finding"

Labels = Mapping[str, int | None]
Statistic = Callable[[np.ndarray], np.ndarray]


def chexpert_scores(
    predictions: Mapping[str, str], references: Mapping[str, str], patients: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`label_scores` of the rule labeler's labels. predictions, references: sample_id → report."""
    said = {i: label(predictions.get(i, "")) for i in references}
    return label_scores(said, {i: label(text) for i, text in references.items()}, patients, PROTOCOL)


def label_scores(
    said: Mapping[str, Labels],
    truth: Mapping[str, Labels],
    patients: Mapping[str, str] | None = None,
    protocol: str = PROTOCOL,
) -> dict[str, Any]:
    """F1 over CheXpert's observations, from the labels of any labeler.

    said, truth: sample_id → {observation: 1, 0, -1 or None}; a missing sample or observation is None. patients:
    sample_id → cluster. Returns {"f1-14", "f1-5": {"micro", "macro", "weighted", "example"}} with doubt as positive,
    the same under "uncertain as negative", micro "precision" and "recall" over the 14, "exact" (the share of reports
    whose 14 labels agree, doubt and silence told apart), and "by_observation" (F1). `f1-14 micro` holds per_sample:
    the report's own F1 as value (None where neither report has a positive label), labels, missing and hallucinated.
    """
    ids = sorted(truth)
    clusters = [(patients or {}).get(i, i) for i in ids]
    positive = {"said": _positive(said, ids, True), "truth": _positive(truth, ids, True)}
    strict = {"said": _positive(said, ids, False), "truth": _positive(truth, ids, False)}
    rows = _label_rows(ids, said, truth, positive)
    exact = [float(all(said.get(i, {}).get(o) == truth[i].get(o) for o in OBSERVATIONS)) for i in ids]
    fourteen, parts = _f1_family("f1-14", OBSERVATIONS, positive, clusters, rows)
    results: dict[str, Any] = {"protocol": protocol, "version": VERSION, "f1-14": fourteen}
    results["f1-5"] = _f1_family("f1-5", FIVE, positive, clusters)[0]
    results |= {name: parts[name] for name in ("precision", "recall")}
    results["exact"] = mean_score("14 labels agree", VERSION, exact, clusters, reason="no reports")
    results["uncertain as negative"] = {
        "f1-14": _f1_family("f1-14", OBSERVATIONS, strict, clusters)[0],
        "f1-5": _f1_family("f1-5", FIVE, strict, clusters)[0],
    }
    results["by_observation"] = {name: parts[name] for name in OBSERVATIONS}
    return results


def entity_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, str],
    patients: Mapping[str, str] | None = None,
    modality: str | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Precision, recall and F1 over stated findings, and how much of their place, side and severity is right.

    predictions, references: sample_id → report. modality: of the label tree, one for all or by sample_id; it settles
    names that several findings share. Returns for each of ASPECTS {"precision", "recall", "f1"} (micro; "location":
    finding and place agree, a place and a part of it do; "all": everything agrees), "report": a report's F1, the mean
    over ASPECTS (two reports that state nothing agree if the prediction says anything at all), and "by_modality" where
    modalities differ. `report` holds per_sample: hallucinated, missing, misplaced, other severity, and contradicted
    findings (one report states what the other denies).
    """
    ids = sorted(references)
    clusters = [(patients or {}).get(i, i) for i in ids]
    modalities = [modality if modality is None or isinstance(modality, str) else modality.get(i) for i in ids]
    said = [read_entities(predictions.get(i, ""), m) for i, m in zip(ids, modalities, strict=True)]
    truth = [read_entities(references[i], m) for i, m in zip(ids, modalities, strict=True)]
    results: dict[str, Any] = {"protocol": PROTOCOL, "version": VERSION}
    results |= _aspect_scores(said, truth, clusters)
    rows = [_entity_row(i, a, b) for i, a, b in zip(ids, said, truth, strict=True)]
    values = [row["value"] for row in rows]
    results["report"] = mean_score("entity F1 of a report", VERSION, values, clusters, rows, "no reports")
    if len(kinds := sorted({str(m) for m in modalities if m})) > 1:
        results["by_modality"] = {kind: _slice(kind, modalities, said, truth, clusters) for kind in kinds}
    return results


def matched(said: Sequence[Entity], truth: Sequence[Entity], aspect: str) -> tuple[int, int, int]:
    """(tp, fp, fn) of two reports' findings, compared under an aspect; each finding counts once."""
    keep = {"finding": (0,), "location": (0, 1), "side": (0, 2), "severity": (0, 3), "all": (0, 1, 2, 3)}[aspect]
    a, b = (list(dict.fromkeys(tuple(e[k] for k in keep) for e in group)) for group in (said, truth))
    equal = set(a) & set(b)
    tp = len(equal)
    if aspect in ("location", "all"):
        rest_a, rest_b = [x for x in a if x not in equal], [y for y in b if y not in equal]
        tp += _pairs_that_fit(rest_a, rest_b)
    return tp, len(a) - tp, len(b) - tp


def _pairs_that_fit(a: Sequence[tuple], b: Sequence[tuple]) -> int:
    """The most pairs that differ at most in how narrow their place is."""
    fits = np.array([[x[0] == y[0] and x[2:] == y[2:] and same_place(x[1], y[1]) for y in b] for x in a], dtype=float)
    if not fits.any():
        return 0
    return int(fits[linear_sum_assignment(-fits)].sum())


def _positive(labels: Mapping[str, Labels], ids: Sequence[str], doubt: bool) -> np.ndarray:
    """(n, 14) bool: stated, and where `doubt` also what is in doubt."""
    wanted = (POSITIVE, UNCERTAIN) if doubt else (POSITIVE,)
    return np.array([[labels.get(i, {}).get(o) in wanted for o in OBSERVATIONS] for i in ids], bool).reshape(-1, 14)


def _f1_family(
    name: str,
    observations: Sequence[str],
    positive: Mapping[str, np.ndarray],
    clusters: Sequence[str],
    per_sample: list[dict] | None = None,
) -> tuple[dict[str, Score], dict[str, Score]]:
    """(micro, macro, weighted and example F1), (precision, recall, and the F1 of each observation)."""
    columns = [OBSERVATIONS.index(o) for o in observations]
    said, truth = positive["said"][:, columns], positive["truth"][:, columns]
    counts = np.stack([said & truth, said & ~truth, ~said & truth], -1)  # (n, L, 3)
    own = _f1(counts.sum(1).astype(float))
    example = np.stack([np.nan_to_num(own), np.isfinite(own)], -1)
    width = counts.shape[1] * 3
    sums = np.concatenate([counts.reshape(len(counts), width), example], 1).astype(float)

    def table(totals: np.ndarray) -> np.ndarray:
        return totals[..., :width].reshape(*totals.shape[:-1], -1, 3)

    def observation(k: int) -> Statistic:
        return lambda totals: _f1(table(totals)[..., k, :])

    overall: dict[str, Statistic] = {
        "micro": lambda totals: _f1(table(totals).sum(-2)),
        "macro": lambda totals: _mean(_f1(table(totals))),
        "weighted": lambda totals: _mean(_f1(table(totals)), table(totals)[..., 0] + table(totals)[..., 2]),
        "example": lambda totals: _ratio(totals[..., width], totals[..., width + 1]),
    }
    parts: dict[str, Statistic] = {
        "precision": lambda totals: _ratio(*_first_and_all(table(totals), 1)),
        "recall": lambda totals: _ratio(*_first_and_all(table(totals), 2)),
        **{o: observation(k) for k, o in enumerate(observations)},
    }
    scores = _scores({**overall, **parts}, sums, clusters, name, {"micro": per_sample})
    return {key: scores[key] for key in overall}, {key: scores[key] for key in parts}


def _scores(
    statistics: Mapping[str, Statistic],
    sums: np.ndarray,
    clusters: Sequence[str],
    name: str,
    per_sample: Mapping[str, list[dict] | None] | None = None,
) -> dict[str, Score]:
    """Each statistic of the summed rows, all intervals from the same resamples of the patients."""
    patients = len(set(clusters))
    values = {key: number(statistic(sums.sum(0))) for key, statistic in statistics.items()}
    resampled: dict[str, list[np.ndarray]] = {key: [] for key in statistics}
    for totals in _resamples(sums, clusters):
        for key, statistic in statistics.items():
            resampled[key].append(statistic(totals))
    scores = {}
    for key, value in values.items():
        drawn = np.concatenate(resampled[key]) if resampled[key] else np.empty(0)
        drawn = drawn[np.isfinite(drawn)]
        interval = None
        if value is not None and len(drawn):
            low, high = np.percentile(drawn, [2.5, 97.5])
            interval = (float(low), float(high))
        rows = (per_sample or {}).get(key)
        reason = (_NOTHING if len(sums) else "no reports") if value is None else None
        scores[key] = Score(f"{name} {key}", VERSION, value, len(sums), interval, patients, rows, reason)
    return scores


def _resamples(sums: np.ndarray, clusters: Sequence[str]) -> Iterator[np.ndarray]:
    """Blocks of (R, K) totals of patients drawn with replacement; none with fewer than two patients."""
    if len(set(clusters)) < 2:
        return
    groups = cluster_sums(sums, clusters)
    rng, count = np.random.default_rng(SEED), len(groups)
    block = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size) @ groups


def _label_rows(
    ids: Sequence[str], said: Mapping[str, Labels], truth: Mapping[str, Labels], positive: Mapping[str, np.ndarray]
) -> list[dict]:
    rows = []
    for k, i in enumerate(ids):
        a, b = positive["said"][k], positive["truth"][k]
        tp, fp, fn = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
        rows.append(
            {
                "sample_id": i,
                "value": number(_f1(np.array([tp, fp, fn], float))),
                **{"tp": tp, "fp": fp, "fn": fn},
                "hallucinated": [o for o, x, y in zip(OBSERVATIONS, a, b, strict=True) if x and not y],
                "missing": [o for o, x, y in zip(OBSERVATIONS, a, b, strict=True) if y and not x],
                "prediction": {o: v for o, v in said.get(i, {}).items() if v is not None},
                "reference": {o: v for o, v in truth[i].items() if v is not None},
            }
        )
    return rows


def _aspect_scores(
    said: Sequence[Reading], truth: Sequence[Reading], clusters: Sequence[str]
) -> dict[str, dict[str, Score]]:
    statistics: dict[str, Statistic] = {
        "precision": lambda totals: _ratio(totals[..., 0], totals[..., 0] + totals[..., 1]),
        "recall": lambda totals: _ratio(totals[..., 0], totals[..., 0] + totals[..., 2]),
        "f1": _f1,
    }
    results = {}
    for aspect in ASPECTS:
        rows = [matched(a.stated, b.stated, aspect) for a, b in zip(said, truth, strict=True)]
        results[aspect] = _scores(statistics, np.array(rows, float).reshape(-1, 3), clusters, f"entity {aspect}")
    return results


def _slice(
    kind: str,
    modalities: Sequence[str | None],
    said: Sequence[Reading],
    truth: Sequence[Reading],
    clusters: Sequence[str],
) -> dict[str, Score]:
    """F1 of each aspect in one modality."""
    chosen = [k for k, modality in enumerate(modalities) if modality == kind]
    scores = _aspect_scores([said[k] for k in chosen], [truth[k] for k in chosen], [clusters[k] for k in chosen])
    return {aspect: scores[aspect]["f1"] for aspect in ASPECTS}


def _entity_row(sample_id: str, said: Reading, truth: Reading) -> dict[str, Any]:
    """One report: its F1 and what is wrong with it."""
    counts = np.array([matched(said.stated, truth.stated, aspect) for aspect in ASPECTS], float)
    value = number(_f1(counts).mean())
    if value is None:  # neither states a finding
        value = float(said.speaks)
    kinds, true_kinds = {e.finding for e in said.stated}, {e.finding for e in truth.stated}
    both = [(a, [b for b in truth.stated if b.finding == a.finding]) for a in said.stated if a.finding in true_kinds]
    misplaced = [a for a, same in both if not any(a.side == b.side and same_place(a.place, b.place) for b in same)]
    placed = [(a, same) for a, same in both if a not in misplaced]
    return {
        "sample_id": sample_id,
        "value": value,
        "hallucinated": [str(e) for e in said.stated if e.finding not in true_kinds],
        "missing": [str(e) for e in truth.stated if e.finding not in kinds],
        "misplaced": [str(e) for e in misplaced],
        "other_severity": [str(a) for a, same in placed if a.severity not in {b.severity for b in same}],
        "contradicted": [str(e) for e in _contradicted(said, truth)],
    }


def _contradicted(said: Reading, truth: Reading) -> list[Entity]:
    """What one report states and the other denies."""
    return [
        entity
        for stated, denied in ((said.stated, truth.denied), (truth.stated, said.denied))
        for entity in stated
        if any(_denies(other, entity) for other in denied)
    ]


def _denies(denied: Entity, stated: Entity) -> bool:
    """A denial of the finding in the same or a wider place."""
    wider = stated.place == denied.place or stated.place.startswith(denied.place + "/")
    return denied.finding == stated.finding and wider and denied.side in (None, stated.side)


def _f1(counts: np.ndarray) -> np.ndarray:
    """(..., 3) [tp, fp, fn] → (...) F1, NaN where nothing is said and nothing true."""
    return _ratio(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def _first_and_all(table: np.ndarray, other: int) -> tuple[np.ndarray, np.ndarray]:
    """(..., L, 3) → (true positives, those and the wrong ones of column `other`), over all observations."""
    totals = table.sum(-2)
    return totals[..., 0], totals[..., 0] + totals[..., other]


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(..., L) → (...) mean over what is defined."""
    known = np.isfinite(values)
    weights = known.astype(float) if weights is None else np.where(known, weights, 0.0)
    return _ratio((np.nan_to_num(values) * weights).sum(-1), weights.sum(-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
