"""What `medglip score` says about the files before and beside the scores."""

import json

import pytest

from downstream.cli import main

REPORT = "There is a small left pleural effusion with adjacent atelectasis and no pneumothorax is seen."


def question(k, **more):
    row = {"sample_id": f"q{k}", "image_id": f"i{k}", "patient_id": f"p{k}", "question": f"Is there finding {k}?"}
    return row | {"answer": "yes", "answer_type": "closed"} | more


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(task, *arguments, **files):
        for name, rows in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = [f"--{name}={name}.jsonl" for name in files]
        code = main(["score", task, *names, "--out", "scores.json", *arguments])
        captured = capsys.readouterr()
        written = json.loads((tmp_path / "scores.json").read_text()) if code == 0 else None
        return written, captured.out + captured.err

    return run


def test_each_odd_sample_is_named(score):
    references = [question(k) for k in range(4)] + [question(5, image_id="i0", question="is there finding 0")]
    predictions = [
        {"sample_id": f"q{k}", "prediction": text} for k, text in ((0, "yes"), (1, " "), (9, "yes"), (5, "y"))
    ]
    written, out = score("vqa", predictions=predictions, references=references)
    found = {name: ids for name, ids in written["checks"].items() if ids}
    assert found == {"missing": ["q2", "q3"], "extra": ["q9"], "empty": ["q1"], "repeated": ["q5"]}
    assert "2 missing (samples without a prediction" in out and "1 repeated" in out


def test_overlap_with_the_training_set_is_listed_and_scored_apart(score):
    references = [question(k) for k in range(10)]
    predictions = [{"sample_id": f"q{k}", "prediction": "yes" if k < 3 else "no"} for k in range(10)]
    train = [
        question(0, sample_id="t0", patient_id="x"),  # the same image and question
        question(1, sample_id="t1", patient_id="y", question="Where?"),  # the same image
        question(2, sample_id="t2", image_id="z"),  # the same patient
        question(30),
    ]
    written, out = score("vqa", predictions=predictions, references=references, train=train)
    shared = {name.removeprefix("training: same "): ids for name, ids in written["checks"].items() if "train" in name}
    assert shared == {
        "id": [],
        "image": ["q0", "q1"],
        "patient": ["q2"],
        "image and question": ["q0"],
        "report": [],
    }
    apart = written["protocols"]["strict"]["by_training"]
    assert (apart["shares something"]["value"], apart["shares something"]["n"]) == (1.0, 3)
    assert (apart["shares nothing"]["value"], apart["shares nothing"]["n"]) == (0.0, 7)
    assert "2 training: same image (samples share their image with the training set): q0, q1" in " ".join(out.split())


def test_reports_that_the_training_set_has_word_for_word(score):
    references = [{"sample_id": "r1", "report": REPORT}, {"sample_id": "r2", "report": "Normal."}]
    train = [{"study_id": "t1", "findings": None, "report": REPORT.upper()}, {"study_id": "t2", "report": "Normal."}]
    predictions = [{"sample_id": "r1", "prediction": "Normal."}]
    written, _ = score("report", "--protocol", "findings", predictions=predictions, references=references, train=train)
    assert written["checks"]["training: same report"] == ["r1"], "two normal studies may say no more than that"


def test_a_training_set_that_says_nothing_is_refused(score):
    files = {"predictions": [{"sample_id": "q1", "prediction": "yes"}], "references": [question(1)]}
    written, out = score("vqa", **files, train=[{"text": "a"}])
    assert written is None and "train.jsonl:1: nothing to compare; give sample_id" in out


def test_patients_are_numbered_not_named(score):
    references = [question(k, patient_id="MRN-4711" if k else "MRN-12") for k in range(3)]
    predictions = [{"sample_id": f"q{k}", "prediction": "yes"} for k in range(3)]
    written, out = score("vqa", predictions=predictions, references=references)
    assert written["clusters"] == {"q0": 0, "q1": 1, "q2": 1}
    assert "MRN" not in json.dumps(written) + out


def test_markdown_holds_every_table(score, tmp_path):
    references = [question(k, question_type="a|b") for k in range(3)]
    predictions = [{"sample_id": f"q{k}", "prediction": "yes"} for k in range(2)]
    written, _ = score("vqa", "--markdown", "s.md", predictions=predictions, references=references)
    text = (tmp_path / "s.md").read_text()
    assert f"| overall | {written['protocols']['strict']['overall']['value']:.3f} (" in text
    assert "1 missing" in text and "sha256" in text and "Research use only" in text
    for table in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_kinds_of_image_that_are_not_known_are_listed(score):
    kinds = ("CT", "X-Ray", "MRI", "MR", "Rontgen")
    references = [question(k, modality=kind) for k, kind in enumerate(kinds)]
    predictions = [{"sample_id": f"q{k}", "prediction": "yes"} for k in range(len(kinds))]
    written, out = score("vqa", predictions=predictions, references=references)
    assert written["checks"]["unknown modalities"] == ["MR", "Rontgen"]
    assert "2 unknown modalities (kinds of image that the label tree does not know" in " ".join(out.split())


def regions(*labels):
    return {"image_size": [9, 9], "regions": [{"box": [0, 0, 1, 1], "label": label, "score": 0.5} for label in labels]}


def test_labels_that_are_not_known_are_listed(score):
    """A finding counts by its kind, and what is annotated though not there is known."""
    truth = [{"image_id": "a", "labelled": ["abdomen/spleen"], **regions("brain/lesion", "abdomen/liver", "my organ")}]
    said = regions("brain/frontal_lobe/lesion", "abdomen/spleen", "my orgen", "abdomen/liver", "kidny")
    written, _ = score("grounding", predictions=[{"image_id": "a", **said}], references=truth)
    assert written["checks"]["unknown labels"] == ["kidny", "my orgen"]


def test_a_training_set_without_answers_leaves_the_baselines_undefined(score):
    files = {"predictions": [{"sample_id": "q1", "prediction": "yes"}], "references": [question(1)]}
    written, out = score("vqa", **files, train=[{"image_id": "i1"}])
    assert written["checks"]["training: same image"] == ["q1"]
    assert written["baselines"]["answer prior"]["closed"]["reason"] == "no training answers"
