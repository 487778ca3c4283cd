import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics import (
    bootstrap_interval,
    cohens_g,
    cohens_h,
    design_effect,
    holm,
    mcnemar,
    mean_of,
    mean_score,
    needed_pairs,
    paired_difference,
    permutation_test,
    standardised_difference,
    visible_difference,
    visible_mean_difference,
)
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


def test_many_clusters_give_the_interval_of_few_draws_of_them():
    """Above some thousand clusters equal ones are drawn together: same width as the normal interval."""
    values = np.repeat([0.0, 1.0], 5000)
    low, high = bootstrap_interval(ones(values), range(10_000))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 100, rel=0.08)
    spread = np.random.default_rng(0).random(10_000)  # no two equal
    low, high = bootstrap_interval(ones(spread), range(10_000))
    assert high - low == pytest.approx(2 * 1.96 * spread.std() / 100, rel=0.08)
    order = np.random.default_rng(1).permutation(10_000)
    assert (low, high) == pytest.approx(bootstrap_interval(ones(spread[order]), order), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(1, 0), (5, 5), (2, 9), (0, 10)])
def test_permutation_of_verdicts_is_mcnemars_test(b, c):
    """Each sample its own patient: changing sides at random is the binomial test on the discordant pairs."""
    first, second = [1.0] * b + [0.0] * c + [1, 0] * 7, [0.0] * b + [1.0] * c + [1, 0] * 7
    result = permutation_test(ones(first), ones(second), range(len(first)))
    assert result["exact"] and result["clusters"] == b + c
    assert result["p"] == pytest.approx(mcnemar(first, second)["p"], abs=1e-12)


def test_random_permutations_come_near_the_exact_p():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, 12), rng.normal(0, 1, 12)
    exact = permutation_test(ones(first), ones(second), range(12))
    sampled = permutation_test(ones(first), ones(second), range(12), permutations=4000)
    assert exact["exact"] and not sampled["exact"]
    assert sampled["p"] == pytest.approx(exact["p"], abs=0.03)


def test_patients_change_sides_as_a_whole():
    """One patient with 30 better samples is one piece of evidence, not 30."""
    better, same = ones([1.0] * 30 + [0, 1]), ones([0.0] * 30 + [0, 1])
    assert permutation_test(better, same, range(32))["p"] < 0.001
    assert permutation_test(better, same, ["one"] * 30 + ["two", "three"])["p"] == 1.0


def test_permutation_of_what_is_undefined():
    assert permutation_test(np.zeros((3, 2)), np.zeros((3, 2)), "abc")["p"] is None
    assert permutation_test(ones([1, 0]), ones([1, 0]), "ab")["p"] == 1.0


def test_holm():
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_effect_sizes():
    assert cohens_h(0.5, 0.5) == 0 and cohens_h(1, 0) == pytest.approx(np.pi)
    assert cohens_h(0.3, 0.2) == -cohens_h(0.2, 0.3)
    assert (cohens_g(3, 1), cohens_g(0, 0)) == (0.25, None)
    assert standardised_difference([2, 3, 4], [1, 2, 3]) == pytest.approx(1.0)
    assert standardised_difference([1, 1], [0, 0]) is None


def test_power_of_paired_proportions():
    """Connor (1987): with 272 questions and 9 % discordant pairs, 5 points can be seen."""
    assert visible_difference(272, 0.09) == pytest.approx(0.05, abs=0.001)
    for n, discordant in ((100, 0.3), (272, 0.09), (3000, 0.2)):
        assert needed_pairs(visible_difference(n, discordant), discordant) == pytest.approx(n, abs=1)
    assert visible_difference(10, 0.05) is None, "half a discordant pair shows nothing"
    assert needed_pairs(0.2, 0.1) is None and needed_pairs(0, 0.1) is None


def test_a_visible_difference_is_seen_in_eight_of_ten_trials():
    rng, n, discordant = np.random.default_rng(0), 300, 0.2
    d = visible_difference(n, discordant)
    seen = 0
    for _ in range(300):
        only_b, only_c, _ = rng.multinomial(n, [(discordant + d) / 2, (discordant - d) / 2, 1 - discordant])
        seen += mcnemar([1] * only_b + [0] * only_c, [0] * only_b + [1] * only_c)["p"] < 0.05
    assert 0.7 < seen / 300 < 0.88


def test_design_effect_is_the_size_of_clusters_that_agree():
    values = np.repeat([0.0, 1.0] * 10, 20)
    assert design_effect(values, range(400)) == 1
    assert design_effect(values, [k // 20 for k in range(400)]) == pytest.approx(20)
    assert design_effect([1.0, 1.0], "ab") == 1
    alone, together = (visible_mean_difference(values, c) for c in (range(400), [k // 20 for k in range(400)]))
    assert together == pytest.approx(alone * np.sqrt(20))
    assert visible_mean_difference([1.0], "a") is None
