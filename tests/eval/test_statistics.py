import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics import bootstrap_interval, mcnemar, mean_of, mean_score, paired_difference
from eval.types import Score, plain


def ones(values):
    return np.array([[v, 1.0] for v in values])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 11), (0, 9)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    first, second = [1] * b + [0] * c + [1, 0] * 7, [0] * b + [1] * c + [1, 0] * 7
    result = mcnemar(first, second)
    assert (result["n"], result["b"], result["c"]) == (b + c + 14, b, c)
    assert result["p"] == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0, abs=1e-12)


def test_mcnemar_refuses_unpaired_verdicts():
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([1], [1, 0])


def test_bootstrap_is_deterministic_and_blind_to_order():
    rng = np.random.default_rng(1)
    values, patients = rng.integers(0, 2, 120).astype(float), [f"p{k % 30}" for k in range(120)]
    order = rng.permutation(120)
    interval = bootstrap_interval(ones(values), patients)
    assert interval == bootstrap_interval(ones(values), patients)
    assert interval == bootstrap_interval(ones(values[order]), [patients[k] for k in order])
    assert interval != bootstrap_interval(ones(values), patients, seed=1)
    assert interval[0] < values.mean() < interval[1]


def test_bootstrap_has_the_width_of_the_normal_interval_for_independent_samples():
    values = np.repeat([0.0, 1.0], 200)
    low, high = bootstrap_interval(ones(values), range(400))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.08)


def test_clustering_widens_the_interval():
    values = np.repeat([0.0, 1.0] * 10, 20)  # each patient's twenty samples agree
    alone = bootstrap_interval(ones(values), range(400))
    together = bootstrap_interval(ones(values), [k // 20 for k in range(400)])
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_no_interval_from_one_patient():
    assert bootstrap_interval(ones([0, 1, 1]), ["a", "a", "a"]) is None
    assert mean_score("m", "1", [0, 1, 1], ["a", "a", "a"]).ci95 is None


def test_resamples_where_the_statistic_is_undefined_are_left_out():
    statistics = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert bootstrap_interval(statistics, ["a", "b"]) == (1.0, 1.0)
    assert bootstrap_interval(np.zeros((2, 2)), ["a", "b"]) is None


def test_paired_difference_of_equal_systems_is_zero():
    values = ones([0, 1, 1, 0, 1])
    result = paired_difference(values, values, list("abcde"))
    assert (result["difference"], result["ci95"]) == (0.0, (0.0, 0.0))


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 300).astype(float)
    b = np.where(np.arange(300) < 30, 0, a)
    result = paired_difference(ones(a), ones(b), range(300))
    assert result["difference"] == pytest.approx(a.mean() - b.mean())
    assert 0 < result["ci95"][0] < result["ci95"][1] < 0.1


def test_mean_of_nothing_is_undefined():
    assert np.isnan(mean_of(np.zeros(2)))
    score = mean_score("m", "1", [None, None], ["a", "b"], reason="no masks")
    assert (score.value, score.n, str(score)) == (None, 0, "undefined (no masks)")


def test_a_score_has_a_value_or_a_reason():
    with pytest.raises(ValueError, match="reason"):
        Score("m", "1", None, 0)
    with pytest.raises(ValueError, match="reason"):
        Score("m", "1", 0.0, 1, reason="but it is defined")
    assert str(Score("m", "1", 0.5, 9, (0.25, 0.75))) == "0.500 [0.250, 0.750]"
    score = Score("m", "1", 0.5, 1, per_sample=[{"sample_id": "a", "value": 0.5}])
    assert "per_sample" not in plain({"x": [score]}, per_sample=False)["x"][0]
    assert plain({"x": score})["x"]["per_sample"] == [{"sample_id": "a", "value": 0.5}]
