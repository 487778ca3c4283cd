"""Scores of masks and heat maps, pixel by pixel: Hausdorff distance, contrast-to-noise ratio, pointing, overlap.

Dimension key: H, W pixels of an image or cells of a heat map. Masks are (H, W) bool, spacing is (row, column) in mm.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from scipy.ndimage import binary_erosion, distance_transform_edt

from eval.statistics import mean_score
from eval.types import Score, ScoreError
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

VERSION = "1"
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
HEAT_METRICS = ("CNR", "|CNR|", "pointing", "mIoU")


def hausdorff95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float] | None = None) -> float | None:
    """95 % Hausdorff distance in pixels, or in mm with `spacing`; 0 for two empty masks, None where one is empty.

    The larger of the two directed distances, each the 95th percentile (linear between ranks) of the distances from the
    border pixels of one mask to the nearest border pixel of the other (Metrics Reloaded, Maier-Hein et al. 2024,
    https://arxiv.org/abs/2206.01653). A border pixel has one of its four neighbours, or the image's edge, outside the
    mask. Programs that pool both directions before they take the percentile give other numbers. Raises ScoreError where
    sizes differ.
    """
    if a.shape != b.shape:
        raise ScoreError(f"masks of sizes {a.shape} and {b.shape}; resize one of them first")
    both = a | b
    rows, columns = np.flatnonzero(both.any(1)), np.flatnonzero(both.any(0))
    if not a.any() or not b.any():
        return None if len(rows) else 0.0
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    borders = [mask[window] & ~binary_erosion(mask[window]) for mask in (a, b)]
    far = [distance_transform_edt(~border, sampling=spacing) for border in borders]
    return float(max(np.percentile(far[1][borders[0]], 95), np.percentile(far[0][borders[1]], 95)))


def contrast_to_noise(values: np.ndarray, inside: np.ndarray) -> float | None:
    """CNR = (μ_in - μ_out) / sqrt(σ²_in + σ²_out) of a heat map, or of scores of patches, inside and outside a region.

    values, inside: arrays of one shape. BioViL (Boecking et al., ECCV 2022, https://arxiv.org/abs/2204.09817) takes the
    absolute value, which rewards a map that is dark where it should be bright; the sign is kept here. None where all or
    nothing is inside, a value is not finite, or the map is flat on both sides.
    """
    values, inside = np.asarray(values, float), np.asarray(inside, bool)
    if values.shape != inside.shape:
        raise ScoreError(f"heat map of shape {values.shape}, region of shape {inside.shape}; give them one grid")
    if inside.all() or not inside.any() or not np.isfinite(values).all():
        return None
    within, without = values[inside], values[~inside]
    noise = within.var() + without.var()
    return float((within.mean() - without.mean()) / np.sqrt(noise)) if noise > 0 else None


def heatmap_scores(
    heatmaps: Mapping[str, Mapping[str, np.ndarray]],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
) -> dict[str, Score]:
    """Scores of models that give a map a phrase, not boxes; the unit is a pair (image, label present in its reference).

    heatmaps: image_id → label → (H, W) of any resolution over the whole image. Returns CNR (signed), |CNR| (BioViL's),
    pointing (the hottest cell, the first of equals, lies in the region) and mIoU (map at or above .1, .2 ... .5 against
    the region, mean over these thresholds, as BioViL-T has it, https://arxiv.org/abs/2301.04558). A pair without a map
    has pointing 0 and mIoU 0, and no CNR. Raises ScoreError for a map that is not two-dimensional.
    """
    return mean_heatmap_scores(judge_heatmaps(heatmaps, references), patients)


def judge_heatmaps(
    heatmaps: Mapping[str, Mapping[str, np.ndarray]],
    references: Mapping[str, RegionSet],
    modalities: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
) -> list[dict[str, Any]]:
    """{"sample_id", "label", "map": is there one?, and HEAT_METRICS} of each pair, for `heatmap_scores`.

    The map of a label is the one of its own name, else of another name that the label tree has for it in the image's
    modality (modalities: image_id → modality).
    """
    tree, rows = tree or load_label_tree(), []
    for image_id in sorted(references):
        maps, modality = heatmaps.get(image_id, {}), (modalities or {}).get(image_id)
        for label in sorted(set(references[image_id].labels)):
            name = find_map(maps, label, modality, tree)
            verdict = _judge(None if name is None else maps[name], references[image_id], label, image_id)
            rows.append({"sample_id": image_id, "label": label, "map": name is not None, **verdict})
    return rows


def find_map(names: Iterable[str], label: str, modality: str | None, tree: LabelTree) -> str | None:
    """The one of the names that a label has."""
    if label in names:
        return label
    known = tree.find(label, modality=modality)
    return next((name for name in names if known and tree.find(name, modality=modality) == known), None)


def mean_heatmap_scores(
    rows: Sequence[Mapping[str, Any]], patients: Mapping[str, str] | None = None
) -> dict[str, Score]:
    """The means of `judge_heatmaps`, with per_sample."""
    clusters = [(patients or {}).get(row["sample_id"], row["sample_id"]) for row in rows]
    scores = {}
    for name in HEAT_METRICS:
        column = [{"sample_id": row["sample_id"], "class": row["label"], "value": row[name]} for row in rows]
        reason = "no heat maps with contrast" if "CNR" in name else "no reference regions"
        scores[name] = mean_score(name, VERSION, [row[name] for row in rows], clusters, column, reason)
    return scores


def region_mask(regions: RegionSet, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool on any grid over the image: cells whose centre lies in a mask, or in the box of a region without."""
    height, width = size
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    inside = np.zeros((height, width), bool)
    for (x1, y1, x2, y2), mask in zip(regions.boxes, regions.masks or [None] * len(regions), strict=True):
        if mask is None:
            inside |= np.outer((y1 <= y) & (y < y2), (x1 <= x) & (x < x2))
        else:
            pixels = rle.decode(mask).astype(bool)
            inside |= pixels[np.ix_((y * pixels.shape[0]).astype(int), (x * pixels.shape[1]).astype(int))]
    return inside


def _judge(heat: Any, truth: RegionSet, label: str, image_id: str) -> dict[str, float | None]:
    if heat is None:
        return {"CNR": None, "|CNR|": None, "pointing": 0.0, "mIoU": 0.0}
    heat = np.asarray(heat, float)
    if heat.ndim != 2 or not heat.size:
        raise ScoreError(f"image {image_id}, {label}: heat map of shape {heat.shape}; it has rows and columns")
    inside = region_mask(truth.select([k for k, other in enumerate(truth.labels) if other == label]), heat.shape)
    contrast = contrast_to_noise(heat, inside)
    heat = np.nan_to_num(heat, nan=-np.inf)
    return {
        "CNR": contrast,
        "|CNR|": None if contrast is None else abs(contrast),
        "pointing": float(inside.ravel()[heat.argmax()]),
        "mIoU": float(np.mean([_iou(heat >= threshold, inside) for threshold in THRESHOLDS])),
    }


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def best_hausdorff95(
    mask: Mapping, references: Sequence[Mapping], spacing: tuple[float, float] | None = None
) -> float | None:
    """HD95 of a COCO RLE mask with the references together, or with the nearest single one where that is less."""
    said = rle.decode(mask).astype(bool)
    candidates = [rle.merge(list(references)), *(references if len(references) > 1 else ())]
    distances = [hausdorff95(said, rle.decode(other).astype(bool), spacing) for other in candidates]
    return min((value for value in distances if value is not None), default=None)
