"""Places in the image, parsed by rule: image left is not patient left."""

import numpy as np
import pytest

from grounding.labels import load_label_tree
from grounding.position import extreme, parse_position

TREE = load_label_tree()
SIDED = {label.split("/")[0] for label, node in TREE.nodes.items() if node.side}


def parse(phrase):
    def sided(thing):
        label = TREE.find(thing)
        return label is None or label.split("/")[0] in SIDED

    return parse_position(phrase, lambda name: TREE.find(name) is not None, sided)


UPPER, LOWER, MIDDLE, ALL = (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.0, 1.0)


@pytest.mark.parametrize(
    ("phrase", "thing", "columns", "rows", "superlative"),
    [
        ("the lesion in the upper left part", "lesion", UPPER, UPPER, None),
        ("lesion in the lower right part of the image", "lesion", LOWER, LOWER, None),
        ("polyp at the bottom", "polyp", ALL, LOWER, None),
        ("polyp on the left", "polyp", UPPER, ALL, None),
        ("left polyp", "polyp", UPPER, ALL, None),
        ("upper-left skin lesion", "skin lesion", UPPER, UPPER, None),
        ("nodule on the left of the image", "nodule", UPPER, ALL, None),
        ("nodule in the left half", "nodule", UPPER, ALL, None),
        ("polyp in the centre", "polyp", MIDDLE, MIDDLE, None),
        ("polyp in the upper middle part", "polyp", MIDDLE, UPPER, None),
        ("polyp in the upper third", "polyp", ALL, (0.0, 1 / 3), None),
        ("polyp in the middle third", "polyp", ALL, (1 / 3, 2 / 3), None),
        ("largest polyp", "polyp", ALL, ALL, "largest"),
        ("left-most nodule", "nodule", ALL, ALL, "leftmost"),
        ("the biggest red blood cell in the lower half", "red blood cell", ALL, LOWER, "largest"),
        ("smallest left lung nodule", "left lung nodule", ALL, ALL, "smallest"),
        ("uppermost polyp on the right side", "polyp", LOWER, ALL, "uppermost"),
    ],
)
def test_what_a_phrase_says_of_the_place(phrase, thing, columns, rows, superlative):
    found = parse(phrase)
    assert (found.thing, found.columns, found.rows, found.superlative) == (thing, columns, rows, superlative)


@pytest.mark.parametrize(
    "phrase",
    [
        "left lung",
        "left lung nodule",
        "left upper lobe of the lung",
        "nodule on the left",  # the patient's
        "lesion on the left side",
        "lesion in the left part of the brain",
        "left kidney",
        "polyp",
        "polyp at the upper bottom",
        "nodule in the left lung",
        "",
    ],
)
def test_sides_of_the_patient_stay_in_the_name(phrase):
    assert parse(phrase) is None


def test_boxes_are_chosen_by_their_centre():
    found = parse("polyp in the upper left part")
    boxes = np.array([[0.1, 0.1, 0.3, 0.3], [0.4, 0.1, 0.9, 0.3], [0.1, 0.6, 0.2, 0.9], [0.3, 0.3, 0.69, 0.69]])
    assert found.inside(boxes).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("superlative", "expected"),
    [
        ("largest", 2),
        ("smallest", 0),
        ("leftmost", 0),
        ("rightmost", 1),
        ("uppermost", 1),
        ("lowermost", 2),
        ("most central", 2),
    ],
)
def test_superlatives(superlative, expected):
    boxes = np.array([[0.0, 0.4, 0.1, 0.5], [0.8, 0.0, 1.0, 0.1], [0.3, 0.5, 0.7, 0.7]])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert extreme(superlative, boxes, areas) == expected
