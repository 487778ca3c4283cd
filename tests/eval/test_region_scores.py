import contextlib
import io

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval.coco import COCO_METRICS, coco_family, coco_rows
from eval.grounding import class_of, grounding_scores
from eval.regions import PAIR_METRICS, region_scores
from eval.types import ScoreError
from grounding.labels import load_label_tree
from grounding.types import RegionSet

TREE = load_label_tree()
LOBE, INSULA = "brain/temporal_lobe/left_temporal_lobe", "brain/insula/left_insula"
LABELS = [LOBE, f"{LOBE}/lesion", INSULA, "chest/heart"]
SIZE = (300, 400)


def regions(boxes, labels, scores=None, masks=False, size=SIZE):
    coded = [_mask(box, size) for box in boxes] if masks else None
    return RegionSet(np.array(boxes).reshape(-1, 4), list(labels), size, scores, coded)


def _mask(box, size):
    mask = np.zeros(size, np.uint8, order="F")
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(box, (size[1], size[0]) * 2, strict=True))
    mask[y1:y2, x1:x2] = 1
    return rle.encode(mask)


def draw(seed=0, images=40, masks=False):
    rng = np.random.default_rng(seed)
    truth, said = {}, {}
    for k in range(images):
        size = rng.choice([0.05, 0.2, 0.5], (5, 1)) * rng.uniform(0.7, 1.2, (5, 2))
        corner = rng.uniform(0, 0.35, (5, 2))
        boxes = np.concatenate([corner, corner + size], 1).clip(0, 1)
        labels = [LABELS[j] for j in rng.integers(0, 4, 5)]
        noisy = (np.concatenate([boxes, boxes[:2]]) + rng.normal(0, 0.015, (7, 4))).clip(0, 1)
        noisy[:, 2:] = np.maximum(noisy[:, 2:], noisy[:, :2] + 0.01).clip(0, 1)
        said_labels = [label if rng.random() > 0.2 else LABELS[0] for label in labels + labels[:2]]
        truth[f"i{k:02}"] = regions(boxes, labels, masks=masks)
        if k % 9:
            said[f"i{k:02}"] = regions(noisy, said_labels, rng.integers(1, 15, 7) / 15, masks)
    return said, truth


