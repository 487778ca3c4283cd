"""Scores of the contestants by source, means over sources, and how many times as good one is as another.

All intervals are 95 % percentiles of the same 500 resamples of each source's patients, so that a ratio is a paired one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.coco import RESAMPLES, bootstrap_precision, coco_rows
from eval.grounding import METRICS, VERSION, class_of, judged, scores_by_source
from eval.records import RegionFiles, read_region_files
from eval.statistics import SEED, cluster_sums, mean_of
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree

SIX = ("bccd", "busi", "cxr-lungboxes", "isic2018", "kvasir-seg", "lgg-mri")  # enough images to train and to tell


@dataclass(frozen=True)
class Scores:
    """sources: source → metric → Score. resampled: source → metric → (R,) values; sources and metrics that cannot be
    resampled (one patient) are left out."""

    sources: dict[str, dict[str, Score]]
    resampled: dict[str, dict[str, np.ndarray]]


def score(results: Path, truth: Path) -> Scores:
    """COCO results against COCO ground truth. Of results without masks Dice is undefined: what such a peer misses
    would count as 0, and what it finds not at all."""
    regions, tree = read_region_files(results, truth), load_label_tree()
    sources = {k: {m: v[m] for m in METRICS} for k, v in scores_by_source(regions, tree).items()}
    if all(found.masks is None for found in regions.predictions.values()):
        for scores in sources.values():
            scores["dice"] = Score("dice", VERSION, None, 0, reason="no masks in the predictions")
    resampled = {name: _resampled(name, scores, regions, tree) for name, scores in sources.items()}
    return Scores(sources, resampled)


def _resampled(name: str, scores: Mapping[str, Score], regions: RegionFiles, tree: LabelTree) -> dict[str, np.ndarray]:
    ids = [k for k in regions.references if regions.sources.get(k) == name]
    patients = {k: regions.patients.get(k, k) for k in ids}
    values = {
        metric: _resampled_mean(scores[metric].per_sample or [], patients)
        for metric in METRICS[2:]
        if scores[metric].value is not None
    }
    said = judged(regions.predictions, regions.references, regions.labelled, tree)
    rows = coco_rows({k: regions.references[k] for k in ids}, said, lambda label: class_of(label, tree))
    drawn = bootstrap_precision(*rows, {n: patients[k] for n, k in enumerate(sorted(ids), 1)})
    if drawn:
        by_class = np.stack(list(drawn.values()))  # (classes, R, thresholds)
        values |= {"AP": _present_mean(by_class.mean(2)), "AP50": _present_mean(by_class[..., 0])}
    return {metric: column for metric, column in values.items() if column is not None}


def _resampled_mean(rows: Sequence[Mapping], patients: Mapping[str, str]) -> np.ndarray | None:
    kept = [row for row in rows if row["value"] is not None]
    if not kept:
        return None
    sums = cluster_sums(np.array([[row["value"], 1.0] for row in kept]), [patients[row["sample_id"]] for row in kept])
    count = len(sums)
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return mean_of(draws @ sums)


def _present_mean(by_class: np.ndarray) -> np.ndarray:
    """(classes, R) → (R,) mean over the classes that a resample holds."""
    present = ~np.isnan(by_class)
    return np.where(present, by_class, 0).sum(0) / np.maximum(present.sum(0), 1)


def mean_over(scores: Scores, sources: Sequence[str], metric: str) -> Score:
    """Mean of the sources that have this metric."""
    known = [name for name in sources if name in scores.sources and scores.sources[name][metric].value is not None]
    if not known:
        return Score(metric, VERSION, None, 0, reason="no source has it")
    values = [scores.sources[name][metric].value for name in known]
    interval = _interval(_mean_resamples(scores, known, metric))
    return Score(metric, VERSION, float(np.mean(values)), len(known), interval)


def _mean_resamples(scores: Scores, sources: Sequence[str], metric: str) -> np.ndarray:
    """(R,); a source that cannot be resampled stands with its value."""
    columns = [
        scores.resampled[name].get(metric, np.full(RESAMPLES, scores.sources[name][metric].value)) for name in sources
    ]
    return np.mean(columns, 0)


def ratio(ours: Scores, theirs: Scores, sources: Sequence[str], metric: str) -> Score:
    """Our mean over theirs, over the sources that both have, with the interval of paired resamples."""
    known = [
        n for n in sources if all(n in s.sources and s.sources[n][metric].value is not None for s in (ours, theirs))
    ]
    below = float(np.mean([theirs.sources[name][metric].value for name in known])) if known else 0.0
    if not below:
        return Score(f"{metric} ratio", VERSION, None, 0, reason="theirs is 0")
    above = float(np.mean([ours.sources[name][metric].value for name in known]))
    a, b = _mean_resamples(ours, known, metric), _mean_resamples(theirs, known, metric)
    return Score(f"{metric} ratio", VERSION, above / below, len(known), _interval(a[b > 0] / b[b > 0]))


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
