"""Scores of heat maps over everything that grounding is sliced by; the scores themselves are in eval/heatmaps.py."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from eval.grounding import class_of, levels_of
from eval.heatmaps import HEAT_METRICS, VERSION, judge_heatmaps, mean_heatmap_scores
from eval.means import mean_scores
from eval.regions import SIZES, region_size
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

PROTOCOL = "heatmaps"
_REASONS = dict.fromkeys(("CNR", "|CNR|"), "no heat maps with contrast")


def heatmap_results(
    heatmaps: Mapping[str, Mapping[str, np.ndarray]],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    modalities: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`heatmap_scores` overall, and by class, tree level, modality, source and size of what is marked.

    patients, sources, modalities: by image_id, where known. Returns {"protocol", "version", "overall", "by_label",
    "by_level", "by_modality", "by_source", "by_size": {name: {metric: Score}}, "counts"}.
    """
    tree = tree or load_label_tree()
    rows = judge_heatmaps(heatmaps, references, modalities, tree)
    for row in rows:
        row["class"] = class_of(row["label"], tree)
        row["size"] = region_size(_marked(references[row["sample_id"]], row["label"]))
    keys = {
        "by_label": lambda row: [row["class"]],
        "by_level": lambda row: levels_of(row["class"], tree),
        "by_modality": lambda row: _one(modalities, row),
        "by_source": lambda row: _one(sources, row),
        "by_size": lambda row: [row["size"]],
    }
    order = {"by_size": SIZES}
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "overall": mean_heatmap_scores(rows, patients),
        **{name: _sliced(rows, key, patients or {}, order.get(name)) for name, key in keys.items()},
        "counts": {"images": len(references), "pairs": len(rows), "without a map": sum(not row["map"] for row in rows)},
    }


def _marked(regions: RegionSet, label: str) -> RegionSet:
    return regions.select([k for k, other in enumerate(regions.labels) if other == label])


def _one(groups: Mapping[str, str] | None, row: Mapping) -> list[str]:
    return [groups[row["sample_id"]]] if groups and row["sample_id"] in groups else []


def _sliced(rows: list[dict], key, patients: Mapping[str, str], names: Iterable[str] | None) -> dict[str, Any]:
    """name → scores of the rows that have it; names: in which order (default: sorted)."""
    members: dict[str, list[dict]] = {}
    for row in rows:
        for name in key(row):
            members.setdefault(name, []).append(row)
    return {name: _means(members[name], patients) for name in names or sorted(members) if name in members}


def _means(rows: list[dict], patients: Mapping[str, str]) -> dict[str, Score]:
    values = [[np.nan if row[name] is None else row[name] for name in HEAT_METRICS] for row in rows]
    clusters = [patients.get(row["sample_id"], row["sample_id"]) for row in rows]
    return mean_scores(HEAT_METRICS, VERSION, values, clusters, _REASONS, "no reference regions")
