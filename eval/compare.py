"""`medglip score compare A.json B.json ...`: do the systems differ, by how much, and could this test set have told?

medglip score compare none.json text.json tokens.json --against best --markdown compare.md

Each system is compared with one base on the same samples, from the per-sample columns of the scores.json files.
- difference: system minus base, 95 % interval from whole patients drawn with replacement.
- p: exact McNemar test where each sample is right or wrong and no patient has two; otherwise a paired permutation test
  in which whole patients change sides. Holm: adjusted for the number of systems compared in that metric.
- effect: Cohen's h of two proportions; standardised mean difference d of other values.
- visible: the smallest difference that these samples show with power 0.8, given how much the two systems disagree and
  how alike samples of one patient are.
A corpus score that is no mean (F1, BLEU) is compared as what it is where its file holds the counts; otherwise the mean
of its per-sample values is compared, and the name says so.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from configs import write_atomic
from eval.compare_files import (
    MetricPath,
    System,
    check_same,
    load_system,
    name_systems,
    note_checks,
    note_differences,
    shared_metrics,
)
from eval.findings import f1_of
from eval.meteor import corpus_meteor
from eval.statistics import (
    Statistic,
    cohens_g,
    cohens_h,
    design_effect,
    holm,
    mcnemar,
    mean_of,
    number,
    paired_difference,
    permutation_test,
    standardised_difference,
    visible_difference,
    visible_mean_difference,
)
from eval.table import as_markdown, as_rich
from eval.text import corpus_bleu
from eval.types import ScoreError, lower_is_better

BASES = ("first", "best")
COLUMNS = ["metric", "system", "score", "difference [95 %]", "p", "Holm", "test", "effect", "visible", "n"]
CORPUS: dict[str, Statistic] = {f"BLEU-{n}": partial(corpus_bleu, order=n) for n in (1, 2, 3, 4)}
CORPUS["METEOR"] = corpus_meteor

_MATCH = 1e-6  # a recomputed score that is farther from the file's is not that score
_COUNTS = ("tp", "fp", "fn")


class Column(NamedTuple):
    """One metric of one system on the shared samples. statistics: (n, K), which `statistic` makes the score of."""

    values: np.ndarray
    statistics: np.ndarray


def compare_files(
    paths: Sequence[str | Path], against: str = "first", metrics: Sequence[str] = (), by: str | None = None
) -> dict[str, Any]:
    """Compares scores.json files of one task, references and protocol version.

    against: "first" file or, in each metric, the "best" score. metrics: names to keep ("strict", "overall", "BLEU-4");
    none keeps all. by: a slice of VQA files, such as "answer_type", in whose parts means are compared too.
    Returns {"task", "systems": {name: path}, "against", "notes", "comparisons": [...]}; a comparison has metric, base,
    system, base_score, score, difference, ci95, p, p_holm, test, effect, visible, n, clusters and, of right and wrong
    verdicts, McNemar's counts. Raises ScoreError with the two files that cannot be compared, and why.
    """
    if against not in BASES:
        raise ScoreError(f"--against {against!r}; choose one of {', '.join(BASES)}")
    if len(paths) < 2:
        raise ScoreError("a comparison needs two scores.json files or more")
    systems = name_systems([load_system(Path(path)) for path in paths])
    notes = [*check_same(systems), *note_differences(systems), *note_checks(systems)]
    comparisons, left_out = [], []
    parts = _parts(systems[0], by)
    for path in shared_metrics(systems, metrics):
        rows = [row for name, ids in parts for row in _compare_metric(systems, path, against, name, ids)]
        comparisons += rows
        left_out += [] if rows else [" · ".join(path)]
    if not comparisons:
        raise ScoreError("no metric with a per-sample column is in all files; score them with the same --protocol")
    if left_out:
        notes.append(f"not compared, since its samples differ between the systems: {', '.join(left_out)}")
    names = {system.name: str(system.path) for system in systems}
    task = systems[0].content["task"]
    return {"task": task, "systems": names, "against": against, "notes": notes, "comparisons": comparisons}


def run_compare(args: Namespace) -> int:
    """The command: args has files, against, metric, by, out and markdown. Returns 0."""
    result = compare_files(args.files, args.against, args.metric, args.by)
    tables = list(_tables(result))
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(as_rich(*table))
    for note in result["notes"]:
        console.print(escape(note))
    outputs = {}
    if args.out:
        outputs[Path(args.out)] = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if args.markdown:
        notes = "".join(f"- {note}\n" for note in result["notes"])
        outputs[Path(args.markdown)] = "\n".join([*(as_markdown(*table) for table in tables), notes])
    for path, text in outputs.items():
        write_atomic(path, text)
        console.print(f"written: {escape(str(path))}")
    return 0


def _tables(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each protocol: their numbers do not stand in one table."""
    for protocol in dict.fromkeys(row["metric"].partition(" · ")[0] for row in result["comparisons"]):
        rows = [row for row in result["comparisons"] if row["metric"].partition(" · ")[0] == protocol]
        yield f"{result['task']}, {protocol}, differences to the {result['against']}", COLUMNS, table_rows(rows)


