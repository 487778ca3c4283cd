"""Scores of masks and heat maps, as functions and from files."""

import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from safetensors.numpy import save_file
from scipy.spatial.distance import cdist

from downstream.cli import main
from eval.heatmaps import best_hausdorff95, contrast_to_noise, hausdorff95, heatmap_scores, region_mask
from eval.score import score_files
from eval.types import ScoreError
from grounding.types import RegionSet


def square(size, y1, x1, y2, x2):
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def border(mask):
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spacing", [None, (0.7, 2.5)])
def test_hausdorff_equals_all_pairs_of_border_pixels(seed, spacing):
    rng = np.random.default_rng(seed)
    a, b = (rng.random((23, 31)) < 0.1 for _ in range(2))
    a |= square(a.shape, 0, 0, 6, 9)  # touches the edge of the image
    distances = cdist(border(a) * np.array(spacing or 1), border(b) * np.array(spacing or 1))
    expected = max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))
    assert hausdorff95(a, b, spacing) == pytest.approx(expected)
    assert hausdorff95(b, a, spacing) == pytest.approx(expected)


def test_hausdorff_of_a_shift():
    a, b = square((40, 40), 5, 5, 15, 15), square((40, 40), 5, 9, 15, 19)
    assert (hausdorff95(a, a), hausdorff95(a, b)) == (0.0, 4.0)
    assert hausdorff95(a, b, (3.0, 0.5)) == 2.0


def test_hausdorff_of_empty_masks():
    empty, full = np.zeros((5, 5), bool), np.ones((5, 5), bool)
    assert hausdorff95(empty, empty) == 0.0
    assert hausdorff95(empty, full) is None and hausdorff95(full, empty) is None
    with pytest.raises(ScoreError, match="resize"):
        hausdorff95(full, np.ones((6, 5), bool))


def test_hausdorff_of_several_references_takes_the_nearest():
    masks = [rle.encode(np.asfortranarray(square((50, 50), 5, x, 15, x + 10).astype(np.uint8))) for x in (5, 35)]
    assert best_hausdorff95(masks[0], masks) == 0.0
    assert best_hausdorff95(masks[0], masks[1:]) == 30.0


def test_contrast_to_noise():
    inside = np.array([True, True, False, False])
    assert contrast_to_noise([3.0, 5.0, 0.0, 2.0], inside) == pytest.approx(3 / np.sqrt(2))
    assert contrast_to_noise([0.0, 2.0, 3.0, 5.0], inside) == pytest.approx(-3 / np.sqrt(2))
    rng = np.random.default_rng(0)
    heat, region = rng.random((9, 9)), rng.random((9, 9)) < 0.3
    assert contrast_to_noise(heat * 7 - 2, region) == pytest.approx(contrast_to_noise(heat, region))
    for values, where in (([1, 1, 0, 0], inside), ([1, 2, 3, 4], [True] * 4), ([1, 2, 3, 4], [False] * 4)):
        assert contrast_to_noise(values, where) is None
    assert contrast_to_noise([np.nan, 1, 2, 3], inside) is None


def test_a_region_on_any_grid():
    box = RegionSet([[0.25, 0.5, 0.75, 1]], ["x"], (100, 200))
    for size in ((4, 4), (100, 200), (7, 13)):
        assert region_mask(box, size).mean() == pytest.approx(0.25, abs=0.08)
    coded = rle.encode(np.asfortranarray(square((100, 200), 50, 50, 100, 150).astype(np.uint8)))
    masked = RegionSet([[0.25, 0.5, 0.75, 1]], ["x"], (100, 200), masks=[coded])
    assert (region_mask(masked, (100, 200)) == region_mask(box, (100, 200))).all()
    assert region_mask(masked, (4, 4)).tolist() == region_mask(box, (4, 4)).tolist()


def test_heat_maps():
    truth = {i: RegionSet([[0, 0, 0.5, 0.5]], ["lesion"], (8, 8)) for i in "abc"}
    ramp = np.linspace(0, 0.05, 64).reshape(8, 8)
    hot = np.where(region_mask(truth["a"], (8, 8)), 0.9 + ramp, ramp)
    scores = heatmap_scores({"a": {"lesion": hot}, "b": {"lesion": 1 - hot}}, truth)
    rows = {name: [row["value"] for row in scores[name].per_sample] for name in scores}
    assert rows["CNR"][0] == pytest.approx(-rows["CNR"][1]) and rows["CNR"][0] > 10 and rows["CNR"][2] is None
    assert rows["|CNR|"][0] == pytest.approx(rows["|CNR|"][1])
    assert rows["pointing"] == [1.0, 0.0, 0.0]
    assert rows["mIoU"][0] == 1.0 and rows["mIoU"][2] == 0.0
    assert (scores["CNR"].n, scores["pointing"].n) == (2, 3)


def test_flat_broken_and_absent_heat_maps():
    truth = {"a": RegionSet([[0, 0, 0.5, 0.5]], ["lesion"], (8, 8))}
    assert "contrast" in heatmap_scores({"a": {"lesion": np.zeros((4, 4))}}, truth)["CNR"].reason
    assert heatmap_scores({"a": {"lesion": np.full((4, 4), np.nan)}}, truth)["mIoU"].value == 0.0
    assert heatmap_scores({}, {})["mIoU"].value is None
    with pytest.raises(ScoreError, match="rows and columns"):
        heatmap_scores({"a": {"lesion": np.zeros(4)}}, truth)


