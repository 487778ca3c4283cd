"""What every VQA protocol owes: nothing leaves the denominator, slices add up, bad input is counted."""

import random

import pytest

from eval.vqa import vqa_accuracy
from eval.vqa_protocols import PROTOCOLS

ALL = {"strict": vqa_accuracy, **PROTOCOLS}


def some_rows(count: int = 60) -> list[dict]:
    rng = random.Random(5)
    return [
        {
            "sample_id": f"s{k}",
            "patient_id": f"p{k % 17}",
            "answer": rng.choice(("yes", "no")) if k % 2 else "left lung",
            "answer_type": "closed" if k % 2 else "open",
            "modality": ("CT", "MRI")[k % 3 == 0],
            "organ": "lung",
            "question_type": "PRES, POS" if k % 5 == 0 else "POS",
        }
        for k in range(count)
    ]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_leaves_the_denominator(name):
    rows = some_rows()
    answers = {row["sample_id"]: row["answer"] for row in rows}
    whole = PROTOCOLS[name](answers, rows)
    assert whole["overall"].value == 1.0 and whole["overall"].n == whole["counts"]["questions"] == 60
    assert whole["closed"].n + (whole["open"] if "open" in whole else whole["recall"]).n == 60
    for slice_name, sizes in {
        "answer_type": [30, 30],
        "modality": [40, 20],
        "organ": [60],
        "question_type": [60, 12],
    }.items():
        assert [score.n for score in whole["by_" + slice_name].values()] == sizes
    del answers["s0"], answers["s1"]
    answers |= {"s2": " ", "s3": "perhaps", "extra": "yes"}
    less = PROTOCOLS[name](answers, rows)
    assert less["overall"].value == pytest.approx(56 / 60) and less["overall"].n == 60
    assert {key: less["counts"][key] for key in ("missing", "empty", "unparsed")} == {
        "missing": 2,
        "empty": 1,
        "unparsed": 1,
    }
    low, high = less["overall"].ci95
    assert low <= less["overall"].value <= high and less["overall"].clusters == 17
    shuffled = random.Random(0).sample(rows, len(rows))
    assert PROTOCOLS[name](dict(reversed(answers.items())), shuffled) == less


@pytest.mark.parametrize("name", ALL)
def test_numbers_nulls_and_rows_without_a_reference(name):
    rows = [
        {"sample_id": 1, "answer": 2, "answer_type": "open"},
        {"sample_id": 2, "answer": 1.5, "answer_type": "open"},
        {"sample_id": 3, "answer": "yes", "answer_type": "closed"},
        {"sample_id": 4, "answer": None, "answer_type": "closed"},
    ]
    scores = ALL[name]({"1": 2, "2": 1.5, "3": None, "4": "yes"}, rows)
    assert scores["overall"].value == pytest.approx(2 / 3) and scores["overall"].n == 3
    assert scores["counts"]["empty"] == 1 and scores["counts"]["no_reference"] == 1


@pytest.mark.parametrize("name", ALL)
def test_one_sample_and_one_class(name):
    row = {"sample_id": "1", "answer": "yes", "answer_type": "closed"}
    scores = ALL[name]({"1": "yes"}, [row])
    assert (scores["overall"].value, scores["overall"].ci95, scores["overall"].n) == (1.0, None, 1)
    assert scores["open" if "open" in scores else "recall"].value is None
    nothing = ALL[name]({}, [])
    assert nothing["overall"].value is None and nothing["overall"].reason


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("piece", ["(", "lung ", "1-", "\\boxed{", "<answer>", "肺，", "*", "A. ", "."])
def test_answers_of_a_megabyte(name, piece):
    rows = [{"sample_id": k, "answer": "left lung", "answer_type": kind} for k, kind in enumerate(("open", "closed"))]
    long = piece * (1_000_000 // len(piece))
    scores = ALL[name]({"0": long, "1": "left lung"}, rows)
    assert scores["overall"].per_sample[0]["value"] < 1


def test_several_references_count_as_the_best():
    row = {"sample_id": "1", "references": ["heart", "left lung"], "answer_type": "open"}
    for name, protocol in ALL.items():
        assert protocol({"1": "left lung"}, [row])["overall"].value == 1.0, name


def test_an_answer_type_that_llavamed_does_not_know_is_counted_not_scored():
    rows = [{"sample_id": k, "answer": "yes", "answer_type": kind} for k, kind in enumerate(("closed", "number", None))]
    scores = PROTOCOLS["llavamed"]({"0": "yes", "1": "yes"}, rows)
    assert (scores["overall"].n, scores["counts"]["other_type"], scores["counts"]["missing"]) == (1, 2, 0)
