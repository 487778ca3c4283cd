"""One self-contained page of a scored file: tables, plots, and every sample with the verdict of each protocol.

Python prepares data, `page.html` holds style and script. Patients are not named. Images are embedded small, so that the
page can be mailed; regions are drawn as outlines where they have masks, else as boxes.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from configs import write_atomic
from eval.fingerprint import read_picture
from eval.html import self_contained
from eval.page_images import Images, ReadImage
from eval.page_samples import Sample, draw_regions, read_samples
from eval.score import NOTICE, check_lines
from eval.table import scores_in
from eval.types import Score, ScoreError, lower_is_better

SAMPLES = 2000  # shown at most, evenly spaced by id: more make a page that browsers open slowly
MAIN = ("overall", "by_answer_type", "always", "closed", "open")  # of answers, what is plotted
FOREST = 45  # rows that are plotted
NOTE = 600  # characters of a note


def write_page(
    out: str | Path,
    results: Mapping[str, Any],
    predictions: str | Path | None,
    references: str | Path,
    images: str | Path | None = None,
    read_image: ReadImage = read_picture,
) -> None:
    """Writes the page, whole or not at all.

    results: what `score_files` returned for the two files. images: folder that holds a sample's `image`, `image_id`
    (with or without suffix, with or without the choice of a slice) or COCO `file_name`. read_image: path →
    pixels as displayed; the default reads pictures of 8 bits. Raises ScoreError where the folder is none or the page
    cannot be written.
    """
    store = Images(images, read_image)
    samples = read_samples(results["task"], predictions, references)
    total = len(samples)
    kept = [samples[k] for k in sorted({k * total // min(total, SAMPLES) for k in range(min(total, SAMPLES))})]
    columns = _columns(results)
    quiet = images is None or not sys.stderr.isatty()
    shown = track(kept, "page", console=Console(stderr=True), transient=True, disable=quiet)
    data = {
        "task": results["task"],
        "notice": NOTICE,
        "tables": _tables(results),
        "checks": check_lines(results["checks"]),
        "plots": _plots(results, columns),
        "agreement": _agreement(columns),
        "metrics": [
            {key: column[key] for key in ("name", "verdict")} | {"classes": any(column["classes"].values())}
            for column in columns
        ],
        "samples": [_entry(sample, columns, store) for sample in shown],
        "total": total,
        "images": store.encoded,
        "facts": [*_facts(results), *store.facts()],
    }
    template = resources.files("eval").joinpath("page.html").read_text(encoding="utf-8")
    try:
        write_atomic(Path(out), self_contained(template, data))
    except OSError as error:
        raise ScoreError(f"{out}: cannot be written ({error.strerror}); choose another --html") from None


def _columns(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every per-sample column: {"name", "verdict": shown as right or wrong, "values", "notes": {sample_id: ...},
    "classes": {sample_id: {class: value}}}.

    In grounding a sample has a row for each class, and the mean of them is its value. Columns of parts of the samples
    repeat those of all.
    """
    columns = []
    for path, score in scores_in(results["protocols"]):
        if score.per_sample and all("value" in row for row in score.per_sample) and "by_" not in " ".join(path):
            binary = {row["value"] for row in score.per_sample} <= {0, 1, None}
            errors = "errors" in path or lower_is_better(path[-1])  # no verdict: a sample without them is right
            verdict = path[-1] == "overall" if results["task"] == "vqa" else binary and not errors
            name = path[0] if verdict and path[-1] == "overall" else " · ".join(path)
            columns.append({"name": name, "short": path[-1], "verdict": verdict, **_by_sample(score.per_sample)})
    return columns


def _by_sample(rows: Sequence[Mapping]) -> dict[str, dict]:
    grouped: dict[str, list[Mapping]] = {}
    for row in rows:
        grouped.setdefault(str(row["sample_id"]), []).append(row)
    values: dict[str, float | None] = {}
    notes, classes = {}, {}
    for key, group in grouped.items():
        known = [row["value"] for row in group if row["value"] is not None]
        values[key] = sum(known) / len(known) if known else None
        notes[key] = "; ".join(note for row in group for note in _notes(row))[:NOTE]
        classes[key] = {str(row["class"]): row["value"] for row in group if "class" in row}
    return {"values": values, "notes": notes, "classes": classes}


def _notes(row: Mapping) -> Iterator[str]:
    """Why a sample has its value, in words: what its row lists beside it."""
    if row.get("status") not in (None, "ok"):
        yield str(row["status"])
    for name in ("hallucinated", "missing", "misplaced", "other_severity", "contradicted"):
        if isinstance(row.get(name), list) and row[name]:
            yield f"{name.replace('_', ' ')}: {', '.join(map(str, row[name]))}"
    for found in row.get("findings") or ():
        yield found["finding"] + (f" ({found['why']})" if found.get("why") else "")
    for citation in row.get("citations") or ():
        if not citation["right"]:
            yield f"[r{citation['region']}] {citation['why']}"
    for side in ("predicted", "reference"):
        told = row[side] if isinstance(row.get(side), list) else []
        if left := [sentence["text"] for sentence in told if not sentence["entailed"]]:
            yield f"{side} and not entailed: {' | '.join(left)}"