LEFT = {"image_size": [8, 8], "regions": [{"box": [0, 0, 0.5, 1], "label": "chest/lung/left_lung"}]}


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Scores heat maps, keyed by (image_id, phrase), against image rows; (exit code, scores.json, what was said)."""
    monkeypatch.chdir(tmp_path)

    def run(maps, rows, *arguments):
        save_file({"\t".join(key): heat for key, heat in maps.items()}, "maps.safetensors")
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ["--heatmaps", "maps.safetensors", "--references", "r.jsonl", "--out", "s.json"]
        code = main(["score", "grounding", *files, *arguments])
        captured = capsys.readouterr()
        written = json.loads((tmp_path / "s.json").read_text()) if code == 0 else None
        return code, written, " ".join((captured.out + captured.err).split())

    return run


def hot(left, dtype=np.float32):
    heat = np.zeros((4, 4), dtype)
    heat[:, :2] = left
    heat[:, 2:] = 1 - left
    return heat


def test_a_file_of_heat_maps_is_scored_without_boxes(score):
    """By name or another name of the label tree; sliced; what has no map is wrong and counted."""
    about = {"modality": "xray", "source": "s", "patient_id": "p"}
    rows = [{"image_id": f"study/{k}.png", **about, **LEFT} for k in range(4)]
    maps = {
        ("study/0.png", "chest/lung/left_lung"): hot(1),
        ("study/1.png", "left lung"): hot(1, np.float16),
        ("study/2.png", "Left Lung"): hot(0, np.uint8),
        ("study/2.png", "teh lung"): hot(1),
        ("other", "left lung"): hot(1),
    }
    code, written, said = score(maps, rows, "--html", "page.html", "--markdown", "s.md")
    assert code == 0 and list(written["protocols"]) == ["heatmaps"]
    scores = written["protocols"]["heatmaps"]
    assert [row["value"] for row in scores["overall"]["pointing"]["per_sample"]] == [1, 1, 0, 0]
    assert (scores["overall"]["pointing"]["value"], scores["overall"]["mIoU"]["value"]) == (0.5, 0.5)
    assert scores["by_modality"]["xray"]["pointing"]["n"] == scores["by_source"]["s"]["pointing"]["n"] == 4
    assert scores["by_label"]["chest/lung/left_lung"]["pointing"]["value"] == 0.5
    assert scores["counts"] == {"images": 4, "pairs": 4, "without a map": 1}
    assert {name: found for name, found in written["checks"].items() if found} == {
        "without a map": ["study/3.png"],
        "maps of unknown images": ["other"],
        "maps of unknown phrases": ["teh lung"],
    }
    assert list(written["files"]) == ["heatmaps", "references"]
    assert "1 maps of unknown phrases (phrases of heat maps that no reference has under any name" in said


def test_heat_maps_beside_boxes_and_two_files_of_them_compared(score, tmp_path, capsys):
    rows = [{"image_id": f"{k}", **LEFT} for k in range(6)]
    predictions = [{**row, "regions": [{**LEFT["regions"][0], "score": 0.5}]} for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    good = {(f"{k}", "left lung"): hot(1) for k in range(6)}
    _, written, _ = score(good, rows, "--predictions", "p.jsonl")
    assert list(written["protocols"]) == ["coco", "regions", "heatmaps"]
    (tmp_path / "s.json").rename("good.json")
    score(good | {("0", "left lung"): hot(0)}, rows)
    assert main(["score", "compare", "s.json", "good.json", "--metric", "pointing", "--out", "c.json"]) == 0
    (row,) = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert row["metric"] == "heatmaps · overall · pointing" and row["difference"] == pytest.approx(1 / 6)


def test_coco_ground_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth = {"images": [{"id": 7, "height": 8, "width": 8}], "categories": [{"id": 1, "name": "left lung"}]}
    truth["annotations"] = [{"id": 0, "image_id": 7, "category_id": 1, "bbox": [0, 0, 4, 8]}]
    (tmp_path / "r.json").write_text(json.dumps(truth))
    save_file({"7\tleft lung": hot(1)}, "maps.safetensors")
    scores = score_files("grounding", None, "r.json", heatmaps="maps.safetensors")["protocols"]["heatmaps"]
    assert scores["overall"]["mIoU"].value == 1.0


@pytest.mark.parametrize(
    ("maps", "arguments", "reason"),
    [
        ({("a", "x"): np.zeros(4, np.float32)}, (), "tensor 'a\\tx' is F32 of shape [4]; a map is float32"),
        ({("a",): hot(1)}, (), "tensor 'a' is of no image and phrase; name each"),
        ({}, (), "holds no heat maps"),
        ({("b", "x"): hot(1)}, (), "none of its 1 ids is among the references"),
        ({("a", "x"): hot(1)}, ("--protocol", "coco"), "protocol coco needs --predictions"),
    ],
)  # fmt: skip
def test_bad_heat_maps(score, maps, arguments, reason):
    code, _, said = score(maps, [{"image_id": "a", **LEFT}], *arguments)
    assert code == 1 and reason in said


def test_files_that_are_not_there(score, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(json.dumps({"image_id": "a", **LEFT}) + "\n")
    (tmp_path / "maps.npz").write_bytes(b"PK" + b"0" * 99)
    for arguments, reason in (
        (["--heatmaps", "none.safetensors"], "none.safetensors: not a safetensors file (No such file"),
        (["--heatmaps", "maps.npz"], "maps.npz: not a safetensors file"),
        (["--protocol", "heatmaps"], "protocol heatmaps needs --heatmaps"),
        ([], "nothing to score; give --predictions or --heatmaps"),
    ):
        assert main(["score", "grounding", "--references", "r.jsonl", *arguments]) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_a_region_with_a_mask_beside_one_with_a_box():
    coded = rle.encode(np.asfortranarray(square((4, 4), 0, 0, 2, 2).astype(np.uint8)))
    both = RegionSet([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], ["x", "x"], (4, 4), masks=[coded, None])
    assert region_mask(both, (4, 4)).sum() == 8
