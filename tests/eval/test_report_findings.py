import json

import pytest

from eval.report_findings import citation_scores, finding_errors
from eval.types import plain
from grounding.labels import load_label_tree

TREE = load_label_tree()
LEFT, RIGHT = [0.6, 0.3, 0.9, 0.8], [0.1, 0.3, 0.4, 0.8]
LOBE = "brain/temporal_lobe/left_temporal_lobe"


def one(said, truth):
    errors = finding_errors({"a": said}, {"a": truth}, tree=TREE)
    return {name: errors[name].per_sample[0]["findings"] for name in ("right", "misplaced", "hallucinated", "missing")}


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        ("Left effusion.", "Small left pleural effusion.", {"right": ["effusion, left"]}),
        ("Left effusion.", "Right effusion.", {"misplaced": ["effusion, left"]}),
        ("No effusion.", "Right effusion.", {"missing": ["effusion, right"]}),
        ("Left effusion.", "No effusion.", {"hallucinated": ["effusion, left"]}),
        ("A lesion in the brain.", "A lesion in the left temporal lobe.", {"right": ["lesion, brain"]}),
        ("A lesion in the left insula.", "A lesion in the left temporal lobe.", {"misplaced": ["lesion, left insula"]}),
        ("Effusions.", "Effusions.", {"right": ["effusion"]}),
        ("", "", {}),
        ("Lungs are clear.", "Lungs are clear.", {}),
    ],
)
def test_kinds_of_errors(said, truth, expected):
    found = {name: [row["finding"] for row in rows] for name, rows in one(said, truth).items() if rows}
    assert found == expected


def test_right_words_over_the_wrong_boxes_are_misplaced():
    said, truth = ([{"text": "Consolidation.", "boxes": [box]}] for box in (LEFT, RIGHT))
    assert one(said, truth)["misplaced"][0]["why"] == "boxes"
    assert one(said, [{"text": "Consolidation."}])["right"][0]["why"] == ""


def test_the_nearest_finding_is_paired_first():
    truth = "A lesion in the right thalamus. A lesion in the left temporal lobe."
    found = one("A lesion in the left temporal lobe. A lesion in the left insula.", truth)
    assert found["right"][0]["finding"] == "lesion, left temporal_lobe"
    assert found["misplaced"][0] == {
        "finding": "lesion, left insula",
        "sentence": "A lesion in the left insula.",
        "reference": "lesion, right thalamus",
        "why": "side, place",
    }


def test_shares():
    said = {"a": "Left effusion. Pneumothorax.", "b": "Lungs are clear."}
    truth = {"a": "Left effusion. Cardiomegaly. Consolidation.", "b": "Nodule in the left lung."}
    errors = finding_errors(said, truth, tree=TREE)
    assert (errors["right"].value, errors["hallucinated"].value, errors["missing"].value) == (0.5, 0.5, 0.75)
    assert errors["counts"] == {"stated": 2, "true": 4}
    assert finding_errors({}, truth, tree=TREE)["missing"].value == 1.0
    assert finding_errors({}, truth, tree=TREE)["right"].reason == "no findings stated"
    assert finding_errors(dict(reversed(said.items())), dict(reversed(truth.items())), tree=TREE) == errors
    json.dumps(plain(errors), allow_nan=False)


def cited(*sentences, labels=(f"{LOBE}/lesion", LOBE), boxes=(LEFT, RIGHT)):
    regions = [{"box": box, "label": label} for box, label in zip(boxes, labels, strict=True)]
    return {
        "prediction": "",
        "sentences": [{"text": text, "region_ids": list(ids)} for text, *ids in sentences],
        "evidence": {"image_size": [10, 10], "regions": regions, "queries": []},
    }


def scores(said, truth):
    result = citation_scores({"a": said}, {"a": truth}, tree=TREE)
    whys = [row["why"] for row in result["precision"].per_sample[0]["citations"]]
    return [result[name].value for name in ("precision", "recall", "cited")], whys


LESION = "A 10 mm lesion in the left temporal lobe."


@pytest.mark.parametrize(
    ("said", "truth", "expected", "whys"),
    [
        (cited((LESION, 0)), LESION, [1, 1, 1], [None]),
        (cited((LESION,)), LESION, [None, 0, 0], []),
        (cited((LESION, 1)), LESION, [0, 0, 0], ["the region shows another finding"]),
        (cited((LESION, 0, 9)), LESION, [0.5, 1, 1], [None, "no such region"]),
        (cited((LESION, -1)), LESION, [0, 0, 0], ["no such region"]),
        (cited((LESION, 0)), "No lesion is seen.", [0, None, None], ["the reference has no such finding"]),
        (cited((LESION, 0)), LESION.replace("left", "right"), [0, 0, None], ["the reference has no such finding"]),
        (cited(("The brain is normal.", 0)), LESION, [0, 0, None], ["the sentence states no finding"]),
        (cited((LESION, 0)), LESION + " A lesion in the right thalamus.", [1, 0.5, 1], [None]),
        (cited((LESION, 0)), [{"text": LESION, "boxes": [LEFT]}], [1, 1, 1], [None]),
        (cited((LESION, 0)), [{"text": LESION, "boxes": [RIGHT]}], [0, 0, 0], ["the region lies elsewhere"]),
    ],
)
def test_citations(said, truth, expected, whys):
    assert scores(said, truth) == (expected, whys)


def test_marks_in_the_text_are_citations():
    said = cited(("x",)) | {
        "sentences": None,
        "prediction": LESION.replace(".", " [r0].") + " The brain is small [r5].",
    }
    values, whys = scores(said, LESION)
    assert (values, whys) == ([0.5, 1.0, 1.0], [None, "no such region"])


def test_plain_texts_and_missing_predictions_have_no_citations():
    result = citation_scores({"a": LESION}, {"a": LESION, "b": LESION}, tree=TREE)
    assert (result["precision"].value, result["recall"].value, result["cited"].value) == (None, 0.0, 0.0)
    assert result["cited"].n == 1
    assert citation_scores({}, {}, tree=TREE)["recall"].value is None


def test_counts_of_citations():
    said = cited((LESION, 0, 9), ("The brain is normal.", 1))
    counts = citation_scores({"a": said}, {"a": LESION}, tree=TREE)["counts"]
    assert counts == {"citations": 3, "of no region": 1, "in sentences without findings": 1}