def table_rows(comparisons: Sequence[Mapping]) -> list[list[str]]:
    """Cells in the order of COLUMNS; the base of a metric stands first, without a difference."""
    rows: list[list[str]] = []
    shown: set[tuple] = set()
    for row in comparisons:
        if (row["metric"], row["base"]) not in shown:
            shown.add((row["metric"], row["base"]))
            rows.append([row["metric"], row["base"], _three(row["base_score"]), *[""] * 6, str(row["n"])])
        interval = "" if row["ci95"] is None else f" [{row['ci95'][0]:+.3f}, {row['ci95'][1]:+.3f}]"
        difference = "undefined" if row["difference"] is None else f"{row['difference']:+.3f}{interval}"
        effect = "" if row["effect"] is None else f"{row['effect']['name']} {row['effect']['value']:+.2f}"
        cells = [_three(row["score"]), difference, _p(row["p"]), _p(row["p_holm"]), row["test"], effect]
        visible = _three(row["visible"], "none" if row["effect"] else "")
        rows.append(["", row["system"], *cells, visible, str(row["n"])])
    return rows


def _compare_metric(
    systems: Sequence[System], path: MetricPath, against: str, part: str = "", ids: set[str] | None = None
) -> list[dict[str, Any]]:
    """A comparison for each system but the base; [] where their per-sample columns are of different samples.

    part, ids: name and sample ids of a part of the samples; a score that is no mean has none."""
    tables = [{_row_key(row): row for row in system.metrics[path]["per_sample"]} for system in systems]
    complete = all(
        len(t) == len(s.metrics[path]["per_sample"]) and t.keys() == tables[0].keys()
        for t, s in zip(tables, systems, strict=True)
    )
    if not complete:
        return []
    statistic, name = _statistic([system.metrics[path] for system in systems], path)
    if ids is not None:
        if statistic is not mean_of:
            return []
        name = f"{name}, {part}"
        tables = [{key: row for key, row in table.items() if key[0] in ids} for table in tables]
    keys = [k for k in sorted(tables[0]) if statistic is not mean_of or all(t[k]["value"] is not None for t in tables)]
    if not keys:
        return []
    columns = [_column([table[key] for key in keys], statistic) for table in tables]
    clusters = [systems[0].content["clusters"].get(key[0], key[0]) for key in keys]
    scores = [number(statistic(column.statistics.sum(0))) for column in columns]
    base = 0 if against == "first" else _best(scores, path)
    rows = [
        {
            "metric": name,
            "base": systems[base].name,
            "system": systems[k].name,
            **_compare_pair(columns[k], columns[base], clusters, statistic),
        }
        for k in range(len(systems))
        if k != base
    ]
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _parts(system: System, by: str | None) -> list[tuple[str, set[str] | None]]:
    """(name, sample ids) of all samples, and of each part of a slice."""
    slices = system.content.get("slices", {})
    if by is not None and by not in slices:
        raise ScoreError(
            f"{system.path}: no slice {by!r}; choose from {', '.join(slices) or 'none: only VQA has some'}"
        )
    return [("", None), *((value, set(ids)) for value, ids in (slices[by] if by else {}).items())]


