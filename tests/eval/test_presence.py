"""Presence scores against definitions that are slow and plain."""

import numpy as np
import pytest

from eval.presence import auroc, expected_calibration_error, reliability, share


def some(n=300, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.random(n).round(2)  # with ties
    return p, rng.random(n) < p, [f"image {k // 6}" for k in range(n)]


def test_auroc_counts_pairs():
    scores, present, images = some()
    pairs = [(a > b) + (a == b) / 2 for a in scores[present] for b in scores[~present]]
    estimate = auroc(scores, present, images)
    assert estimate.value == pytest.approx(np.mean(pairs))
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
    assert estimate.n == 300 and estimate.images == 50
    assert auroc(1 - scores, ~present, images).value == pytest.approx(estimate.value)


def test_perfect_and_blind_scores():
    assert auroc([0.1, 0.9, 0.2, 0.8], [False, True, False, True], list("aabb")).value == 1
    assert auroc([0.5] * 4, [False, True, False, True], list("aabb")).value == 0.5


def test_what_is_undefined_is_none():
    assert auroc([0.1, 0.9], [True, True], ["a", "b"]).value is None
    assert expected_calibration_error([], [], []).value is None and reliability([], [], []) == []
    assert share([], []).value is None
    one = auroc([0.1, 0.9], [False, True], ["a", "a"])
    assert one.value == 1 and one.ci95 is None  # one image says nothing of others


def test_calibration_error_by_hand():
    p, y = [0.05, 0.05, 0.95, 0.95, 1.0], [False, True, True, True, True]
    # bins: (0.05 against 0.5, 2 of 5) and (0.9667 against 1, 3 of 5)
    expected = 2 / 5 * 0.45 + 3 / 5 * (1 - 2.9 / 3)
    assert expected_calibration_error(p, y, list("aabbc")).value == pytest.approx(expected)
    rows = reliability(p, y, list("aabbc"))
    assert [(row["low"], row["n"], row["present"]) for row in rows] == [(0.0, 2, 0.5), (0.9, 3, 1.0)]


def test_right_probabilities_have_a_small_error_and_a_curve_on_the_diagonal():
    p, y, images = some(20_000)
    assert expected_calibration_error(p, y, images, resamples=20).value < 0.02
    assert all(abs(row["probability"] - row["present"]) < 0.05 for row in reliability(p, y, images, resamples=20))
    assert expected_calibration_error(p**3, y, images, resamples=20).value > 0.1


def test_intervals_are_over_images_and_repeat():
    scores, present, images = some()
    together = auroc(np.repeat(scores, 4), np.repeat(present, 4), np.repeat(images, 4))
    assert together.ci95 == pytest.approx(auroc(scores, present, images).ci95)  # copies add no evidence
    assert auroc(scores, present, images) == auroc(scores, present, images)


@pytest.mark.parametrize(
    ("p", "y", "images", "says"),
    [
        ([0.1], [True, False], ["a"], "1 scores"),
        ([float("nan")], [True], ["a"], "not finite"),
        ([1.2], [True], ["a"], "outside"),
    ],
)
def test_wrong_input_is_named(p, y, images, says):
    with pytest.raises(ValueError, match=says):
        expected_calibration_error(p, y, images)