def _entry(sample: Sample, columns: Sequence[Mapping], store: Images) -> dict[str, Any]:
    """A sample as the script reads it; regions are sent where there is an image to draw them on."""
    key, image = sample["id"], store.number(sample["names"])
    return {name: value for name, value in sample.items() if name != "names"} | {
        "values": [_short(column["values"].get(key)) for column in columns],
        "notes": [column["notes"].get(key, "") for column in columns],
        "classes": _class_table(key, columns),
        "image": image,
        **{side: [] if image is None else draw_regions(sample[side]) for side in ("said", "truth")},
    }


def _class_table(key: str, columns: Sequence[Mapping]) -> dict[str, Any] | None:
    """{"metrics": [name], "rows": [[class, value or None ...]]} of a sample; a metric of two protocols once."""
    scored = {column["short"]: found for column in columns if (found := column["classes"].get(key))}
    classes = sorted({name for found in scored.values() for name in found})
    rows = [[name, *(_short(found.get(name)) for found in scored.values())] for name in classes]
    return {"metrics": list(scored), "rows": rows} if rows else None


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"title", "rows": [[metric, value or None, [low, high] or None, n, reason or ""]], "counts": {name: number}}."""
    groups = {f"protocol {name}": scores for name, scores in results["protocols"].items()}
    if results["baselines"]:
        groups["baselines, without the image"] = results["baselines"]
    tables = []
    for title, scores in groups.items():
        rows = [
            [" · ".join(path), score.value, score.ci95, score.n, score.reason or ""]
            for path, score in scores_in(scores)
        ]
        tokens = f", tokens {scores['tokenizer']}" if "tokenizer" in scores else ""
        version = f", version {scores['version']}" if "version" in scores else ""
        tables.append({"title": title + version + tokens, "rows": rows, "counts": scores.get("counts", {})})
    return tables


def _plots(results: Mapping[str, Any], columns: Sequence[Mapping]) -> dict[str, Any]:
    """forests: [name, value, [low, high] or None, n] of the main scores within [0, 1]; histograms: counts of per-sample
    values in 20 bins, of columns that are no verdicts."""
    groups = results["protocols"] | results["baselines"]
    main = [(name, path, score) for name, scores in groups.items() for path, score in scores_in(scores)]
    kept = [(name, path, score) for name, path, score in main if _is_main(results["task"], path, score)]
    if results["task"] == "vqa":  # the protocols of one number under one another
        kept.sort(key=lambda row: MAIN.index(row[1][-1]))
        rows = [[" · ".join((*path, name)), s.value, s.ci95, s.n] for name, path, s in kept]
        forests = [{"title": "Main scores, 95 % intervals", "rows": rows}]
    else:  # each protocol apart: their numbers are not to be compared
        forests = [
            {"title": f"{name}, 95 % intervals", "rows": [[" · ".join(p), s.value, s.ci95, s.n] for p, s in rows]}
            for name in groups
            if (rows := [(path, score) for other, path, score in kept if other == name][:FOREST])
        ]
    histograms = []
    for column in columns:
        values = [value for value in column["values"].values() if value is not None]
        if values and not column["verdict"]:
            top = max(1.0, *values)
            counts = np.histogram(values, bins=20, range=(min(0.0, *values), top))[0].tolist()
            histograms.append({"name": column["name"], "low": min(0.0, *values), "high": top, "counts": counts})
    return {"forests": forests, "histograms": histograms}


def _is_main(task: str, path: tuple[str, ...], score: Score) -> bool:
    inside = score.value is not None and 0 <= score.value <= 1 and (score.ci95 is None or score.ci95[1] <= 1)
    named = path in [(name,) for name in MAIN] if task == "vqa" else path[0] not in ("errors", "path")
    return inside and named and not (len(path) > 1 and path[0].startswith("by_"))


def _agreement(columns: Sequence[Mapping]) -> list[list]:
    """[one protocol, another, samples judged by both, of which alike] of the verdicts."""
    pairs = []
    for a, b in combinations([column for column in columns if column["verdict"]], 2):
        both = [key for key, value in a["values"].items() if value is not None and b["values"].get(key) is not None]
        alike = sum((a["values"][key] >= 1) == (b["values"][key] >= 1) for key in both)
        pairs.append([a["name"], b["name"], len(both), alike])
    return pairs


def _facts(results: Mapping[str, Any]) -> list[list[str]]:
    files = [[name, f"{file['path']}, sha256 {file['sha256'][:16]}"] for name, file in results["files"].items()]
    interval = f"95 %, {results['resamples']} bootstrap resamples of whole patients, seed {results['seed']}"
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items() if found)
    return [*files, ["intervals", interval], ["versions", versions]]
