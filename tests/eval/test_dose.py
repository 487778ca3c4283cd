import numpy as np
import pytest

from eval.dose import dose_response


def answers(chances, n=400, seed=0):
    """n questions, right with the chance of their dose."""
    return (np.random.default_rng(seed).random((n, len(chances))) < np.asarray(chances)).astype(float)


def test_the_slope_is_that_of_the_line_through_the_means():
    doses, values = [0.1, 0.35, 0.7, 1.0], answers([0.4, 0.5, 0.6, 0.8])
    found = dose_response(doses, values, range(len(values)))
    slope, _ = np.polyfit(doses, values.mean(0), 1)
    assert found["slope"].value == pytest.approx(slope) and found["slope"].n == 400
    low, high = found["slope"].ci95
    assert 0 < low < slope < high and found["rises"] == 1


def test_an_answer_that_does_not_depend_on_the_regions_has_no_slope():
    always = np.repeat(answers([0.5]), 3, axis=1)
    found = dose_response([0.0, 0.5, 1.0], always, range(len(always)))
    assert found["slope"].value == pytest.approx(0) and found["slope"].ci95 == pytest.approx((0, 0))
    assert found["rises"] == 0.5


def test_the_order_of_the_doses_changes_nothing_and_a_falling_curve_falls():
    doses, values = np.array([0.2, 0.9, 0.5]), answers([0.8, 0.3, 0.6])
    clusters = np.arange(len(values)) // 4
    one, other = (dose_response(doses[order], values[:, order], clusters) for order in ([0, 1, 2], [2, 0, 1]))
    assert one["slope"].value == pytest.approx(other["slope"].value) and one["slope"].clusters == 100
    assert one["slope"].value < 0 and one["rises"] == other["rises"] == 0


def test_whole_patients_are_drawn():
    """Copies of the same questions in the same patient tell nothing new."""
    values = answers([0.3, 0.7], n=60)
    alone = dose_response([0, 1], values, range(60))["slope"]
    copied = dose_response([0, 1], np.repeat(values, 10, 0), np.repeat(np.arange(60), 10))["slope"]
    assert copied.ci95 == pytest.approx(alone.ci95, abs=0.02)


@pytest.mark.parametrize(("doses", "n"), [([0.5], 4), ([0.5, 0.5], 4), ([0.1, 0.5], 0)])
def test_without_two_doses_or_samples_it_is_undefined(doses, n):
    found = dose_response(doses, np.zeros((n, len(doses))), range(n))
    assert found["slope"].value is None and found["slope"].reason and found["rises"] is None


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="not \\(3 samples, 2 doses\\)"):
        dose_response([0.1, 0.2], np.zeros((3, 3)), range(3))
