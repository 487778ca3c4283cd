"""Regions drawn on an image and cut out of it."""

import numpy as np

from bridges.routes import NO_IMAGE
from downstream.pictures import CROPS, colours_of, cropped, crops, overlaid
from grounding.overlay import COLOURS

GREY = np.full((100, 200), 90, np.uint8)
BOX = np.array([0.25, 0.3, 0.5, 0.7], np.float32)


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_first_labels_have_colours_of_their_own():
    assert colours_of(["a", "b", "a", "c", ""]) == [0, 1, 0, 2, 0]
    assert colours_of([str(k) for k in range(8)]) == [0, 1, 2, 3, 4, 5, 0, 1]


def test_boxes_are_drawn_where_they_are_and_nothing_else_is_touched():
    (drawn,) = overlaid([GREY], BOX[None], [1], [0])
    assert drawn.shape == (100, 200, 3) and drawn.dtype == np.uint8
    assert drawn[50, 50].tolist() == rgb(COLOURS[1]) == drawn[69, 80].tolist()  # left and lower edge
    far = np.ones((100, 200), bool)
    far[25:75, 45:105] = False
    assert (drawn[far] == 90).all()
    assert (drawn[45:65, 75:95] == 90).all()  # inside, beside the number


def test_the_first_region_is_on_top():
    (drawn,) = overlaid([GREY], np.stack([BOX, BOX]), [2, 3], [0, 0])
    assert drawn[50, 50].tolist() == rgb(COLOURS[2])


def test_numbers_tell_regions_apart():
    one, other = (overlaid([GREY], np.stack([BOX] * 2), [0, 0], row)[0] for row in ([0, NO_IMAGE], [NO_IMAGE, 0]))
    assert (one != other).any() and (one[50:, 45:105] == other[50:, 45:105]).all()  # "r0" and "r1", at the upper corner


def test_each_image_has_its_own_regions_and_one_without_stays_as_it_is():
    first, second = overlaid([GREY, GREY], np.stack([BOX, BOX]), [0, 1], [NO_IMAGE, 1])
    assert first is GREY and (second != 90).any()


def test_a_box_at_the_border_is_drawn():
    for box in ([0, 0, 1, 1], [1, 1, 1, 1], [0.999, 0, 1, 0.001]):
        assert (overlaid([GREY], np.array([box], np.float32), [0], [0])[0] != 90).any()


def test_a_crop_shows_the_box_and_its_surroundings():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    cut = cropped(ramp, BOX)
    assert cut.shape == (60, 75)  # 40 x 50 pixels and half as much again
    assert (cut[0, 0], cut[0, -1]) == (37, 111)
    assert cropped(ramp, np.array([0.0, 0.0, 1.0, 1.0], np.float32)).shape == ramp.shape


def test_no_crop_is_too_small_to_see():
    for box in ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 0, 0], [0.3, 0.4, 0.301, 0.402]):
        height, width = cropped(GREY, np.array(box, np.float32)).shape
        assert 12 <= min(height, width) <= max(height, width) <= 26


def test_the_most_important_regions_are_cut_out_first():
    boxes = np.stack([BOX] * 7)
    chosen, cut = crops([GREY, GREY[:50]], boxes, [0, 0, 1, 1, 1, 0, NO_IMAGE], [6, 3, 0, 5, 2, 1, 4])
    assert chosen == [3, 0, 5, 2] and len(cut) == CROPS
    assert cut[0].shape == (30, 75) and cut[1].shape == (60, 75)
