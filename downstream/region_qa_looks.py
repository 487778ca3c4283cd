"""What a region looks like, measured from its pixels and its mask: brightness, contrast, margin, texture and shape.

A measure becomes a word ("sharp", "blurred") by the thirds of its distribution among regions of the same label and
modality: the lower third has one word, the upper third the other, the middle third none. So a word is relative: a
sharp margin is one that is sharper than two thirds of the margins of its kind. Only "brighter" and "darker" are plain
signs. Dimension key: H W the image, h w a part of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image
from scipy import ndimage

# Measure -> the words of its lower and its upper third.
LOOKS = {
    "texture": ("homogeneous", "heterogeneous"),
    "margin": ("blurred", "sharp"),
    "shape": ("irregular", "round"),
    "contrast": ("faintly", "strongly"),
}
# Least difference between the two words of a measure; thirds that are closer are moved apart.
LEAST = {"texture": 4.0, "margin": 0.1, "shape": 0.05, "contrast": 12.0}
SMALLEST = 16.0  # pixels of diameter; below, neither margin nor texture can be told
CLEARLY = 10.0  # greys of 255 between a region and its surroundings from which one is brighter
LONG = 1.4  # ratio of axes from which a region is neither round nor irregular
FEWEST = 12  # regions that thirds are taken from at least

BLACK, WHITE = 5.0, 250.0  # greys; pixels beyond, around a region, show no tissue
SECTORS, LEAST_STEP = 16, 10.0

_DIAMETER = 96.0  # pixels; larger regions are scaled down to this, so that measures do not depend on resolution

Measures = dict[str, float]
Thresholds = dict[str, dict[str, list[float]]]


def measure(pixels: np.ndarray, mask: np.ndarray) -> Measures:
    """The measures that can be taken of a region; {} where it is too small.

    pixels: (H, W) or (H, W, 3) uint8. mask: (H, W) bool.
    brightness: mean grey of the region minus that of a rim of 0.3 diameters around it, where that is neither black nor
    white; contrast: the distance of their mean colours. margin: share of the step from inside to outside that lies
    within 0.05 diameters of the outline (1 = a clean edge), the median of 16 sectors with a step of at least 10 greys.
    texture: standard deviation of the greys, without the outline's own 0.08 diameters. shape: intersection over union
    with the ellipse of the same moments; not of a region that the image's edge cuts, or that is long.
    """
    diameter = 2 * np.sqrt(mask.sum() / np.pi)
    if diameter < SMALLEST:
        return {}
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    is_cut = rows[0] == 0 or columns[0] == 0 or rows[-1] == mask.shape[0] - 1 or columns[-1] == mask.shape[1] - 1
    shown, inside = _cut_out(pixels, mask, rows, columns, diameter)
    found = _measure_greys(shown, inside, min(diameter, _DIAMETER))
    regularity = None if is_cut else _regularity(ndimage.binary_fill_holes(inside))
    return found | ({} if regularity is None else {"shape": regularity})


def _cut_out(pixels, mask, rows, columns, diameter: float) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) float32 and (h, w) bool: the region, at most 96 pixels wide, with half a diameter around it."""
    pad = int(0.5 * diameter) + 2
    window = tuple(slice(max(0, line[0] - pad), line[-1] + pad + 1) for line in (rows, columns))
    inside = mask[window].astype(np.float32)
    scale = min(1.0, _DIAMETER / diameter)
    size = (max(1, round(inside.shape[1] * scale)), max(1, round(inside.shape[0] * scale)))
    part = pixels[window].astype(np.float32)
    planes = np.moveaxis(part, 2, 0) if part.ndim == 3 else np.stack([part] * 3)
    small = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in (*planes, inside)]
    return np.stack(small[:3], 2), small[3] >= 0.5


