"""What each option of training does, through the command's own entry, on a tiny trunk and a small store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from grounding.detect import load_grounder
from grounding.images import read_image
from grounding.model import load_checkpoint
from grounding.store import open_store, write_store
from grounding.train import main
from grounding.types import GroundingSample, RegionSet

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trunk=tiny", "image_size=64", "width=32", "batch_size=4", "calibration=4", "warmup=2")
EVERYTHING = ("ema=0.9", "scales=64,96", "augment=true", "workers=2", "accumulation=2", "save_every=2")


def train(out: Path, store: Path, *overrides: str) -> Path:
    main([*TINY, f"store={store}", f"out={out}", *overrides])
    return out


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != "familiar"}


def store_of(folder: Path, images: list[tuple[str, np.ndarray, list[str]]], modality: str = "mri") -> Path:
    """A store of (source, pixels, labels); every region is the middle of its image."""
    samples = []
    folder.mkdir(parents=True, exist_ok=True)
    for k, (source, pixels, labels) in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{k}.tiff")
        regions = RegionSet(np.array([[0.25, 0.25, 0.75, 0.75]] * len(labels)), labels, pixels.shape[:2])
        path = str(folder / f"{k}.tiff")
        samples.append(GroundingSample(f"{k}", f"p{k}", source, modality, path, regions, ("brain/lesion",)))
    write_store(samples, folder / "store", "# card\n")
    return folder / "store"


@pytest.fixture(scope="module")
def plain(brain_store, tmp_path_factory) -> Path:
    """Four steps of eight images."""
    return train(tmp_path_factory.mktemp("plain"), brain_store, "steps=4", "batch_size=8")


def test_accumulation_is_a_larger_batch(plain, brain_store, tmp_path):
    split = train(tmp_path, brain_store, "steps=4", "batch_size=2", "accumulation=4")
    assert curve(split) == pytest.approx(curve(plain), rel=1e-4)
    first, second = weights(plain), weights(split)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 2e-4


@pytest.mark.slow
def test_checkpointing_changes_no_loss(plain, brain_store, tmp_path):
    assert curve(train(tmp_path, brain_store, "steps=4", "batch_size=8", "checkpointing=true")) == pytest.approx(
        curve(plain), rel=1e-5
    )


@pytest.mark.slow
def test_bf16_is_near_and_auto_is_float32_on_a_cpu(plain, brain_store, tmp_path):
    coarse = train(tmp_path, brain_store, "steps=4", "batch_size=8", "precision=bf16")
    assert curve(coarse) != curve(plain) and curve(coarse) == pytest.approx(curve(plain), rel=0.1)
    assert json.loads((coarse / "run.json").read_text())["bf16"] is True
    assert json.loads((plain / "run.json").read_text())["bf16"] is False
    assert all(tensor.dtype == torch.float32 for tensor in weights(coarse).values())


def test_the_mean_of_the_weights_is_what_is_saved(brain_store, tmp_path):
    out = train(tmp_path, brain_store, "steps=4", "ema=0.8", "save_every=4")
    saved, last = weights(out), load_file(out / "checkpoints" / "step-4" / "model.safetensors")
    averages = load_file(out / "checkpoints" / "step-4" / "average-0.safetensors")
    names = [name for name, p in load_checkpoint(out).named_parameters() if (saved[name] != last[name]).any()]
    assert len(names) > 20
    kept = [tensor for _, tensor in sorted(averages.items(), key=lambda x: int(x[0]))]
    for name in names:
        assert any(torch.equal(saved[name], tensor) for tensor in kept if tensor.shape == saved[name].shape)


SLOW = ("fusion=none", "fusion=two_way", "adapters=false", "scales=64,96")
SWITCHES = ["mask_head=false", "hierarchy=false", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_train_and_predict(switch, brain_store, tmp_path):
    out = train(tmp_path, brain_store, "steps=2", switch)
    name, value = switch.split("=")
    about = json.loads((out / "config.json").read_text())
    assert name not in about or str(about[name]).lower() == value
    if name in ("hierarchy", "scales"):
        assert str(yaml.safe_load((out / "config.yaml").read_text())[name]).lower() in (value, "[64, 96]")
    sample = open_store(brain_store)[0]
    (found,) = load_grounder(out).detect([read_image(sample.image).pixels])
    assert (found.candidates.masks is None) == (switch == "mask_head=false")
    assert ("tree" in rows(out)[0] and rows(out)[0]["tree"] > 0) == (switch != "hierarchy=false")


def test_what_is_beside_the_weights(plain, brain_store):
    card = (plain / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "med-glip" and head["license"] == "other" and "mri" in head["tags"]
    store = open_store(brain_store)
    assert "Research only" in card and f"{len(store):,} images" in card and store.column("licence")[0] in card
    for label, limit in json.loads((plain / "config.json").read_text())["thresholds"].items():
        assert f"| `{label}` |" in card and f"| {limit:.3f} |" in card
    assert f"`{load_grounder(plain).hash}`" in card and "| steps | 4 |" in card
    with Image.open(plain / "curves.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_tensorboard_has_every_part(brain_store, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(tmp_path, brain_store, "steps=3", "tensorboard=true")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("training/loss")] == pytest.approx(curve(out), rel=1e-5)
    assert "loss_parts/align" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_there_is_one_line(brain_store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        train(tmp_path, brain_store, "steps=3", "tensorboard=true")


def test_a_loss_that_is_no_number_names_its_images(brain_store, tmp_path):
    with pytest.raises(SystemExit, match="the loss is nan.*bad_batch.json"):
        train(tmp_path, brain_store, "steps=9", "lr=1e30", "trunk_lr=1e30", "clip=1e30")
    row = json.loads((tmp_path / "bad_batch.json").read_text())
    assert len(row["images"]) == 4 and set(row["images"]) <= set(open_store(brain_store).image_ids)
    assert row["parts"] and row["step"] == len(rows(tmp_path))


def test_pixels_that_are_no_numbers_do_no_harm(tmp_path):
    pixels = np.random.default_rng(0).random((8, 40, 60), np.float32)
    pixels[:, :20, :20] = np.nan
    store = store_of(tmp_path / "data", [("a", one, ["brain/lesion"]) for one in pixels])
    assert np.isfinite(curve(train(tmp_path / "out", store, "steps=3"))).all()


def test_a_batch_without_regions_trains(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 40, 60), dtype=np.uint8)
    images = [("a", one, ["brain/lesion"] if k == 0 else []) for k, one in enumerate(pixels)]
    store = store_of(tmp_path / "data", images)
    out = train(tmp_path / "out", store, "steps=6", "batch_size=1", "calibration=1", "augment=true")
    assert np.isfinite(curve(out)).all()


def test_labels_that_nobody_mapped_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 60), dtype=np.uint8)
    store = store_of(tmp_path / "data", [("coded", one, ["class 3"]) for one in pixels])
    with pytest.raises(SystemExit, match="source coded: the label tree knows none of its 1 labels"):
        train(tmp_path / "out", store, "steps=2")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_free_phrases_can_be_meant(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 60), dtype=np.uint8)
    store = store_of(tmp_path / "data", [("coded", one, ["class 3"]) for one in pixels])
    out = train(tmp_path / "out", store, "steps=2", "free_phrases=true")
    assert json.loads((out / "config.json").read_text())["vocabulary"] == ["class 3"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("scales=64,100", "multiple of 32"),
        ("precision=fp16", "known: auto, fp32, bf16"),
        ("ema=1", "ema must be in"),
        ("replay=somewhere", "go with init=FOLDER"),
        ("fusion=both", "unknown fusion 'both'"),
        ("init=nowhere", "nowhere: no grounding checkpoint there"),
    ],
)
def test_wrong_settings_are_one_line(setting, says, brain_store, tmp_path):
    with pytest.raises(SystemExit, match=says):
        train(tmp_path, brain_store, "steps=2", setting)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_everything_on_survives_kills(brain_store, tmp_path):
    """Killed twice with SIGKILL, the command ends with the very losses and weights of a run that nobody stopped."""
    common = [sys.executable, "-m", "grounding.train", *TINY, f"store={brain_store}", "steps=8", *EVERYTHING]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*common, f"out={whole}"], env=environment, cwd=ROOT, check=True, capture_output=True)
    for least in (2, 4):
        run = subprocess.Popen([*common, f"out={killed}"], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        while run.poll() is None and last_step(killed) < least:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (killed / "config.json").exists()
    subprocess.run([*common, f"out={killed}"], env=environment, cwd=ROOT, check=True, capture_output=True)
    assert curve(killed) == curve(whole) and len(curve(whole)) == 8
    first, second = weights(whole), weights(killed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def last_step(folder: Path) -> int:
    return max((int(x.name.removeprefix("step-")) for x in folder.glob("checkpoints/step-*")), default=0)
