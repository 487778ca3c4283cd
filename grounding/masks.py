"""Masks of regions: from the model's prototypes to COCO run lengths in the user's image, however large that is.

Dimension key: N regions, P prototypes, H W the user's image, h w a part of it, S the network input.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch.nn import functional as F

from grounding.images import Letterbox

WEIGHED, AT_ONCE = 512, 64  # masks that are held at a time: at the prototypes' size, at the network's
MANY_PIXELS = 4_000_000  # of one box: beyond, every second, third ... pixel is looked at and stands for its neighbours


@dataclass(frozen=True)
class View:
    """What the network saw: a whole image in its letterbox, or (``window`` = top, left, height, width in pixels) a tile
    of an image of ``image_size`` (H, W)."""

    box: Letterbox
    image_size: tuple[int, int]
    window: tuple[int, int, int, int] | None = None

    def invert(self, boxes: torch.Tensor) -> torch.Tensor:
        """(..., 4) in [0, 1] of the network input → [0, 1] of the user's image."""
        inside = self.box.invert(boxes).clamp(0, 1)
        if self.window is None:
            return inside
        (top, left, height, width), (h, w) = self.window, self.image_size
        scale, shift = inside.new_tensor([width, height] * 2), inside.new_tensor([left, top] * 2)
        return ((inside * scale + shift) / inside.new_tensor([w, h] * 2)).clamp(0, 1)


def decode_masks(
    coefficients: torch.Tensor, prototypes: torch.Tensor, boxes: torch.Tensor, view: View
) -> list[dict[str, Any]]:
    """COCO RLE in the user's image, N: prototypes (P, h, w) weighed by coefficients (N, P), half and over, inside the
    region's box (N, 4) of the network input.

    Only the pixels of the box are looked at: a region is small, and the image may have millions.
    """
    masks = []
    for start in range(0, len(boxes), WEIGHED):
        rows = slice(start, start + WEIGHED)
        logits = torch.einsum("np,phw->nhw", coefficients[rows], prototypes)
        masks += [_encode(one, box, view) for one, box in _unpadded(logits, boxes[rows], view.box)]
    return masks


def _unpadded(logits: torch.Tensor, boxes: torch.Tensor, box: Letterbox) -> Iterator[tuple[torch.Tensor, list[float]]]:
    """Logits of the image alone, without the letterbox's padding, and the box in [0, 1] of it, mask by mask."""
    top, left, height, width = box.content
    for some, near in zip(logits[:, None].split(AT_ONCE), boxes.split(AT_ONCE), strict=True):
        full = F.interpolate(some, size=(box.size, box.size), mode="bilinear", align_corners=False)
        full = full[:, :, top : top + height, left : left + width]
        yield from zip(full, box.invert(near).clamp(0, 1).tolist(), strict=True)


def _encode(logits: torch.Tensor, box: list[float], view: View) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    h, w = view.box.image_size
    rows, columns = _centres_inside(y1, y2, h), _centres_inside(x1, x2, w)
    top, left = (0, 0) if view.window is None else view.window[:2]
    inside = _sampled(logits[None], rows, columns, (h, w))
    return encode_inside(inside, rows.start + top, columns.start + left, view.image_size)


def _centres_inside(low: float, high: float, side: int) -> range:
    """The pixels whose centres lie strictly between two edges in [0, 1]."""
    return range(math.floor(low * side - 0.5) + 1, math.ceil(high * side - 0.5))


def _sampled(logits: torch.Tensor, rows: range, columns: range, size: tuple[int, int]) -> np.ndarray:
    """(1, 1, h', w') logits of the whole image → bool at those pixels of it at (H, W); as F.interpolate would."""
    if logits.shape[-2:] == size:
        return (logits[0, 0, rows.start : rows.stop, columns.start : columns.stop] > 0).numpy()
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), bool)
    step = math.ceil(math.sqrt(len(rows) * len(columns) / MANY_PIXELS))
    inside = _sampled_at(logits, rows[step // 2 :: step] or rows, columns[step // 2 :: step] or columns, size)
    if step == 1:
        return inside
    # Pixel k of a row has its sample at k // step; behind the last sample, the last one stands.
    near = [np.minimum(np.arange(len(r)) // step, n - 1) for r, n in zip((rows, columns), inside.shape, strict=True)]
    return inside[near[0]][:, near[1]]


def _sampled_at(logits: torch.Tensor, rows: range, columns: range, size: tuple[int, int]) -> np.ndarray:
    y, x = ((torch.tensor(r) + 0.5) / side * 2 - 1 for r, side in zip((rows, columns), size, strict=True))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    return (F.grid_sample(logits, grid, padding_mode="border", align_corners=False)[0, 0] > 0).numpy()


def encode_inside(inside: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO RLE of the (H, W) mask that is `inside` (h, w) bool at (top, left), and zero elsewhere."""
    h, w = inside.shape
    padded = np.zeros((w, h + 2), bool)  # run lengths go down the columns
    padded[:, 1:-1] = inside.T
    columns, rows = np.nonzero(padded[:, 1:] != padded[:, :-1])
    edges = (columns + left) * size[0] + rows + top
    starts, ends = edges[::2], edges[1::2]
    apart = starts[1:] != ends[:-1]  # a run to the foot of a column goes on at the head of the next
    starts, ends = starts[np.r_[True, apart][: len(starts)]], ends[np.r_[apart, True][: len(ends)]]
    counts = np.diff(np.r_[0, np.stack([starts, ends], 1).ravel(), size[0] * size[1]])
    counts = counts if counts[-1] else counts[:-1]  # as COCO writes it
    coded = rle.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": coded["counts"].decode()}
