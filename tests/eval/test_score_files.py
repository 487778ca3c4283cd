import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle

from eval.score import ScoreError, run_score, score_files
from grounding.types import RegionSet, write_regions

QUESTIONS = [
    {"sample_id": "q1", "question": "Is there a lesion?", "answer": "yes", "answer_type": "closed", "patient_id": "p1"},
    {"sample_id": "q2", "question": "How large?", "answer": "15 mm", "answer_type": "open", "patient_id": "p2"},
]
ANSWERS = [{"sample_id": "q1", "prediction": "Yes."}, {"sample_id": "q2", "prediction": "15mm"}]
REPORTS = [
    {"sample_id": "r1", "report": "A 15 mm lesion in the left temporal lobe.", "patient_id": "p1"},
    {"sample_id": "r2", "report": "No lesion is seen.", "patient_id": "p2"},
]


def read(name):
    return json.loads(Path(name).read_text(encoding="utf-8"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        (tmp_path / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return name

    return write


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_vqa(files):
    results = score_files("vqa", files("p.jsonl", ANSWERS), files("r.jsonl", QUESTIONS), (), "out/scores.json")
    written = read("out/scores.json")
    overall = written["protocols"]["strict"]["overall"]
    assert (overall["value"], overall["n"], len(overall["per_sample"])) == (1.0, 2, 2)
    assert results["protocols"]["strict"]["overall"].value == 1.0
    assert written["checks"] == dict.fromkeys(("missing", "extra", "empty", "repeated", "unknown modalities"), [])
    assert len(written["files"]["predictions"]["sha256"]) == 64
    assert written["versions"]["numpy"]


def test_order_of_lines_changes_nothing(files):
    answers = [{"sample_id": f"q{k}", "prediction": "yes" if k % 3 else "no"} for k in range(30)]
    questions = [{**QUESTIONS[0], "sample_id": f"q{k}", "patient_id": f"p{k % 11}"} for k in range(30)]
    first = score_files("vqa", files("p.jsonl", answers), files("r.jsonl", questions))
    second = score_files("vqa", files("p.jsonl", answers[::-1]), files("r.jsonl", questions[::-1]))
    assert first["protocols"] == second["protocols"]


def test_missing_is_wrong_and_listed_extra_is_listed(files):
    answers = [ANSWERS[0], {"sample_id": "q9", "prediction": ""}]
    results = score_files("vqa", files("p.jsonl", answers), files("r.jsonl", QUESTIONS))
    found = {name: ids for name, ids in results["checks"].items() if ids}
    assert found == {"missing": ["q2"], "extra": ["q9"], "empty": ["q9"]}
    assert results["protocols"]["strict"]["overall"].value == 0.5


def test_report(files, no_java, capsys):
    said = [{"sample_id": row["sample_id"], "prediction": row["report"]} for row in REPORTS]
    args = Namespace(
        task="report",
        predictions=files("p.jsonl", said),
        references=files("r.jsonl", REPORTS),
        protocol=None,
        out="s.json",
    )
    assert run_score(args) == 0
    written = read("s.json")["protocols"]
    assert written["findings"]["finding"]["f1"]["value"] == 1.0
    assert written["full"]["METEOR"]["value"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "undefined (Java" in printed and "tokens words" in printed and "written: s.json" in printed


def test_the_projects_own_reports_file_is_read(files, no_java):
    rows = [{"study_id": "r1", "patient_id": "p", "findings": "No lesion is seen.", "impression": "Normal study."}]
    said = [{"sample_id": "r1", "prediction": "No lesion is seen."}]
    results = score_files("report", files("p.jsonl", said), files("r.jsonl", rows), ["findings"])
    assert list(results["protocols"]) == ["findings"]
    assert results["protocols"]["findings"]["presence"].value == 1.0


def test_several_references(files, no_java):
    rows = [{"sample_id": "r1", "references": ["no lesion", "normal study"]}, REPORTS[1]]
    said = [{"sample_id": "r1", "prediction": "normal study"}, {"sample_id": "r2", "prediction": "No lesion is seen."}]
    results = score_files("report", files("p.jsonl", said), files("r.jsonl", rows), ["full"])
    assert results["protocols"]["full"]["ROUGE-L"].value == pytest.approx(1.0)


def test_regions_jsonl(files, tmp_path):
    region = RegionSet([[0, 0, 0.5, 0.5]], ["brain/lesion"], (10, 10))
    truth = {"a": region, "b": region.select([])}
    write_regions(tmp_path / "r.jsonl", truth)
    write_regions(tmp_path / "p.jsonl", {"a": RegionSet(region.boxes, region.labels, (10, 10), [0.5])})
    results = score_files("grounding", "p.jsonl", "r.jsonl", ["coco"], "s.json")
    assert results["protocols"]["coco"]["overall"]["AP50"].value == pytest.approx(1.0)
    nothing = dict.fromkeys(("missing", "extra", "empty", "out of frame", "unknown labels"), [])
    assert results["checks"] == nothing | {"missing": ["b"]}
    assert read("s.json")["protocols"]["coco"]["overall"]["dice"]["value"] is None


def coco_truth():
    images = [{"id": k, "height": 50, "width": 40, "patient_id": f"p{k}"} for k in range(3)]
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    annotations = [
        {"id": k, "image_id": k, "category_id": 7, "bbox": [10, 10, 20, 20], "segmentation": polygon} for k in range(2)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "polyp"}]}


def coco_results():
    mask = np.zeros((50, 40), np.uint8, order="F")
    mask[10:30, 10:30] = 1
    coded = rle.encode(mask)
    segmentation = {"size": [50, 40], "counts": coded["counts"].decode()}
    row = {"category_id": 7, "bbox": [10, 10, 20, 20], "score": 0.9, "segmentation": segmentation}
    return [{**row, "image_id": k} for k in range(2)]


def test_coco_json_with_annotation_id_0_and_polygons(files):
    predictions = files("p.json", [json.dumps(coco_results())])
    results = score_files("grounding", predictions, files("r.json", [json.dumps(coco_truth())]), ["coco"])
    scores = results["protocols"]["coco"]["overall"]
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"AP": 1.0, "AP50": 1.0, "acc@0.5": 1.0, "pointing": 1.0, "dice": 1.0}
    )
    assert results["checks"]["empty"] == ["2"]


