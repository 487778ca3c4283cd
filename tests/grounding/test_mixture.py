"""The order of images: the same from any step and for any ranks, every image once a round, sources by temperature."""

from collections import Counter

import pytest

from grounding.mixture import CYCLE, Mixture


def drawn(mixture: Mixture, steps: range, batch: int = 8, world: int = 1) -> list[int]:
    return [k for step in steps for rank in range(world) for k in mixture.indices(step, batch, world, rank)]


def test_two_ranks_see_what_one_would_have_seen():
    mixture = Mixture(["a"] * 30 + ["b"] * 5, 2.0, seed=3)
    assert drawn(mixture, range(40), 4, 2) == drawn(mixture, range(40), 8, 1)


def test_a_run_can_start_anywhere():
    sources = ["a"] * 300 + ["b"] * 50
    assert drawn(Mixture(sources, 2.0, 0), range(200, 210)) == drawn(Mixture(sources, 2.0, 0), range(210))[1600:]
    assert drawn(Mixture(sources, 2.0, 1), range(3)) != drawn(Mixture(sources, 2.0, 0), range(3))


def test_every_image_comes_once_before_any_comes_again():
    sources = ["a"] * 300 + ["b"] * 50
    counts = Counter(drawn(Mixture(sources, 2.0, 0), range(500)))
    for name in "ab":
        of_source = [counts[k] for k, source in enumerate(sources) if source == name]
        assert max(of_source) - min(of_source) <= 1
    assert sorted(drawn(Mixture(["a"] * 80, 1.0, 0), range(10))) == list(range(80))


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.9), (2.0, 0.75), (1000.0, 0.5)])
def test_temperature_sets_the_shares(temperature, share):
    mixture = Mixture(["a"] * 900 + ["b"] * 100, temperature, 0)
    first = sum(k < 900 for k in drawn(mixture, range(CYCLE // 8)))
    assert first / CYCLE == pytest.approx(share, abs=0.003)


def test_one_image_of_a_source_is_not_lost():
    mixture = Mixture(["big"] * 100_000 + ["tiny"], 1.0, 0)
    assert sum(mixture.shares) == CYCLE and 100_000 in drawn(mixture, range(CYCLE // 8))
