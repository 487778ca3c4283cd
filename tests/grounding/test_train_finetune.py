"""Going on from a checkpoint: what it takes over, what it refuses, and what it says of the old sources."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from grounding.fine_tune import start_from
from grounding.labels import load_label_tree
from grounding.mixture import CYCLE, Mixture
from grounding.model import MedGLIPConfig, build_model, load_checkpoint
from grounding.store import write_store
from grounding.train import main
from grounding.types import GroundingSample, RegionSet

TINY = ("trunk=tiny", "image_size=64", "width=32", "batch_size=4", "calibration=4", "warmup=2")


def train(out: Path, store: Path, *overrides: str) -> Path:
    main([*TINY, f"store={store}", f"out={out}", *overrides])
    return out


@pytest.fixture(scope="module")
def first(brain_store, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("first"), brain_store, "steps=3")


@pytest.fixture(scope="module")
def skin(tmp_path_factory) -> Path:
    """Twelve pictures of a dark square on the skin: another source, modality and label."""
    folder, samples = tmp_path_factory.mktemp("skin"), []
    for k in range(12):
        pixels = np.full((48, 64, 3), 200, np.uint8)
        x, y = 4 + 3 * k, 2 + 2 * k
        pixels[y : y + 16, x : x + 16] = 60
        Image.fromarray(pixels).save(folder / f"{k}.png")
        boxes = np.array([[x / 64, y / 48, (x + 16) / 64, (y + 16) / 48]])
        regions = RegionSet(boxes, ["skin/skin_lesion"], (48, 64))
        path = str(folder / f"{k}.png")
        samples.append(GroundingSample(f"s{k}", f"q{k}", "skin", "dermoscopy", path, regions, ("skin/skin_lesion",)))
    write_store(samples, folder / "store", "# card\n")
    return folder / "store"


def test_fine_tuning_keeps_what_was_known_and_says_what_was_lost(first, skin, brain_store, tmp_path):
    out = train(tmp_path, skin, "steps=3", f"init={first}", f"replay={brain_store}")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (first, out))
    assert {*old["vocabulary"], "skin/skin_lesion"} == set(new["vocabulary"])
    assert new["modalities"] == ["dermoscopy", "mri"] and set(old["phrases"]) < set(new["phrases"])
    report = json.loads((out / "forgetting.json").read_text())
    assert report["init"] == str(first) and len(report["sources"]) == 1
    (row,) = report["sources"].values()
    assert row["images"] == 4
    assert row["AP50"]["change"] == pytest.approx(row["AP50"]["after"] - row["AP50"]["before"], abs=1e-4)
    card = (out / "README.md").read_text()
    assert "Old sources, AP50 before and after" in card and "Replayed (1): 24 images" in card


def test_a_checkpoint_judged_against_itself_forgot_nothing(first, brain_store, tmp_path):
    out = train(tmp_path, brain_store, "steps=1", f"init={first}", "lr=0", "trunk_lr=0", f"forgetting={brain_store}")
    before, after = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name != "familiar")
    (row,) = json.loads((out / "forgetting.json").read_text())["sources"].values()
    assert row["images"] == 24 and row["AP50"]["change"] == row["acc@0.5"]["change"] == 0


def test_replay_has_its_share_and_leaves_the_rest_as_it_was():
    mixture = Mixture(["new"] * 50 + ["newer"] * 50, 2.0, 0, old=["a"] * 30 + ["b"] * 300, old_share=0.3)
    drawn = [k for step in range(CYCLE // 8) for k in mixture.indices(step, 8, 1, 0)]
    assert sum(k >= 100 for k in drawn) / CYCLE == pytest.approx(0.3, abs=0.005)
    assert max(drawn) < 430 and {k for k in drawn if k < 100} == set(range(100))
    assert sum(100 <= k < 130 for k in drawn) > 30  # temperature holds among the old ones, too
    alone = Mixture(["new"] * 50, 2.0, 0)
    assert alone.shares == Mixture(["new"] * 50, 2.0, 0, (), 0.3).shares


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("width=64",), r"tensor \S+ is \S+ there and \S+ here; give width=32"),
        (("fusion=none",), "tensor fusion.* is .* there and not there here; give fusion=phrase"),
        (("mask_head=false",), "give mask_head=True"),
    ],
)
def test_other_sizes_are_refused_by_the_tensor(settings, says, first, brain_store, tmp_path):
    with pytest.raises(SystemExit, match=says):
        train(tmp_path, brain_store, "steps=1", f"init={first}", *settings)


def test_another_label_tree_is_refused_by_the_label(first, brain_store, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    row = json.loads((first / "config.json").read_text())
    row["vocabulary"].append("brain/third_hemisphere")
    (other / "config.json").write_text(json.dumps(row))
    save_file(load_file(first / "model.safetensors"), other / "model.safetensors")
    with pytest.raises(SystemExit, match="'brain/third_hemisphere' is not in this label tree"):
        train(tmp_path / "out", brain_store, "steps=1", f"init={other}")


def test_every_weight_is_taken_over(first):
    old = load_checkpoint(first)
    fresh = build_model(MedGLIPConfig(trunk="tiny", image_size=64, width=32), seed=7)
    start_from(fresh, first, load_label_tree())
    mine = fresh.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in old.state_dict().items() if name != "familiar")
