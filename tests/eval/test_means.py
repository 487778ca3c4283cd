import numpy as np
import pytest

from eval.means import mean_scores
from eval.statistics import mean_score

NAMES = ("a", "b")


def test_columns_are_scored_as_one_by_one():
    rng = np.random.default_rng(0)
    values, patients = rng.random((60, 2)), [str(k // 2) for k in range(60)]
    together = mean_scores(NAMES, "1", values, patients, {}, "none")
    for k, name in enumerate(NAMES):
        alone = mean_score(name, "1", values[:, k].tolist(), patients)
        assert (together[name].value, together[name].n, together[name].clusters) == (alone.value, 60, 30)
        assert together[name].ci95 == pytest.approx(alone.ci95)


def test_samples_without_a_value_do_not_count():
    nan = float("nan")
    scores = mean_scores(NAMES, "1", [[1.0, nan], [nan, nan], [0.0, nan]], ["p", "q", "q"], {"b": "no masks"}, "none")
    assert (scores["a"].value, scores["a"].n, scores["a"].clusters) == (0.5, 2, 2)
    assert (scores["b"].value, scores["b"].reason) == (None, "no masks")


def test_one_patient_or_none():
    one = mean_scores(NAMES, "1", [[1.0, 0.0]] * 3, ["p"] * 3, {}, "none")
    assert (one["a"].value, one["a"].ci95) == (1.0, None)
    assert mean_scores(NAMES, "1", [], [], {"a": "no masks"}, "no samples")["a"].reason == "no samples"
