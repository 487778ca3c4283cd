import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from grounding.boxes import generalised_iou, nms, pairwise_iou
from grounding.types import (
    RegionError,
    RegionSet,
    RegionTokens,
    load_region_tokens,
    read_regions,
    save_region_tokens,
    stack_region_tokens,
    write_regions,
)


def some_regions() -> RegionSet:
    return RegionSet(
        boxes=np.array([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]),
        labels=["brain/lesion", "brain"],
        image_size=(120, 80),
        scores=np.array([0.9, 0.25]),
        masks=[{"size": [120, 80], "counts": "a"}, {"size": [120, 80], "counts": "b"}],
        queries=[{"phrase": "tumour", "label": None, "presence": 0.02}],
        attributes=[{"margin": "sharp"}, {}],
    )


def some_tokens(n: int, images: int = 1) -> RegionTokens:
    return RegionTokens(
        features=torch.randn(images, n, 6),
        boxes=torch.rand(images, n, 4),
        scores=torch.rand(images, n),
        labels=[[f"label {k}" for k in range(n)] for _ in range(images)],
        label_vectors=torch.randn(images, n, 5),
        levels=torch.zeros(images, n, dtype=torch.long),
        valid=torch.ones(images, n, dtype=torch.bool),
        queries=[[{"phrase": "lesion", "label": "brain/lesion", "presence": 0.5}] for _ in range(images)],
    )


def test_region_set_survives_json():
    regions = some_regions()
    again = RegionSet.from_dict(json.loads(json.dumps(regions.to_dict())))
    assert again.to_dict() == regions.to_dict()
    np.testing.assert_allclose(again.boxes, regions.boxes, atol=1e-6)


def test_region_set_survives_coco():
    regions = some_regions()
    rows = regions.to_coco(7, {"brain/lesion": 1, "brain": 2})
    assert rows[0]["bbox"] == pytest.approx([8, 24, 32, 84], rel=1e-5)
    again = RegionSet.from_coco(rows, {1: "brain/lesion", 2: "brain"}, regions.image_size)
    np.testing.assert_allclose(again.boxes, regions.boxes, atol=1e-6)
    assert (again.labels, again.masks) == (regions.labels, regions.masks)


def test_a_region_may_have_a_box_alone():
    whole = some_regions()
    regions = replace(whole, masks=[None, whole.masks[1]])
    assert regions.full_masks is None and whole.full_masks == whole.masks
    again = RegionSet.from_dict(json.loads(json.dumps(regions.to_dict())))
    rows = regions.to_coco(7, {"brain/lesion": 1, "brain": 2})
    back = RegionSet.from_coco(rows, {1: "brain/lesion", 2: "brain"}, regions.image_size)
    assert again.masks == back.masks == regions.masks and "segmentation" not in rows[0]
    assert regions.select([1]).full_masks == [whole.masks[1]] and regions.select([0]).masks is None
    assert regions.select([1, 0]).masks == [whole.masks[1], None]
    assert replace(whole, masks=[None, None]).masks is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"boxes": [[0.5, 0.2, 0.1, 0.9], [0, 0, 1, 1]]}, "inverted"),
        ({"boxes": [[0.1, 0.2, 0.5, 1.9], [0, 0, 1, 1]]}, "outside"),
        ({"boxes": [[0.1, float("nan"), 0.5, 0.9], [0, 0, 1, 1]]}, "not finite"),
        ({"labels": ["brain"]}, "2 boxes but 1 labels"),
        ({"scores": [0.1, 0.2, 0.3]}, "2 boxes but 3 scores"),
        ({"masks": [None]}, "2 boxes but 1 masks"),
        ({"masks": [None, "aaa"]}, "mask 1 is aaa, not a COCO RLE"),
    ],
)
def test_region_set_refuses_what_breaks_the_contract(change, says):
    fields = {"boxes": [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], "labels": ["a", "b"], "image_size": (10, 10)}
    with pytest.raises(RegionError, match=says):
        RegionSet(**(fields | change))


def test_regions_file_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "regions.jsonl"
    write_regions(path, {"a": some_regions(), "b": some_regions()})
    assert read_regions(path)["b"].to_dict() == some_regions().to_dict()
    path.write_text(path.read_text() + '{"image_id": "c", "image_size": [4, 4], "regions": [{"box": [0, 0, 1]}]}\n')
    with pytest.raises(RegionError, match="regions.jsonl:3"):
        read_regions(path)


def test_region_tokens_survive_the_disk(tmp_path):
    tokens = some_tokens(3, images=2)
    save_region_tokens(
        tmp_path / "t.safetensors", ["a", "b"], tokens, {"checkpoint": "abc"}, {"lesion": torch.arange(5.0)}
    )
    ids, again, meta, vocabulary = load_region_tokens(tmp_path / "t.safetensors")
    assert torch.equal(vocabulary["lesion"], torch.arange(5.0))
    assert (ids, meta, again.labels, again.queries) == (
        ["a", "b"],
        {"checkpoint": "abc"},
        tokens.labels,
        tokens.queries,
    )
    for name in RegionTokens.TENSORS:
        assert torch.equal(getattr(again, name), getattr(tokens, name))


def test_stacking_pads_with_invalid_regions():
    short, long = some_tokens(1), some_tokens(4)
    both = stack_region_tokens([short, long])
    assert both.valid.sum(1).tolist() == [1, 4]
    assert torch.equal(both.features[0, :1], short.features[0])
    assert not both.features[0, 1:].any()


def test_a_file_that_holds_no_region_tokens_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(RegionError, match="t.safetensors: not a region-token file"):
        load_region_tokens(path)


def test_overlaps():
    a = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    b = torch.tensor([[0.25, 0.0, 0.75, 1.0], [0.5, 0.0, 1.0, 1.0]])
    assert pairwise_iou(a, b)[0].tolist() == pytest.approx([1 / 3, 0])
    assert generalised_iou(a.expand(2, 4), b).tolist() == pytest.approx([1 / 3, 0])  # hulls hold nothing besides
    far = torch.tensor([[0.75, 0.0, 1.0, 1.0]])
    assert generalised_iou(a, far).item() == pytest.approx(-0.25)  # a quarter of the hull belongs to neither


def test_nms_keeps_the_best_of_each_heap():
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.01, 0, 0.5, 0.5], [0.6, 0.6, 1, 1]])
    assert nms(boxes, torch.tensor([0.3, 0.9, 0.5]), 0.5) == [1, 2]
