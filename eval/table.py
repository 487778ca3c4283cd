"""Scores as a table for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from eval.types import Score


def score_table(title: str, results: dict[str, Any]) -> Table:
    """A row for each Score of a nested result: where it stands, value and interval, number of samples."""
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("score [95 % interval]")
    table.add_column("n", justify="right")
    for path, score in _scores(results):
        table.add_row(" · ".join(path), str(score), str(score.n))
    return table


def _scores(results: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Score]]:
    for key, value in results.items():
        if isinstance(value, Score):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from _scores(value, (*path, key))
