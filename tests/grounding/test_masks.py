"""Masks are sampled inside their boxes alone: the same bits as sampling the whole image and cutting."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch.nn import functional as F

from grounding.masks import _centres_inside, _sampled, encode_inside


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_of_a_part_are_those_of_the_whole(seed):
    rng = np.random.default_rng(seed)
    size, top, left = (37, 23), int(rng.integers(0, 20)), int(rng.integers(0, 12))
    whole = np.zeros(size, np.uint8)
    inside = rng.random((rng.integers(0, 17), rng.integers(0, 11))) > rng.choice([0.0, 0.5, 1.0])
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    coded = rle.encode(np.asfortranarray(whole))
    assert encode_inside(inside, top, left, size)["counts"] == coded["counts"].decode()


def test_run_lengths_of_full_and_empty_masks():
    full, empty = (
        encode_inside(np.ones((4, 3), bool), 0, 0, (4, 3)),
        encode_inside(np.zeros((0, 0), bool), 0, 0, (4, 3)),
    )
    assert rle.decode(full).all() and not rle.decode(empty).any()


@pytest.mark.parametrize("size", [(48, 48), (96, 64), (31, 57)])
def test_sampling_in_a_box_is_interpolating_and_cutting(size):
    logits = torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0] > 0
    rows, columns = _centres_inside(0.21, 0.83, size[0]), _centres_inside(0.0, 0.5, size[1])
    y, x = ((np.arange(side) + 0.5) / side for side in size)
    assert list(rows) == np.flatnonzero((y > 0.21) & (y < 0.83)).tolist()
    assert list(columns) == np.flatnonzero((x > 0) & (x < 0.5)).tolist()
    part = _sampled(logits, rows, columns, size)
    differing = part != whole[rows.start : rows.stop, columns.start : columns.stop].numpy()
    assert differing.mean() < 0.001  # a logit of 1e-7 may fall on either side


def test_an_edge_on_a_centre_holds_neither():
    assert list(_centres_inside(0.125, 0.875, 4)) == [1, 2] and not list(_centres_inside(0.3, 0.3, 4))
