from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as rle

from downstream.brain_qa import KINDS, build_questions, lesions_of, questions_for, report_for, report_text, size_text
from downstream.samples import read_questions, read_reports
from eval.findings import parse_findings
from grounding.brain import build_brain, make_sample
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import GroundingSample, RegionSet

PLAIN = {"brightness": "bright", "margin": "sharp", "shape": "round", "texture": "solid"}
TEMPORAL, FRONTAL = (
    "brain/{0}_lobe/{1}_{0}_lobe".format(*name) for name in (("temporal", "left"), ("frontal", "right"))
)
RIGHT_TEMPORAL = TEMPORAL.replace("left", "right")


def square(row: int, column: int, side: int) -> np.ndarray:
    mask = np.zeros((192, 192), np.uint8)
    mask[row : row + side, column : column + side] = 1
    return mask


def sample_of(*parts: tuple[str, np.ndarray, dict], spacing=(1.0, 1.0)) -> GroundingSample:
    """An axial-like sample with three structures and the lesions that are given."""
    parts = [
        ("brain", square(10, 10, 170), {}),
        (TEMPORAL, square(60, 110, 60), {}),
        (RIGHT_TEMPORAL, square(60, 20, 60), {}),
        (FRONTAL, square(12, 20, 45), {}),
        *parts,
    ]
    boxes = [
        [
            np.nonzero(m.any(0))[0][0],
            np.nonzero(m.any(1))[0][0],
            np.nonzero(m.any(0))[0][-1] + 1,
            np.nonzero(m.any(1))[0][-1] + 1,
        ]
        for _, m, _ in parts
    ]
    coded = [rle.encode(np.asfortranarray(m)) for _, m, _ in parts]
    regions = RegionSet(
        boxes=np.array(boxes) / 192,
        labels=[label for label, _, _ in parts],
        image_size=(192, 192),
        masks=[{"size": [192, 192], "counts": c["counts"].decode()} for c in coded],
        attributes=[attributes for _, _, attributes in parts],
    )
    return GroundingSample("i1", "p1", "test", "mri", b"", regions, ("brain",), spacing)


ONE = (f"{TEMPORAL}/lesion", square(80, 130, 13), PLAIN)  # 13 mm square: 14.7 mm diameter
TWO = (f"{FRONTAL}/lesion", square(20, 30, 25), PLAIN | {"brightness": "dark", "texture": "ring"})  # 28.2 mm


def answers(sample, seeds=range(20)):
    """kind -> set of (question, answer) over many random choices."""
    asked = defaultdict(set)
    for seed in seeds:
        for question in questions_for(sample, np.random.default_rng(seed)):
            asked[question.question_type].add((question.question, question.answer))
    return asked


def test_no_lesion():
    sample = sample_of()
    asked = answers(sample)
    assert set(asked) == {"presence", "structure_presence", "count"}
    assert {a for _, a in asked["presence"]} == {a for _, a in asked["structure_presence"]} == {"no"}
    assert {a for _, a in asked["count"]} == {"0"}
    report = report_for(sample)
    assert (report.findings, report.impression, report.indication) == ("No lesion is seen.", "Normal study.", None)


def test_one_lesion():
    asked = answers(sample_of(ONE))
    assert set(asked) == set(KINDS)
    assert {a for _, a in asked["structure"]} == {"left temporal lobe"}
    assert {a for _, a in asked["size"]} == {"15 mm"}
    said = {
        kind: {a for _, a in asked[kind]} for kind in ("brightness", "margin", "shape", "texture", "count", "presence")
    }
    assert said == {
        "brightness": {"brighter"},
        "margin": {"sharp"},
        "shape": {"round"},
        "texture": {"solid"},
        "count": {"1"},
        "presence": {"yes"},
    }
    for question, answer in asked["side"]:
        assert answer == ("yes" if "left" in question else "no")
    for question, answer in asked["structure_presence"]:
        assert answer == ("yes" if "left temporal lobe" in question else "no")
    assert any("right temporal lobe" in question for question, _ in asked["structure_presence"])


def test_two_lesions_are_compared_and_the_largest_described():
    asked = answers(sample_of(ONE, TWO))
    assert {a for _, a in asked["structure"]} == {"right frontal lobe"} and {a for _, a in asked["size"]} == {"30 mm"}
    assert {a for _, a in asked["texture"]} == {"ring-shaped"} and {a for _, a in asked["brightness"]} == {"darker"}
    for question, answer in asked["comparison"]:
        if "more than one" in question or "several" in question:
            assert answer == "yes"
        elif "larger" in question:
            assert answer == ("yes" if question.index("right frontal") < question.index("left temporal") else "no")
        else:
            assert answer == "no"  # one on each side


def test_nothing_is_asked_about_the_largest_of_two_like_sizes():
    rival = (f"{FRONTAL}/lesion", square(20, 30, 15), PLAIN)
    assert set(answers(sample_of(ONE, rival))) == {"presence", "structure_presence", "count", "comparison"}


