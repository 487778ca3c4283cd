"""Whose regions a prompt has: the controls of an experiment."""

import dataclasses

import pytest
import torch

from downstream.sources import RegionSource, TokenTable, check_source, open_source
from grounding.boxes import pairwise_iou
from grounding.labels import load_label_tree
from grounding.types import RegionTokens

TREE = load_label_tree()
LESION, INSULA = "brain/insula/left_insula/lesion", "brain/insula"
IMAGES = [f"image{i}" for i in range(6)]
PATIENTS = {image_id: f"patient{i // 2}" for i, image_id in enumerate(IMAGES)}


@pytest.fixture(scope="module")
def tables() -> dict[str, TokenTable]:
    """A lesion, an insula and a free row an image, other places and features in each."""
    random = torch.Generator().manual_seed(0)
    low = 0.3 + 0.4 * torch.rand(6, 3, 2, generator=random)
    tokens = RegionTokens(
        features=torch.randn(6, 3, 4, generator=random),
        boxes=torch.cat([low, low + 0.1], -1),
        scores=torch.rand(6, 3, generator=random),
        labels=[[LESION, INSULA, ""]] * 6,
        label_vectors=torch.randn(6, 3, 2, generator=random),
        levels=torch.zeros(6, 3, dtype=torch.long),
        valid=torch.tensor([[True, True, False]]).repeat(6, 1),
        queries=[[] for _ in range(6)],
    )
    predicted = TokenTable({x: i for i, x in enumerate(IMAGES)}, tokens, "hash", {LESION: torch.zeros(2)})
    return {"predicted": predicted, "annotated": dataclasses.replace(predicted, detector=None)}


def slots(source: RegionSource, image_id: str = "image0", k: int = 3) -> RegionTokens:
    return source.slots(image_id, frozenset(), TREE, k)


def opened(tables, name: str, **settings) -> RegionSource:
    return open_source(name, tables, PATIENTS, **settings)


@pytest.mark.parametrize("name", ["random", "jittered:0.2"])
def test_moved_boxes_have_the_same_labels_and_depend_on_image_and_seed(tables, name):
    own, moved = slots(opened(tables, "predicted")), slots(opened(tables, name))
    assert moved.labels == own.labels and torch.equal(moved.scores, own.scores)
    assert not torch.equal(moved.boxes[0, :2], own.boxes[0, :2])
    assert torch.equal(moved.boxes, slots(opened(tables, name)).boxes)
    assert not torch.equal(moved.boxes, slots(opened(tables, name, seed=1)).boxes)
    # Whatever is asked, the regions of an image are in one and the same place.
    named = opened(tables, name).slots("image0", frozenset([INSULA]), TREE, 1)
    assert torch.equal(named.boxes[0, 0], moved.boxes[0, 1])
    assert not slots(opened(tables, name, features="zero")).features.any()


def test_more_jitter_is_worse(tables):
    truth = opened(tables, "predicted")

    def quality(sigma: float) -> float:
        source = opened(tables, f"jittered:{sigma}")
        pairs = [(source.regions(x).boxes[0, :2], truth.regions(x).boxes[0, :2]) for x in IMAGES]
        return sum(pairwise_iou(a, b).diagonal().mean().item() for a, b in pairs)

    assert quality(0.0) == pytest.approx(6) and quality(0.05) > quality(0.2) > quality(1.0)


def test_a_source_is_named_rightly_or_refused(tables):
    for good in ("predicted", "annotated", "shuffled", "random", "empty", "jittered:0", "jittered:1e-1", "file:a"):
        check_source(good)
    for bad in ("", "jitter", "jittered", "random:1", "file:", "predicted:"):
        with pytest.raises(ValueError, match="known: predicted"):
            check_source(bad)
    for bad in ("jittered:x", "jittered:-1", "jittered:inf", "jittered:nan"):
        with pytest.raises(ValueError, match=f"{bad}.*such as jittered:0.1"):
            open_source(bad, tables, {})
    with pytest.raises(ValueError, match="'random' needs the predicted"):
        open_source("random", {}, {})


def test_the_slots_of_a_study(tables):
    source = opened(tables, "predicted")
    both, image_of = source.study_slots(["image3", "image1"], frozenset(), TREE, 5)
    assert both.labels[0] == [LESION, INSULA, LESION, INSULA, ""] and image_of == [0, 0, 1, 1, -1]
    for i, image_id in enumerate(("image3", "image1")):
        assert torch.equal(both.boxes[0, 2 * i : 2 * i + 2], slots(source, image_id).boxes[0, :2])
    other, _ = opened(tables, "shuffled").study_slots(["image3", "image1"], frozenset(), TREE, 5)
    assert other.labels == both.labels and (other.boxes[0, :4] != both.boxes[0, :4]).any(-1).all()
    nothing, image_of = opened(tables, "empty").study_slots(["image3", "image1"], frozenset(), TREE, 5)
    assert not nothing.valid.any() and nothing.valid.shape == (1, 5)


def test_regions_beyond_the_budget_are_counted(tables):
    source = opened(tables, "predicted")
    assert [source.beyond_budget(["image0"], k) for k in (1, 2, 3)] == [1, 0, 0]
    assert source.beyond_budget(["image0", "image1"], 3) == 1
    assert opened(tables, "empty").beyond_budget(["image0"], 1) == 0
