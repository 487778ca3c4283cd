"""Means of several columns over the same samples, all intervals from the same resamples of the patients."""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.statistics import RESAMPLES, SEED, cluster_sums, mean_of
from eval.types import Score

_BLOCK = 4_000_000  # resample counts held at once


def mean_scores(
    names: Sequence[str],
    version: str,
    values: np.ndarray | Sequence[Sequence[float]],
    clusters: Sequence[str],
    reasons: Mapping[str, str],
    reason: str,
) -> dict[str, Score]:
    """name → mean with its 95 % interval, whole clusters drawn with replacement.

    values: (n, names), NaN where a sample has no value. reasons: name → why it is undefined where no sample has one;
    `reason` where there are no samples or the name is not there. Ten scores cost little more than one.
    """
    table = np.asarray(values, float).reshape(-1, len(names))
    known = ~np.isnan(table)
    intervals = _intervals(np.where(known, table, 0), known, clusters)
    scores = {}
    for k, name in enumerate(names):
        n = int(known[:, k].sum())
        patients = len({c for c, yes in zip(clusters, known[:, k], strict=True) if yes})
        if n:
            value, interval = float(table[known[:, k], k].mean()), intervals[k] if patients > 1 else None
            scores[name] = Score(name, version, value, n, interval, patients)
        else:
            scores[name] = Score(name, version, None, 0, reason=reasons.get(name, reason) if len(table) else reason)
    return scores


def _intervals(values: np.ndarray, known: np.ndarray, clusters: Sequence[str]) -> list[tuple[float, float] | None]:
    """(n, K) values and whether they count → K intervals, None with fewer than two clusters."""
    sums = cluster_sums(np.concatenate([values, known], 1), clusters)
    if len(sums) < 2:
        return [None] * values.shape[1]
    rng, blocks = np.random.default_rng(SEED), []
    block = max(1, _BLOCK // len(sums))
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        totals = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=size) @ sums
        blocks.append(mean_of(np.stack(np.split(totals, 2, axis=1), -1)))
    columns = (column[np.isfinite(column)] for column in np.concatenate(blocks).T)
    return [_percentiles(column) if len(column) else None for column in columns]


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
