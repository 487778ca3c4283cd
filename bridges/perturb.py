"""Regions in a wrong place, for the controls of an experiment: near their own (`jittered`), or anywhere (`elsewhere`).

Labels, scores and levels stay. A feature belongs to a place, not to a name: a moved region has the feature of the
region of the same image that its new box covers (IoU at least 0.5), its own included, and a feature of zeros where
there is none. What was looked for and not found has no box, and stays as it is.
Dimension key: N regions of one image. Boxes are xyxy in [0, 1].
"""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from grounding.boxes import intersection, pairwise_iou
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

COVERED = 0.5  # IoU from which on a box shows the same as another: that of AP50
TRIES = 64  # places that are tried for a box that should not lie on its old one


def jittered(regions: RegionTokens, seed: str, sigma: float) -> RegionTokens:
    """Boxes of a batch of one moved by a normal deviate of `sigma` box sides along each axis, their sides multiplied by
    the exponential of another, clipped to the image. Of one seed a larger sigma moves the same way, only farther.

    Raises ValueError for a negative sigma.
    """
    if sigma < 0:
        raise ValueError(f"jittered boxes: sigma is {sigma}, must not be negative")
    deviates = _generator(seed).standard_normal((regions.valid.shape[1], 4)) * sigma
    move, grow = torch.from_numpy(deviates).to(regions.boxes).split(2, dim=-1)
    low, high = regions.boxes[0, :, :2], regions.boxes[0, :, 2:]
    sides, centre = high - low, (low + high) / 2
    move = (centre + move * sides).clamp(0, 1) - centre  # the centre stays inside, so that something of a box does
    more = sides * grow.expm1() / 2
    return _moved(regions, torch.cat([low + move - more, high + move + more], -1).clamp(0, 1))


def elsewhere(regions: RegionTokens, seed: str) -> RegionTokens:
    """Boxes of a batch of one, of the same sizes, each at a random place inside the image, off its old one where there
    is room: of `TRIES` uniform places the first with the least IoU."""
    boxes = regions.boxes[0]
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(0, 1)
    places = torch.from_numpy(_generator(seed).random((len(boxes), TRIES, 2))).to(boxes)
    low = places * (1 - sides)[:, None]
    tried = torch.cat([low, low + sides[:, None]], -1)
    overlap = intersection(boxes[:, None], tried)  # of boxes of one size the IoU grows with it
    first = overlap.numpy().argmin(1)  # the first of several, which torch does not promise
    return _moved(regions, tried[torch.arange(len(boxes)), torch.from_numpy(first)].clamp(0, 1))


def _moved(regions: RegionTokens, boxes: torch.Tensor) -> RegionTokens:
    """`regions` with `boxes` (N, 4), and the features of what those cover."""
    found = regions.valid[0] & (regions.levels[0] != NOT_FOUND_LEVEL)
    overlap = pairwise_iou(boxes, regions.boxes[0]) * found
    overlap.diagonal().add_(1e-6)  # its own, where another has the same box
    best, source = overlap.max(1)
    features = regions.features[0, source] * (best >= COVERED)[:, None]
    kept = ~found[:, None]
    return replace(
        regions,
        boxes=torch.where(kept, regions.boxes[0], boxes)[None],
        features=torch.where(kept, regions.features[0], features)[None],
    )


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
