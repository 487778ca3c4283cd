import numpy as np
import pytest

from eval.hierarchy import region_errors, relation, where
from grounding.labels import load_label_tree
from grounding.types import RegionSet

TREE = load_label_tree()
LUNG = "chest/lung/left_lung"
TEMPORAL = "brain/temporal_lobe/left_temporal_lobe"
BOX, FAR = [0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]


def regions(*pairs, scores=None):
    return RegionSet([box for _, box in pairs], [label for label, _ in pairs], (100, 100), scores)


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        (LUNG, LUNG, "exact"),
        ("left lung", LUNG, "exact"),
        (LUNG, "chest/lung", "narrower"),
        ("chest/lung", LUNG, "broader"),
        ("chest", LUNG, "broader"),
        (f"{LUNG}/left_upper_lobe", LUNG, "narrower"),
        ("chest/lung/right_lung", LUNG, "other side"),
        (f"{LUNG}/left_upper_lobe", "chest/lung/right_lung", "other side"),
        (f"{LUNG}/left_upper_lobe", f"{LUNG}/left_lower_lobe", "sibling"),
        (f"{LUNG}/left_upper_lobe", "chest/lung/right_lung/right_lower_lobe", "wrong label"),
        ("brain/insula/left_insula", TEMPORAL, "sibling"),
        ("brain/lesion", f"{TEMPORAL}/lesion", "broader"),
        (f"{TEMPORAL}/lesion", "brain/lesion", "narrower"),
        ("brain/temporal_lobe/right_temporal_lobe/lesion", f"{TEMPORAL}/lesion", "other side"),
        ("brain/insula/left_insula/lesion", f"{TEMPORAL}/lesion", "sibling"),
        (TEMPORAL, f"{TEMPORAL}/lesion", "broader"),
        (f"{TEMPORAL}/lesion", TEMPORAL, "narrower"),
        (f"{LUNG}/nodule", f"{LUNG}/opacity", "other finding"),
        (f"{LUNG}/nodule", "chest/lung/right_lung/opacity", "wrong label"),
        ("chest/heart", LUNG, "sibling"),
        ("chest/heart", TEMPORAL, "wrong label"),
        ("brain", "chest", "wrong label"),
        ("zebra", "Zebra.", "exact"),
        ("zebra", LUNG, "wrong label"),
    ],
)
def test_relation(said, truth, expected):
    assert relation(said, truth, TREE) == expected


def test_a_relation_and_its_reverse_agree():
    reverse = {"narrower": "broader", "broader": "narrower"}
    labels = TREE.ids[::7]
    for a in labels:
        assert relation(a, a, TREE) == "exact"
        for b in labels:
            kind = relation(a, b, TREE)
            assert relation(b, a, TREE) == reverse.get(kind, kind)


def test_labels_taken_apart():
    assert where(f"{TEMPORAL}/lesion", TREE) == (("brain", "temporal_lobe"), -1, "lesion")
    assert where("zebra", TREE) is None


def kinds(said, truth, **more):
    errors = region_errors({"a": said}, {"a": truth}, tree=TREE, **more)
    counts = {}
    for side in ("references", "predictions"):
        counts[side] = {k: round(s.value * s.n) for k, s in errors[side].items() if s.value}
    return counts["references"], counts["predictions"]


def test_right_organ_at_the_wrong_level_is_no_miss():
    truth = {"a": regions((f"{TEMPORAL}/lesion", BOX))}
    errors = region_errors({"a": regions(("brain/lesion", BOX))}, truth, tree=TREE)
    assert (errors["found"]["exact"].value, errors["found"]["right organ"].value) == (0.0, 1.0)
    assert errors["references"]["broader"].value == 1.0 and errors["references"]["missed"].value == 0.0
    assert errors["found"]["exact"].per_sample == [
        {"sample_id": "a", "label": f"{TEMPORAL}/lesion", "said": "brain/lesion", "kind": "broader", "value": 0.0}
    ]


@pytest.mark.parametrize(
    ("said", "of_truth", "of_said"),
    [
        ([(LUNG, BOX)], {"exact": 1}, {"exact": 1}),
        ([(LUNG, BOX), (LUNG, BOX)], {"exact": 1}, {"exact": 1, "duplicate": 1}),
        ([(LUNG, FAR)], {"wrong place": 1}, {"wrong place": 1}),
        ([("chest/lung/right_lung", BOX)], {"other side": 1}, {"other side": 1}),
        ([("chest/lung/right_lung", FAR)], {"missed": 1}, {"background": 1}),
        ([(TEMPORAL, BOX)], {"wrong label": 1}, {"wrong label": 1}),
        ([("chest/lung/right_lung", BOX), (LUNG, BOX)], {"exact": 1}, {"exact": 1, "background": 1}),
        ([], {"missed": 1}, {}),
    ],
)
def test_one_kind_a_region(said, of_truth, of_said):
    assert kinds(regions(*said), regions((LUNG, BOX))) == (of_truth, of_said)


def test_a_used_prediction_finds_nothing_else():
    truth = regions(("chest/lung", BOX), (LUNG, BOX))
    assert kinds(regions(("chest/lung", BOX)), truth)[0] == {"exact": 1, "missed": 1}


def test_low_scores_say_nothing():
    said = regions((LUNG, BOX), (TEMPORAL, FAR), scores=[0.9, 0.1])
    assert kinds(said, regions((LUNG, BOX)), min_score=0.5) == ({"exact": 1}, {"exact": 1})
    assert kinds(said, regions((LUNG, BOX)))[1] == {"exact": 1, "background": 1}


def test_shares_add_up_on_random_regions():
    rng = np.random.default_rng(3)
    names = [LUNG, "chest/lung", "chest/lung/right_lung", f"{LUNG}/nodule", f"{LUNG}/left_upper_lobe", "chest/heart"]
    truth, said = {}, {}
    for k in range(30):
        for table in (truth, said):
            low = rng.random((rng.integers(0, 6), 2)) * 0.3
            boxes = np.concatenate([low, low + 0.3], 1)
            table[str(k)] = RegionSet(boxes, list(rng.choice(names, len(boxes))), (10, 10), rng.random(len(boxes)))
    errors = region_errors(said, truth, tree=TREE)
    for side in ("references", "predictions"):
        assert sum(score.value for score in errors[side].values()) == pytest.approx(1)
    pairs = {side: sum(s.value * s.n for k, s in errors[side].items() if k not in ("missed", "background", "duplicate"))
             for side in ("references", "predictions")}  # fmt: skip
    assert pairs["references"] == pytest.approx(pairs["predictions"])
    assert region_errors(dict(reversed(said.items())), dict(reversed(truth.items())), tree=TREE) == errors


def test_nothing_to_judge_is_undefined():
    errors = region_errors({}, {"a": regions()}, tree=TREE)
    assert errors["found"]["exact"].value is None and errors["predictions"]["background"].reason == "no predictions"
