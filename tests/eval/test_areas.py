import numpy as np
import pytest

from eval.areas import covered_share, joint_areas, union_area, union_iou


def rasterised(boxes, side):
    mask = np.zeros((side, side), bool)
    for x1, y1, x2, y2 in boxes:
        mask[x1:x2, y1:y2] = True
    return mask


@pytest.mark.parametrize("seed", range(20))
def test_areas_equal_counted_pixels(seed):
    rng = np.random.default_rng(seed)
    a, b = (np.sort(rng.integers(0, 60, (n, 2, 2)), 1).reshape(n, 4) for n in rng.integers(0, 12, 2))
    in_a, in_b = rasterised(a, 60), rasterised(b, 60)
    assert joint_areas(a, b) == (in_a.sum(), in_b.sum(), (in_a & in_b).sum())
    assert union_area(np.concatenate([a, b])) == (in_a | in_b).sum()
    either = (in_a | in_b).sum()
    assert union_iou(a, b) == (pytest.approx((in_a & in_b).sum() / either) if either else 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_grid_follows_cut_down_pixels(seed):
    rng = np.random.default_rng(seed)
    a, b = (np.sort(rng.random((5, 2, 2)), 1).reshape(5, 4) for _ in range(2))
    in_a, in_b = (rasterised((boxes * 224).astype(int), 224) for boxes in (a, b))
    assert covered_share(a, b, grid=224) == pytest.approx((in_a & in_b).sum() / in_a.sum())
    assert covered_share(a, b) == pytest.approx((in_a & in_b).sum() / in_a.sum(), abs=0.03)


def test_boxes_without_area():
    assert union_area([]) == 0.0
    assert union_area([[0.5, 0.5, 0.5, 0.9], [0.9, 0.9, 0.1, 0.1]]) == 0.0
    assert covered_share([[0.2, 0.2, 0.2, 0.2]], [[0, 0, 1, 1]]) is None
    assert covered_share([[0, 0, 0.001, 0.001]], [[0, 0, 1, 1]], grid=224) is None
    assert covered_share([[0, 0, 1, 1]], []) == 0.0
