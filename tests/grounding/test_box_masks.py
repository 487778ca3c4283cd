"""Masks of boxes by tiny random checkpoints of SAM, SAM-HQ and SAM 2, saved and loaded."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from grounding.box_masks import add_masks, load_sam
from grounding.model import CheckpointError
from grounding.types import RegionSet
from tests.grounding.detectors import picture, sam

SIZE = (80, 120)


@pytest.fixture(scope="module", params=["sam", "sam_hq", "sam2"])
def segmenter(request, tmp_path_factory):
    return load_sam(sam(tmp_path_factory.mktemp("sam") / request.param, request.param), "cpu")


def regions(*boxes):
    return RegionSet(np.array(boxes).reshape(-1, 4), [f"r{k}" for k in range(len(boxes))], SIZE)


def test_masks_lie_in_their_boxes_and_follow_the_model(segmenter):
    image = picture(*SIZE)
    boxes = [(0.1, 0.1, 0.5, 0.6), (0.3, 0.2, 0.9, 0.95), (0, 0, 1, 1)]
    found = add_masks(regions(*boxes), image, segmenter)
    assert found.labels == ["r0", "r1", "r2"]
    masks = [rle.decode(mask) for mask in found.masks]
    for (x1, y1, x2, y2), mask in zip(boxes, masks, strict=True):
        assert mask.shape == SIZE
        rows, columns = np.nonzero(mask)
        assert len(rows) and rows.min() + 0.5 >= y1 * 80 and rows.max() + 0.5 <= y2 * 80
        assert columns.min() + 0.5 >= x1 * 120 and columns.max() + 0.5 <= x2 * 120
    assert np.mean(masks[2] == _by_the_model(segmenter, image)) > 0.98


def _by_the_model(segmenter, image):
    """The mask of the whole image as transformers' processors resize it: to the network input, then to the image."""
    from grounding.box_masks import _pixel_values

    pixels, (height, width) = _pixel_values(image, segmenter)
    box = torch.tensor([[[0.0, 0.0, width, height]]])
    with torch.no_grad():
        masks = segmenter.model(pixel_values=pixels[None], input_boxes=box, multimask_output=False).pred_masks[0]
    for size in ((segmenter.size, segmenter.size), SIZE):
        masks = torch.nn.functional.interpolate(masks[..., :height, :width], size, mode="bilinear")
    return (masks[0, 0] > 0).numpy()


def test_many_boxes_are_as_each_alone(segmenter):
    image, drawn = picture(*SIZE), np.random.default_rng(1)
    corners = np.sort(drawn.random((40, 2, 2)), 1).reshape(40, 4)
    together = add_masks(regions(*corners), image, segmenter).masks
    for k in (0, 35):
        alone = add_masks(regions(corners[k]), image, segmenter).masks[0]
        assert np.mean(rle.decode(alone) == rle.decode(together[k])) > 0.999


def test_none_or_an_empty_box_or_a_grey_image(segmenter):
    grey = picture(*SIZE)[..., 0]
    assert add_masks(regions(), grey, segmenter).masks is None
    assert rle.area(add_masks(regions((0.5, 0.5, 0.5, 0.5)), grey, segmenter).masks[0]) == 0


def test_wrong_images_and_folders_are_named(segmenter, tmp_path):
    with pytest.raises(ValueError, match=r"image of \(80, 120\), this one is \(64, 64\)"):
        add_masks(regions((0, 0, 1, 1)), picture(64, 64), segmenter)
    with pytest.raises(CheckpointError, match="cannot be loaded as a SAM model"):
        load_sam(tmp_path / "nowhere")
