"""The grid of an experiment: cells by what they depend on, resumed and kept, and what it writes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs import CONFIG_DIR, ConfigError, load_config
from downstream import experiment
from downstream.answerer import evidence_of
from downstream.brain_qa import build_questions
from downstream.citations import cite, split_report
from downstream.experiment import CONTROLS, ExperimentConfig, plan
from downstream.experiment_scores import TestSet, curve, grounding_quality, score_experiment
from downstream.experiment_tables import draw_curve, markdown
from downstream.experiment_tables import tables as tables_of
from downstream.samples import Prediction, read_predictions, read_questions, write_samples
from downstream.sources import RegionSource, open_source, read_table
from eval.statistics import mcnemar
from eval.types import plain
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import RegionSet, RegionTokens, save_region_tokens, stack_region_tokens

TINY = CONFIG_DIR / "experiment" / "tiny.yaml"


def tokens_of(regions: RegionSet) -> RegionTokens:
    """Region tokens with features and label vectors that depend on the label."""
    drawn = [np.random.default_rng(list(label.encode())).standard_normal(20) for label in regions.labels]
    values, n = torch.tensor(np.array(drawn), dtype=torch.float32)[None], len(regions)
    return RegionTokens(
        features=values[..., :8],
        boxes=torch.from_numpy(regions.boxes)[None],
        scores=torch.linspace(1, 0.5, n)[None],
        labels=[list(regions.labels)],
        label_vectors=values[..., 8:],
        levels=torch.zeros(1, n, dtype=torch.int64),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.fixture(scope="module")
def inputs(brain_store, tmp_path_factory) -> list[str]:
    """A data folder for both parts, and region tokens: what is annotated, and as predicted the first half of it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "store").symlink_to(brain_store)
    build_questions(brain_store, folder, seed=0, n_questions=20, n_reports=4)
    regions = {sample.image_id: sample.regions for sample in open_store(brain_store)}
    for kind, part in (("annotated", 1), ("predicted", 2)):
        rows = [tokens_of(r.select(range(-(-len(r) // part)))) for r in regions.values()]
        for split in ("train", "test"):
            path = folder / "regions" / f"{split}-{kind}" / "region_tokens.safetensors"
            save_region_tokens(
                path, list(regions), stack_region_tokens(rows), {"checkpoint": kind}, {"brain/lesion": torch.zeros(12)}
            )
    return [f"train={folder}", f"test={folder}", f"regions={folder / 'regions'}"]


def config_of(inputs: list[str], out: Path, *more: str) -> ExperimentConfig:
    return load_config(ExperimentConfig, TINY, [*inputs, f"out={out}", *more])


@pytest.fixture(scope="module")
def programs():
    """The programs of the cells, called in this process: the same arguments, less the start of Python."""
    called: list[str] = []

    def call(module: str, *arguments: str, **_) -> None:
        called.append(next(a for a in arguments if a.startswith("out=")))
        importlib.import_module(module).main(list(arguments))

    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "launch", call)
    yield called
    patch.undo()


@pytest.fixture(scope="module")
def small() -> list[str]:
    """Questions alone, and few cells: random models write long reports."""
    return ["systems=[none, tokens/predicted, tokens/jittered:0.3]", "controls=[text-only]", "seeds=[0]", "tasks=[vqa]"]


@pytest.fixture(scope="module")
def done(inputs, programs, small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("experiment") / "tiny"
    experiment.main(["--config", str(TINY), *inputs, f"out={out}", *small])
    assert len(programs) == len(set(programs)) == len(plan(config_of(inputs, out, *small)).cells) == 7
    return out


def test_every_cell_leaves_its_result(done, inputs, small):
    grid = plan(config_of(inputs, done, *small))
    assert set(grid.bridges) == {("none", 0), ("tokens", 0), ("text-only", 0)}
    for name, by_seed in grid.answers.items():
        rows = read_predictions(done / by_seed[0].folder / "predictions.jsonl")
        assert len(rows) == 6 and {row.task for row in rows} == {"vqa"}, name
    names = {path.name for path in done.iterdir()}
    assert {"table.md", "scores.json", "curve.png", "curve.svg", "config.yaml", "run.json", "bridges"} <= names
    assert not list(done.rglob("checkpoints"))
    scores = json.loads((done / "scores.json").read_text())
    assert list(scores["vqa"]) == list(grid.answers) and scores["vqa"]["none"]["overall"]["n"] == 6
    assert scores["bridges"]["tokens, seed 0"]["tokens"] == scores["bridges"]["none, seed 0"]["tokens"] > 0


def test_the_same_command_again_runs_nothing(done, inputs, small, programs):
    table, before = (done / "table.md").read_text(), len(programs)
    experiment.main(["--config", str(TINY), *inputs, f"out={done}", *small])
    assert len(programs) == before and (done / "table.md").read_text() == table


def test_a_cell_that_was_stopped_is_taken_up_alone(done, inputs, small, programs):
    made = plan(config_of(inputs, done, *small)).answers["tokens/predicted"][0]
    path = done / made.folder / "predictions.jsonl"
    said, before = path.read_bytes(), len(programs)
    (done / made.folder / ".complete.json").unlink()
    experiment.main(["--config", str(TINY), *inputs, f"out={done}", *small])
    assert programs[before:] == [f"out={done / made.folder}"] and path.read_bytes() == said


def test_more_seeds_are_for_the_systems_that_are_named(inputs, tmp_path):
    grid = plan(config_of(inputs, tmp_path))
    assert {name: list(by_seed) for name, by_seed in grid.answers.items()} == {
        "none": [0, 1],
        **dict.fromkeys(("tokens/predicted", "tokens/annotated", "tokens/shuffled", "tokens/predicted zero"), [0]),
        **dict.fromkeys(("tokens/jittered:0.3", *CONTROLS.values()), [0]),
    }
    assert set(grid.bridges) == {("none", 0), ("none", 1), ("tokens", 0), ("text-only", 0)}


def folders(inputs: list[str], out: Path, *more: str) -> set[str]:
    return {made.folder for made in plan(config_of(inputs, out, *more)).cells}


def test_a_cell_depends_on_its_settings_and_not_on_where_it_lies(inputs, tmp_path):
    before = folders(inputs, tmp_path / "a")
    assert folders(inputs, tmp_path / "b") == before
    assert not any(name in before for name in folders(inputs, tmp_path / "a", "accelerate=ddp"))
    more = folders(inputs, tmp_path / "a", "systems=[none, tokens/predicted, tokens/empty]") - before
    assert [name.partition("-seed")[0] for name in more] == ["answers/tokens-empty"]
    other = folders(inputs, tmp_path / "a", "prediction=[batch_size=3]") - before
    assert other and all(name.startswith("answers/") for name in other)
    training = "training=[base=tiny, steps=3, align_steps=0, batch_size=2, k=6, max_answer=480]"
    assert not folders(inputs, tmp_path / "a", training) & before


def test_a_cell_depends_on_the_content_of_what_it_reads(inputs, tmp_path):
    source = Path(inputs[0].removeprefix("train="))
    copy = tmp_path / "test"
    copy.mkdir()
    (copy / "store").symlink_to((source / "store").resolve())
    for name in ("questions.jsonl", "reports.jsonl"):
        (copy / name).write_bytes((source / name).read_bytes())
    before = folders(inputs, tmp_path)
    moved = [inputs[0], f"test={copy}", inputs[2]]
    assert folders(moved, tmp_path) == before
    questions = read_questions(copy / "questions.jsonl")
    write_samples(copy / "questions.jsonl", [replace(questions[0], answer="another"), *questions[1:]])
    changed = folders(moved, tmp_path) - before
    assert changed and all(name.startswith("answers/") for name in changed)


def test_the_grid_finds_regions_where_a_grounder_is_given(inputs, tmp_path):
    """Planned only: grounding.predict has tests of its own."""
    given = tmp_path / "radiologist.jsonl"
    given.write_text("")
    (tmp_path / "grounder").mkdir()
    names = f"systems=[none, tokens/predicted, tokens/file:{given}, text/file:{given}]"
    config = config_of([*inputs[:2], f"grounder={tmp_path / 'grounder'}"], tmp_path, names, "seeded=[none]")
    grid = plan(config)
    made = [one for one in grid.cells if one.module == "grounding.predict"]
    assert len(made) == 5 and made[-1].folder.startswith("regions/test-file-radiologist")
    for answers in (grid.answers[f"{route}/file:radiologist.jsonl"][0] for route in ("tokens", "text")):
        assert f"source=file:{made[-1].result.path}/region_tokens.safetensors" in answers.arguments
    assert grid.cells.index(made[-1]) < grid.cells.index(grid.answers["tokens/file:radiologist.jsonl"][0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("systems=[none, tokens/guessed]", "source 'guessed'; known: predicted"),
        ("systems=[none, magic/predicted]", "bridges/magic-seed0: .*route='magic'"),
        ("systems=[none, none]", "systems is empty, or names something twice"),
        ("systems=[none, tokens/file:a/r.jsonl, tokens/file:b/r.jsonl]", "names something twice: none, tokens/file:r"),
        ("systems=[none, tokens/file:r.jsonl]", "needs grounder=CHECKPOINT"),
        ("systems=[none, tokens/file:r.safetensors]", "r.safetensors: cannot be read"),
        ("training=[route=none]", "training: 'route' is what the grid varies"),
        ("training=[base=tiny, stepps=3]", "bridges/none-seed0: .*nearest: steps"),
        ("prediction=[source=empty]", "prediction: 'source' is what the grid varies"),
        ("prediction=[beams=none]", "answers/none-seed0: .*beams"),
        ("controls=[nothing]", "controls: 'nothing'; known: blank, text-only"),
        ("seeded=[text/predicted]", "seeded: 'text/predicted' is none of the systems"),
        ("jitter=shuffled", "jitter='shuffled'; known: predicted, annotated"),
        ("grounder=runs/grounder", "either grounder=CHECKPOINT or regions=FOLDER"),
        ("regions=nowhere", "nowhere/train-predicted/region_tokens.safetensors: cannot be read"),
        ("test=nowhere", "nowhere: no questions.jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(inputs, tmp_path, programs, more, message):
    before = len(programs)
    with pytest.raises(SystemExit, match=message):
        experiment.main(["--config", str(TINY), *inputs, f"out={tmp_path / 'out'}", more])
    assert len(programs) == before and not (tmp_path / "out").exists()


def test_two_runs_do_not_share_a_folder(inputs, tmp_path):
    with experiment._only_run(tmp_path), pytest.raises(SystemExit, match="another run, or a program of it, is at work"):
        experiment.main(["--config", str(TINY), *inputs, f"out={tmp_path}"])


def test_the_configurations_that_come_along_can_be_read():
    for name in ("brain", "regionqa", "vqa-rad"):
        config = load_config(ExperimentConfig, CONFIG_DIR / "experiment" / f"{name}.yaml")
        assert {"none", "tokens/predicted", "tokens/shuffled", "overlay/predicted"} <= set(config.systems)
        with pytest.raises((ConfigError, ValueError), match="no questions.jsonl"):
            plan(replace(config, train=Path("nowhere")))


def said_by(test: TestSet, right, source: RegionSource | None) -> list[Prediction]:
    """Predictions of a system that answers question k as `right(k, question)` says, and whose reports are those of the
    references, with citations, where it has a source; else all normal."""
    tree, rows = load_label_tree(), []
    for k, question in enumerate(test.questions):
        text = question["answer"] if right(k, question) else "cannot say"
        rows.append(Prediction(question["sample_id"], "vqa", text, None, None, "detector", "model"))
    for study, reference in test.reports.items():
        text, sentences, evidence = "Findings: No lesion is seen.", None, None
        if source is not None:
            (image,) = test.study_images[study]
            slots = source.slots(image, frozenset(), tree, 8)
            text, sentences = split_report(cite(reference, slots, tree), slots)
            evidence = evidence_of(slots, (192, 192)).to_dict()
        rows.append(Prediction(study, "report", text, evidence, sentences, "detector", "model"))
    return rows


@pytest.fixture(scope="module")
def measured(inputs) -> dict:
    """Scores of systems whose answers are made up, so that each number is known."""
    folder, regions = (Path(inputs[k].partition("=")[2]) for k in (0, 2))
    test, tree = TestSet.read(folder, ("vqa", "report"), None), load_label_tree()
    tables = {k: read_table(regions / f"test-{k}" / "region_tokens.safetensors") for k in ("predicted", "annotated")}
    names = ("predicted", "annotated", "shuffled", "random", "jittered:0.3")
    sources = {}
    for name in names:
        given = tables | {"predicted": tables["annotated"]} if name.startswith("jittered") else tables
        sources[name] = open_source(name, given, test.patients_of_images)
    said = {
        "none": {seed: said_by(test, lambda k, q, s=seed: k % 4 == s, None) for seed in (0, 1)},
        "tokens/predicted": {s: said_by(test, lambda k, q, s=s: k >= 5 + s, sources["predicted"]) for s in (0, 1)},
        "tokens/predicted zero": {0: said_by(test, lambda k, q: k >= 5 and q["needs"] == "boxes", None)},
        "tokens/annotated": {0: said_by(test, lambda k, q: True, sources["annotated"])},
        "tokens/shuffled": {0: said_by(test, lambda k, q: k == 0, sources["shuffled"])},
        "tokens/random": {0: said_by(test, lambda k, q: k == 0, None)},
        "tokens/jittered:0.3": {0: said_by(test, lambda k, q: k % 2 == 0, None)},
        "none, blank image": {0: said_by(test, lambda k, q: False, None)},
    }
    scores = score_experiment(said, test, read_questions(folder / "questions.jsonl"), tree)
    systems = {name: name.partition("/")[2] for name in said if "/" in name and not name.endswith("zero")}
    scores["curve"] = curve(scores, systems, sources, "annotated", test, tree)
    scores["bridges"] = {"tokens, seed 0": {"samples": 3, "tokens": 50.5, "longest": 60, "seconds": 1.5}}
    return scores | {"tables": tables_of(scores)}


def test_differences_are_those_of_the_paired_answers(measured):
    value = {name: found["overall"].value for name, found in measured["vqa"].items()}
    assert value["none"] == 5 / 20 and value["tokens/predicted"] == 15 / 20 and value["tokens/annotated"] == 1
    tests = {(test["a"], test["b"], test["questions"]): test for test in measured["vqa_tests"]}
    gain = tests["tokens/predicted", "none", "all"]  # none is right in 0, 4, 8, 12, 16; tokens from 5 on
    assert (gain["only_a"], gain["only_b"], gain["n"]) == (12, 2, 20) and gain["difference"] == pytest.approx(0.5)
    assert gain["p"] == mcnemar([True] * 12 + [False] * 2, [False] * 12 + [True] * 2)["p"] <= gain["p_holm"]
    assert sum(part["n"] for part in gain["by_question_type"].values()) == gain["by_modality"]["mri"]["n"] == 20
    assert tests["tokens/predicted", "tokens/predicted zero", "boxes"]["difference"] == 0
    feature = tests["tokens/predicted", "tokens/predicted zero", "feature"]
    assert feature["only_a"] == feature["a_accuracy"] * feature["n"] > 0 == feature["only_b"]
    assert ("none", "none, blank image", "all") in tests and ("tokens/predicted", "tokens/random", "all") in tests


def test_reports_are_scored_with_their_citations(measured):
    own, none = measured["report"]["tokens/annotated"], measured["report"]["none"]
    assert own["findings"]["finding"]["f1"].value == 1 and own["citations"]["precision"].value == 1
    assert own["text"]["BLEU-4"].value > none["text"]["BLEU-4"].value
    assert none["citations"]["precision"].value is None and none["citations"]["counts"]["citations"] == 0
    (test,) = [t for t in measured["report_tests"] if (t["a"], t["b"]) == ("tokens/predicted", "none")]
    assert test["difference"] == pytest.approx(test["a_f1"] - (test["b_f1"] or 0)) and test["n"] == 4


def test_the_curve_has_the_quality_of_the_regions_of_each_source(measured):
    quality = {point["system"]: point["AP50"].value for point in measured["curve"]["points"]}
    assert quality["tokens/annotated"] == 1 and 0 < quality["tokens/predicted"] < 1
    assert max(quality["tokens/shuffled"], quality["tokens/random"]) < quality["tokens/predicted"]
    assert list(quality.values()) == sorted(quality.values()) and len(quality) == 5
    found = measured["curve"]["response"]["tokens"]  # annotated: all right; jittered: half
    assert found["slope"].value == pytest.approx(0.5 / (1 - quality["tokens/jittered:0.3"])) and found["rises"] == 1


def test_seeds_have_a_mean_and_a_spread(measured):
    found = measured["seeds"]["accuracy"]
    assert list(found) == ["none", "tokens/predicted", "tokens/predicted - none"]
    assert found["tokens/predicted"]["values"] == {0: 0.75, 1: 0.7}
    assert found["tokens/predicted"]["mean"] == pytest.approx(0.725)
    assert found["tokens/predicted - none"]["sd"] == pytest.approx(np.std([0.5, 0.45], ddof=1))
    assert set(measured["seeds"]) == {"accuracy", "finding F1"}


def test_the_tables_show_each_system_and_number(measured):
    text = markdown(measured["tables"], "# Made up")
    for name in (*measured["vqa"], "McNemar", "citation precision", "CIDEr", "AP50", "Seeds: accuracy", "nearest"):
        assert name in text
    assert "| tokens/predicted | none | all | 20 | 0.500 |" in text and "| tokens, seed 0 | 3 | 50.500 |" in text
    for table in measured["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
        assert f"**{table['title']}**" in text
    assert json.loads(json.dumps(plain(measured), allow_nan=False))["vqa"]["none"]["overall"]["value"] == 0.25


def test_the_curve_is_drawn_the_same_each_time(measured, tmp_path):
    for name in ("a", "b"):
        draw_curve(measured["curve"], tmp_path / name)
    one, other = ((tmp_path / name / "curve.svg").read_bytes() for name in ("a", "b"))
    assert one == other and b"</svg>" in one and Image.open(tmp_path / "a" / "curve.png").size[0] > 1000


def test_without_annotated_regions_there_is_no_curve(measured, inputs, tmp_path):
    folder = Path(inputs[0].removeprefix("train="))
    test = TestSet.read(folder, ("vqa",), None)
    bare = {image: regions.select([]) for image, regions in test.regions.items()}
    table = read_table(Path(inputs[2].removeprefix("regions=")) / "test-predicted" / "region_tokens.safetensors")
    source = open_source("predicted", {"predicted": table}, {})
    found = grounding_quality(source, replace(test, regions=bare), load_label_tree())
    assert found.value is None and found.reason == "no annotated regions"
    points = [{**measured["curve"]["points"][0], "AP50": found}]
    draw_curve({"points": points, "jitter": "annotated", "response": {}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_command_survives_being_killed(inputs, tmp_path):
    """Killed with all its programs in the middle; the same command goes on, and what was complete is not run again."""
    out, root = tmp_path / "out", CONFIG_DIR.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    small = ["systems=[none, tokens/predicted]", "controls=[]", "seeds=[0]", "tasks=[vqa]"]
    command = [sys.executable, "-m", "downstream.experiment", "--config", str(TINY), *inputs, f"out={out}", *small]
    how = {"env": environment, "cwd": root, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    first = subprocess.Popen(command, start_new_session=True, **how)
    end = time.monotonic() + 200
    while len(list(out.glob("bridges/*/.complete.json"))) < 1 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, first.stdout.read()
    again = subprocess.run(command, timeout=280, **how)
    assert again.returncode == 0, again.stdout[-3000:]
    assert "reused from" in again.stdout and "tokens/predicted" in again.stdout and (out / "table.md").exists()
    broken = subprocess.run([*command, "prediction=[batch_size=0]"], timeout=120, **how)
    assert broken.returncode == 1 and "downstream.experiment: answers/none-seed0" in broken.stdout.splitlines()[-1]
