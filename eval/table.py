"""Scores as tables: for the terminal, and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.types import Score

Path = tuple[str, ...]


def score_table(title: str, results: dict[str, Any]) -> Table:
    """A row for each Score of a nested result: where it stands, value and interval, number of samples."""
    return as_rich(title, *score_rows(results))


def side_by_side(title: str, protocols: Mapping[str, dict[str, Any]]) -> Table:
    """The same for several protocols, a column each; counts (missing, empty, unparsed) follow the scores."""
    return as_rich(title, *protocol_rows(protocols))


def as_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if column == "n" else "left", overflow="fold" if k else "ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a bold title; vertical bars in texts are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if column == "n" else "---" for column in columns) + "|"
    return "\n".join([f"**{title}**", "", line(columns), rule, *map(line, rows), ""])


def score_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of one nested result."""
    rows = [[" · ".join(path), str(score), str(score.n)] for path, score in scores_in(results)]
    return ["metric", "score [95 % interval]", "n"], rows


def protocol_rows(protocols: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) with a column a protocol; where they count different samples, the n of each."""
    scores = {name: dict(scores_in(results)) for name, results in protocols.items()}
    counts = {name: results.get("counts", {}) for name, results in protocols.items()}
    paths = list(dict.fromkeys(path for found in scores.values() for path in found))
    rows = []
    for path in paths:
        found = [scores[name].get(path) for name in protocols]
        sizes = [str(score.n) for score in found if score is not None]
        n = sizes[0] if len(set(sizes)) == 1 else " / ".join("-" if s is None else str(s.n) for s in found)
        rows.append([" · ".join(path), *("" if score is None else str(score) for score in found), n])
    for key in dict.fromkeys(key for row in counts.values() for key in row):
        rows.append([f"count · {key}", *(str(counts[name].get(key, "")) for name in protocols), ""])
    return ["metric", *protocols, "n"], rows


def scores_in(results: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Score]]:
    """(where it stands, Score) of a nested result, in order."""
    for key, value in results.items():
        if isinstance(value, Score):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from scores_in(value, (*path, str(key)))