def _row_key(row: Mapping) -> tuple[str, str]:
    """A sample, and in grounding the class that is judged in it."""
    return str(row["sample_id"]), str(row.get("class", ""))


def _best(scores: Sequence[float | None], path: MetricPath) -> int:
    lower = lower_is_better(path[-1])
    return max(range(len(scores)), key=lambda k: -np.inf if scores[k] is None else -scores[k] if lower else scores[k])


def _statistic(scores: Sequence[Mapping], path: MetricPath) -> tuple[Statistic, str]:
    """What the files' values are of their per-sample columns, and the metric's name."""
    name = " · ".join(path)
    if all(_differs(score, mean_of) < _MATCH for score in scores):
        return mean_of, name
    counted = all(key in row for score in scores for row in score["per_sample"] for key in _COUNTS)
    if counted and all(_differs(score, f1_of) < _MATCH for score in scores):
        return f1_of, name
    corpus = CORPUS.get(path[-1])
    summed = all("sums" in row for score in scores for row in score["per_sample"])
    if corpus and summed and all(_differs(score, corpus) < _MATCH for score in scores):
        return corpus, name
    return mean_of, f"{name} (mean of samples)"


def _differs(score: Mapping, statistic: Statistic) -> float:
    rows = [row for row in score["per_sample"] if statistic is not mean_of or row["value"] is not None]
    again = number(statistic(_column(rows, statistic).statistics.sum(0))) if rows else None
    return np.inf if again is None else abs(again - score["value"])


def _column(rows: Sequence[Mapping], statistic: Statistic) -> Column:
    values = np.array([np.nan if row["value"] is None else row["value"] for row in rows], dtype=float)
    if statistic is mean_of:
        return Column(values, np.stack([values, np.ones(len(values))], 1))
    if statistic is f1_of:
        return Column(values, np.array([[row[key] for key in _COUNTS] for row in rows], dtype=float))
    return Column(values, np.array([row["sums"] for row in rows], dtype=float))


def _compare_pair(system: Column, base: Column, clusters: Sequence[Any], statistic: Statistic) -> dict[str, Any]:
    paired = paired_difference(system.statistics, base.statistics, clusters, statistic)
    row: dict[str, Any] = {"base_score": paired["b"], "score": paired["a"]}
    row |= {key: paired[key] for key in ("difference", "ci95", "n", "clusters")}
    verdicts = statistic is mean_of and all(np.isin(column.values, (0, 1)).all() for column in (system, base))
    table = mcnemar(system.values > 0, base.values > 0) if verdicts else None
    if table is not None and paired["clusters"] == paired["n"]:
        row |= {"p": table["p"], "test": "McNemar"}
    else:
        row |= {
            "p": permutation_test(system.statistics, base.statistics, clusters, statistic)["p"],
            "test": "permutation",
        }
    if table is not None:
        row["only_system"], row["only_base"], row["p_mcnemar"] = table["b"], table["c"], table["p"]
        row["cohens_g"] = cohens_g(table["b"], table["c"])
    return row | _power(system, base, clusters, statistic, verdicts)


def _power(
    system: Column, base: Column, clusters: Sequence[Any], statistic: Statistic, verdicts: bool
) -> dict[str, Any]:
    """Effect size and the smallest visible difference; None for scores that are no mean of their samples."""
    if statistic is not mean_of:
        return {"effect": None, "visible": None}
    differences = system.values - base.values
    if verdicts:
        h = cohens_h(float(system.values.mean()), float(base.values.mean()))
        as_many = len(differences) / design_effect(differences, clusters)
        visible = visible_difference(as_many, float((differences != 0).mean()))
        return {"effect": {"name": "h", "value": h}, "visible": visible}
    d = standardised_difference(system.values, base.values)
    effect = None if d is None else {"name": "d", "value": d}
    return {"effect": effect, "visible": visible_mean_difference(differences, clusters)}


def _three(value: float | None, undefined: str = "") -> str:
    return undefined if value is None else f"{value:.3f}"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"
