"""Training and prediction through the real commands, on a tiny model and a tiny store."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bridges.region_vlm import CheckpointError
from configs import load_config
from downstream import predict as program
from downstream import train
from downstream.brain_qa import build_questions
from downstream.controls import BlankImages
from downstream.data import plan_epoch
from downstream.embedded import tiny_base
from downstream.predict import answer, evidence_of, load_answerer, predict, read_samples
from downstream.prompts import REPORT_QUESTION
from downstream.samples import read_predictions, read_questions, read_reports
from downstream.sources import open_source, read_table
from grounding.images import read_image
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import RegionSet, RegionTokens, save_region_tokens, stack_region_tokens

TOLERANCE = 1e-4  # of a loss of about 5, after 12 steps: sums have another order (1e-6 was measured)
MIXED = ("align_steps=6",)  # lists of regions, then questions and reports


def fake_tokens(regions: RegionSet, seed: int) -> RegionTokens:
    """Region tokens of annotated regions with random features, and label vectors that depend on the label."""
    n, rng = len(regions), np.random.default_rng(seed)
    vectors = [np.random.default_rng(list(label.encode())).standard_normal(12) for label in regions.labels]
    return RegionTokens(
        features=torch.tensor(rng.standard_normal((1, n, 8)), dtype=torch.float32),
        boxes=torch.from_numpy(regions.boxes)[None],
        scores=torch.ones(1, n),
        labels=[list(regions.labels)],
        label_vectors=torch.tensor(np.array(vectors), dtype=torch.float32)[None],
        levels=torch.zeros(1, n, dtype=torch.int64),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.fixture(scope="module")
def data(brain_store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "store").symlink_to(brain_store)
    build_questions(brain_store, folder, seed=0, n_questions=40)
    store = open_store(brain_store)
    tokens = stack_region_tokens([fake_tokens(store[k].regions, k) for k in range(len(store))])
    for kind in ("predicted", "annotated"):
        save_region_tokens(
            folder / f"{kind}.safetensors",
            store.image_ids,
            tokens,
            {"checkpoint": "detector-hash"},
            {"brain/lesion": torch.zeros(12)},
        )
    return folder


def settings(data: Path, out: Path, *more: str) -> list[str]:
    files = [f"{kind}={data}/{kind}.safetensors" for kind in ("predicted", "annotated")]
    fixed = ["base=tiny", "batch_size=2", "steps=12", "warmup=2", "lr=1e-2", "bridge_lr=1e-2", "max_answer=700", "k=6"]
    fixed += ["save_every=5", "precision=fp32"]
    return [f"data={data}", *files, f"out={out}", *fixed, "lora_layers=null", "lora_r=4", *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data, launch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    launch("cpu", "downstream.train", *settings(data, out))
    return out


def test_training_lowers_the_loss_and_leaves_a_record(trained):
    values = losses(trained)
    assert len(values) == 12 and sum(values[-4:]) < sum(values[:4]) - 1
    assert {"adapter_model.safetensors", "bridge.safetensors", "bridge.json", "README.md"} <= names(
        trained / "checkpoint"
    )
    assert (trained / "config.yaml").exists()
    run = json.loads((trained / "run.json").read_text())
    assert run["processes"] == 1 and 0 < run["tokens_attended"]["mean"] <= run["tokens_attended"]["max"]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_resuming_gives_the_same_loss_curve(trained, data):
    """The last checkpoint is of step 10: the same command does steps 10 and 11 again."""
    before, weights = losses(trained), (trained / "checkpoint" / "bridge.safetensors").read_bytes()
    assert names(trained / "checkpoints") == {"step-10"}
    saved = load_file(trained / "checkpoints/step-10/model.safetensors")  # what is trained, not the base
    assert saved and all("lora_" in name or "projector." in name for name in saved)
    train.main(settings(data, trained))
    assert losses(trained) == before
    assert (trained / "checkpoint" / "bridge.safetensors").read_bytes() == weights


def test_the_same_seed_gives_the_same_curve(trained, data, tmp_path):
    train.main(settings(data, tmp_path, "save_every=0"))
    assert losses(tmp_path) == losses(trained)


def test_a_step_of_two_batches_has_the_mean_of_their_losses(data, tmp_path):
    arguments = settings(data, tmp_path, "accumulation=2", "steps=1", "warmup=1", "align_steps=0", "save_every=0")
    train.main(arguments)
    config, tree, base = load_config(train.TrainConfig, None, arguments), load_label_tree(), tiny_base()
    tables = {kind: read_table(data / f"{kind}.safetensors") for kind in ("predicted", "annotated")}
    fresh = train.build_vlm(config, base, tree, tables["annotated"]).train()
    batches = [train.TrainingData(config, base, tree, tables).batch(0, 2, k) for k in range(2)]
    parts = [train.step_loss(fresh, batch).item() for batch in batches]
    assert parts[0] != parts[1] and losses(tmp_path) == pytest.approx([sum(parts) / 2], abs=1e-6)


def test_lora_rests_in_the_projectors_own_steps(trained, data, tmp_path):
    train.main(settings(data, tmp_path / "run", "steps=6", "projector_steps=6", "save_every=0"))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    rested, moved = (load_file(run / "checkpoint/adapter_model.safetensors") for run in (tmp_path / "run", trained))
    names_of_b = [name for name in rested if "lora_B" in name]
    assert names_of_b and not any(rested[name].any() for name in names_of_b)
    assert all(moved[name].any() for name in names_of_b)
    with pytest.raises(SystemExit, match="projector_steps=7: give 0 to steps=6"):
        train.main(settings(data, tmp_path / "wrong", "steps=6", "projector_steps=7"))


def test_a_blank_image_hides_the_picture_alone(data, tmp_path):
    tables = {kind: read_table(data / f"{kind}.safetensors") for kind in ("predicted", "annotated")}
    seen = []
    for blank in ("false", "true"):
        config = load_config(train.TrainConfig, None, settings(data, tmp_path, f"blank_image={blank}"))
        seen.append(train.load_data(config, tiny_base(), load_label_tree(), tables).batch(0))
    picture, grey = (batch.inputs.pop("pixel_values") for batch in seen)
    assert picture.shape == grey.shape and picture.std((2, 3)).min() > 0.1 and grey.std((2, 3)).max() < 1e-6
    assert all(seen[0].inputs[name].equal(seen[1].inputs[name]) for name in seen[0].inputs)
    assert seen[0].slots.boxes.equal(seen[1].slots.boxes) and seen[0].labels.equal(seen[1].labels)
    store = open_store(data / "store")
    shown = BlankImages(store).by_id(store.image_ids[0])
    assert read_image(shown.image).pixels.shape[:2] == store[0].regions.image_size
    assert shown.regions.to_dict() == store[0].regions.to_dict()


def test_the_plan_has_each_sample_once_and_batches_of_like_length():
    lengths = [random.Random(i).randrange(10, 200) for i in range(1000)]
    batches = plan_epoch(lengths, 8, seed=1, epoch=0)
    seen = [i for batch in batches for i in batch]
    assert sorted(seen) == list(range(1000)) and batches != plan_epoch(lengths, 8, seed=1, epoch=1)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 30
    assert [len(batch) for batch in plan_epoch([1, 2, 3], 8, 0, 0)] == [8]


def test_prediction_covers_every_sample_in_order(trained, data, tmp_path):
    program.main([*prediction(trained, data, tmp_path), "limit=5"])
    rows = read_predictions(tmp_path / "predictions.jsonl")
    questions = read_questions(data / "questions.jsonl")[:5]
    reports = read_reports(data / "reports.jsonl")[:5]
    assert [row.sample_id for row in rows] == [q.sample_id for q in questions] + [r.study_id for r in reports]
    assert [row.task for row in rows] == ["vqa"] * 5 + ["report"] * 5
    assert {row.detector_hash for row in rows} == {"detector-hash"} and len({row.model_hash for row in rows}) == 1
    evidence = RegionSet.from_dict(rows[0].evidence)
    assert 1 <= len(evidence) <= 6 and evidence.image_size == (192, 192)
    assert "citations_dropped" in json.loads((tmp_path / "run.json").read_text())


def prediction(run: Path, data: Path, out: Path) -> list[str]:
    return [f"checkpoint={run}/checkpoint", f"data={data}", f"predicted={data}/predicted.safetensors", f"out={out}"]


def test_one_loaded_model_serves_every_source(trained, data):
    answerer = load_answerer(trained / "checkpoint")
    store, samples = open_store(data / "store"), read_samples(data, ("vqa", "report"), 3)
    patients = {image_id: store.by_id(image_id).patient_id for image_id in store.image_ids}
    tables = {kind: read_table(data / f"{kind}.safetensors") for kind in ("predicted", "annotated")}
    results = {}
    for name in ("predicted", "annotated", "shuffled", "empty", f"file:{data}/predicted.safetensors"):
        results[name] = predict(answerer, store, samples, open_source(name, tables, patients), batch_size=4)
    assert results["predicted"] == results["annotated"] == results[f"file:{data}/predicted.safetensors"]
    assert all(row.evidence["regions"] == [] for row in results["empty"])
    assert results["shuffled"][0].evidence != results["predicted"][0].evidence
    zero = predict(answerer, store, samples, open_source("predicted", tables, patients, "zero"))
    assert [row.evidence for row in zero] == [row.evidence for row in results["predicted"]]
    one_by_one = [predict(answerer, store, [s], open_source("predicted", tables, patients))[0] for s in samples]
    assert one_by_one == results["predicted"]


def test_answer_about_one_image(trained, data):
    answerer = load_answerer(trained / "checkpoint")
    table = read_table(data / "predicted.safetensors")
    image_id = next(iter(table.rows))
    source = open_source("predicted", {"predicted": table}, {})
    said = answer(answerer, torch.zeros(3, 64, 64), source, image_id, REPORT_QUESTION)
    assert isinstance(said.text, str) and len(evidence_of(said.slots, (192, 192))) == 6
    with pytest.raises(ValueError, match="empty question"):
        answer(answerer, torch.zeros(3, 64, 64), source, image_id, "  ")


@pytest.mark.parametrize("route", ["none", "text"])
def test_each_route_trains_and_answers(route, data, tmp_path):
    train.main(settings(data, tmp_path, f"route={route}", "steps=2", "warmup=1"))
    answerer = load_answerer(tmp_path / "checkpoint")
    assert answerer.route == route
    tables = {"predicted": read_table(data / "predicted.safetensors")}
    samples = read_samples(data, ("vqa",), 2)
    assert len(predict(answerer, open_store(data / "store"), samples, open_source("predicted", tables, {}))) == 2


def test_errors_name_the_thing(trained, data, tmp_path):
    wrong = [f"checkpoint={trained}", f"data={data}", f"out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="not a bridge checkpoint"):
        program.main([*wrong, f"predicted={data}/predicted.safetensors"])
    with pytest.raises(SystemExit, match="source 'predicted' needs the predicted region tokens"):
        program.main([f"checkpoint={trained}/checkpoint", *wrong[1:]])
    with pytest.raises(SystemExit, match="nearest: route"):
        train.main(settings(data, tmp_path, "rout=none"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        load_answerer(tmp_path / "empty")


def test_tiny_base_is_the_same_for_the_same_seed_and_sees():
    base = tiny_base()
    assert base.fingerprint == tiny_base().fingerprint != tiny_base(1).fingerprint
    features = base.model.model.get_image_features(torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)]))
    dark, bright = features.pooler_output
    assert (dark - bright).abs().mean() > 0.05 * dark.abs().mean() > 1e-3


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """One process, whose steps have the batches of two."""
    out = tmp_path_factory.mktemp("alone")
    train.main(settings(data, out, *MIXED, "accumulation=2"))
    return out


@pytest.mark.slow  # the quick case of two processes is grounding's
@pytest.mark.parametrize("launcher", ["zero2", "zero3", "ddp"])
def test_two_processes_train_as_one_and_resume_and_predict(launcher, alone, data, launch, tmp_path):
    launch(launcher, "downstream.train", *settings(data, tmp_path, *MIXED))
    values = losses(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2
    assert len(values) == 12 and values == pytest.approx(losses(alone), abs=TOLERANCE)
    ours, theirs = (load_file(out / "checkpoint/bridge.safetensors") for out in (tmp_path, alone))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 100 * TOLERANCE
    weights = (tmp_path / "checkpoint" / "bridge.safetensors").read_bytes()
    launch(launcher, "downstream.train", *settings(data, tmp_path, *MIXED))
    assert losses(tmp_path) == pytest.approx(values, abs=1e-6)
    assert (tmp_path / "checkpoint" / "bridge.safetensors").read_bytes() == weights
    program.main([*prediction(tmp_path, data, tmp_path / "answers"), "limit=3", "tasks=vqa"])
    assert len(read_predictions(tmp_path / "answers/predictions.jsonl")) == 3


@pytest.mark.slow
def test_two_processes_predict_what_one_does(trained, data, launch, tmp_path):
    program.main([*prediction(trained, data, tmp_path / "one"), "limit=5"])
    launch("ddp", "downstream.predict", *prediction(trained, data, tmp_path / "two"), "limit=5")
    one, two = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert one == two
