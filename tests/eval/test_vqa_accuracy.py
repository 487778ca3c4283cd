import random

import pytest

from eval.vqa import compare, judge, normalise, numbers_in, vqa_accuracy

ROWS = [
    {"sample_id": "1", "answer": "yes", "answer_type": "closed", "question_type": "presence", "needs": "boxes"},
    {"sample_id": "2", "answer": "No", "answer_type": "closed", "question_type": "presence", "needs": "boxes"},
    {"sample_id": "3", "answer": "15 mm", "answer_type": "open", "question_type": "size", "needs": "boxes"},
    {"sample_id": "4", "answer": "bright", "answer_type": "open", "question_type": "brightness", "needs": "feature"},
]
PERFECT = {row["sample_id"]: row["answer"] for row in ROWS}


@pytest.mark.parametrize(
    ("prediction", "reference", "right", "status"),
    [
        ("Yes, there is a lesion.", "yes", True, "ok"),
        ("no", "No.", True, "ok"),
        ("nodule in the lung", "no", False, "unparsed"),
        ("abnormal", "no", False, "unparsed"),
        ("There is no lesion", "no", False, "unparsed"),
        ("no lesion", "yes", False, "ok"),
        ("", "no", False, "empty"),
        (" \n", "no", False, "empty"),
        ("15mm", "15 mm", True, "ok"),
        ("15", "15 mm", True, "ok"),
        ("about 15 millimetres", "15 mm", True, "ok"),
        ("1.5 cm", "15 mm", True, "ok"),
        ("15 cm", "15 mm", False, "ok"),
        ("15 %", "15 mm", False, "ok"),
        ("115 mm", "15 mm", False, "ok"),
        ("15.5", "15", False, "ok"),
        ("10-15 mm", "15 mm", False, "unparsed"),
        ("large", "15 mm", False, "unparsed"),
        ("two", "2", True, "ok"),
        ("There are 2 lesions.", "two", True, "ok"),
        ("none", "0", True, "ok"),
        ("someone", "1", False, "unparsed"),
        ("1,200", "1200", True, "ok"),
        ("The left temporal lobe.", "left temporal lobe", True, "ok"),
        ("right temporal lobe", "left temporal lobe", False, "ok"),
        ("left", "left temporal lobe", False, "ok"),
        ("T2", "2", False, "unparsed"),
    ],
)
def test_verdicts(prediction, reference, right, status):
    assert judge(prediction, [reference]) == (right, status)


@pytest.mark.parametrize(
    ("prediction", "reference", "right", "status"),
    [
        *[
            (form, "A", True, "ok")
            for form in ("A", "a", "(A)", "A.", "A)", "[A]", "A. liver", "Option A", "Answer: (A)")
        ],
        *[(form, "A. liver", True, "ok") for form in ("A", "(A)", "liver", "A: the liver", "The answer is A.")],
        ("B", "A", False, "ok"),
        ("A. kidney", "A. liver", False, "ok"),
        ("B. liver", "A. liver", False, "ok"),
        ("a lesion", "A", False, "unparsed"),
        ("the", "A", False, "unparsed"),
        ("E. coli", "E. coli", True, "ok"),
        ("spleen, liver", "liver and spleen", True, "ok"),
        ("Spleen & the liver.", "liver and spleen", True, "ok"),
        ("liver", "liver and spleen", False, "ok"),
        ("liver, spleen and kidney", "liver and spleen", False, "ok"),
        ("right and left kidney", "left kidney, right kidney", True, "ok"),
        ("left kidney and right lung", "right kidney and left lung", False, "ok"),
        ("肝脏和脾脏", "脾脏、肝脏", True, "ok"),
        ("lungs", "lung", True, "ok"),
        ("pulmonary edema", "pulmonary oedema", True, "ok"),
        ("spleen; lungs", "lung and spleen", True, "ok"),
        ("The answer is: yes, clearly", "yes", True, "ok"),
        ("**Answer:** No", "no", True, "ok"),
        ("answers vary", "no", False, "unparsed"),
        ("Final answer: 1.5 cm", "15 mm", True, "ok"),
        ("１５ｍｍ", "15 mm", True, "ok"),
        ("是的，可以看到", "包含", True, "ok"),
        ("不包含", "包含", False, "ok"),
    ],
)
def test_verdicts_of_version_2(prediction, reference, right, status):
    assert judge(prediction, [reference]) == (right, status)


