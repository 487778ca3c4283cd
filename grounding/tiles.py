"""A large image seen in overlapping tiles, for lesions that are too small to be seen in the whole of it.

Dimension key: H, W the image; N candidates. A window is (top, left, height, width) in pixels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from grounding.boxes import nms
from grounding.decode import concatenated
from grounding.types import RegionSet

OVERLAP = 0.25  # of a tile's side: a lesion smaller than that is whole in one of them
EDGE = 0.005  # of a tile's side; a box that reaches so near to an inner edge is cut

Window = tuple[int, int, int, int]


def windows(image_size: tuple[int, int], tiles: int, smallest: int) -> list[Window]:
    """``tiles`` square windows along the longer side of an (H, W) image, and as many along the shorter as cover it, all
    inside the image. None where the image is not larger than ``smallest``: its tiles would show nothing more."""
    longer = max(image_size)
    if tiles < 2 or longer <= smallest:
        return []
    side = -(-longer // (1 + (tiles - 1) * (1 - OVERLAP)))
    (tops, height), (lefts, width) = (_starts(length, int(side)) for length in image_size)
    return [(top, left, height, width) for top in tops for left in lefts]


def _starts(length: int, side: int) -> tuple[list[int], int]:
    """Where windows begin along one side, evenly, and how long they are."""
    side = min(side, length)
    count = 1 + math.ceil((length - side) / (side * (1 - OVERLAP)) - 1e-9)
    return np.linspace(0, length - side, count).round().astype(int).tolist(), side


def whole_in(regions: RegionSet, window: Window) -> RegionSet:
    """``regions`` of a tile, in the image's frame, without those that an inner edge of the window cuts."""
    top, left, height, width = window
    h, w = regions.image_size
    x1, y1, x2, y2 = (regions.boxes * np.array([w, h, w, h], np.float32)).T
    cut = (x1 < left + EDGE * width) & (left > 0) | (x2 > left + width * (1 - EDGE)) & (left + width < w)
    cut |= (y1 < top + EDGE * height) & (top > 0) | (y2 > top + height * (1 - EDGE)) & (top + height < h)
    return regions.select(np.flatnonzero(~cut).tolist())


def merge(passes: Sequence[RegionSet], limit: Callable[[str], int]) -> RegionSet:
    """Candidates of the whole image (first) and of its tiles: non-maximum suppression within each label and phrase, at
    most ``limit(label)`` of each kept; best first, with the first's queries."""
    every = concatenated(passes)
    groups: dict[tuple[str, str], list[int]] = {}
    for k, label in enumerate(every.labels):
        groups.setdefault((label, every.texts[k] if every.texts else ""), []).append(k)
    boxes, scores = torch.from_numpy(every.boxes), torch.from_numpy(every.scores)
    kept = [rows[i] for (label, _), rows in groups.items() for i in nms(boxes[rows], scores[rows], 0.5)[: limit(label)]]
    return every.select(sorted(kept, key=lambda k: (-float(scores[k]), k)))
