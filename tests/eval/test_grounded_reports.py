import json
from pathlib import Path

import numpy as np
import pytest

from eval.grounded_reports import ASPECTS, f1_of_means, radfact_scores, sentences_of
from eval.types import ScoreError, plain

EXAMPLES = Path(__file__).resolve().parents[3] / "shared/vectors/radfact/grounded_reporting_examples.json"
LEFT, RIGHT = [0.6, 0.3, 0.9, 0.8], [0.1, 0.3, 0.4, 0.8]
REPORTS = {
    "a": [
        {"text": "There is a small left pleural effusion.", "boxes": [LEFT]},
        {"text": "The heart is normal.", "boxes": None},
        {"text": "No pneumothorax.", "boxes": None},
    ],
    "b": [
        {"text": "Consolidation in the right upper lobe.", "boxes": [RIGHT]},
        {"text": "Lungs are otherwise clear."},
    ],
    "c": [{"text": "Lungs are clear."}, {"text": "There is cardiomegaly.", "boxes": [[0.3, 0.4, 0.7, 0.9]]}],
}


def same_text(hypothesis, evidence):
    return hypothesis in evidence


def values(scores):
    return {aspect: [scores[aspect][name].value for name in ("precision", "recall", "f1")] for aspect in ASPECTS}


def rows(*pairs):
    return [{"text": text, "boxes": boxes or None} for text, *boxes in pairs]


def test_the_example_of_radfacts_own_tests():
    """Boxes, entailment and numbers of https://github.com/microsoft/RadFact, tests/metric/test_radfact.py."""
    cat, dog = [0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4]
    third = [0.5, 0.5, 0.6, 0.6]
    said = {"1": rows(("cat", cat), ("dog", dog, third), ("bird",), ("rabbit",))}
    truth = {"1": rows(("cat", cat), ("dog", dog), ("bird", third), ("shark",))}
    for grid in (224, None):
        scores = radfact_scores(said, truth, same_text, grid=grid)
        assert values(scores)["logical"] == [0.75, 0.75, 0.75]
        # Half of the dog's two boxes is covered, and not more. The bird has no predicted box.
        assert values(scores)["spatial"] == pytest.approx([0.5, 2 / 3, 4 / 7])
        assert values(scores)["grounding"] == pytest.approx([0.5, 2 / 3, 4 / 7])
    assert scores["counts"]["predicted sentences with boxes"] == 2


def counted(boxes, evidence):
    """RadFact's rule, by counting the pixels of a 224 x 224 image."""

    def mask(rows):
        grid = np.zeros((224, 224), bool)
        for x1, y1, x2, y2 in (np.array(rows) * 224).astype(int):
            grid[x1:x2, y1:y2] = True
        return grid

    said = mask(boxes)
    return bool(said.any()) and bool((said & mask(evidence)).sum() / said.sum() > 0.5)


@pytest.mark.skipif(not EXAMPLES.exists(), reason="RadFact's examples are not there")
def test_spatial_verdicts_on_radfacts_examples():
    examples = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    said, truth = ({str(e["example_id"]): e[key] for e in examples} for key in ("prediction", "target"))

    def always(hypothesis, evidence):  # so that every pair of boxes is compared, whatever the texts say
        return True

    def corners(sentences):
        boxes = [box for sentence in sentences for box in sentence["boxes"] or []]
        return [[box[key] for key in ("x_min", "y_min", "x_max", "y_max")] for box in boxes]

    judged = []
    for row in radfact_scores(said, truth, always, grid=224)["logical"]["f1"].per_sample:
        i = row["sample_id"]
        for verdicts, mine, other in ((row["predicted"], said, truth), (row["reference"], truth, said)):
            for verdict, sentence in zip(verdicts, mine[i], strict=True):
                boxes, evidence = corners([sentence]), corners(other[i])
                expected = None if not boxes else bool(evidence) and counted(boxes, evidence)
                assert verdict["spatial"] is expected
                judged.append(expected)
    assert (judged.count(True), judged.count(False), judged.count(None)) == (36, 26, 200)


