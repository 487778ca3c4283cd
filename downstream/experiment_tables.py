"""The tables of an experiment, in the terminal and in Markdown, and the picture of its curve."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import write_atomic
from downstream.pages import cell_text
from downstream.scores import report_table, span, table, vqa_table
from eval.table import as_markdown
from eval.types import Score

TEXT = ("BLEU-4", "ROUGE-L", "CIDEr")
SLICES = {"modality": "modality", "question_type": "kind", "needs": "what is needed"}
CLAIM = ("none", "shuffled")  # a gain over these two is what regions are said to bring

Table = dict[str, Any]


def tables(scores: Mapping[str, Any]) -> list[Table]:
    """Of scores.json: {"title", "columns", "rows", "note", "detail"} each; those with detail are not printed."""
    vqa, report, found = scores["vqa"], scores["report"], []
    if vqa:
        found += [vqa_table(vqa), _baseline_table(scores["baselines"]), _tests_table(scores["vqa_tests"])]
        found += [_slice_table(vqa, name) for name in ("modality", "question_type")]
        found += [_claim_table(scores["vqa_tests"], name) for name in SLICES]
    if report:
        found += [report_table(report), _text_table(report), _report_tests_table(scores["report_tests"])]
    found += [_seed_table(name, rows) for name, rows in scores["seeds"].items() if rows]
    found += [_curve_table(scores["curve"]), _bridge_table(scores["bridges"])]
    return [one for one in found if one["rows"]]


def markdown(found: Sequence[Table], title: str) -> str:
    """All tables, each with its note, under a title."""
    parts = [title, "Research use only; not a medical device."]
    for one in found:
        rows = [[cell_text(value) for value in row] for row in one["rows"]]
        parts += [as_markdown(one["title"], one["columns"], rows).rstrip(), one["note"]]
    return "\n\n".join(filter(None, parts)) + "\n"


def _baseline_table(baselines: Mapping[str, Mapping[str, Score]]) -> Table:
    rows = []
    for name, scores in baselines.items():
        overall = scores["overall"] if "overall" in scores else scores["by_answer_type"]
        rows.append([name, overall.n, overall.value, span(overall), scores["closed"].value, scores["open"].value])
    return table("Questions without a model", ["guess", "n", "accuracy", "95 %", "closed", "open"], rows)


def _tests_table(tests: Sequence[Mapping]) -> Table:
    rows = [
        [*_pair(t), t["n"], t["difference"], t["ci95"], t["only_a"], t["only_b"], _p(t["p"]), _p(t["p_holm"])]
        for t in tests
    ]
    columns = ["a", "b", "on", "n", "a - b", "95 %", "only a right", "only b right", "p", "p, Holm"]
    note = "p: exact McNemar test. 95 %: paired bootstrap over patients. Holm: adjusted for the rows of this table."
    return table("Questions: differences in accuracy", columns, rows, note)


def _pair(test: Mapping) -> list[str]:
    return [test["a"], test["b"], test["questions"]]


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"


def _slice_table(vqa: Mapping[str, Mapping], name: str) -> Table:
    """Accuracy of each system in each part of the questions."""
    parts = list(next(iter(vqa.values()))[f"by_{name}"])
    if not parts:
        return table("", [], [])
    counts = ["n", *(next(iter(vqa.values()))[f"by_{name}"][part].n for part in parts)]
    rows = [[system, *(scores[f"by_{name}"][part].value for part in parts)] for system, scores in vqa.items()]
    return table(f"Questions by {SLICES[name]}: accuracy", ["system", *parts], [counts, *rows], detail=True)


def _claim_table(tests: Sequence[Mapping], name: str) -> Table:
    """The differences of `CLAIM` in each part of the questions."""
    rows = []
    for test in (t for t in tests if t["questions"] == "all" and t["b"].rpartition("/")[2] in CLAIM):
        for part, t in test[f"by_{name}"].items():
            values = [t["n"], t["a_accuracy"], t["b_accuracy"], t["difference"], t["ci95"], _p(t["p"])]
            rows.append([test["a"], test["b"], part, *values])
    columns = ["a", "b", SLICES[name], "n", "a", "b", "a - b", "95 %", "p"]
    return table(f"Questions: differences by {SLICES[name]}", columns, rows, "p: exact McNemar test.", detail=True)


def _text_table(report: Mapping[str, Mapping]) -> Table:
    rows = []
    for name, scores in report.items():
        cited, text = scores["citations"], scores["text"]
        precision, recall = cited["precision"], cited["recall"]
        shown = [cited["counts"]["citations"], precision.value, span(precision), recall.value]
        rows.append([name, *(text[metric].value for metric in TEXT), *shown])
    columns = ["system", *TEXT, "citations", "citation precision", "95 %", "citation recall"]
    tokenizer = next(iter(report.values()))["text"]["tokenizer"]
    note = (
        f"Tokens: {tokenizer}. Citations are taken out of the text. A citation is right where its sentence states an"
        " annotated finding, the region has that label, and more than half of it lies in the annotated box."
    )
    return table("Reports (text and citations)", columns, rows, note)


def _report_tests_table(tests: Sequence[Mapping]) -> Table:
    rows = [[t["a"], t["b"], t["n"], t["a_f1"], t["b_f1"], t["difference"], t["ci95"]] for t in tests]
    note = "95 %: paired bootstrap over patients."
    return table("Reports: differences in finding F1", ["a", "b", "n", "a", "b", "a - b", "95 %"], rows, note)


def _seed_table(name: str, systems: Mapping[str, Mapping]) -> Table:
    rows = [
        [system, len(row["values"]), row["mean"], row["sd"], row["min"], row["max"]] for system, row in systems.items()
    ]
    note = "Over seeds of training, on the same test samples; sd of single trainings."
    return table(f"Seeds: {name}", ["system", "seeds", "mean", "sd", "lowest", "highest"], rows, note)


def _curve_table(curve: Mapping[str, Any]) -> Table:
    rows = []
    for point in curve["points"]:
        answer, f1 = point["accuracy"], point["finding F1"]
        spans = [answer and span(answer), f1 and f1.value]
        rows.append([point["system"], point["AP50"].value, span(point["AP50"]), answer and answer.value, *spans])
    notes = [f"jittered: the {curve['jitter']} regions, moved."]
    for route, found in curve["response"].items():
        notes.append(
            f"{route}, {curve['jitter']} and jittered regions: {_slope(found['slope'])} accuracy a unit of AP50;"
            f" of pairs, the one with the higher AP50 has the higher accuracy in {cell_text(found['rises'])}."
        )
    columns = ["system", "AP50", "95 %", "accuracy", "95 %", "finding F1"]
    return table("Quality of the regions and of the answers", columns, rows, " ".join(notes))


def _slope(slope: Score) -> str:
    interval = "" if slope.ci95 is None else f" [{slope.ci95[0]:+.3f}, {slope.ci95[1]:+.3f}]"
    return f"undefined ({slope.reason})" if slope.value is None else f"{slope.value:+.3f}{interval}"


def _bridge_table(bridges: Mapping[str, Mapping]) -> Table:
    rows = [[name, row["samples"], row["tokens"], row["longest"], row["seconds"]] for name, row in bridges.items()]
    columns = ["bridge", "samples", "tokens a row", "longest", "seconds"]
    note = "Tokens: those that are attended to, answers and packed questions included, the mean over the training."
    return table("Trainings", columns, rows, note)


def draw_curve(curve: Mapping[str, Any], out: Path) -> None:
    """`out`/curve.png and curve.svg: AP50 of the regions against accuracy, and against finding F1, a line a route
    through the sources that differ in the places of the boxes alone; nothing where AP50 is undefined."""
    points = [point for point in curve["points"] if point["AP50"].value is not None]
    names = [name for name in ("accuracy", "finding F1") if any(_drawn(point[name]) for point in points)]
    if not names:
        return
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for k, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), k, xlabel="AP50 of the regions", ylabel=name)
        _draw(axes, [point for point in points if _drawn(point[name])], name, curve["jitter"])
    for kind in ("png", "svg"):
        content = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "curve"}):  # else no two files are alike
            figure.savefig(content, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
        write_atomic(out / f"curve.{kind}", content.getvalue())


def _drawn(score: Score | None) -> bool:
    return score is not None and score.value is not None


def _draw(axes: Any, points: Sequence[Mapping], name: str, jitter: str) -> None:
    for k, route in enumerate(dict.fromkeys(point["route"] for point in points)):
        own, colour = [point for point in points if point["route"] == route], f"C{k}"
        line = [point for point in own if point["source"] == jitter or point["source"].startswith("jittered:")]
        x, y = ([point[key].value for point in line] for key in ("AP50", name))
        axes.plot(x, y, color=colour, linewidth=1)
        for point in own:
            score, place = point[name], point["AP50"].value
            low, high = score.ci95 or (score.value, score.value)
            axes.plot([place, place], [low, high], color=colour, linewidth=0.7, alpha=0.6)
        axes.plot([p["AP50"].value for p in own], [p[name].value for p in own], "o", color=colour, label=route)
        for point in own:
            at = (point["AP50"].value, point[name].value)
            axes.annotate(_short(point["source"]), at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlim(-0.03, 1.15)  # room for the name of the rightmost point
    axes.legend(fontsize=8)


def _short(source: str) -> str:
    return "file" if source.startswith("file:") else source.replace("jittered:", "σ ")
