"""What was left out of prompts that were longer than the model's context, counted."""

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dropped:
    """So many `prompts` were too long, and lost `regions` and earlier `turns` of the conversation, in all."""

    prompts: int = 0
    regions: int = 0
    turns: int = 0

    def __add__(self, other: "Dropped") -> "Dropped":
        return Dropped(self.prompts + other.prompts, self.regions + other.regions, self.turns + other.turns)

    def __bool__(self) -> bool:
        return self.prompts > 0


def most_that_fit(length: Callable[[int, int], int], regions: int, turns: int, room: int) -> tuple[int, int] | None:
    """How many regions and earlier turns a prompt of at most `room` tokens can have, of those there are: regions go
    first, then turns. None where it is too long without any.

    `length(regions, turns)` must not fall as either grows.
    """
    kept = bisect_right(range(regions + 1), room, key=lambda n: length(n, turns)) - 1
    if kept >= 0:
        return kept, turns
    kept = bisect_right(range(turns), room, key=lambda n: length(0, n)) - 1
    return (0, kept) if kept >= 0 else None


def warn_dropped(dropped: Dropped, asked: int) -> None:
    """One line, where any of `asked` prompts was too long."""
    if dropped:
        log.warning(
            "%d of %d prompts were longer than the model's context: left out of them %d regions (the least important) "
            "and %d earlier turns (the oldest)",
            dropped.prompts,
            asked,
            dropped.regions,
            dropped.turns,
        )