@pytest.mark.skipif(not EXAMPLES.exists(), reason="RadFact's examples are not there")
def test_scores_of_radfacts_examples_by_rule():
    examples = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    said, truth = ({str(e["example_id"]): e[key] for e in examples} for key in ("prediction", "target"))
    exact, pixels = (radfact_scores(said, truth, grid=grid) for grid in (None, 224))
    assert values(exact) == values(pixels)
    rows = {row["sample_id"]: row for row in exact["logical"]["f1"].per_sample}
    spondylosis = rows["3"]["predicted"][8]
    assert (spondylosis["entailed"], spondylosis["evidence"], spondylosis["spatial"]) == (True, [7], True)
    effusion = rows["17"]["predicted"][1]  # the same words, the boxes apart
    assert (effusion["entailed"], effusion["spatial"]) == (True, False)
    assert values(radfact_scores(truth, truth)) == {aspect: [1.0, 1.0, 1.0] for aspect in ASPECTS}


def test_identical_reports_score_one():
    assert values(radfact_scores(REPORTS, REPORTS)) == {aspect: [1.0, 1.0, 1.0] for aspect in ASPECTS}


def test_order_of_sentences_and_samples_changes_nothing():
    said = {"a": REPORTS["b"], "b": REPORTS["b"] + REPORTS["a"], "c": REPORTS["c"][:1]}
    turned = {i: report[::-1] for i, report in reversed(said.items())}
    truth = {i: report[::-1] for i, report in reversed(REPORTS.items())}
    first, second = radfact_scores(said, REPORTS), radfact_scores(turned, truth)
    assert values(first) == values(second)
    assert all(first[a][k].ci95 == second[a][k].ci95 for a in ASPECTS for k in ("precision", "recall", "f1"))


def test_swapping_the_reports_swaps_precision_and_recall():
    said = {"a": REPORTS["a"][:2], "b": REPORTS["b"] + REPORTS["a"], "c": REPORTS["a"]}
    forward, back = values(radfact_scores(said, REPORTS)), values(radfact_scores(REPORTS, said))
    assert {a: [r, p, f] for a, (p, r, f) in forward.items()} == back


def test_denominators():
    said = {"a": rows(("true", LEFT), ("also true", LEFT), ("false", LEFT), ("plain",))}
    truth = {"a": rows(("true", LEFT), ("also true", RIGHT), ("plain",))}
    scores = values(radfact_scores(said, truth, same_text))
    assert [scores[aspect][0] for aspect in ASPECTS] == pytest.approx([3 / 4, 1 / 3, 1 / 2])
    assert [scores[aspect][1] for aspect in ASPECTS] == pytest.approx([1, 1 / 2, 1 / 2])


def test_a_mean_over_reports_not_over_sentences():
    said = {"a": rows(("x",)), "b": rows(("x",), ("y",), ("z",), ("w",)), "c": []}
    truth = {"a": rows(("x",)), "b": rows(("x",)), "c": rows(("x",))}
    logical = radfact_scores(said, truth, same_text)["logical"]
    assert (logical["precision"].value, logical["precision"].n) == (pytest.approx((1 + 1 / 4) / 2), 2)
    assert (logical["recall"].value, logical["recall"].n) == (pytest.approx(2 / 3), 3)
    assert logical["f1"].value == pytest.approx(2 * 0.625 * (2 / 3) / (0.625 + 2 / 3))


def test_evidence_is_what_entails_alone_or_what_is_needed():
    def together(hypothesis, evidence):
        return hypothesis in evidence or (hypothesis == "ab" and {"a", "b"} <= set(evidence))

    truth = {"1": rows(("a", LEFT), ("c", RIGHT), ("b",))}
    scores = radfact_scores({"1": rows(("ab", LEFT))}, truth, together)
    (verdict,) = scores["logical"]["f1"].per_sample[0]["predicted"]
    assert (verdict["evidence"], verdict["spatial"]) == ([0, 2], True)


