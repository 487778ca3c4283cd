"""What augmentation shows is what its boxes, masks and labels say; a side changes with the image, or it stays."""

import random

import numpy as np
import pytest
from pycocotools import mask as rle

from grounding.augment import POLICIES, View, augment, draw_view, mirrored, tile, tone, twin
from grounding.data import Collator
from grounding.labels import load_label_tree
from grounding.model import MODALITIES
from grounding.types import GroundingSample, RegionSet

TREE = load_label_tree()
LEFT, RIGHT = "brain/insula/left_insula", "brain/insula/right_insula"
EVERY = {LEFT, RIGHT, "brain/insula", "brain/lesion", "skin/skin_lesion"}


def painted(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 200
    return image


def sample_of(image: np.ndarray, boxes, labels, modality="mri", labelled=()) -> GroundingSample:
    height, width = image.shape
    masks = [rle.encode(np.asfortranarray(painted(height, width, box) // 200)) for box in boxes]
    masks = [{"size": list(mask["size"]), "counts": mask["counts"].decode()} for mask in masks]
    unit = np.array(boxes, np.float32) / np.array([width, height] * 2, np.float32)
    regions = RegionSet(unit, list(labels), (height, width), masks=masks)
    return GroundingSample("a", "p", "s", modality, b"", regions, tuple(labelled))


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("window", [(0, 0, 30, 50), (-7, 4, 40, 30), (3, -9, 20, 64)])
def test_boxes_follow_the_pixels_and_come_back(turns, mirror, window):
    box = (12, 8, 25, 19)
    view = View((30, 50), turns, mirror, window)
    seen = view.pixels(painted(30, 50, box))
    moved = view.apply(np.array([box], np.float32) / np.array([50, 30, 50, 30], np.float32))
    x1, y1, x2, y2 = (moved[0].clip(0, 1) * np.array([*seen.shape[::-1]] * 2)).round(4)
    rows, columns = np.nonzero(seen)
    if rows.size:
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
    else:
        assert x1 == x2 or y1 == y2
    back = view.invert(moved)[0] * np.array([50, 30, 50, 30])
    assert np.allclose(back, box, atol=1e-4)


def test_drawn_views_keep_proportions_and_hold_or_lie_in_the_image():
    for seed in range(200):
        policy = POLICIES["microscopy"]
        view = draw_view(random.Random(seed), (300, 500), policy, mirror=True)
        height, width = (500, 300) if view.turns % 2 else (300, 500)
        top, left, h, w = view.window
        assert h / w == pytest.approx(height / width, rel=0.01)
        assert 1 / policy.zoom - 0.01 < h / height < policy.zoom + 0.01
        inside = top >= 0 and left >= 0 and top + h <= height and left + w <= width
        around = top <= 0 and left <= 0 and top + h >= height and left + w >= width
        assert inside or around


def test_masks_and_boxes_of_a_view_agree_with_its_pixels():
    boxes = [(4, 6, 20, 18), (30, 10, 44, 26)]
    image = np.maximum(painted(40, 60, boxes[0]), painted(40, 60, boxes[1]))
    sample = sample_of(image, boxes, ["skin/skin_lesion", "skin/skin_lesion"], "dermoscopy")
    for seed in range(40):
        shown, pixels = augment(sample, image, random.Random(seed), TREE, EVERY)
        regions = shown.regions
        assert pixels.shape == regions.image_size
        for box, mask in zip(regions.boxes, regions.masks, strict=True):
            inside = rle.decode(mask).astype(bool)
            rows, columns = np.nonzero(inside)
            height, width = inside.shape
            edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.allclose(edges, box * np.array([width, height] * 2), atol=1e-3)
            assert pixels[inside].min() > pixels[~inside].min() or inside.all()


def test_a_mirrored_image_has_the_other_side_in_its_labels():
    box = (2, 10, 12, 20)
    image = painted(40, 60, box)
    sample = sample_of(image, [box], [LEFT], labelled=(LEFT, RIGHT, "brain/lesion"))
    sides = set()
    for seed in range(60):
        shown, pixels = augment(sample, image, random.Random(seed), TREE, EVERY)
        if len(shown.regions):
            centre = np.nonzero(pixels > pixels.min())[1].mean() / pixels.shape[1]
            label = shown.regions.labels[0]
            sides.add(label)
            assert (label == LEFT) == (shown.regions.boxes[0, ::2].mean() < 0.5) == (centre < 0.5)
            assert "brain/lesion" in shown.labelled
    assert sides == {LEFT, RIGHT}


@pytest.mark.parametrize(
    ("label", "other"),
    [
        (LEFT, RIGHT),
        ("brain/insula", "brain/insula"),
        ("brain/frontal_lobe/right_frontal_lobe/lesion", "brain/frontal_lobe/left_frontal_lobe/lesion"),
        ("chest/lung/right_lung/right_middle_lobe", None),
        ("mass in the left upper part", "mass in right upper part"),
        ("a nodule", "a nodule"),
    ],
)
def test_twins(label, other):
    assert twin(label, TREE) == other


@pytest.mark.parametrize(
    ("label", "modality", "known"),
    [
        (LEFT, "mri", {LEFT}),  # nobody trains the other side
        ("chest/lung/left_lung", "xray", {"chest/lung/left_lung", "chest/lung/right_lung"}),  # the heart would be right
        ("mass in the left upper part", "mri", {"mass in the left upper part"}),
    ],
)
def test_what_cannot_be_mirrored_is_not(label, modality, known):
    sample = sample_of(np.zeros((10, 10), np.uint8), [(1, 1, 4, 4)], [label], modality)
    assert mirrored(sample, POLICIES[modality], TREE, known) is None


def test_a_region_cut_to_a_sliver_is_neither_there_nor_absent():
    image = painted(100, 100, (0, 0, 50, 50))
    states = set()
    for seed in range(300):
        sample = sample_of(image, [(0, 0, 8, 8)], [LEFT], labelled=(LEFT, RIGHT, "brain/insula"))
        shown, _ = augment(sample, image, random.Random(seed), TREE, {LEFT})
        there, known = bool(len(shown.regions)), LEFT in shown.labelled
        states.add((there, known))
        assert known == ("brain/insula" in shown.labelled) and RIGHT in shown.labelled
    assert states == {(True, True), (False, True), (False, False)}


def test_only_what_has_no_up_is_turned():
    turned = {modality for modality, policy in POLICIES.items() if policy.turns}
    assert turned == {"dermoscopy", "microscopy"} and POLICIES.keys() == set(MODALITIES)
    for modality, policy in POLICIES.items():
        views = [draw_view(random.Random(seed), (30, 50), policy, True) for seed in range(30)]
        assert any(view.turns for view in views) == (modality in turned)


@pytest.mark.parametrize("modality", MODALITIES)
def test_tone_changes_no_hue(modality):
    colour = np.random.default_rng(0).integers(70, 180, (16, 16, 3), dtype=np.uint8)
    for seed in range(20):
        other = tone(random.Random(seed), colour, modality).astype(int)
        darker = colour[..., 0].astype(int) < colour[..., 1]
        assert (other[..., 0] <= other[..., 1])[darker].all()
        grey = np.repeat(colour[..., :1], 3, 2)
        assert np.ptp(tone(random.Random(seed), grey, modality), axis=2).max() == 0


def test_the_window_of_ct_moves_and_narrows():
    ramp = np.arange(256, dtype=np.uint8)[None]
    seen = [tone(random.Random(seed), ramp, "ct")[0].astype(int) for seed in range(50)]
    widths = [(np.diff(row) > 0).mean() for row in seen]
    centres = [int(np.abs(row - 128).argmin()) for row in seen]
    assert min(widths) < 0.85 and np.ptp(centres) > 30 and all((np.diff(row) >= 0).all() for row in seen)


def test_the_same_draw_gives_the_same_view():
    image = painted(40, 60, (4, 6, 20, 18))
    sample = sample_of(image, [(4, 6, 20, 18)], [LEFT])
    one, two = (augment(sample, image, random.Random("0/3/a"), TREE, EVERY) for _ in range(2))
    assert (one[1] == two[1]).all() and (one[0].regions.boxes == two[0].regions.boxes).all()


def test_a_tile_shows_lesions_larger_and_leaves_out_what_it_does_not_show():
    box = (100, 60, 106, 66)
    sample = sample_of(painted(200, 400, box), [box], ["skin/skin_lesion"], "dermoscopy", ("skin/skin_lesion",))
    seen = [tile(sample, painted(200, 400, box), random.Random(seed), TREE, tiles=4) for seed in range(40)]
    assert {pixels.shape for _, pixels in seen} == {(124, 124)}  # as `windows` cuts: 400 / (1 + 3 * 0.75)
    for cut, pixels in seen:
        assert len(cut.regions) in (0, 1)
        if len(cut.regions):
            x1, y1, x2, y2 = (cut.regions.boxes[0] * 124).round().astype(int)
            assert (pixels[y1:y2, x1:x2] == 200).all()
    assert 0 < sum(len(cut.regions) for cut, _ in seen) < 40


def test_only_images_of_small_findings_are_shown_in_tiles():
    collate = Collator([], TREE, 320, 0, tiles=4)
    small = sample_of(painted(200, 400, (100, 60, 106, 66)), [(100, 60, 106, 66)], ["skin/skin_lesion"])
    large = sample_of(painted(200, 400, (100, 60, 160, 120)), [(100, 60, 160, 120)], ["skin/skin_lesion"])
    assert collate._is_fine(small) and not collate._is_fine(large)
