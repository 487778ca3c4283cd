"""Exact areas of unions of boxes.

Boxes are (N, 4) xyxy in any one unit. The edges of all boxes cut the plane into cells that each box covers wholly or
not at all, so no pixel grid is needed; `grid` asks for one where another program's rounding is to be followed.
"""

from collections.abc import Sequence

import numpy as np


def union_area(boxes: np.ndarray | Sequence) -> float:
    """Area that at least one box covers; 0 without boxes. Inverted boxes cover nothing."""
    return joint_areas(boxes, [])[0]


def joint_areas(a: np.ndarray | Sequence, b: np.ndarray | Sequence) -> tuple[float, float, float]:
    """(area of the union of a, of the union of b, of what both unions cover)."""
    a, b = (_proper(boxes) for boxes in (a, b))
    both = np.concatenate([a, b])
    xs, ys = np.unique(both[:, 0::2]), np.unique(both[:, 1::2])
    covered = [_covered(boxes, xs, ys) for boxes in (a, b)]
    widths, heights = np.diff(xs), np.diff(ys)
    area_a, area_b, area_both = (float(widths @ cells @ heights) for cells in (*covered, covered[0] & covered[1]))
    return area_a, area_b, area_both


def union_iou(a: np.ndarray | Sequence, b: np.ndarray | Sequence) -> float:
    """Intersection over union of the two unions; 0 where both are empty."""
    area_a, area_b, both = joint_areas(a, b)
    return both / (area_a + area_b - both) if area_a + area_b > 0 else 0.0


def covered_share(
    boxes: np.ndarray | Sequence, evidence: np.ndarray | Sequence, grid: int | None = None
) -> float | None:
    """Share of the area of `boxes` together that lies in the union of `evidence`; None where they have no area.

    grid: boxes in [0, 1] are first cut down to whole pixels of a grid x grid image (224 is RadFact's).
    """
    if grid is not None:
        boxes, evidence = (np.trunc(np.asarray(x, float).reshape(-1, 4) * grid) for x in (boxes, evidence))
    area, _, both = joint_areas(boxes, evidence)
    return both / area if area > 0 else None


def mostly_covered(boxes: np.ndarray | Sequence, evidence: np.ndarray | Sequence, grid: int | None = None) -> bool:
    """RadFact's rule: does more than half of the boxes' area lie in the union of the evidence's? Not without area."""
    part = covered_share(boxes, evidence, grid)
    return part is not None and part > 0.5 + 1e-9  # exactly half stays half, whatever the rounding


def _proper(boxes: np.ndarray | Sequence) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def _covered(boxes: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """(X - 1, Y - 1) bool: which cells between the sorted edges some box covers."""
    cells = np.zeros((max(len(xs) - 1, 0), max(len(ys) - 1, 0)), bool)
    left, right = np.searchsorted(xs, boxes[:, 0]), np.searchsorted(xs, boxes[:, 2])
    top, bottom = np.searchsorted(ys, boxes[:, 1]), np.searchsorted(ys, boxes[:, 3])
    for x1, x2, y1, y2 in zip(left, right, top, bottom, strict=True):
        cells[x1:x2, y1:y2] = True
    return cells
