"""Intervals and tests that respect that samples of one patient are not independent.

Dimension key: n samples, K sufficient statistics a sample, C clusters (patients), R bootstrap resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom, norm

from eval.types import Score

RESAMPLES = 2000
PERMUTATIONS = 10_000
SEED = 0
_BLOCK = 4_000_000  # resample counts held at once, so that 100,000 patients do not need gigabytes
_MANY = 500  # clusters from which on drawing row numbers is quicker than drawing multinomial counts

Statistic = Callable[[np.ndarray], np.ndarray]


def mean_of(totals: np.ndarray) -> np.ndarray:
    """(..., 2) sums (of values, of weights) → (...) their ratio; NaN where the weight is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals[..., 1] > 0, totals[..., 0] / totals[..., 1], np.nan)


def cluster_sums(statistics: np.ndarray, clusters: Sequence[Any]) -> np.ndarray:
    """(n, K) → (C, K): summed within each cluster, clusters in sorted order (so that line order does not matter)."""
    names = [str(c) for c in clusters]
    place = {name: k for k, name in enumerate(sorted(set(names)))}
    index = np.fromiter((place[name] for name in names), np.int64, len(names))
    return np.stack([np.bincount(index, column, len(place)) for column in statistics.T], axis=1)


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
    values = np.concatenate([statistic(totals) for totals in _resampled(sums, resamples, rng)])
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _resampled(sums: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """(C, K) → blocks of (R, K) totals, C clusters drawn with replacement in each.

    Clusters of equal sums count as one row with that many chances: the distribution is the same, and 100,000 verdicts
    have but two different rows.
    """
    count = len(sums)
    chances = np.full(count, 1 / count)
    if count > _MANY:
        sums, repeats = np.unique(sums, axis=0, return_counts=True)
        if len(sums) > _MANY:
            owner = np.repeat(np.arange(len(sums)), repeats)
            for _ in range(resamples):
                yield (np.bincount(owner[rng.integers(0, count, count)], minlength=len(sums)) @ sums)[None]
            return
        chances = repeats / count
    block = max(1, _BLOCK // len(sums))
    for start in range(0, resamples, block):
        yield rng.multinomial(count, chances, size=min(block, resamples - start)) @ sums


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


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Any],
    statistic: Statistic = mean_of,
    seed: int = SEED,
    permutations: int = PERMUTATIONS,
) -> dict[str, Any]:
    """Two-sided paired permutation test of statistic(a) = statistic(b): whole clusters change sides.

    a, b: (n, K) sufficient statistics of two systems, row for row the same sample. With few differing clusters all
    2^C assignments are looked at, else `permutations` random ones, the observed one counted in (Phipson & Smyth 2010,
    https://doi.org/10.2202/1544-6115.1585). Returns {"p", "permutations", "exact", "clusters": those that differ}; p is
    None where a statistic is undefined.
    """
    first, second = cluster_sums(np.asarray(a, float), clusters), cluster_sums(np.asarray(b, float), clusters)
    observed = number(statistic(first.sum(0)) - statistic(second.sum(0)))
    gaps, repeats = np.unique((second - first)[(first != second).any(1)], axis=0, return_counts=True)
    differing = int(repeats.sum())
    exact = differing < 32 and 2**differing <= permutations
    if observed is None:
        return {"p": None, "permutations": 0, "exact": exact, "clusters": differing}
    extreme = total = 0
    for moved in _exchanges(gaps, repeats, permutations, exact, np.random.default_rng(seed)):
        values = statistic(first.sum(0) + moved) - statistic(second.sum(0) - moved)
        values = values[np.isfinite(values)]
        extreme += int((np.abs(values) >= abs(observed) - 1e-12).sum())
        total += len(values)
    p = extreme / total if exact else (extreme + 1) / (total + 1)
    return {"p": p, "permutations": total, "exact": exact, "clusters": differing}


