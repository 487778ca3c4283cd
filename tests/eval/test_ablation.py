"""The ablation: how rows are measured and set against the full model, and (slow) the command, killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import ConfigError
from eval.bench.ablation import COLUMNS, ROWS, Bench, main, measure, over_seeds, summary, table
from eval.bench.grounding.children import BenchError

ROOT = Path(__file__).resolve().parents[2]
ORGAN, LESION = "abdomen/liver", "abdomen/liver/liver_lesion"


def write(folder: Path, wrong_lesions: int = 0, masks: bool = True) -> Path:
    """Ten images with a liver and a lesion; the predictions are the truth, but the first lesions are elsewhere."""
    folder.mkdir()
    names = {1: ORGAN, 2: LESION}
    images = [{"id": k, "file_name": f"i{k}", "height": 64, "width": 64, "patient_id": f"p{k}"} for k in range(1, 11)]
    rows, results = [], []
    for k in range(1, 11):
        for category, (x, y, side) in {1: (4, 4, 40), 2: (10, 10, 12)}.items():
            box = [x, y, side, side]
            ring = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            rows.append({"id": len(rows) + 1, "image_id": k, "category_id": category, "bbox": box})
            rows[-1] |= {"area": side * side, "iscrowd": 0, "segmentation": ring}
            said = [50, 50, 12, 12] if category == 2 and k <= wrong_lesions else box
            results.append({"image_id": k, "category_id": category, "bbox": said, "score": 0.9})
            if masks:
                x, y, side, _ = said
                results[-1]["segmentation"] = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    categories = [{"id": k, "name": name} for k, name in names.items()]
    truth = {"images": images, "annotations": rows, "categories": categories}
    (folder / "coco_truth.json").write_text(json.dumps(truth))
    (folder / "coco_results.json").write_text(json.dumps(results))
    return folder


def test_organs_and_lesions_are_measured_apart_and_against_the_full_model(tmp_path):
    full, poor = measure(write(tmp_path / "full")), measure(write(tmp_path / "poor", wrong_lesions=4))
    assert all(full[key].value == 1 for key in COLUMNS)
    assert poor["organ", "AP50"].value == 1 and poor["organ", "acc@0.5"].value == 1
    assert poor["lesion", "acc@0.5"].value == pytest.approx(0.6)
    assert poor["all", "acc@0.5"].value == pytest.approx(0.8)
    found = summary(poor, full)
    assert found["acc@0.5, lesion"]["difference"] == pytest.approx(-0.4)
    low, high = found["acc@0.5, lesion"]["difference_ci95"]
    assert -0.8 < low < -0.4 < high < 0
    assert found["AP50, organ"]["difference"] == 0 and found["AP50, organ"]["difference_ci95"] == (0, 0)
    low, high = found["AP50, all"]["ci95"]
    assert low < found["AP50, all"]["value"] < high
    text = table({"full": {"scores": summary(full, full), "steps": 1}, "x": {"scores": found, "steps": 1}})
    assert "-0.400 [-0." in text


def test_resamples_are_the_same_for_every_row_so_that_a_row_against_itself_differs_by_nothing(tmp_path):
    one, two = measure(write(tmp_path / "a", wrong_lesions=3)), measure(write(tmp_path / "b", wrong_lesions=3))
    for row in summary(one, two).values():
        assert row["difference"] == 0 and row["difference_ci95"] == (0, 0)


def test_seeds_are_averaged(tmp_path):
    both = over_seeds([measure(write(tmp_path / "a")), measure(write(tmp_path / "b", wrong_lesions=4))])
    assert both["lesion", "acc@0.5"].value == pytest.approx(0.8)
    assert np.isfinite(both["all", "AP50"].resampled).all()


def test_dice_of_a_model_without_masks_is_undefined_not_zero(tmp_path):
    full, boxes = measure(write(tmp_path / "full")), measure(write(tmp_path / "boxes", masks=False))
    found = summary(boxes, full)["dice, all"]
    assert found == {"value": None, "ci95": None, "difference": None, "difference_ci95": None}


def test_a_folder_of_another_comparison_is_refused_but_more_seeds_are_not(tmp_path):
    settings = {"steps": 4, "minutes": 6, "seeds": [0], "threads": 1, "store": "a", "val": "b", "config": {}}
    Bench(settings, tmp_path)
    Bench(settings | {"seeds": [0, 1]}, tmp_path)
    with pytest.raises(BenchError, match=r"made with other settings, see .*settings.json; choose another --out"):
        Bench(settings | {"steps": 5}, tmp_path)


def test_every_row_is_a_setting_that_training_knows():
    from configs import load_config
    from grounding.train import TrainConfig

    for settings in ROWS.values():
        load_config(TrainConfig, None, ["store=a", "out=b", *settings])
    with pytest.raises(ConfigError):
        load_config(TrainConfig, None, ["store=a", "out=b", "fussion=none"])


def test_a_row_that_cannot_be_trained_is_one_line_with_its_log(tmp_path):
    folders = ["--store", str(tmp_path / "none"), "--val", str(tmp_path), "--out", str(tmp_path / "out")]
    says = r"eval.bench.ablation: python -m grounding.train .* failed, see .*not a region store"
    with pytest.raises(SystemExit, match=says):
        main([*folders, "--steps", "2"])


@pytest.mark.slow
def test_the_command_compares_and_goes_on_where_it_was(brain_store, tmp_path):
    from grounding.brain import build_brain

    build_brain(tmp_path / "val", "test", 6, seed=0)
    command = [sys.executable, "-m", "eval.bench.ablation", "--store", str(brain_store)]
    command += ["--val", str(tmp_path / "val")]
    command += ["--out", str(tmp_path / "out"), "--steps", "6", "--threads", "1", "--only", "stage one first"]
    command += ["--set", "trunk=tiny", "image_size=64", "width=32", "batch_size=4", "calibration=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def go() -> str:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    first = go()
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert list(result["rows"]) == ["full", "stage one first"]
    assert [row["steps"] for row in result["rows"].values()] == [6, 6]
    assert (tmp_path / "out" / "stage-one-first-0" / "stage-one" / "config.json").exists()
    assert "| stage one first |" in first and "full, seed 0" in first
    weights = (tmp_path / "out" / "full-0" / "grounder" / "model.safetensors").stat().st_mtime_ns
    unfinished = tmp_path / "out" / "stage-one-first-0"
    (unfinished / "row.json").unlink()
    shutil.rmtree(unfinished / "regions")
    again = go()
    assert "full, seed 0" not in again and "stage one first, seed 0" in again
    assert (tmp_path / "out" / "full-0" / "grounder" / "model.safetensors").stat().st_mtime_ns == weights
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"] == result["rows"]