def test_a_source_is_judged_by_what_it_annotates(files):
    """A second class is predicted everywhere; it counts as wrong only in the source that annotates it."""
    truth, results = coco_truth(), coco_results()
    truth["categories"].append({"id": 8, "name": "skin/skin_lesion"})
    for image, source in zip(truth["images"], "aab", strict=True):
        image |= {"source": source, "labelled": ["polyp"] if source == "a" else ["skin/skin_lesion"]}
    other = {"category_id": 8, "bbox": [0, 0, 5, 5], "score": 0.99}
    results = [{k: v for k, v in row.items() if k != "segmentation"} for row in results]
    results += [{**other, "image_id": k} for k in range(3)]
    truth["annotations"].append({"id": 9, "image_id": 2, "category_id": 8, "bbox": [20, 20, 9, 9]})
    for row in truth["annotations"]:
        row.pop("segmentation", None)
    scores = score_files("grounding", files("p.json", [json.dumps(results)]), files("r.json", [json.dumps(truth)]))
    by_source = scores["protocols"]["coco"]["by_source"]
    assert by_source["a"]["AP50"].value == pytest.approx(1.0) and by_source["b"]["AP50"].value == 0.0
    assert scores["protocols"]["coco"]["overall"]["AP50"].value == pytest.approx(0.5)


