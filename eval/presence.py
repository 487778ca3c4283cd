"""Scores of "is it there": ranking (AUROC) and calibration (ECE, reliability curve) of probabilities of presence.

Intervals are 95 % percentile bootstrap intervals over images (whole images drawn with replacement, Efron & Tibshirani
1993, ch. 13), since the phrases of one image are not independent. What is undefined is None, never 0.

Dimension key: n phrase–image pairs, C images, R resamples, K bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10
RESAMPLES = 1000
SEED = 0

Weighted = Callable[[np.ndarray], float | None]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; None where it is undefined. ``n`` pairs of ``images`` images."""

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    images: int


def auroc(
    scores: Sequence[float],
    present: Sequence[bool],
    images: Sequence[Any],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Probability that a phrase that is there scores above one that is not; ties count half (Mann & Whitney 1947).

    scores (n,), present (n,), images (n,) names of the clusters. None where only one kind occurs. Raises ValueError for
    lengths that differ or a score that is not finite.
    """
    x, y, cluster, count = _checked(scores, present, images)
    order = np.unique(x, return_inverse=True)[1]

    def value(weights: np.ndarray) -> float | None:
        high = np.bincount(order, weights * y, minlength=1)
        low = np.bincount(order, weights * ~y, minlength=1)
        pairs = high.sum() * low.sum()
        below = np.cumsum(low) - low
        return float((high * (below + low / 2)).sum() / pairs) if pairs else None

    return _estimate(value, cluster, count, resamples, seed)


def expected_calibration_error(
    probabilities: Sequence[float],
    present: Sequence[bool],
    images: Sequence[Any],
    bins: int = BINS,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Σ (share of pairs in a bin) × |mean probability − share present| over equal-width bins of [0, 1] (Naeini et al.,
    AAAI 2015). Raises ValueError as ``auroc``, and for a probability outside [0, 1]."""
    p, y, cluster, count = _checked(probabilities, present, images)
    place = _bins(p, bins)

    def value(weights: np.ndarray) -> float | None:
        total = weights.sum()
        gap = np.bincount(place, weights * (p - y), minlength=bins)
        return float(np.abs(gap).sum() / total) if total else None

    return _estimate(value, cluster, count, resamples, seed)


def reliability(
    probabilities: Sequence[float],
    present: Sequence[bool],
    images: Sequence[Any],
    bins: int = BINS,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """The reliability curve: for each bin that holds pairs ``{"low", "high", "n", "probability" (mean), "present"
    (share), "ci95" (of the share)}``. Raises ValueError as ``expected_calibration_error``."""
    p, y, cluster, count = _checked(probabilities, present, images)
    place, rows = _bins(p, bins), []
    for k in np.unique(place):
        own = place == k

        def share(weights: np.ndarray, own: np.ndarray = own) -> float | None:
            total = weights[own].sum()
            return float((weights[own] * y[own]).sum() / total) if total else None

        estimate = _estimate(share, cluster, count, resamples, seed)
        about: dict[str, Any] = {"low": float(k / bins), "high": float((k + 1) / bins), "n": int(own.sum())}
        rows.append(about | {"probability": float(p[own].mean()), "present": estimate.value, "ci95": estimate.ci95})
    return rows


def share(
    right: Sequence[bool | float], images: Sequence[Any], resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """Mean of (n,) values with its interval over images."""
    x, _, cluster, count = _checked(right, np.ones(len(right), bool), images)

    def value(weights: np.ndarray) -> float | None:
        return float((weights * x).sum() / weights.sum()) if weights.sum() else None

    return _estimate(value, cluster, count, resamples, seed)


def _checked(
    scores: Sequence[float], present: Sequence[bool] | np.ndarray, images: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Scores (n,) float64, truth (n,) bool, cluster numbers (n,) and how many clusters there are."""
    x, y = np.asarray(scores, float).reshape(-1), np.asarray(present, bool).reshape(-1)
    if not len(x) == len(y) == len(images):
        raise ValueError(f"{len(x)} scores, {len(y)} truths, {len(images)} images; give one of each a phrase")
    if not np.isfinite(x).all():
        raise ValueError(f"score {int(np.argmin(np.isfinite(x)))} is not finite")
    names = {name: k for k, name in enumerate(dict.fromkeys(images))}
    return x, y, np.array([names[name] for name in images], np.int64), len(names)


def _bins(p: np.ndarray, bins: int) -> np.ndarray:
    """Bin numbers; bin k is [k, k + 1) / bins, and 1 is in the last."""
    if len(p) and (p.min() < 0 or p.max() > 1):
        raise ValueError(f"probability {float(p[np.argmax(np.abs(p - 0.5))])} is outside [0, 1]")
    return np.minimum((p * bins).astype(int), bins - 1)


def _estimate(value: Weighted, cluster: np.ndarray, count: int, resamples: int, seed: int) -> Estimate:
    """``value`` of weights (n,): all 1, and how often each image was drawn."""
    rng = np.random.default_rng(seed)
    every = value(np.ones(len(cluster)))
    if every is None or count < 2:
        return Estimate(every, None, len(cluster), count)
    drawn = (rng.multinomial(count, np.full(count, 1 / count)) for _ in range(resamples))
    values = [v for weights in drawn if (v := value(weights[cluster].astype(float))) is not None]
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(every, (float(low), float(high)), len(cluster), count)
