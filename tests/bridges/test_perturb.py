"""Regions in a wrong place: how far, where to, and whose features they have there."""

from dataclasses import replace

import pytest
import torch

from bridges.perturb import elsewhere, jittered
from grounding.boxes import pairwise_iou
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

N = 40


@pytest.fixture
def regions() -> RegionTokens:
    """Small boxes, the last of them "not found", and before it a free row."""
    random = torch.Generator().manual_seed(0)
    low = 0.1 + 0.6 * torch.rand(1, N, 2, generator=random)
    boxes = torch.cat([low, low + 0.05 + 0.1 * torch.rand(1, N, 2, generator=random)], -1)
    boxes[0, -1] = 0
    levels = torch.zeros(1, N, dtype=torch.long)
    levels[0, -1] = NOT_FOUND_LEVEL
    return RegionTokens(
        features=torch.randn(1, N, 5, generator=random) * (levels != NOT_FOUND_LEVEL)[..., None],
        boxes=boxes,
        scores=torch.rand(1, N, generator=random),
        labels=[[f"label {i}" for i in range(N)]],
        label_vectors=torch.randn(1, N, 3, generator=random),
        levels=levels,
        valid=torch.arange(N)[None] != N - 2,
        queries=[[]],
    )


def iou(a: RegionTokens, b: RegionTokens) -> torch.Tensor:
    return pairwise_iou(a.boxes[0, :-2], b.boxes[0, :-2]).diagonal()


@pytest.mark.parametrize("moved", [elsewhere, lambda regions, seed: jittered(regions, seed, 0.3)])
def test_what_is_moved_and_what_is_not(regions, moved):
    there = moved(regions, "0/a")
    assert torch.equal(there.boxes, moved(regions, "0/a").boxes)
    assert not torch.equal(there.boxes, moved(regions, "1/a").boxes)
    assert not torch.equal(there.boxes, moved(regions, "0/b").boxes)
    assert there.boxes.min() >= 0 and there.boxes.max() <= 1 and (there.boxes[..., 2:] >= there.boxes[..., :2]).all()
    for name in ("scores", "label_vectors", "levels", "valid"):
        assert torch.equal(getattr(there, name), getattr(regions, name))
    assert there.labels == regions.labels
    assert torch.equal(there.boxes[0, -2:], regions.boxes[0, -2:])  # free, and not found
    assert not there.features[0, -1].any()


def test_elsewhere_keeps_the_size_and_leaves_the_place(regions):
    there = elsewhere(regions, "0/a")
    sides, before = (r.boxes[0, :-2, 2:] - r.boxes[0, :-2, :2] for r in (there, regions))
    assert torch.allclose(sides, before, atol=1e-6)
    assert iou(there, regions).max() == 0  # there is room enough


def test_what_fills_the_image_stays_where_it_is(regions):
    regions.boxes[0, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    there = elsewhere(regions, "0/a")
    assert torch.equal(there.boxes[0, 0], regions.boxes[0, 0])
    assert torch.equal(there.features[0, 0], regions.features[0, 0])


def test_no_jitter_changes_nothing_and_more_jitter_goes_farther(regions):
    still = jittered(regions, "0/a", 0.0)
    assert torch.equal(still.boxes, regions.boxes) and torch.equal(still.features, regions.features)
    overlaps = [iou(jittered(regions, "0/a", sigma), regions).mean().item() for sigma in (0.05, 0.1, 0.2, 0.5, 2.0)]
    assert overlaps == sorted(overlaps, reverse=True) and overlaps[0] > 0.85 and overlaps[-1] < 0.2
    with pytest.raises(ValueError, match="must not be negative"):
        jittered(regions, "0/a", -0.1)


def test_jitter_is_in_box_sides(regions):
    """The centres of many boxes of one size move by sigma sides, along each axis by its own."""
    boxes = torch.tensor([0.4, 0.45, 0.6, 0.55]).repeat(1, N, 1)
    given = replace(regions, boxes=boxes, levels=torch.zeros(1, N, dtype=torch.long))
    moves = []
    for seed in range(50):
        there = jittered(given, f"{seed}/a", 0.1).boxes[0, :-2]
        moves.append((there[:, :2] + there[:, 2:]) / 2 - torch.tensor([0.5, 0.5]))
    x, y = torch.cat(moves).std(0).tolist()
    assert x == pytest.approx(0.1 * 0.2, rel=0.1) and y == pytest.approx(0.1 * 0.1, rel=0.1)


def test_a_feature_belongs_to_the_place(regions):
    near = jittered(regions, "0/a", 0.05)
    kept = iou(near, regions) >= 0.5
    assert kept.float().mean() > 0.8
    own, there = regions.features[0, :-2], near.features[0, :-2]
    assert torch.equal(there[kept], own[kept])
    far = elsewhere(regions, "0/a")
    overlap = pairwise_iou(far.boxes[0, :-2], regions.boxes[0, :-2])
    for i, row in enumerate(overlap):
        expected = own[row.argmax()] if row.max() >= 0.5 else torch.zeros(5)
        assert torch.equal(far.features[0, i], expected)
    assert (overlap.max(1).values < 0.5).any()
