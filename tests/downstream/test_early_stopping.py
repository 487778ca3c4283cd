"""Evaluation by generation during training: what is kept, when it stops, and that no process waits for another."""

import json
import shutil

import pytest

from downstream import train
from downstream.answerer import load_answerer
from downstream.predict import predict, read_samples
from downstream.samples import read_questions, read_reports
from downstream.sources import open_source, read_table
from downstream.validation import METRICS, best_of, drawn, is_over, score
from grounding.store import open_store
from tests.downstream.test_train_predict import data, losses, settings  # noqa: F401  (data is a fixture)


@pytest.fixture(scope="module")
def yes_or_no(data, tmp_path_factory):  # noqa: F811
    """The same images with questions that are all answered with yes, which is learnt in some dozens of steps."""
    folder = tmp_path_factory.mktemp("yes")
    (folder / "store").symlink_to(data / "store")
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    rows = [row | {"answer": "yes", "answer_type": "closed"} for row in rows]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reports.jsonl").write_text("")
    for kind in ("predicted", "annotated"):
        shutil.copy(data / f"{kind}.safetensors", folder)
    return folder


def judged(folder, out, *more):
    """Settings of a training that is judged on what it is trained on; more than enough steps."""
    fixed = ("steps=200", "align_steps=0", "eval_every=10", "patience=2", "val_samples=7", "region_dropout=0")
    return settings(folder, out, f"val={folder}", *fixed, *more)


def log(out):
    return [json.loads(line) for line in (out / "val_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(yes_or_no, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    train.main(judged(yes_or_no, out, "save_every=25"))
    return out


def test_training_stops_after_the_best_and_keeps_that(stopped):
    rows = log(stopped)
    best = best_of(rows)
    assert best["value"] == 1.0 and best["n"] == 7 and best["metric"] == "accuracy"
    assert len(rows) - 1 - rows.index(best) == 2  # patience
    assert [row["step"] for row in rows] == list(range(9, len(losses(stopped)), 10)) and len(losses(stopped)) < 200
    settings_kept = json.loads((stopped / "checkpoint/bridge.json").read_text())["settings"]
    assert settings_kept["steps"] == best["step"] + 1
    assert json.loads((stopped / "run.json").read_text())["best"] == best


def test_the_kept_checkpoint_says_what_was_scored(stopped, yes_or_no):
    samples = drawn(yes_or_no, "vqa", 7, seed=0)
    source = open_source("predicted", {"predicted": read_table(yes_or_no / "predicted.safetensors")}, {})
    said = predict(load_answerer(stopped / "checkpoint"), open_store(yes_or_no / "store"), samples, source, 2)
    assert {row.prediction for row in said} == {"yes"}
    assert score("accuracy", {row.sample_id: row for row in said}, samples).value == best_of(log(stopped))["value"]


def test_a_resumed_training_stops_at_the_same_step(stopped, yes_or_no):
    rows, curve = log(stopped), losses(stopped)
    weights = (stopped / "checkpoint/bridge.safetensors").read_bytes()
    (stopped / "val_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')  # killed
    train.main(judged(yes_or_no, stopped, "save_every=25"))
    without_time = [{**row, "seconds": 0} for row in rows]
    assert [{**row, "seconds": 0} for row in log(stopped)] == without_time and losses(stopped) == curve
    assert (stopped / "checkpoint/bridge.safetensors").read_bytes() == weights


def test_the_card_tells_data_detector_and_evaluations(stopped):
    card = (stopped / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: med-glip\n") and "research-only" in card
    assert "`detector-hash`" in card and "Trained on: 24 images" in card and "Judged on: 24 images" in card
    assert sum(line.endswith("| kept |") for line in card.splitlines()) == 1 and "Not a medical device" in card


def test_when_it_is_over():
    rows = [{"value": value} for value in (0.1, 0.4, None, 0.4, 0.2)]
    assert best_of(rows) is rows[1] and best_of([]) is None
    assert [is_over(rows, patience) for patience in (0, 1, 3, 4)] == [False, True, True, False]
    assert not is_over([{"value": None}], 1) and is_over([{"value": None}, {"value": None}], 1)


def test_the_draw_is_fixed_and_in_order(data):  # noqa: F811
    ids = [question.sample_id for question in read_questions(data / "questions.jsonl")]
    some = [sample.sample_id for sample in drawn(data, "vqa", 10, seed=0)]
    assert len(some) == 10 and some == sorted(some, key=ids.index) != ids[:10]
    assert some == [sample.sample_id for sample in drawn(data, "vqa", 10, seed=0)]
    assert len(drawn(data, "vqa", 10_000, seed=0)) == len(ids)


def test_reference_texts_score_full_marks(data):  # noqa: F811
    """Each metric on what the references themselves say; a missing answer is never left out."""
    from dataclasses import replace

    from downstream.data import answer_of
    from downstream.samples import Prediction

    empty = Prediction("", "vqa", "", None, None, None, None)
    reports, questions = read_reports(data / "reports.jsonl"), read_samples(data, ("vqa",))
    for metric, task in METRICS.items():
        samples = questions if task == "vqa" else reports
        ids = [getattr(sample, "sample_id", None) or sample.study_id for sample in samples]
        said = {i: replace(empty, sample_id=i, prediction=answer_of(s)) for i, s in zip(ids, samples, strict=True)}
        right = score(metric, said, samples)
        assert right.value == pytest.approx(10 if metric == "CIDEr" else 1, abs=0.2), metric
        assert score(metric, {}, samples).n == right.n, metric


def test_errors_name_the_thing(yes_or_no, tmp_path):
    with pytest.raises(SystemExit, match=r"metric='bleu'; known: accuracy, closed"):
        train.main(judged(yes_or_no, tmp_path, "metric=bleu"))
    with pytest.raises(SystemExit, match=r"reports.jsonl: holds no sample to judge by; choose another metric"):
        train.main(judged(yes_or_no, tmp_path, "metric=finding-F1"))
    with pytest.raises(SystemExit, match="val_predicted and patience go with val=FOLDER"):
        train.main(settings(yes_or_no, tmp_path, "patience=2"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_two_processes_judge_together(launcher, yes_or_no, launch, tmp_path):
    """Seven samples and two processes: the shares do not come out even, and answers end at different lengths."""
    launch(launcher, "downstream.train", *judged(yes_or_no, tmp_path, "save_every=0"))
    rows = log(tmp_path)
    assert best_of(rows)["value"] == 1.0 and {row["n"] for row in rows} == {7} and len(losses(tmp_path)) < 200
    samples = drawn(yes_or_no, "vqa", 7, seed=0)
    source = open_source("predicted", {"predicted": read_table(yes_or_no / "predicted.safetensors")}, {})
    said = predict(load_answerer(tmp_path / "checkpoint"), open_store(yes_or_no / "store"), samples, source, 2)
    assert {row.prediction for row in said} == {"yes"}