def pycocotools(said, truth, kind):
    rows, results = coco_rows(truth, said, lambda label: class_of(label, TREE))
    reference = COCO()
    for number, row in enumerate(rows["annotations"], 1):
        row |= {"id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
        if kind == "segm":
            row["area"] = float(rle.area(row["segmentation"]))
    results = [{k: v for k, v in row.items() if k != ("bbox" if kind == "segm" else "segmentation")} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        reference.dataset = rows
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("masks", [False, True])
def test_the_family_is_that_of_pycocotools(masks):
    said, truth = draw(images=12 if masks else 40, masks=masks)
    scores = region_scores(said, truth, tree=TREE)["masks" if masks else "overall"]
    expected = pycocotools(said, truth, "segm" if masks else "bbox")
    assert [scores[name].value for name in COCO_METRICS] == pytest.approx(list(expected), abs=1e-12)


def test_it_agrees_with_the_grounding_protocol():
    said, truth = draw(1, 12, masks=True)
    ours, theirs = region_scores(said, truth, tree=TREE), grounding_scores(said, truth, tree=TREE)
    for name in ("AP", "AP50", "acc@0.5", "pointing", "dice"):
        assert ours["overall"][name].value == pytest.approx(theirs["overall"][name].value)
        assert ours["by_label"]["lesion"][name].value == pytest.approx(theirs["by_label"]["lesion"][name].value)
    assert ours["overall"]["AP"].ci95 == theirs["overall"]["AP"].ci95
    assert ours["overall"]["recall@1"].value == ours["overall"]["acc@0.5"].value
    assert set(ours["by_level"]) == set(theirs["by_level"])


def test_perfect_predictions():
    truth = draw(2, 12, masks=True)[1]
    spacing = dict.fromkeys(truth, (0.5, 0.5))
    scores = region_scores(truth, truth, tree=TREE, spacing=spacing)
    values = {name: score.value for name, score in (scores["overall"] | scores["masks"]).items()}
    assert values.pop("HD95 px") == values.pop("HD95 mm") == 0.0
    values.pop("AR1")  # one detection cannot find two boxes of a class
    assert values == pytest.approx(dict.fromkeys(values, 1.0))
    assert scores["errors"]["found"]["exact"].value == 1.0


def test_both_rules_for_several_boxes():
    truth = {"a": regions([[0, 0, 0.4, 0.5], [0.6, 0, 1, 0.5]], [LOBE, LOBE])}

    def scores(boxes, marks, **more):
        said = {"a": regions(boxes, [LOBE] * len(boxes), marks)}
        return {k: s.value for k, s in region_scores(said, truth, tree=TREE, **more)["overall"].items()}

    one = scores([[0, 0, 0.4, 0.5]], [0.9])
    assert (one["mIoU"], one["mIoU union"], one["acc@0.7"], one["acc@0.7 union"]) == pytest.approx((1, 0.5, 1, 0))
    assert (one["acc@0.3 union"], one["acc@0.5 union"]) == (1.0, 1.0)
    around = scores([[0, 0, 1, 0.5]], [0.9])
    assert (around["mIoU"], around["mIoU union"]) == pytest.approx((0.4, 0.8))
    low = [[0, 0, 0.1, 0.1], [0.6, 0, 1, 0.5]]
    late = scores(low, [0.9, 0.2])
    assert (late["recall@1"], late["recall@5"], late["acc@0.3"]) == (0.0, 1.0, 0.0)
    assert scores(low, [0.9, 0.2], min_score=0.5)["mIoU union"] == pytest.approx(0.01 / 0.4)
    assert scores(low, [0.9, 0.2], min_score=0.95)["mIoU"] == 0.0


def test_slices_hold_the_rows_of_their_images():
    said, truth = draw(3)
    modalities = {i: "mri" if k % 2 else "xray" for k, i in enumerate(sorted(truth))}
    scores = region_scores(said, truth, tree=TREE, modalities=modalities, sources=dict.fromkeys(truth, "one"))
    alone = region_scores(said, {i: truth[i] for i in truth if modalities[i] == "mri"}, tree=TREE)
    for name, score in scores["by_modality"]["mri"].items():
        assert (score.value, score.n, score.ci95) == (
            alone["overall"][name].value,
            alone["overall"][name].n,
            alone["overall"][name].ci95,
        )
    assert sum(s["mIoU"].n for s in scores["by_size"].values()) == scores["overall"]["mIoU"].n
    assert scores["by_source"]["one"]["AP"] == scores["overall"]["AP"]


def test_sizes_are_those_of_coco():
    boxes = [[0, 0, 31 / 400, 31 / 300], [0, 0, 33 / 400, 33 / 300], [0, 0, 96 / 400, 97 / 300]]
    truth = {str(k): regions([box], [LOBE]) for k, box in enumerate(boxes)}
    counts = region_scores(truth, truth, tree=TREE)["counts"]
    assert [counts[f"{size} pairs"] for size in ("small", "medium", "large")] == [1, 1, 1]


def test_distances_in_pixels_and_mm():
    truth = {"a": regions([[0.1, 0.1, 0.3, 0.3]], [LOBE], masks=True), "b": regions([[0, 0, 1, 1]], [LOBE], masks=True)}
    said = {"a": regions([[0.2, 0.1, 0.4, 0.3]], [LOBE], [0.5], masks=True)}
    scores = region_scores(said, truth, tree=TREE, spacing={"a": (1.0, 0.25)})["overall"]
    assert (scores["HD95 px"].value, scores["HD95 mm"].value) == (40.0, 10.0)
    assert (scores["HD95 px"].n, scores["dice"].n) == (1, 2)
    assert "spacing" in region_scores(said, truth, tree=TREE)["overall"]["HD95 mm"].reason


def test_only_what_is_annotated_is_judged():
    truth = {"a": regions([[0, 0, 0.5, 0.5]], [LOBE]), "b": regions([[0, 0, 0.5, 0.5]], [INSULA])}
    said = {
        i: regions([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]], [LOBE, INSULA], [0.9, 0.8]) for i in truth
    }  # each image has the other's label, too, where nobody looked for it
    open_world = region_scores(said, truth, tree=TREE)
    judged = region_scores(said, truth, tree=TREE, labelled={"a": [LOBE], "b": [INSULA]})
    assert open_world["overall"]["AP"].value < 1 and judged["overall"]["AP"].value == pytest.approx(1)
    assert judged["counts"]["predictions not judged"] == 2
    rows = coco_rows(truth, said, str)
    numbers = {k: str(k) for k in (1, 2)}
    by_number = [{k: table[i] for i, k in zip("ab", numbers.values(), strict=True)} for table in (said, truth)]
    labelled = {"1": [LOBE], "2": [INSULA]}
    assert region_scores(*by_number, tree=TREE, coco=rows, labelled=labelled)["overall"]["AP"].value == pytest.approx(1)
    assert judged["errors"]["predictions"]["background"].value == 0.0
    assert region_scores(said, truth, tree=TREE, labelled=dict.fromkeys(truth, [LOBE, INSULA]))["overall"][
        "AP"
    ].value == pytest.approx(open_world["overall"]["AP"].value)


def test_intervals_hold_the_values_and_respect_patients():
    said, truth = draw(4)
    scores = region_scores(said, truth, tree=TREE)["overall"]
    for name in ("AP", "AP75", *PAIR_METRICS[:12]):
        assert scores[name].ci95[0] <= scores[name].value <= scores[name].ci95[1]
        assert scores[name].clusters == len(truth)
    one = region_scores(said, truth, dict.fromkeys(truth, "p"), TREE)["overall"]
    assert one["AP"].ci95 is None and one["mIoU"].ci95 is None and one["mIoU"].value == scores["mIoU"].value


def test_bad_input():
    truth = {"a": regions([[0, 0, 0.5, 0.5]], [LOBE], masks=True)}
    nothing = region_scores({"a": regions([], [], np.zeros(0)), "other": truth["a"]}, truth, tree=TREE)
    overall = nothing["overall"]
    assert [overall[m].value for m in ("AP", "AR100", "mIoU", "recall@10", "pointing", "dice")] == [0.0] * 6
    assert overall["HD95 px"].value is None and overall["AP small"].reason == "no reference of this size"
    assert nothing["counts"]["images without predictions"] == 1
    empty = region_scores({}, {"a": regions([], [])}, tree=TREE)
    assert all(score.value is None and score.reason for score in empty["overall"].values())
    assert region_scores({}, {}, tree=TREE)["counts"]["images"] == 0
    with pytest.raises(ScoreError, match="resize"):
        region_scores({"a": regions([[0, 0, 1, 1]], [LOBE], [1], True, (50, 50))}, truth, tree=TREE)


def test_the_size_of_a_reference_is_that_of_its_mask():
    ring = np.ones((100, 100), np.uint8, order="F")
    ring[1:99, 1:99] = 0  # 396 pixels in a box of 10,000
    rows = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "ring"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "segmentation": rle.encode(ring)}],
    }
    results = [row | {"score": 0.5} for row in rows["annotations"]]
    for kind in ("segm", "bbox"):
        family = coco_family(rows, results, kind)["ring"]
        assert (family["AP small"], family["AP medium"], family["AP large"]) == (pytest.approx(1), None, None)
    truth = {"1": RegionSet.from_coco(rows["annotations"], {1: "ring"}, (100, 100))}
    assert region_scores(truth, truth, tree=TREE)["counts"]["small pairs"] == 1


