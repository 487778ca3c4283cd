"""The comparison of grounders: what its peers decode, its scores, and (slow) all of it through the real command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from eval.bench.grounding.closed_set import assigned, decoded, locations, reach
from eval.bench.grounding.data import Batch, Example, Frame, class_maps, coco_truth, collate, draw
from eval.bench.grounding.detection import coco_results, suppressed
from eval.bench.grounding.medglip import translated
from eval.bench.grounding.scores import mean_over, ratio, score
from eval.bench.grounding.trunk import build_trunk
from eval.bench.grounding.unet import components
from eval.score import score_files

ROOT = Path(__file__).resolve().parents[2]


def example(number=0, size=(60, 120), boxes=((0.25, 0.25, 0.5, 0.75),), labels=("skin/skin_lesion",), masks=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Example(str(number), f"p{number}", "isic2018", "a.png", size, boxes, tuple(labels), masks, tuple(labels))


def test_components_become_boxes_with_their_mean_probability():
    probability = np.full((2, 32, 32), 0.1, np.float32)
    probability[0, 4:12, 8:16] = 0.9
    probability[0, 20:28, 2:6] = 0.7
    probability[0, 0:2, 0:2] = 0.99  # a speck
    probability[1, 16:32, 16:32] = 0.6
    found = components(probability)
    assert found.classes.tolist() == [0, 0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert (found.boxes * 32).tolist() == [[8, 4, 16, 12], [2, 20, 6, 28], [16, 16, 32, 32]]
    assert found.masks.sum((1, 2)).tolist() == [64, 32, 256]
    assert len(components(np.zeros((2, 32, 32), np.float32)).boxes) == 0


def test_fcos_distances_decode_to_the_box_they_were_measured_from():
    centres, strides, counts = locations(96)
    assert counts == [144, 36, 9, 4, 1] and len(centres) == sum(counts)
    assert centres[1].tolist() == pytest.approx([12 / 96, 4 / 96])  # x runs first
    box = torch.tensor([[0.2, 0.3, 0.7, 0.8]])
    inside = (reach(box, centres)[0] > 0).all(-1)
    back = decoded(reach(box, centres)[0][inside], centres[inside])
    assert torch.allclose(back, box.expand_as(back), atol=1e-6)


def test_a_location_answers_for_the_smallest_region_around_it():
    centres, strides, counts = locations(256)
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.45, 0.45, 0.55, 0.55]])
    owner = assigned(boxes, centres, strides, counts)
    assert {0, 1} <= set(owner.tolist())
    for k, box in enumerate(boxes):
        place = centres[owner == k]
        assert ((place > box[:2]) & (place < box[2:])).all()
    middle = (centres - 0.5).norm(dim=1)[: counts[0]].argmin()
    assert owner[middle] == 1
    assert (assigned(boxes[:0], centres, strides, counts) == -1).all()


def test_suppression_is_within_a_class():
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.48], [0.6, 0.6, 1, 1]])
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.01, 0.3]])
    found = suppressed(boxes, scores, 0.05, 0.6)
    pairs = {(k, round(s, 2)) for k, s in zip(found.classes.tolist(), found.scores.tolist(), strict=True)}
    assert pairs == {(0, 0.9), (1, 0.7), (1, 0.3)}


@pytest.mark.parametrize("size", [(60, 120), (200, 80), (64, 64)])
def test_results_lie_where_the_annotation_is(size):
    one = example(size=size)
    frame = Frame(size, 96)
    assert np.allclose(frame.invert(frame.apply(one.boxes)), one.boxes, atol=1e-6)
    mask = np.zeros((96, 96), np.float32)
    x1, y1, x2, y2 = (int(round(float(v) * 96)) for v in frame.apply(one.boxes)[0])
    mask[y1:y2, x1:x2] = 1
    (row,) = coco_results(components(mask[None]), frame, 7)
    (truth,) = coco_truth([one], ["skin/skin_lesion"])["annotations"]
    assert row["image_id"] == 7 and row["category_id"] == truth["category_id"] == 1
    assert row["segmentation"]["size"] == list(size)
    assert np.allclose(row["bbox"], truth["bbox"], atol=max(size) / 96 + 1)


def test_boxes_without_masks_are_drawn_as_ellipses():
    one = example(size=(64, 64))
    batch = Batch(torch.zeros(1, 3, 64, 64), [], [], [one], [Frame((64, 64), 64)])
    maps = class_maps(batch, {"skin/skin_lesion": 0, "polyp": 1}, 2)
    assert maps.shape == (1, 2, 32, 32) and maps[0, 1].sum() == 0
    rows, columns = np.nonzero(maps[0, 0].numpy())
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (8, 16, 8, 24)
    assert maps[0, 0].sum() == pytest.approx(np.pi * 4 * 8, rel=0.1)


def test_batches_mix_sources_and_use_every_image():
    examples = [example(k) for k in range(5)]
    batches = draw(examples, 5, 0)
    assert sorted(one.image_id for one in next(batches)) == list("01234")
    assert sorted(one.image_id for one in next(batches)) == list("01234")


def test_labels_that_only_validation_images_have_are_left_out(tmp_path):
    Image.new("L", (120, 60)).save(tmp_path / "a.png")
    one = example(boxes=[[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.75]], labels=("new", "skin/skin_lesion"))
    batch = collate([Example(**{**vars(one), "image": str(tmp_path / "a.png")})], {"skin/skin_lesion": 3}, 96)
    assert batch.classes[0].tolist() == [3] and batch.boxes[0].shape == (1, 4)
    assert batch.pixel_values.shape == (1, 3, 96, 96)


def test_the_ratio_of_two_contestants_is_paired(tmp_path):
    examples = [example(k) for k in range(12)]
    truth = coco_truth(examples, ["skin/skin_lesion"])
    right = [{**row, "score": 0.9} for row in truth["annotations"]]
    for name, rows in (("ours", right), ("theirs", right[:6]), ("nothing", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    ours, theirs, nothing = (
        score(tmp_path / f"{n}.json", tmp_path / "truth.json") for n in ("ours", "theirs", "nothing")
    )
    assert ours.sources["isic2018"]["AP50"].value == pytest.approx(1)
    assert ours.sources["isic2018"]["dice"].value is None
    half = mean_over(theirs, ["isic2018", "absent"], "acc@0.5")
    assert half.value == 0.5 and half.ci95[0] < 0.5 < half.ci95[1]
    same = ratio(ours, ours, ["isic2018"], "AP50")
    assert same.value == 1 and same.ci95 == (1, 1)
    assert ratio(ours, theirs, ["isic2018"], "acc@0.5").value == pytest.approx(2)
    assert ratio(ours, nothing, ["isic2018"], "AP50").value is None


def test_predictions_of_another_program_get_the_ids_of_the_truth(tmp_path):
    truth = coco_truth([example(0), example(1)], ["skin/skin_lesion"])
    own = {
        "images": [{"id": 1, "file_name": "1"}, {"id": 2, "file_name": "0"}],
        "categories": [{"id": 1, "name": "skin"}, {"id": 2, "name": "skin/skin_lesion"}],
    }
    rows = [{"image_id": 1, "category_id": 2, "score": 0.5}, {"image_id": 2, "category_id": 1, "score": 0.4}]
    (tmp_path / "coco_truth.json").write_text(json.dumps(own))
    (tmp_path / "coco_results.json").write_text(json.dumps(rows))
    assert translated(tmp_path, truth) == [{"image_id": 2, "category_id": 1, "score": 0.5}]


def test_an_unknown_trunk_is_named():
    with pytest.raises(ValueError, match="trunk 'swin': the peers are built on one of embedded, tiny"):
        build_trunk("swin", 96)


def draw_set(folder: Path, count: int, shape: str, colour: tuple[int, int, int], name: str) -> None:
    """Synthetic: one coloured shape on grey in each image, as a COCO folder."""
    rng = np.random.default_rng(len(name))
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        image = Image.fromarray(rng.integers(90, 120, (80, 96, 3), np.uint8))
        x, y, side = (int(v) for v in (*rng.integers(4, 40, 2), rng.integers(24, 40)))
        getattr(ImageDraw.Draw(image), shape)((x, y, x + side - 1, y + side - 1), fill=colour)
        image.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 80, "width": 96})
        row = {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, side, side]}
        annotations.append({**row, "area": side * side, "iscrowd": 0})
    about = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": name}]}
    (folder / "annotations.json").write_text(json.dumps(about))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_contestant_is_trained_scored_and_kept(tmp_path):
    data, out = tmp_path / "data", tmp_path / "bench"
    draw_set(data / "skin", 40, "ellipse", (60, 20, 20), "skin lesion")
    draw_set(data / "gut", 40, "rectangle", (220, 180, 180), "polyp")
    sources = [
        "coco:skin?modality=dermoscopy&name=isic2018&licence=none",
        "coco:gut?modality=endoscopy&name=kvasir-seg&licence=none",
    ]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"sources": sources, "out": "store"}))
    ours = {"trunk": "tiny", "image_size": 96, "width": 32, "batch_size": 4, "calibration": 8, "warmup": 4}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({**ours, "store": "store", "out": "out"}))
    command = [sys.executable, "-m", "eval.bench.grounding", "--data", str(data), "--out", str(out)]
    command += ["--data-config", str(tmp_path / "data.yaml"), "--config", str(tmp_path / "ours.yaml")]
    command += ["--minutes", "0.1", "--threads", "1"]

    def bench(*more: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, env=environment)

    done = bench()
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    names = ("medglip", "grounding-dino", "rt-detr", "fcos", "u-net")
    for name in names:
        assert f"| {name} |" in done.stdout
        scored = score_files("grounding", out / name / "val_results.json", out / "data" / "truth.json")
        results = json.loads((out / "results.json").read_text())["contestants"][name]
        assert scored["protocols"] and set(results["sources"]) == {"isic2018", "kvasir-seg"}
        assert results["cost"]["steps"] > 0 and results["cost"]["train_mb"] > 100
        log = [json.loads(row) for row in next((out / name).rglob("train_log.jsonl")).read_text().splitlines()]
        assert np.isfinite([row["loss"] for row in log]).all()
    assert (out / "results.md").read_text().strip() == done.stdout[done.stdout.index("**Means") :].strip()

    # A second run keeps all but the stage that is taken away; another's data is refused.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("train.json")}
    (out / "u-net" / "predict.json").unlink()
    again = bench()
    assert again.returncode == 0 and [line for line in again.stdout.splitlines() if ": training" in line] == []
    assert "u-net: prediction" in again.stdout and "fcos: prediction" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("train.json")} == before
    other = bench("--seed", "1")
    assert other.returncode == 1 and "made with another seed; choose another --out" in other.stderr
    assert "Traceback" not in other.stderr