def test_forms_of_a_report():
    text = "Findings: Small effusion [r0]. No\u2028pneumothorax. Impression: Small effusion."
    assert [s.text for s in sentences_of(text)] == ["Small effusion.", "No\u2028pneumothorax."]
    line = {
        "prediction": "Effusion [r1]. Clear.",
        "sentences": [{"text": "Effusion.", "region_ids": [1, 7]}, {"text": "Clear.", "region_ids": []}],
        "evidence": {"regions": [{"box": LEFT, "label": "x"}, {"box": RIGHT, "label": "y"}]},
    }
    for report in (line, {**line, "sentences": None}):
        first, second = sentences_of(report)
        assert (first.text, first.boxes.tolist(), second.boxes) == ("Effusion.", [RIGHT], None)
    named = [{"text": "x", "boxes": [dict(zip(("x_min", "y_min", "x_max", "y_max"), LEFT, strict=True))]}]
    assert sentences_of(named)[0].boxes.tolist() == [LEFT]
    assert sentences_of([{"text": "x", "boxes": [[-0.5, 0, 2, 1]]}])[0].boxes.tolist() == [[0, 0, 1, 1]]
    assert sentences_of(None) == sentences_of("") == sentences_of([]) == []


@pytest.mark.parametrize(
    "report",
    [
        [{"text": "x", "boxes": [[0.5, 0, 0.1, 1]]}],
        [{"text": "x", "boxes": [[0, 0, float("nan"), 1]]}],
        [{"text": "x", "boxes": [[0, 0, 1]]}],
        [{"text": "x", "boxes": [{"x_min": 0}]}],
        [{"boxes": None}],
        {"sentences": [{"text": "x", "region_ids": ["r1"]}]},
        {"sentences": [{"text": "x", "region_ids": [0]}], "evidence": {"regions": [{"label": "y"}]}},
        ["x"],
        7,
    ],
)
def test_what_cannot_be_read_is_refused_with_its_sample(report):
    with pytest.raises(ScoreError, match="sample s1"):
        radfact_scores({"s1": report}, {"s1": "Lungs are clear."})


def test_missing_and_empty_reports():
    scores = radfact_scores({}, REPORTS)
    assert (scores["logical"]["recall"].value, scores["logical"]["precision"].value) == (0.0, None)
    assert scores["logical"]["f1"].reason == "no predicted sentences"
    assert scores["counts"]["missing predictions"] == 3
    text_only = radfact_scores({"c": "Lungs are clear."}, {"c": "The lungs are clear."})
    assert text_only["logical"]["f1"].value == 1.0 and text_only["spatial"]["f1"].value is None
    assert radfact_scores({}, {})["logical"]["f1"].value is None
    json.dumps(plain(scores), allow_nan=False)


@pytest.mark.parametrize("text", ["Lungs are clear. ", "no effusion abnormal ", "x"])
def test_a_megabyte_of_text(text):
    long = text * (1_000_000 // len(text))
    assert radfact_scores({"a": long}, {"a": "Lungs are clear."})["logical"]["recall"].value is not None


def test_intervals_are_of_patients():
    said = {str(k): REPORTS["a"][: 1 + k % 3] for k in range(30)}
    truth = {str(k): REPORTS["a"] for k in range(30)}
    scores = radfact_scores(said, truth)["logical"]
    assert scores["f1"].ci95[0] < scores["f1"].value < scores["f1"].ci95[1]
    assert radfact_scores(said, truth, patients=dict.fromkeys(said, "p"))["logical"]["f1"].ci95 is None


def test_f1_of_two_means():
    assert f1_of_means(np.array([0.0, 2, 0, 3])) == 0.0
    assert np.isnan(f1_of_means(np.array([0.0, 0, 1, 1])))
