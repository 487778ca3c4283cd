"""What goes first where a prompt is too long."""

import logging

import pytest

from bridges.budget import Dropped, most_that_fit, warn_dropped


@pytest.mark.parametrize(
    ("room", "kept"),
    [(100, (4, 3)), (63, (4, 3)), (62, (3, 3)), (43, (0, 3)), (42, (0, 2)), (15, (0, 0)), (13, (0, 0)), (12, None)],
)
def test_regions_go_before_turns(room, kept):
    """A question of 13 tokens, regions of 5 each, turns of 10 each."""
    assert most_that_fit(lambda regions, turns: 13 + 5 * regions + 10 * turns, 4, 3, room) == kept


def test_what_was_dropped_adds_up_to_one_line(caplog):
    total = sum([Dropped(), Dropped(1, 2, 0), Dropped(1, 4, 3)], Dropped())
    assert total == Dropped(2, 6, 3) and not Dropped()
    with caplog.at_level(logging.WARNING):
        warn_dropped(Dropped(), 9)
        assert not caplog.records
        warn_dropped(total, 9)
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("2 of 9 prompts were longer") and "6 regions" in caplog.text
