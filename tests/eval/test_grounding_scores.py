import contextlib
import io
import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval.coco import average_precision, bootstrap_precision, coco_rows, match_tables, weighted_precision
from eval.grounding import class_of, deepest_pixel, grounding_scores, levels_of
from grounding.labels import load_label_tree
from grounding.types import RegionSet

TREE = load_label_tree()
LOBE = "brain/temporal_lobe/left_temporal_lobe"
LESION, ELSEWHERE = f"{LOBE}/lesion", "brain/thalamus/right_thalamus/lesion"
LABELS = [LOBE, LESION, ELSEWHERE, "brain/insula/left_insula"]


def regions(boxes, labels, scores=None, masks=True, size=(100, 200)):
    coded = [_box_mask(box, size) for box in boxes] if masks else None
    return RegionSet(np.array(boxes).reshape(-1, 4), list(labels), size, scores, coded)


def _box_mask(box, size):
    mask = np.zeros(size, np.uint8, order="F")
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(box, (size[1], size[0]) * 2, strict=True))
    mask[y1:y2, x1:x2] = 1
    coded = rle.encode(mask)
    return {"size": list(size), "counts": coded["counts"].decode()}


@pytest.fixture(scope="module")
def random_pair():
    """Forty images of truth, and predictions that are noisy, doubled, mislabelled, missing or tied in score."""
    rng = np.random.default_rng(5)
    truth, said = {}, {}
    for k in range(40):
        corner, size = rng.uniform(0, 0.6, (6, 2)), rng.uniform(0.1, 0.4, (6, 2))
        boxes = np.concatenate([corner, corner + size], 1)
        labels = [LABELS[j] for j in rng.integers(0, 4, 6)]
        truth[f"i{k:02}"] = regions(boxes, labels)
        noisy = np.concatenate([boxes, boxes[:3]]) + rng.normal(0, 0.02, (9, 4))
        said_labels = [label if rng.random() > 0.2 else LABELS[0] for label in labels + labels[:3]]
        if k % 7:
            said[f"i{k:02}"] = regions(noisy.clip(0, 1), said_labels, rng.integers(1, 20, 9) / 20)
    return said, truth


def merged(label):
    return class_of(label, TREE)


def test_classes_and_levels():
    assert (merged(LESION), merged(ELSEWHERE), merged(LOBE)) == ("lesion", "lesion", LOBE)
    assert merged("polyp") == "polyp"
    assert levels_of("lesion", TREE) == ("finding",)
    assert levels_of(LOBE, TREE) == ("structure", "depth 2", "named region")
    assert levels_of("zebra", TREE) == ("other",)


def test_perfect_predictions_score_one(random_pair):
    truth = random_pair[1]
    scores = grounding_scores(truth, truth, tree=TREE)
    assert {name: s.value for name, s in scores["overall"].items()} == pytest.approx(
        {"AP": 1, "AP50": 1, "acc@0.5": 1, "pointing": 1, "dice": 1}
    )
    assert scores["path"].value == 1.0


def test_equal_to_pycocotools(random_pair):
    said, truth = random_pair
    rows, results = coco_rows(truth, said, merged)
    precision = average_precision(rows, results)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {**rows, "annotations": [_full(row, k) for k, row in enumerate(rows["annotations"], 1)]}
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert np.mean(list(precision.values())) == pytest.approx(evaluation.stats[0], abs=1e-12)
    assert np.mean([values[0] for values in precision.values()]) == pytest.approx(evaluation.stats[1], abs=1e-12)


def test_weighted_precision_without_weights_is_average_precision(random_pair):
    said, truth = random_pair
    rows, results = coco_rows(truth, said, merged)
    ones = {image["id"]: np.ones(1) for image in rows["images"]}
    precision = average_precision(rows, results)
    for name, table in match_tables(rows, results).items():
        assert weighted_precision(*table, ones)[0] == pytest.approx(precision[name], abs=1e-12)


def test_weights_are_repeated_images(random_pair):
    """An image of weight 3 must count like three copies of it."""
    said, truth = random_pair
    tripled = {f"{i}-{k}": value for i, value in truth.items() for k in range(3 if i < "i05" else 1)}
    tripled_said = {f"{i}-{k}": said[i] for i in said for k in range(3 if i < "i05" else 1)}
    rows, results = coco_rows(truth, said, merged)
    weights = {image["id"]: np.array([3.0 if image["id"] <= 5 else 1.0]) for image in rows["images"]}
    # No two images may tie in score, since the order of tied detections then differs.
    for k, row in enumerate(results):
        row["score"] = float(row["score"] + k * 1e-6)
    expected_rows, expected = coco_rows(tripled, tripled_said, merged)
    by_box = {(tuple(row["bbox"]), row["category_id"]): row["score"] for row in results}
    for row in expected:
        row["score"] = by_box[tuple(row["bbox"]), row["category_id"]]
    precision = average_precision(expected_rows, expected)
    for name, table in match_tables(rows, results).items():
        assert weighted_precision(*table, weights)[0] == pytest.approx(precision[name], abs=0.02)


def test_intervals_hold_the_value_and_repeat(random_pair):
    scores, again = (grounding_scores(*random_pair, tree=TREE) for _ in range(2))
    assert scores == again
    for score in scores["overall"].values():
        assert score.ci95[0] < score.value < score.ci95[1]
    rows, results = coco_rows(random_pair[1], random_pair[0], merged)
    assert bootstrap_precision(rows, results, dict.fromkeys((i["id"] for i in rows["images"]), "p")) is None


