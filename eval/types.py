"""What a metric returns, and how it refuses."""

from dataclasses import dataclass, fields
from typing import Any


class ScoreError(ValueError):
    """What cannot be scored: one line with the file, the row and the remedy."""


@dataclass(frozen=True)
class Score:
    """One number and what it rests on.

    value: None where the metric is undefined; then `reason` says why. n: samples it was computed from.
    ci95: percentile bootstrap interval over `clusters` patients, None where it cannot be had (fewer than two patients).
    per_sample: `[{"sample_id", "value", ...}]`, None for a score of a subset whose samples stand in the overall score.
    """

    name: str
    version: str
    value: float | None
    n: int
    ci95: tuple[float, float] | None = None
    clusters: int | None = None
    per_sample: list[dict] | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"score {self.name}: give a value, or a reason why it is undefined")

    def to_dict(self, per_sample: bool = True) -> dict[str, Any]:
        """The JSON form; `per_sample=False` leaves the long column out."""
        # Not asdict(): it copies every row of a column of 100,000.
        return {f.name: getattr(self, f.name) for f in fields(self) if per_sample or f.name != "per_sample"}

    def __str__(self) -> str:
        """ "0.812 [0.774, 0.846]", or "undefined (reason)"."""
        if self.value is None:
            return f"undefined ({self.reason})"
        interval = "" if self.ci95 is None else f" [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}]"
        return f"{self.value:.3f}{interval}"


LOWER_IS_BETTER = (  # in the metric's name
    *("hd95", "hausdorff", "radcliq", "hallucinated", "misplaced", "missing", "missed", "duplicate", "background"),
    *("other side", "other finding", "sibling", "wrong place", "wrong label"),
)


def lower_is_better(name: str) -> bool:
    """Is a metric a distance, or a share of errors?"""
    return any(word in name.lower() for word in LOWER_IS_BETTER)


def plain(results: Any, per_sample: bool = True) -> Any:
    """A nested result (dicts and lists of Scores) as JSON-ready data."""
    if isinstance(results, Score):
        return results.to_dict(per_sample)
    if isinstance(results, dict):
        return {str(key): plain(value, per_sample) for key, value in results.items()}
    if isinstance(results, list | tuple):
        return [plain(value, per_sample) for value in results]
    return results
