"""Training and prediction through the real commands, on a tiny trunk and a small store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from grounding.store import open_store
from grounding.train import main
from grounding.types import load_region_tokens, read_regions

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trunk=tiny", "image_size=96", "width=32", "batch_size=4", "calibration=4", "warmup=4")


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(brain_store, launch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grounder")
    launch("cpu", "grounding.train", *TINY, f"store={brain_store}", f"out={out}", "steps=24", "save_every=8")
    return out


def test_the_loss_falls(trained):
    losses = curve(trained)
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


def test_a_run_that_was_killed_goes_on_to_the_same_losses(trained, brain_store, tmp_path):
    command = [sys.executable, "-m", "grounding.train", *TINY, f"store={brain_store}", f"out={tmp_path}"]
    command += ["steps=24", "save_every=8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(tmp_path.glob("checkpoints/step-*")):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "config.json").exists()
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    assert curve(tmp_path) == curve(trained)


def test_prediction_writes_regions_tokens_and_coco(trained, brain_store, launch, tmp_path):
    out = tmp_path / "regions"
    launch("cpu", "grounding.predict", f"checkpoint={trained}", f"store={brain_store}", f"out={out}")
    ids, tokens, meta, vocabulary = load_region_tokens(out / "region_tokens.safetensors")
    store = open_store(brain_store)
    assert ids == store.image_ids
    assert {"brain/lesion", "brain/frontal_lobe/left_frontal_lobe/lesion"} <= set(vocabulary)
    assert len(meta["checkpoint"]) == len(meta["phrases"]) == len(meta["images"]) == 16
    found = read_regions(out / "regions.jsonl")
    queries = found[ids[0]].queries
    assert all(0 <= query["presence"] <= 1 for query in queries) and len(queries) > 20
    truth = json.loads((out / "coco_truth.json").read_text())
    assert min(row["id"] for row in truth["annotations"]) == 1
    assert len(truth["annotations"]) == sum(len(store[k].regions) for k in range(len(store)))


def test_annotated_regions_become_tokens_with_their_boxes(trained, brain_store, launch, tmp_path):
    arguments = (f"checkpoint={trained}", f"store={brain_store}")
    launch("cpu", "grounding.predict", *arguments, f"out={tmp_path / 'a'}", "regions=annotated")
    ids, tokens, *_ = load_region_tokens(tmp_path / "a" / "region_tokens.safetensors")
    for k, sample in enumerate(open_store(brain_store)[j] for j in range(4)):
        real = tokens.boxes[k][tokens.valid[k] & (tokens.levels[k] < 3)]
        assert np.allclose(sorted(real.tolist()), sorted(sample.regions.boxes.tolist()), atol=1e-6)
    file = tmp_path / "a" / "regions.jsonl"
    launch("cpu", "grounding.predict", *arguments, f"out={tmp_path / 'b'}", f"regions=file:{file}")
    again = load_region_tokens(tmp_path / "b" / "region_tokens.safetensors")[1]
    assert np.allclose(again.features.numpy(), tokens.features.numpy(), atol=1e-4)


def _two_processes(kind: str, launch, brain_store, out: Path) -> None:
    """Trains, stops, resumes, predicts; the first 6 losses of a run of 10 must come again."""
    common = (*TINY, f"store={brain_store}", f"out={out}", "save_every=4", "batch_size=2")
    launch(kind, "grounding.train", *common, "steps=10")
    whole = curve(out)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert np.mean(whole[-3:]) < np.mean(whole[:3])
    (out / "config.json").unlink()
    launch(kind, "grounding.train", *common, "steps=10")
    resumed = curve(out)
    assert resumed[:8] == whole[:8]
    assert resumed == pytest.approx(whole, rel=1e-4)
    launch("cpu", "grounding.predict", f"checkpoint={out}", f"store={brain_store}", f"out={out / 'regions'}")
    assert (out / "regions" / "regions.jsonl").exists()


def test_zero2_on_two_processes(launch, brain_store, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux only")
    _two_processes("zero2", launch, brain_store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero3", "ddp"])
def test_other_kinds_of_two_processes(kind, launch, brain_store, tmp_path):
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux only")
    _two_processes(kind, launch, brain_store, tmp_path)


def test_a_wrong_setting_of_the_command_is_one_line(brain_store, tmp_path):
    command = [sys.executable, "-m", "grounding.train", f"store={brain_store}", f"out={tmp_path / 'out'}", "stpes=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "unknown key 'stpes'; nearest: steps" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("steps=ten", "steps: expected int, got 'ten'"),
        ("store=nowhere", "nowhere: not a region store"),
        ("image_size=100", "multiple of 32"),
    ],
)
def test_wrong_settings_are_one_line(argument, says, brain_store, tmp_path):
    with pytest.raises(SystemExit, match=says) as stopped:
        main([f"store={brain_store}", f"out={tmp_path / 'out'}", argument])
    assert "\n" not in str(stopped.value) and not (tmp_path / "out").exists()
