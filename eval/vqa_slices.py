"""The samples that a VQA score rests on: texts of any kind, rows without a reference, the slices of a test set.

Dimension key: n rows, C patients.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.statistics import bootstrap_interval
from eval.types import Score

# Slice → the columns that say it, the first one that a row has: ours, VQA-RAD's, SLAKE's, VQA-Med's.
SLICES: dict[str, tuple[str, ...]] = {
    "answer_type": ("answer_type",),
    "modality": ("modality",),
    "organ": ("organ", "image_organ", "location"),
    "question_type": ("question_type", "content_type", "category"),
    "language": ("language", "q_lang"),
    "needs": ("needs",),
}


def text_of(value: Any) -> str:
    """An answer as text: numbers as written, nothing for null."""
    return "" if value is None else value if isinstance(value, str) else str(value)


def references_of(row: Mapping, key: str) -> list[str]:
    """The accepted texts of a reference row: its `references`, or its one `key`; null is none."""
    texts = row.get("references") or [row.get(key)]
    return [text_of(text) for text in texts if text is not None]


def cluster_of(row: Mapping) -> str:
    """What a sample is not independent of: its patient, else its image, else itself alone."""
    for key in ("patient_id", "image_id", "img_id", "image_name"):
        value = row.get(key)
        if value is not None and value != "":
            return str(value)
    return str(row["sample_id"])


def in_order(rows: Sequence[Mapping]) -> list[Mapping]:
    """Rows by sample id, so that the order of lines changes nothing."""
    return sorted(rows, key=lambda row: str(row["sample_id"]))


def rows_by(rows: Sequence[Mapping], name: str) -> dict[str, list[int]]:
    """Slice value → the places of its rows. "PRES, ATTRIB" counts in both; a row without the column in none."""
    found: dict[Any, list[int]] = {}
    for k, row in enumerate(rows):
        found.setdefault(kind_of(row, name), []).append(k)
    parts: dict[str, list[int]] = {}
    for value, places in found.items():
        for part in {part.strip() for part in re.split(r"[,;|]", value or "")} - {""}:
            parts.setdefault(part, []).extend(places)
    return {part: sorted(parts[part]) for part in sorted(parts)}


def kind_of(row: Mapping, name: str) -> str | None:
    """The row's value of a slice, in lower case; None where it has none."""
    for column in SLICES[name]:
        value = row.get(column)
        if value is not None and value != "":
            return str(value).strip().lower()
    return None


@dataclass(frozen=True)
class Patients:
    """Whose row is whose, found once for many scores. codes: (n,) place of each row's patient in the sorted `names`."""

    names: np.ndarray
    codes: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping]) -> "Patients":
        clusters = [cluster_of(row) for row in rows]
        names = sorted(set(clusters))
        place = {name: k for k, name in enumerate(names)}
        return cls(np.array(names, dtype=object), np.array([place[name] for name in clusters], dtype=np.int64))

    def mean(
        self,
        name: str,
        version: str,
        values: np.ndarray,
        rows: Sequence[int] | None = None,
        per_sample: list[dict] | None = None,
        reason: str = "no questions",
    ) -> Score:
        """The mean of values (n,), NaN left out, with the interval that `eval.statistics.mean_score` gives.

        rows: the places that count (all). reason: why the mean is undefined, if nothing is left.
        """
        places = np.arange(len(values)) if rows is None else np.asarray(rows, dtype=np.int64)
        places = places[~np.isnan(values[places])]
        if not len(places):
            return Score(name, version, None, 0, per_sample=per_sample, reason=reason)
        kept, codes = values[places], self.codes[places]
        counts = np.bincount(codes, minlength=len(self.names))
        there = np.flatnonzero(counts)
        sums = np.stack([np.bincount(codes, kept, len(self.names)), counts], axis=1)[there]
        interval = bootstrap_interval(sums, self.names[there])
        return Score(name, version, float(kept.mean()), len(kept), interval, len(there), per_sample)

    def means_by(
        self, name: str, version: str, values: np.ndarray, rows: Sequence[Mapping], slices: Sequence[str]
    ) -> dict[str, dict[str, Score]]:
        """{"by_SLICE": {value: Score}}; empty where no row has the column."""
        return {
            f"by_{one}": {part: self.mean(name, version, values, places) for part, places in rows_by(rows, one).items()}
            for one in slices
        }