def _measure_greys(shown: np.ndarray, inside: np.ndarray, diameter: float) -> Measures:
    grey = shown @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    depth, away = ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside)
    core, rim = depth > 0.08 * diameter + 1, (away > 1) & (away <= 0.3 * diameter + 1)
    # Black is air, or outside the field of view; white is bone, or a reflection: a lesion is compared with the tissue.
    is_tissue = (grey > BLACK) & (grey < WHITE)
    if not core.any() or not rim.any() or (rim & is_tissue).sum() < 0.3 * rim.sum():
        return {}
    colour = shown[depth > 1].mean(0) - shown[rim & is_tissue].mean(0)
    found = {
        "brightness": float(grey[depth > 1].mean() - grey[rim & is_tissue].mean()),
        "contrast": float(np.linalg.norm(colour) / np.sqrt(3)),
        "texture": float(grey[core].std()),
    }
    sharpness = _sharpness(grey, np.where(is_tissue, away, 0), depth, max(1.5, 0.05 * diameter))
    return found | ({} if sharpness is None else {"margin": sharpness})


def _sharpness(grey: np.ndarray, away: np.ndarray, depth: np.ndarray, width: float) -> float | None:
    """Median over sectors of near step / far step; None where fewer than half of the sectors have a step."""
    rows, columns = np.nonzero(depth)
    every_row, every_column = np.indices(grey.shape)
    angle = np.arctan2(every_row - rows.mean(), every_column - columns.mean())
    sector = ((angle + np.pi) / (2 * np.pi) * SECTORS).astype(int) % SECTORS
    means = []
    for line in (depth, away):
        for band in ((line > 0) & (line <= width), (line > 2 * width) & (line <= 4 * width)):
            count, total = np.bincount(sector[band], None, SECTORS), np.bincount(sector[band], grey[band], SECTORS)
            means.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    near, far = means[0] - means[2], means[1] - means[3]
    has_step = (np.abs(far) >= LEAST_STEP) & np.isfinite(near)
    return float(np.median(near[has_step] / far[has_step])) if has_step.sum() >= SECTORS / 2 else None


def _regularity(inside: np.ndarray) -> float | None:
    """None where the ellipse's axes differ by more than `LONG`."""
    rows, columns = np.nonzero(inside)
    offsets = np.stack([rows - rows.mean(), columns - columns.mean()])
    covariance = offsets @ offsets.T / len(rows)
    small, large = np.sqrt(np.linalg.eigvalsh(covariance))
    if large > LONG * small:
        return None
    every = np.indices(inside.shape).reshape(2, -1) - np.array([[rows.mean()], [columns.mean()]])
    # A uniform ellipse has semi-axes of two standard deviations.
    ellipse = (every * np.linalg.solve(covariance, every)).sum(0).reshape(inside.shape) <= 4
    return float((ellipse & inside).sum() / (ellipse | inside).sum())


def thresholds_of(regions: Iterable[tuple[str, str, Measures]]) -> Thresholds:
    """(modality, label, measures) of regions -> "modality|label" -> measure -> [third, two thirds].

    Where fewer than `FEWEST` regions have a measure, it has no entry. The label "" stands for every finding.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for modality, label, measures in regions:
        for name, value in measures.items():
            values[f"{modality}|{label}"][name].append(value)
    return {
        key: {name: _thirds(column, name) for name, column in sorted(columns.items()) if len(column) >= FEWEST}
        for key, columns in sorted(values.items())
    }


def _thirds(column: list[float], name: str) -> list[float]:
    low, high = (float(q) for q in np.quantile(column, (1 / 3, 2 / 3)))
    apart = max(0.0, LEAST.get(name, 0.0) - (high - low)) / 2
    return [round(low - apart, 4), round(high + apart, 4)]


def third_of(thresholds: Thresholds, modality: str, label: str, name: str, value: float | None) -> int | None:
    """0, 1 or 2: the third that a measure falls into among its label and modality (among all findings of the
    modality where the label is rare); None where neither is known."""
    limits = thresholds.get(f"{modality}|{label}", {}).get(name) or thresholds.get(f"{modality}|", {}).get(name)
    return None if limits is None or value is None else int(value > limits[0]) + int(value >= limits[1])


def looks_of(measures: Mapping[str, float], thresholds: Thresholds, modality: str, label: str) -> dict[str, str]:
    """Measure -> word, for those that are beyond doubt: {"brightness": "darker", "margin": "sharp"}."""
    found = {}
    if abs(measures.get("brightness", 0.0)) >= CLEARLY:
        found["brightness"] = "brighter" if measures["brightness"] > 0 else "darker"
    for name, (low, high) in LOOKS.items():
        third = third_of(thresholds, modality, label, name, measures.get(name))
        if third in (0, 2):
            found[name] = high if third else low
    return found