def test_coco_results_may_be_empty(files):
    results = score_files("grounding", files("p.json", ["[]"]), files("r.json", [json.dumps(coco_truth())]))
    assert results["protocols"]["coco"]["overall"]["AP"].value == 0.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([*ANSWERS, ANSWERS[0]], r"p\.jsonl:3: sample_id 'q1' again, first on line 1; keep one"),
        ([ANSWERS[0], "{broken\n", "also\n"], r"p\.jsonl:2: not JSON .* \(and 1 more: line 3 not"),
        (["[1]\n"], r"p\.jsonl:1: not a JSON object"),
        ([{"prediction": "yes"}], r'p\.jsonl:1: no "sample_id"'),
        ([{"sample_id": "q1"}], r'p\.jsonl:1: "prediction" is missing; give a text'),
        ([{"sample_id": "q1", "prediction": None}], r'p\.jsonl:1: "prediction" is null'),
        ([{"sample_id": "x", "prediction": "yes"}], r"p\.jsonl: none of its 1 ids is among the references"),
        ([], r"p\.jsonl: holds no records"),
        (["\n \n"], r"p\.jsonl: holds no records"),
    ],
)
def test_bad_predictions(files, answers, message):
    with pytest.raises(ScoreError, match=message) as error:
        score_files("vqa", files("p.jsonl", answers), files("r.jsonl", QUESTIONS), (), "s.json")
    assert "\n" not in str(error.value)
    assert not Path("s.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_type": "maybe"}, r"r\.jsonl:1: \"answer_type\" is 'maybe'; give open or closed"),
        ({"answer": " "}, r'r\.jsonl:1: "answer" is empty'),
        ({"references": []}, r'r\.jsonl:1: "references" is not a list'),
        ({"references": [3, None]}, r'r\.jsonl:1: "references" is null'),
    ],
)
def test_bad_references(files, change, message):
    with pytest.raises(ScoreError, match=message):
        score_files("vqa", files("p.jsonl", ANSWERS), files("r.jsonl", [{**QUESTIONS[0], **change}]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{}"], "not COCO results"),
        (["[{}]"], "row 0 has no image_id"),
        ([json.dumps([{**coco_results()[0], "image_id": 99}])], "row 0 has image_id 99"),
        ([json.dumps([{**coco_results()[0], "bbox": [1, 2, 3]}])], "row 0 has bbox"),
        (["[1"], r"p\.json:1: not JSON"),
    ],
)
def test_bad_coco(files, rows, message):
    with pytest.raises(ScoreError, match=message):
        score_files("grounding", files("p.json", rows), files("r.json", [json.dumps(coco_truth())]))


def test_bad_regions(files):
    row = {"image_id": "a", "image_size": [9, 9], "regions": [{"box": [0, 0, 2, 1], "label": "brain"}]}
    with pytest.raises(ScoreError, match=r"p\.jsonl:1: box 0 .* outside"):
        score_files("grounding", files("p.jsonl", [row]), files("r.jsonl", [row]))
    with pytest.raises(ScoreError, match="differ in kind"):
        score_files("grounding", files("p.jsonl", [row]), files("r.json", ["{}"]))


def test_wrong_names_and_paths(files, tmp_path):
    predictions, references = files("p.jsonl", ANSWERS), files("r.jsonl", QUESTIONS)
    with pytest.raises(ScoreError, match="unknown task 'vpa'; choose one of vqa, report, grounding"):
        score_files("vpa", predictions, references)
    with pytest.raises(ScoreError, match="unknown protocol 'exact' for vqa; choose from strict, llavamed"):
        score_files("vqa", predictions, references, ["exact"])
    with pytest.raises(ScoreError, match=r"none\.jsonl: cannot be read \(No such file"):
        score_files("vqa", "none.jsonl", references)
    with pytest.raises(ScoreError, match=r"p\.jsonl/s\.json: cannot be written"):
        score_files("vqa", predictions, references, (), "p.jsonl/s.json")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(ScoreError, match="not UTF-8"):
        score_files("vqa", "latin.jsonl", references)


def test_another_judge_of_entailment(files, monkeypatch, tmp_path):
    """A function of the user's own decides in radfact; "" and what is not there are refused by name."""
    (tmp_path / "my_judge.py").write_text("def never(hypothesis, evidence):\n    return False\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = [{"sample_id": row["sample_id"], "prediction": row["report"]} for row in REPORTS]
    paths = files("p.jsonl", said), files("r.jsonl", REPORTS), ["radfact"]
    assert score_files("report", *paths)["protocols"]["radfact"]["logical"]["precision"].value == 1.0
    judged = score_files("report", *paths, entails="my_judge:never")
    assert judged["protocols"]["radfact"]["logical"]["precision"].value == 0.0
    for name in ("my_judge:always", "no_such_module:f", "", "my_judge"):
        with pytest.raises(ScoreError, match="write MODULE:FUNCTION"):
            score_files("report", *paths, entails=name)