def test_image_ids_may_be_texts():
    said, truth = draw(5, 10)
    rows, results = coco_rows(truth, said, str)
    named = {
        **rows,
        "images": [{**image, "id": f"image {image['id']:03}"} for image in rows["images"]],
        "annotations": [{**row, "image_id": f"image {row['image_id']:03}"} for row in rows["annotations"]],
    }
    found = [{**row, "image_id": f"image {row['image_id']:03}"} for row in results]
    assert coco_family(named, found) == coco_family(rows, results)
    assert coco_family(named, []) == coco_family(rows, [])


def test_coco_rows_with_id_0_and_boxes_out_of_the_image():
    rows = {
        "images": [{"id": 0, "height": 100, "width": 100}],
        "categories": [{"id": 0, "name": "polyp"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [80, 80, 40, 40]}],
    }
    results = [{"image_id": 0, "category_id": 0, "bbox": [80, 80, 40, 40], "score": 0.9}]
    results.append({"image_id": 0, "category_id": 0, "bbox": [500, 500, 10, 10], "score": 0.8})
    family = coco_family(rows, results)["polyp"]
    assert family == pytest.approx({n: None if n[3:] in ("small", "large") else 1.0 for n in COCO_METRICS}, nan_ok=True)
    said = {"0": RegionSet.from_coco(results, {0: "polyp"}, (100, 100))}
    truth = {"0": RegionSet.from_coco(rows["annotations"], {0: "polyp"}, (100, 100))}
    scores = region_scores(said, truth, tree=TREE, coco=(rows, results))
    assert scores["overall"]["AP"].value == pytest.approx(1) and scores["overall"]["mIoU"].value == 1.0
