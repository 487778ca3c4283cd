"""Stages of a long run: reused, run side by side, and what they are said to have taken."""

import threading
import time
from pathlib import Path

import pytest

from downstream.stages import Stage, Stages


def stage(name: str, work, **settings) -> Stage:
    return Stage(name, f"Stage {name}", settings, work)


def test_stages_of_one_call_run_at_one_time_and_count_once(tmp_path):
    together = threading.Barrier(2, timeout=20)  # one alone would wait until it breaks

    def work(folder: Path) -> None:
        together.wait()
        time.sleep(0.3)
        (folder / "result").write_text(folder.name)

    stages = Stages(tmp_path)
    stages.run_all([stage("a", work), stage("b", work)], jobs=2)
    assert [(tmp_path / name / "result").read_text() for name in "ab"] == ["a", "b"]
    assert set(stages.seconds) == {"Stage a", "Stage b"} and min(stages.seconds.values()) >= 0.3
    assert stages.elapsed < sum(stages.seconds.values()) - 0.1


def test_a_pause_between_two_runs_does_not_count(tmp_path):
    Stages(tmp_path).run(*stage("a", lambda folder: time.sleep(0.2)))
    time.sleep(0.6)
    again = Stages(tmp_path)
    again.run(*stage("a", lambda folder: pytest.fail("complete, and run again")))
    again.run(*stage("b", lambda folder: time.sleep(0.2)))
    assert 0.3 <= again.elapsed < 0.8


def test_of_several_stages_one_that_fails_costs_no_other(tmp_path):
    begun = []

    def fail(folder: Path) -> None:
        raise RuntimeError("stopped with exit code 3")

    def work(folder: Path) -> None:
        begun.append(folder.name)

    with pytest.raises(RuntimeError, match="exit code 3"):
        Stages(tmp_path).run_all([stage("a", work), stage("b", fail), stage("c", work)], jobs=2)
    stages = Stages(tmp_path)
    stages.run_all([stage(name, work) for name in "abc"], jobs=2)
    assert sorted(begun) == ["a", "b", "c"] and set(stages.seconds) == {f"Stage {name}" for name in "abc"}


def test_other_settings_make_a_stage_anew(tmp_path):
    def work(folder: Path) -> None:
        (folder / f"{len(list(folder.glob('[0-9]')))}").touch()

    for steps in (1, 1, 2):
        Stages(tmp_path).run(*stage("a", work, steps=steps))
    assert [file.name for file in (tmp_path / "a").glob("[0-9]")] == ["0"]