def _exchanges(
    gaps: np.ndarray, repeats: np.ndarray, permutations: int, exact: bool, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Blocks of (R, K): what a's totals gain where some clusters change sides. gaps (G, K), each `repeats` times; of
    so many equal ones a binomial number changes."""
    if exact:
        rows = np.repeat(gaps, repeats, axis=0)
        yield (np.arange(2 ** len(rows))[:, None] >> np.arange(len(rows)) & 1) @ rows
        return
    block = max(1, _BLOCK // max(1, len(gaps)))
    for start in range(0, permutations, block):
        yield rng.binomial(repeats, 0.5, size=(min(block, permutations - start), len(gaps))) @ gaps


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for looking at all of them (Holm 1979); None stays None and is not counted."""
    order = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, k) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[k] = highest
    return adjusted


def cohens_h(p1: float, p2: float) -> float:
    """Effect size of two proportions: 2 asin √p1 - 2 asin √p2; 0.2 small, 0.5 medium, 0.8 large (Cohen 1988, ch. 6)."""
    return float(2 * np.arcsin(np.sqrt(p1)) - 2 * np.arcsin(np.sqrt(p2)))


def cohens_g(b: int, c: int) -> float | None:
    """Effect size of discordant pairs: b / (b + c) - 0.5, from -0.5 to 0.5; 0.05 small, 0.15 medium, 0.25 large (Cohen
    1988, ch. 5). None without discordant pairs."""
    return b / (b + c) - 0.5 if b + c else None


def standardised_difference(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Mean difference over the root mean of both variances (Cohen's d_av; Lakens 2013,
    https://doi.org/10.3389/fpsyg.2013.00863). None where nothing varies."""
    if len(a) < 2:
        return None
    spread = np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
    return float((np.mean(a) - np.mean(b)) / spread) if spread > 0 else None


def design_effect(values: Sequence[float], clusters: Sequence[Any]) -> float:
    """How much larger the variance of the mean is than that of independent samples (Kish 1965); at least 1, so that
    n / design_effect is the number of independent samples that tell as much."""
    off = np.asarray(values, float) - np.mean(values)
    alone = float((off**2).sum())
    together = float((cluster_sums(off[:, None], clusters) ** 2).sum())
    return max(1.0, together / alone) if alone > 0 else 1.0


def needed_pairs(difference: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Pairs needed to see a difference of two paired proportions with McNemar's test (Connor 1987, Biometrics 43:207):

        n = (z(1 - alpha/2) √ψ + z(power) √(ψ - d²))² / d²

    difference: d, e.g. 0.05 for 5 points. discordant: ψ, the share of samples that just one of the two gets right.
    None where d is 0 or above ψ, which cannot be.
    """
    d = abs(difference)
    if not 0 < d <= discordant:
        return None
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)
    return int(np.ceil((z_alpha * np.sqrt(discordant) + z_power * np.sqrt(discordant - d * d)) ** 2 / d**2))


def visible_difference(n: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference of two paired proportions that n pairs show with this power: `needed_pairs` solved for d.

    "With n = 272 and 9 % discordant pairs you can see 5 points." None where even all discordant pairs on one side
    would not do. n: samples, or independent samples that tell as much (n / design_effect).
    """
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)
    root = n * z_alpha**2 - (n + z_power**2) * (z_alpha**2 - z_power**2)
    if n <= 0 or discordant <= 0 or root < 0:
        return None
    d = np.sqrt(discordant) * (np.sqrt(n) * z_alpha + np.sqrt(root)) / (n + z_power**2)
    return float(d) if d <= discordant else None


def visible_mean_difference(differences: Sequence[float], clusters: Sequence[Any], power: float = 0.8) -> float | None:
    """The smallest mean of paired differences that so many samples show: (z(0.975) + z(power)) standard errors, which
    are inflated by the design effect. None for fewer than two samples."""
    if len(differences) < 2:
        return None
    error = np.std(differences, ddof=1) * np.sqrt(design_effect(differences, clusters) / len(differences))
    return float((norm.ppf(0.975) + norm.ppf(power)) * error)


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
