"""`medglip score compare`: from answer files to the table of differences."""

import json

import numpy as np
import pytest

from downstream.cli import main
from eval.statistics import mcnemar


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows):
    with open(name, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def scored(name, right, patients=None, task="vqa", protocol="strict"):
    """Scores of a system that is right where `right` says; returns scores.json's name."""
    patients = patients or [f"p{k}" for k in range(len(right))]
    references = [
        {"sample_id": f"q{k}", "question": "?", "answer": "yes", "answer_type": "closed", "patient_id": patients[k]}
        for k in range(len(right))
    ]
    write("r.jsonl", references)
    write(f"{name}.jsonl", [{"sample_id": f"q{k}", "prediction": "yes" if ok else "no"} for k, ok in enumerate(right)])
    arguments = ["--predictions", f"{name}.jsonl", "--references", "r.jsonl", "--protocol", protocol]
    assert main(["score", task, *arguments, "--out", f"{name}.json"]) == 0
    return f"{name}.json"


def compare(*arguments, metric="overall"):
    assert main(["score", "compare", *arguments, "--metric", metric, "--out", "compare.json"]) == 0
    with open("compare.json") as stream:
        return json.load(stream)


def refused(capsys, *arguments):
    assert main(["score", "compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_three_systems_against_the_first(folder, capsys):
    rng = np.random.default_rng(0)
    verdicts = {"a": rng.random(200) < 0.5, "b": rng.random(200) < 0.55, "c": rng.random(200) < 0.8}
    files = [scored(name, right) for name, right in verdicts.items()]
    capsys.readouterr()
    rows = {row["system"]: row for row in compare(*files)["comparisons"]}
    assert list(rows) == ["b", "c"] and {row["base"] for row in rows.values()} == {"a"}
    for name, row in rows.items():
        assert row["difference"] == pytest.approx(verdicts[name].mean() - verdicts["a"].mean())
        assert row["test"] == "McNemar" and row["p"] == mcnemar(verdicts[name], verdicts["a"])["p"]
        assert row["ci95"][0] < row["difference"] < row["ci95"][1]
        assert row["only_system"] - row["only_base"] == pytest.approx(200 * row["difference"])
    assert rows["c"]["p_holm"] == pytest.approx(2 * rows["c"]["p"]) and rows["c"]["p"] < 1e-4
    out = capsys.readouterr().out
    assert "strict · overall" in out and "<0.0001" in out and "h +0." in out


def test_against_the_best(folder):
    files = [scored(name, [k % n == 0 for k in range(40)]) for name, n in (("a", 4), ("b", 2), ("c", 3))]
    rows = compare(*files, "--against", "best")["comparisons"]
    assert {row["base"] for row in rows} == {"b"} and all(row["difference"] < 0 for row in rows)


def test_samples_of_one_patient_are_tested_together(folder):
    better, worse = [True] * 40 + [True, False] * 5, [False] * 40 + [True, False] * 5
    patients = ["one"] * 40 + [f"p{k}" for k in range(10)]
    files = [scored("a", worse, patients), scored("b", better, patients)]
    (row,) = compare(*files)["comparisons"]
    assert (row["test"], row["p"], row["clusters"]) == ("permutation", 1.0, 11)
    assert row["p_mcnemar"] < 1e-6, "which takes 40 samples of one patient as 40 patients"
    assert row["visible"] is None


def test_f1_is_compared_as_f1(folder):
    reports = ["A lesion in the left insula.", "No lesion is seen.", "A lesion in the right temporal lobe."] * 4
    write("r.jsonl", [{"sample_id": f"r{k}", "report": text} for k, text in enumerate(reports)])
    for name, said in (("a", ["A lesion in the left insula."] * 12), ("b", reports)):
        write(f"{name}.jsonl", [{"sample_id": f"r{k}", "prediction": text} for k, text in enumerate(said)])
        arguments = ["--predictions", f"{name}.jsonl", "--references", "r.jsonl", "--protocol", "findings"]
        assert main(["score", "report", *arguments, "--out", f"{name}.json"]) == 0
    rows = compare("a.json", "b.json", metric="finding")["comparisons"]
    (row,) = [row for row in rows if row["metric"].endswith("f1")]
    # a states 12 findings, 4 of them true, of 8 true ones.
    assert (row["base_score"], row["score"]) == (pytest.approx(2 * 4 / (12 + 8)), 1.0)


def test_equal_predictions_are_noted(folder):
    files = [scored(name, [True, False, True]) for name in "ab"]
    result = compare(*files)
    assert result["comparisons"][0]["p"] == 1.0
    assert result["notes"] == ["a and b are scores of the same predictions"]


def test_what_cannot_be_compared_is_refused(folder, capsys):
    a = scored("a", [True, False])
    other = scored("other", [True, False, True])
    assert "a.json and other.json have different references (sha256)" in refused(capsys, a, other)
    assert "two scores.json files or more" in refused(capsys, a)
    assert "given twice" in refused(capsys, a, a)
    assert "none.json: cannot be read" in refused(capsys, a, "none.json")
    assert "r.jsonl" in refused(capsys, a, "r.jsonl")
    assert "no metric 'BLEU-9'" in refused(capsys, a, scored("b", [True, True]), "--metric", "BLEU-9")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(task="report"), "different tasks: vqa and report"),
        (lambda c: c["protocols"]["strict"].update(version="0"), "differ in the version of strict"),
        (
            lambda c: c["protocols"].update(lenient=c["protocols"].pop("strict")),
            "share no protocol: strict and lenient",
        ),
        (lambda c: c["clusters"].pop("q1"), "different sample ids"),
        (lambda c: c["protocols"]["strict"]["overall"].update(version="0"), "different versions of strict · overall"),
        (lambda c: c.pop("clusters"), "not a scores.json"),
    ],
)
def test_other_versions_are_refused(folder, capsys, change, reason):
    files = [scored(name, [True, False, name == "a"]) for name in "ab"]
    content = json.loads((folder / "b.json").read_text())
    change(content)
    (folder / "b.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert reason in refused(capsys, *files)


def test_columns_of_other_samples_are_left_out_by_name(folder, capsys):
    files = [scored(name, [True, False, name == "a"]) for name in "ab"]
    content = json.loads((folder / "b.json").read_text())
    content["protocols"]["strict"]["overall"]["per_sample"].pop()
    (folder / "b.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert "per-sample column is in all files" in refused(capsys, *files, "--metric", "overall")


def test_markdown(folder):
    files = [scored(name, [True, False, name == "a"]) for name in "ab"]
    assert main(["score", "compare", *files, "--markdown", "c.md"]) == 0
    text = (folder / "c.md").read_text()
    assert "| strict · overall | a | 0.667 |" in text and "| b | 0.333 | -0.333" in text


def test_parts_of_a_slice(folder, capsys):
    rows = [{"sample_id": f"q{k}", "question": "?", "answer": "yes", "answer_type": "closed"} for k in range(8)]
    rows += [{"sample_id": f"o{k}", "question": "?", "answer": "liver", "answer_type": "open"} for k in range(8)]
    write("r.jsonl", rows)
    for name, said in (("a", {"yes": "no", "liver": "liver"}), ("b", {"yes": "yes", "liver": "liver"})):
        write(f"{name}.jsonl", [{"sample_id": row["sample_id"], "prediction": said[row["answer"]]} for row in rows])
        files = ["--predictions", f"{name}.jsonl", "--references", "r.jsonl", "--protocol", "strict"]
        assert main(["score", "vqa", *files, "--out", f"{name}.json"]) == 0
    found = {
        row["metric"]: row["difference"] for row in compare("a.json", "b.json", "--by", "answer_type")["comparisons"]
    }
    assert found == {"strict · overall": 0.5, "strict · overall, closed": 1.0, "strict · overall, open": 0.0}
    capsys.readouterr()
    assert "no slice 'organ'; choose from answer_type" in refused(capsys, "a.json", "b.json", "--by", "organ")


def test_bleu_is_compared_as_corpus_bleu_and_full_apart_from_r2gen(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))  # no Java: METEOR takes long to start
    reports = ["The heart is of normal size.", "There is a small effusion on the left side.", "Lungs are clear."] * 5
    write("r.jsonl", [{"sample_id": f"r{k}", "report": text} for k, text in enumerate(reports)])
    for name, words in (("a", 3), ("b", 6)):
        said = [" ".join(text.split()[:words]) for text in reports]
        write(f"{name}.jsonl", [{"sample_id": f"r{k}", "prediction": text} for k, text in enumerate(said)])
        files = ["--predictions", f"{name}.jsonl", "--references", "r.jsonl", "--protocol", "full", "r2gen"]
        assert main(["score", "report", *files, "--out", f"{name}.json"]) == 0
    capsys.readouterr()
    rows = {row["metric"]: row for row in compare("a.json", "b.json", metric="BLEU-2")["comparisons"]}
    for name, key in (("a", "base_score"), ("b", "score")):
        scores = json.loads((folder / f"{name}.json").read_text())["protocols"]
        for protocol in ("full", "r2gen"):
            assert rows[f"{protocol} · BLEU-2"][key] == pytest.approx(scores[protocol]["BLEU-2"]["value"])
    out = capsys.readouterr().out
    assert "report, full, differences to the first" in out and "report, r2gen, differences to the first" in out


def changed(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_what_is_odd_in_either_file_is_noted(folder):
    """What their checks list, once where it is the same; other programs; another training set."""
    files = [scored(name, [True, False, name == "a"]) for name in "ab"]
    write("b.jsonl", [{"sample_id": "q0", "prediction": "yes"}, {"sample_id": "q9", "prediction": ""}])
    arguments = ["--predictions", "b.jsonl", "--references", "r.jsonl", "--protocol", "strict", "--out", "b.json"]
    write("t.jsonl", [{"image_id": "x"}])
    assert main(["score", "vqa", *arguments, "--train", "t.jsonl"]) == 0
    changed(folder, "b.json", lambda c: c["versions"].update(scipy="0.1"))
    for name in files:
        changed(folder, name, lambda c: c["checks"].update(repeated=["q1"]))
    notes = compare(*files)["notes"]
    assert any(note.startswith("scored with different versions of scipy: ") and "0.1 (b)" in note for note in notes)
    assert "looked through with different training sets, so that the checks and by_training differ" in notes
    assert notes[-4:] == ["a, b: 1 repeated: q1", "b: 2 missing: q1, q2", "b: 1 extra: q9", "b: 1 empty: q9"]


def test_other_samples_are_named(folder, capsys):
    files = [scored(name, [True, False, name == "a"]) for name in "ab"]
    changed(folder, "b.json", lambda c: c["clusters"].update(q7=3))
    capsys.readouterr()
    assert "different sample ids: only b.json has q7" in refused(capsys, *files)
    changed(folder, "b.json", lambda c: c["clusters"].pop("q7"))
    changed(folder, "b.json", lambda c: c["clusters"].update(q0=2))
    assert "have different patients of q0" in refused(capsys, *files)


def test_the_best_of_errors_has_fewest(folder):
    """Shares of hallucinated, misplaced and missing findings, as of distances: less is better."""
    write("r.jsonl", [{"sample_id": f"r{k}", "report": "A lesion in the left insula."} for k in range(6)])
    for name, side in (("worse", "right"), ("better", "left")):
        write(
            f"{name}.jsonl", [{"sample_id": f"r{k}", "prediction": f"A lesion in the {side} insula."} for k in range(6)]
        )
        arguments = ["--predictions", f"{name}.jsonl", "--references", "r.jsonl", "--protocol", "grounded-findings"]
        assert main(["score", "report", *arguments, "--out", f"{name}.json"]) == 0
    (row,) = compare("worse.json", "better.json", "--against", "best", metric="misplaced")["comparisons"]
    assert (row["base"], row["difference"]) == ("better", 1.0)
