"""Scores as tables: for the terminal, and in Markdown."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.types import Score

Path = tuple[str, ...]


def score_table(title: str, results: dict[str, Any]) -> Table:
    """A row for each Score of a nested result: where it stands, value and interval, number of samples."""
    return as_rich(title, *score_rows(results))


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


def score_rows(results: Mapping[str, Any], names: bool = False) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of one nested result; with `names`, what each score calls itself stands beside its path.

    Undefined scores of slices are counted in the last row, not listed: they are many, and scores.json has them."""
    found = list(scores_in(results))
    shown = [(path, score) for path, score in found if score.value is not None or not path[0].startswith("by_")]
    rows = [
        [" · ".join(path) + (f": {_cut(score.name)}" if names else ""), str(score), str(score.n)]
        for path, score in shown
    ]
    rows += [["by_…", f"{len(found) - len(shown)} undefined", ""]] if len(found) > len(shown) else []
    return ["metric", "score [95 % interval]", "n"], rows


def protocol_rows(protocols: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) with a column a protocol; a cell whose n is not that of the row says so."""
    scores = {name: dict(scores_in(results)) for name, results in protocols.items()}
    counts = {name: results.get("counts", {}) for name, results in protocols.items()}
    rows = []
    for path in _ordered(path for found in scores.values() for path in found):
        found = [scores[name].get(path) for name in protocols]
        ((n, _),) = Counter(score.n for score in found if score is not None).most_common(1)
        rows.append([" · ".join(path), *("" if score is None else _short(score, n) for score in found), str(n)])
    for key in dict.fromkeys(key for row in counts.values() for key in row):
        rows.append([f"count · {key}", *(str(counts[name].get(key, "")) for name in protocols), ""])
    return ["metric (95 % interval)", *protocols, "n"], rows


def _cut(name: str) -> str:
    return name if len(name) <= 60 else name[:59] + "…"


def _short(score: Score, n: int) -> str:
    """ "0.812 (.774-.846)", with " n 244" where that is not the row's n: as many columns as protocols must fit."""
    other = "" if score.n == n else f" n {score.n}"
    if score.value is None or score.ci95 is None or not 0 <= score.ci95[0] <= score.ci95[1] <= 1:
        return str(score) + other
    low, high = (f"{end:.3f}" if end == 1 else f"{end:.3f}".removeprefix("0") for end in score.ci95)
    return f"{score.value:.3f} ({low}-{high}){other}"


def _ordered(paths: Iterable[Path]) -> list[Path]:
    """Each path once; slices stand after what is not sliced."""
    return sorted(dict.fromkeys(paths), key=lambda path: path[0].startswith("by_"))


def scores_in(results: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Score]]:
    """(where it stands, Score) of a nested result, in order."""
    for key, value in results.items():
        if isinstance(value, Score):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from scores_in(value, (*path, str(key)))
