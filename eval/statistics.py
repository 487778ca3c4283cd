"""Intervals and tests that respect that samples of one patient are not independent.

Dimension key: n samples, K sufficient statistics a sample, C clusters (patients), R bootstrap resamples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

from eval.types import Score

RESAMPLES = 2000
SEED = 0
_BLOCK = 4_000_000  # resample counts held at once, so that 100,000 patients do not need gigabytes

Statistic = Callable[[np.ndarray], np.ndarray]


def mean_of(totals: np.ndarray) -> np.ndarray:
    """(..., 2) sums (of values, of weights) → (...) their ratio; NaN where the weight is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals[..., 1] > 0, totals[..., 0] / totals[..., 1], np.nan)


def cluster_sums(statistics: np.ndarray, clusters: Sequence[Any]) -> np.ndarray:
    """(n, K) → (C, K): summed within each cluster, clusters in sorted order (so that line order does not matter)."""
    _, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    sums = np.zeros((int(index.max(initial=-1)) + 1, statistics.shape[1]))
    np.add.at(sums, index, statistics)
    return sums


def bootstrap_interval(
    statistics: np.ndarray,
    clusters: Sequence[Any],
    statistic: Statistic = mean_of,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic`, whole clusters drawn with replacement (Efron & Tibshirani 1993, ch. 13).

    statistics: (n, K) sufficient statistics, which add up over samples. statistic: (R, K) totals → (R,) values, NaN
    where undefined; such resamples are left out. Returns None with fewer than two clusters: then nothing can be said.
    """
    sums = cluster_sums(np.asarray(statistics, dtype=float), clusters)
    count = len(sums)
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    values = []
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(block, resamples - start))
        values.append(statistic(drawn @ sums))
    defined = np.concatenate(values)
    defined = defined[np.isfinite(defined)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Any],
    statistic: Statistic = mean_of,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """statistic(a) - statistic(b) over the same samples, with its clustered bootstrap interval.

    a, b: (n, K) sufficient statistics of two systems, row for row the same sample.
    Returns {"a", "b", "difference", "ci95", "clusters", "n"}; numbers are None where undefined.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or len(a) != len(clusters):
        raise ValueError(f"paired statistics differ in shape: {a.shape}, {b.shape}, {len(clusters)} clusters")
    width = a.shape[1]

    def difference(totals: np.ndarray) -> np.ndarray:
        return statistic(totals[..., :width]) - statistic(totals[..., width:])

    first, second = number(statistic(a.sum(0))), number(statistic(b.sum(0)))
    return {
        "a": first,
        "b": second,
        "difference": None if first is None or second is None else first - second,
        "ci95": bootstrap_interval(np.concatenate([a, b], 1), clusters, difference, seed, resamples),
        "clusters": len({str(c) for c in clusters}),
        "n": len(a),
    }


def mcnemar(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> dict[str, Any]:
    """Exact two-sided McNemar test: binomial on the discordant pairs (McNemar 1947; Edwards 1948).

    Returns {"n", "b": only a right, "c": only b right, "p"}; p is 1 without discordant pairs. Raises ValueError where
    the lengths differ. The test takes pairs as independent; read the clustered interval beside it.
    """
    if len(a_correct) != len(b_correct):
        raise ValueError(f"McNemar needs pairs: {len(a_correct)} and {len(b_correct)} verdicts")
    b = sum(bool(x) and not y for x, y in zip(a_correct, b_correct, strict=True))
    c = sum(bool(y) and not x for x, y in zip(a_correct, b_correct, strict=True))
    p = min(1.0, 2 * float(binom.cdf(min(b, c), b + c, 0.5))) if b + c else 1.0
    return {"n": len(a_correct), "b": b, "c": c, "p": p}


def mean_score(
    name: str,
    version: str,
    values: Sequence[float | None],
    clusters: Sequence[Any],
    per_sample: list[dict] | None = None,
    reason: str = "no samples",
    seed: int = SEED,
) -> Score:
    """Mean of per-sample values with a clustered interval; None values are left out; `reason`: why, if all are."""
    kept = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
    if not kept:
        return Score(name, version, None, 0, per_sample=per_sample, reason=reason)
    statistics = np.array([[value, 1.0] for value, _ in kept])
    groups = [cluster for _, cluster in kept]
    interval = bootstrap_interval(statistics, groups, seed=seed)
    mean = float(statistics[:, 0].mean())
    return Score(name, version, mean, len(kept), interval, len({str(g) for g in groups}), per_sample)


def number(value: Any) -> float | None:
    """A float, or None for NaN (undefined)."""
    return float(value) if np.isfinite(value) else None