def test_small_lesions_get_no_feature_questions():
    tiny = (f"{TEMPORAL}/lesion", square(80, 130, 9), PLAIN)
    assert not {kind for kind, (_, needs) in KINDS.items() if needs == "feature"} & set(answers(sample_of(tiny)))


def test_a_structure_into_which_a_lesion_spills_is_not_asked_about():
    spilling = (f"{FRONTAL}/lesion", square(48, 40, 18), PLAIN)  # 9 of 18 rows in the frontal, 6 in the temporal lobe
    questions = {q for q, _ in answers(sample_of(spilling))["structure_presence"]}
    assert not any("right temporal" in question for question in questions)


@pytest.mark.parametrize(("diameter", "text"), [(1.0, "5 mm"), (12.4, "10 mm"), (12.5, "15 mm"), (37.6, "40 mm")])
def test_sizes_are_rounded_to_5_mm(diameter, text):
    assert size_text(diameter) == text


def test_size_counts_the_spacing():
    coarse = lesions_of(sample_of(ONE, spacing=(2.0, 2.0)).regions, (2.0, 2.0))[0]
    assert coarse.diameter == pytest.approx(2 * 2 * 13 / np.sqrt(np.pi))


def test_regions_without_masks_are_refused():
    with pytest.raises(ValueError, match="masks and attributes"):
        report_text(replace(sample_of(ONE).regions, masks=None))


def test_report_states_lesions_largest_first_and_cites():
    regions = sample_of(ONE, TWO).regions
    findings, impression = report_text(regions, {4: 0, 5: 3})
    assert findings == (
        "A 30 mm dark, ring-shaped, round lesion with a sharp margin in the right frontal lobe [r3]. "
        "A 15 mm bright, solid, round lesion with a sharp margin in the left temporal lobe [r0]."
    )
    assert impression == "2 lesions in the right frontal lobe and left temporal lobe."
    assert report_text(sample_of(ONE).regions)[1] == "Single lesion in the left temporal lobe."
    assert "[r" not in report_text(regions)[0] and "[r0]" not in report_text(regions, {5: 3})[0]


def test_reports_say_what_the_regions_hold():
    tree = load_label_tree()
    for index in range(40):
        sample = make_sample("test", 1, index)
        stated = Counter((f.structure, f.side) for f in parse_findings(report_for(sample).findings, tree))
        places = [lesion.place for lesion in lesions_of(sample.regions)]
        assert stated == Counter((place.split("/")[1], tree.laterality(place)) for place in places)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("brain")
    build_brain(out / "store", "train", 160, 5)
    build_questions(out / "store", out, 0, 500)
    return out


def test_files_have_the_numbers_that_were_asked_for(built, tmp_path):
    assert len(read_questions(built / "questions.jsonl")) == 500
    assert len(read_reports(built / "reports.jsonl")) == 160
    build_questions(built / "store", tmp_path, 0, 50, 7)
    assert len(read_questions(tmp_path / "questions.jsonl")) == 50
    assert len(read_reports(tmp_path / "reports.jsonl")) == 7


def test_files_depend_on_the_seed_alone(built, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        build_questions(built / "store", tmp_path / name, seed, 500)
    same, other, first = (folder / "questions.jsonl" for folder in (tmp_path / "same", tmp_path / "other", built))
    assert same.read_text() == first.read_text() != other.read_text()


def test_kinds_and_answers_are_balanced(built):
    questions = read_questions(built / "questions.jsonl")
    kinds = defaultdict(Counter)
    for question in questions:
        kinds[question.question_type][question.answer] += 1
    assert set(kinds) == set(KINDS)
    assert sum(q.needs == "feature" for q in questions) / len(questions) >= 0.25
    for kind, counts in kinds.items():
        share = counts.most_common(1)[0][1] / counts.total()
        assert share <= {"structure": 0.15, "size": 0.35, "count": 0.35}.get(kind, 0.56), (kind, counts)


def test_the_name_of_a_structure_does_not_give_the_answer_away(built):
    named = defaultdict(Counter)
    for q in read_questions(built / "questions.jsonl"):
        if q.question_type == "structure_presence":
            structure = next(
                s for s in ("frontal", "parietal", "temporal", "occipital", "cerebellum", "") if s in q.question
            )
            named[structure][q.answer] += 1
    assert all(abs(c["yes"] - c["no"]) <= max(4, 0.4 * c.total()) for c in named.values()), named


def test_questions_have_unique_ids_and_belong_to_the_store(built):
    questions, store = read_questions(built / "questions.jsonl"), open_store(built / "store")
    assert len({q.sample_id for q in questions}) == len(questions)
    assert all(store.by_id(q.image_id).patient_id == q.patient_id for q in questions[:50])
    assert {q.answer for q in questions if q.answer_type == "closed"} == {"yes", "no"}
    assert len({q.question for q in questions if q.question_type == "count"}) == 3