@pytest.mark.parametrize(
    "options",
    [["Liver", "A kidney", "Lungs"], {"A": "liver", "B": "kidney", "C": "lung"}, ["A. liver", "B) kidney", "(C) lung"]],
)
def test_options_of_the_row(options):
    for wanted in ("B", "kidney", "(B) kidney"):
        for said in ("B", "(b)", "kidney", "The kidney.", "B. kidney", "B, because it is dark", "The answer is B."):
            assert judge(said.replace(", b", ": b"), [wanted], options=options) == (True, "ok"), (said, wanted)
        assert judge("A", [wanted], options=options) == (False, "ok")
        assert judge("B. liver", [wanted], options=options) == (False, "ok")
        assert judge("D", [wanted], options=options) == (False, "unparsed")
        assert judge("spleen", [wanted], options=options) == (False, "unparsed")
    rows = [{"sample_id": "1", "answer": "C", "answer_type": "closed", "options": options}]
    assert vqa_accuracy({"1": "the lung"}, rows)["overall"].value == 1.0


def test_names_depend_on_the_modality():
    row = {"sample_id": "1", "answer": "pulmonary oedema", "answer_type": "open"}
    for modality, right in (("X-Ray", 1.0), ("MRI", 0.0)):
        assert vqa_accuracy({"1": "edema"}, [{**row, "modality": modality}])["overall"].value == right


def test_any_of_several_references_will_do():
    assert judge("insula", ["insular cortex", "Insula"]) == (True, "ok")
    assert judge("insular lobe", ["insula"], {"insular lobe": "insula"}) == (True, "ok")


def test_normalise_and_numbers():
    assert normalise("The  LEFT, lobe!") == "left lobe"
    assert numbers_in("three of 10 mm and 1.5cm, T1, 3D") == [(3.0, None), (10.0, "mm"), (1.5, "cm")]


def test_perfect_answers_score_one_everywhere():
    scores = vqa_accuracy(PERFECT, ROWS)
    for score in (scores["overall"], scores["closed"], scores["open"]):
        assert score.value == 1.0
    assert {name: s.n for name, s in scores["by_question_type"].items()} == {"presence": 2, "size": 1, "brightness": 1}
    assert {name: s.n for name, s in scores["by_needs"].items()} == {"boxes": 3, "feature": 1}
    assert scores["counts"] == {"missing": 0, "empty": 0, "unparsed": 0}


def test_nothing_leaves_the_denominator():
    scores = vqa_accuracy({"1": "maybe", "2": "", "3": "15 mm"}, ROWS)
    assert scores["overall"].value == 0.25
    assert scores["counts"] == {"missing": 1, "empty": 1, "unparsed": 1}
    assert [row["status"] for row in scores["overall"].per_sample] == ["unparsed", "empty", "ok", "missing"]


def test_order_changes_nothing():
    rows = [{**row, "sample_id": f"{row['sample_id']}-{k}", "patient_id": f"p{k}"} for k in range(9) for row in ROWS]
    answers = {row["sample_id"]: row["answer"] if k % 3 else "yes" for k, row in enumerate(rows)}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert vqa_accuracy(answers, rows) == vqa_accuracy(dict(reversed(answers.items())), shuffled)


def test_a_kind_that_is_not_there_is_undefined():
    score = vqa_accuracy(PERFECT, ROWS[:2])["open"]
    assert (score.value, str(score)) == (None, "undefined (no open questions)")


def test_answer_types_with_a_trailing_space_count():
    assert vqa_accuracy(PERFECT, [{**ROWS[0], "answer_type": "CLOSED "}])["closed"].n == 1


def test_compare_counts_discordant_pairs():
    result = compare(PERFECT, {**PERFECT, "1": "no", "4": "dark"}, ROWS)
    assert (result["n"], result["b"], result["c"], result["p"]) == (4, 2, 0, 0.5)
    assert (result["a_accuracy"], result["b_accuracy"], result["difference"]) == (1.0, 0.5, 0.5)
    assert result["ci95"][0] <= 0.5 <= result["ci95"][1]