def test_order_of_images_changes_nothing(random_pair):
    said, truth = random_pair
    turned = grounding_scores(dict(reversed(said.items())), dict(reversed(truth.items())), tree=TREE)
    assert turned == grounding_scores(said, truth, tree=TREE)


def test_empty_detections_do_not_crash():
    truth = {"a": regions([[0, 0, 0.5, 0.5]], [LESION])}
    for said in ({}, {"a": regions([], [], np.zeros(0))}):
        scores = grounding_scores(said, truth, tree=TREE)
        assert [s.value for s in scores["overall"].values()] == [0.0] * 5
        assert scores["path"].value is None


def test_empty_references_are_undefined():
    scores = grounding_scores({}, {"a": regions([], [])}, tree=TREE)
    assert all(score.value is None for score in scores["overall"].values())


def test_annotation_id_0_and_absent_classes_harm_nothing():
    rows = {
        "images": [{"id": 0, "height": 100, "width": 100}],
        "categories": [{"id": 0, "name": "polyp"}, {"id": 1, "name": "never there"}],
        "annotations": [
            {"id": k, "image_id": 0, "category_id": 0, "bbox": [10 * k, 0, 10, 10], "area": 100, "iscrowd": 0}
            for k in range(4)
        ],
    }
    results = [{"image_id": 0, "category_id": 0, "bbox": row["bbox"], "score": 0.9} for row in rows["annotations"]]
    results.append({"image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.9})
    precision = average_precision(rows, results)
    assert list(precision) == ["polyp"]
    assert precision["polyp"].tolist() == pytest.approx([1.0] * 10)
    assert "segmentation" not in results[0] and rows["annotations"][0]["id"] == 0  # the caller's rows stay as they were


def test_the_top_scoring_box_decides():
    truth = {"a": regions([[0, 0, 0.5, 0.5], [0.6, 0.6, 1, 1]], [LESION, ELSEWHERE])}
    boxes, labels = [[0, 0, 0.5, 0.5], [0.5, 0, 0.6, 0.1]], [LESION, LESION]
    right = grounding_scores({"a": regions(boxes, labels, [0.9, 0.2])}, truth, tree=TREE)["overall"]
    wrong = grounding_scores({"a": regions(boxes, labels, [0.2, 0.9])}, truth, tree=TREE)["overall"]
    assert [right[m].value for m in ("acc@0.5", "pointing", "dice")] == [1.0, 1.0, 1.0]
    assert [wrong[m].value for m in ("acc@0.5", "pointing", "dice")] == [0.0, 0.0, 0.0]


def test_exact_dice_and_pointing():
    truth = {"a": regions([[0, 0, 0.4, 1]], [LOBE])}
    said = {"a": regions([[0.2, 0, 0.8, 1]], [LOBE], [1])}  # overlap .2, areas .4 and .6, centre at .5
    scores = grounding_scores(said, truth, tree=TREE)["overall"]
    assert [scores[m].value for m in ("acc@0.5", "pointing", "dice")] == pytest.approx([0, 0, 0.4])
    assert scores["dice"].per_sample == [{"sample_id": "a", "class": LOBE, "value": pytest.approx(0.4)}]


def crescent(size=(100, 200)):
    """A thin arch: its box's centre is outside."""
    mask = np.zeros(size, np.uint8, order="F")
    mask[:90, :10], mask[:90, -20:], mask[:5] = 1, 1, 1
    coded = rle.encode(mask)
    return RegionSet([[0, 0, 1, 0.9]], [LOBE], size, None, [{"size": list(size), "counts": coded["counts"].decode()}])


def test_deepest_pixel():
    mask = rle.decode(crescent().masks[0])
    row, column = deepest_pixel(mask)
    assert mask[row, column] and 185 <= column <= 195 and 5 < row < 85
    assert deepest_pixel(np.zeros((10, 20))) == (5, 10)
    assert deepest_pixel(np.ones((5, 5))) == (2, 2)


def test_pointing_uses_masks_where_both_have_them():
    truth, elsewhere = {"a": crescent()}, {"a": regions([[0.3, 0.3, 0.7, 0.9]], [LOBE], [1])}
    assert grounding_scores(truth, truth, tree=TREE)["overall"]["pointing"].value == 1.0
    assert grounding_scores(elsewhere, truth, tree=TREE)["overall"]["pointing"].value == 0.0
    boxes = {"a": regions([[0.3, 0.3, 0.7, 0.9]], [LOBE], [1], masks=False)}
    scores = grounding_scores(boxes, truth, tree=TREE)["overall"]
    assert scores["pointing"].value == 1.0
    assert scores["dice"].value is None and "no masks" in scores["dice"].reason


def test_masks_of_different_size_are_refused():
    truth = {"a": regions([[0, 0, 1, 1]], [LOBE])}
    with pytest.raises(ValueError, match="resize"):
        grounding_scores({"a": regions([[0, 0, 1, 1]], [LOBE], [1], size=(50, 100))}, truth, tree=TREE)


def test_path_says_whether_the_finding_hangs_on_the_right_structure():
    truth = {"a": regions([[0, 0, 0.5, 0.5], [0.6, 0.6, 1, 1]], [LESION, ELSEWHERE])}
    said = {"a": regions([[0, 0, 0.5, 0.5], [0.6, 0.6, 1, 1]], [LESION, LESION], [0.9, 0.8])}
    scores = grounding_scores(said, truth, tree=TREE)
    assert (scores["path"].value, scores["path"].n) == (0.5, 2)
    assert scores["by_label"]["lesion"]["AP50"].value == pytest.approx(1.0)


def _full(row, number):
    return {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row, "id": number}
