"""Stage one through its command: it learns, resumes, hands over to grounding.train, and says what it does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from grounding.left_out import grid_boxes
from grounding.left_out import main as judge
from grounding.model import build_model, load_checkpoint
from grounding.pretrain import STAGE_TWO, main
from grounding.store import write_store
from grounding.train import main as train
from grounding.types import GroundingSample, RegionSet

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trunk=tiny", "image_size=64", "width=32", "batch_size=4", "warmup=2")
FAST = ("steps=40", "save_every=30", "lr=3e-3", "trunk_lr=3e-3")
SETS = {"skin": ("dermoscopy", "skin/skin_lesion", 60), "bowel": ("endoscopy", "gastrointestinal_tract/polyp", 250)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two sources of twelve synthetic pictures: a dark square on the skin, a bright one in the bowel."""
    folder, samples = tmp_path_factory.mktemp("pictures"), []
    for source, (modality, label, value) in SETS.items():
        for k in range(12):
            pixels = np.full((48, 64, 3), 150, np.uint8)
            x, y = 4 + 3 * k, 2 + 2 * k
            pixels[y : y + 16, x : x + 16] = value
            path = folder / f"{source}-{k}.png"
            Image.fromarray(pixels).save(path)
            regions = RegionSet(np.array([[x / 64, y / 48, (x + 16) / 64, (y + 16) / 48]]), [label], (48, 64))
            samples.append(GroundingSample(path.stem, path.stem, source, modality, str(path), regions, (label,)))
    write_store(samples, folder / "store", "# card\n")
    return folder / "store"


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stage_one(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stage-one")
    main([*TINY, *FAST, f"store={store}", f"out={out}"])
    return out


def test_the_loss_falls(stage_one):
    losses = curve(stage_one)
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert (stage_one / "curves.png").exists() and (stage_one / "run.json").exists()


def test_a_resumed_run_has_the_same_losses_and_weights(stage_one, store, tmp_path):
    main([*TINY, *FAST, f"store={store}", f"out={tmp_path}"])
    (tmp_path / "config.json").unlink()  # goes on from step 30
    main([*TINY, *FAST, f"store={store}", f"out={tmp_path}"])
    assert curve(tmp_path) == curve(stage_one)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, stage_one))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_stage_two_trains_is_untouched_and_the_rest_is_not(stage_one):
    after = load_checkpoint(stage_one)
    before = build_model(after.config, seed=0)
    trained = {name for name, p in before.named_parameters() if p.requires_grad and not name.startswith(STAGE_TWO)}
    ends = dict(after.named_parameters())
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, ends[name])}
    assert changed <= trained
    assert {"scale", "region_align.weight", "text.0.weight", "lateral.0.weight"} <= changed


def test_grounding_train_starts_from_it(stage_one, store, tmp_path):
    settings = [*TINY, f"store={store}", f"out={tmp_path}", "steps=1", "calibration=4", "lr=0", "trunk_lr=0"]
    train([*settings, f"init={stage_one}"])
    before, after = (load_file(folder / "model.safetensors") for folder in (stage_one, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before if name != "familiar")


def test_a_source_left_out_lends_nothing_and_is_judged(store, tmp_path):
    main([*TINY, f"store={store}", f"out={tmp_path}", "steps=2", "leave_out=bowel"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocabulary"] == ["skin/skin_lesion"] and config["modalities"] == ["dermoscopy"]
    scores = json.loads((tmp_path / "left_out.json").read_text())
    assert list(scores) == ["bowel"] and scores["bowel"]["images"] == scores["bowel"]["regions"] == 12
    assert scores["bowel"]["phrases"] == 2 and scores["bowel"]["phrase"]["chance"] == 0.5
    assert scores["bowel"]["own phrase"] is None  # of one there is no choice
    box = scores["bowel"]["acc@0.5"]
    assert 0 <= box["score"]["value"] <= box["best"] <= 1 and 0 < box["chance"] < 0.1


def test_regions_are_told_apart_after_stage_one(stage_one, store, tmp_path, capsys):
    judge([f"checkpoint={stage_one}", f"store={store}", f"out={tmp_path / 'scores.json'}"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == set(SETS) and all(row["phrase"]["score"]["value"] == 1 for row in scores.values())
    assert "phrase: 1.000 [1.000, 1.000] (chance 0.500)" in capsys.readouterr().out


def test_the_grid_covers_the_image():
    boxes = grid_boxes()
    assert boxes.min() == 0 and boxes.max() == 1 and (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(boxes) < 5000


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("leave_out=liver",), "no source 'liver' to leave out; it has: bowel, skin"),
        (("leave_out=skin,bowel",), "no image is left"),
        (("hardness=0.5",), "hardness 1 or more"),
        (("image_size=100",), "multiples of 32"),
        (("lr=1e30", "trunk_lr=1e30", "warmup=1", "steps=4"), "the loss is not finite .* images: .*; lower lr"),
    ],
)
def test_mistakes_are_one_line(settings, says, store, tmp_path):
    with pytest.raises(SystemExit, match=says) as caught:
        main([*TINY, f"store={store}", f"out={tmp_path}", *settings])
    assert "\n" not in str(caught.value)


# The gradient that a batch of 8 leaves, spread over as many processes as were launched; each holds its own images with
# no more padding than they need.
GRADIENT = """
import dataclasses, sys
from pathlib import Path
import torch
from grounding.data import Collator, phrase_targets
from grounding.labels import load_label_tree
from grounding.model import build_model
from grounding.pretrain import Contrast, PretrainConfig, describe_model, freeze_stage_two, setup, trained_part
from grounding.store import open_store
store, out = map(Path, sys.argv[1:])
accelerator, tree = setup(4, 0), load_label_tree()
config = PretrainConfig(store=store, out=out, trunk="tiny", image_size=64, width=32, background=0)
part = trained_part(config, open_store(store), tree)
targets = phrase_targets(part, tree)
contrast = Contrast(config, targets, tree)
model = build_model(describe_model(config, part, targets, tree, contrast.text_width), 0)
freeze_stage_two(model)
model = accelerator.prepare(model)
pixels, texts, truth = Collator(targets, tree, 64, 0)([part.store[k] for k in range(8)], 1)
size = 8 // accelerator.num_processes
own = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
n = int(truth.valid[own].sum(1).max())
columns = ("boxes", "jittered", "valid", "positive", "masks", "has_mask")
rows = {name: getattr(truth, name)[own, :n] for name in columns}
mine = dataclasses.replace(truth, **rows, known=truth.known[own], modality=truth.modality[own])
loss, parts = contrast(accelerator, model, 1, ([], pixels[own], texts, mine))
accelerator.backward(loss)
if accelerator.is_main_process:
    inner = accelerator.unwrap_model(model)
    gradients = {name: p.grad for name, p in inner.named_parameters() if p.requires_grad}
    torch.save({"gradients": gradients, "loss": parts["region_to_phrase"].item()}, out)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(brain_store, tmp_path):
    (tmp_path / "gradient.py").write_text(GRADIENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = {}
    for kind in ("cpu", "ddp"):
        config = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", "0", str(tmp_path / "gradient.py"), str(brain_store), str(tmp_path / kind)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=280)
        found[kind] = torch.load(tmp_path / kind)
    one, two = found["cpu"], found["ddp"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys()
    assert all(gradient is not None for gradient in one["gradients"].values())
    assert sum(bool(gradient.any()) for gradient in one["gradients"].values()) > 30  # adapters start as the identity
    for name, gradient in one["gradients"].items():
        assert torch.allclose(gradient, two["gradients"][name], rtol=1e-3, atol=1e-5 * gradient.abs().max()), name
