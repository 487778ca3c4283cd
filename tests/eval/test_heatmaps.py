import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from scipy.spatial.distance import cdist

from eval.heatmaps import best_hausdorff95, contrast_to_noise, hausdorff95, heatmap_scores, region_mask
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
