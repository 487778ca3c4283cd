"""One self-contained page of a scored file: tables, plots, and every sample with the verdict of each protocol.

Python prepares data, `page.html` holds style and script; the data is one JSON block, and the script sets all text as
text, never as markup. Patients are not named. Images are embedded small, so that the page can be mailed.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from configs import write_atomic
from eval.records import RegionFiles, read_prediction_rows, read_questions, read_region_files, read_reports
from eval.score import NOTICE, check_lines
from eval.table import scores_in
from eval.types import Score, ScoreError
from eval.vqa_slices import SLICES
from grounding.types import RegionSet

SAMPLES = 2000  # shown at most, evenly spaced by id: more make a page that browsers open slowly
IMAGES = 400
SIDE = 480  # pixels of the longer side of an embedded image
TEXT = 3000  # characters of a text that are shown
MAIN = ("overall", "by_answer_type", "always", "closed", "open")  # of answers, what is plotted
FOREST = 45  # rows that are plotted
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DATA_MARK = "{{data}}"

Sample = dict[str, Any]


def write_page(
    out: str | Path,
    results: Mapping[str, Any],
    predictions: str | Path,
    references: str | Path,
    images: str | Path | None = None,
) -> None:
    """Writes the page, whole or not at all.

    results: what `score_files` returned for the two files. images: folder that holds a sample's `image`, `image_id`
    (with or without suffix) or COCO `file_name`. Raises ScoreError where the folder is none or the page cannot be
    written.
    """
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise ScoreError(f"{folder}: is no folder; give --images the folder of the images")
    samples = _SAMPLES[results["task"]](predictions, references)
    total = len(samples)
    kept = [samples[k] for k in sorted({k * total // min(total, SAMPLES) for k in range(min(total, SAMPLES))})]
    columns = _columns(results)
    store = _Images(folder)
    data = {
        "task": results["task"],
        "notice": NOTICE,
        "tables": _tables(results),
        "checks": check_lines(results["checks"]),
        "plots": _plots(results, columns),
        "agreement": _agreement(columns),
        "metrics": [{key: column[key] for key in ("name", "verdict")} for column in columns],
        "samples": [_entry(sample, columns, store) for sample in kept],
        "total": total,
        "images": store.encoded,
        "facts": [*_facts(results), *store.facts()],
    }
    # No "<" in the block: neither "</script" nor "<!--" can end it.
    block = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = resources.files("eval").joinpath("page.html").read_text(encoding="utf-8")
    try:
        write_atomic(Path(out), page.replace(DATA_MARK, block))
    except OSError as error:
        raise ScoreError(f"{out}: cannot be written ({error.strerror}); choose another --html") from None


# --- samples: {"id", "question", "prediction" (None: missing), "references", "slices", "names", "said", "truth"}


def _questions(predictions: str | Path, references: str | Path) -> list[Sample]:
    lines = read_prediction_rows(predictions)
    return [_sample(row, lines, str(row.get("question", ""))) for row in read_questions(references)]


def _reports(predictions: str | Path, references: str | Path) -> list[Sample]:
    lines = read_prediction_rows(predictions)
    return [_sample(row, lines, str(row.get("indication") or "")) for row in read_reports(references)]


def _sample(row: Mapping, lines: Mapping[str, Mapping], question: str) -> Sample:
    line = lines.get(row["sample_id"])
    several = row.get("images")
    names = [*(row.get(key) for key in ("image", "image_id", "img_name", "image_name")), *(several if several else [])]
    evidence = line.get("evidence") if line else None
    return {
        "id": row["sample_id"],
        "question": _cut(question),
        "prediction": _cut(line["prediction"]) if line else None,
        "references": [_cut(text) for text in row["references"]],
        "slices": {name: value for name, columns in SLICES.items() if (value := _slice(row, columns))},
        "names": [str(name) for name in names if name],
        "said": _region_boxes(evidence.get("regions") if isinstance(evidence, dict) else None),
        "truth": _region_boxes(row.get("regions")),
    }


def _region_boxes(regions: Any) -> list[list]:
    rows = regions if isinstance(regions, list) else []
    return [box for region in rows if isinstance(region, dict) and (box := _box(region))]


def _slice(row: Mapping, columns: Sequence[str]) -> str:
    return next((str(row[column]).strip().lower() for column in columns if row.get(column) not in (None, "")), "")


def _regions(predictions: str | Path, references: str | Path) -> list[Sample]:
    files = read_region_files(predictions, references)
    names = {str(i["id"]): str(i.get("file_name", "")) for i in files.coco[0]["images"]} if files.coco else {}
    return [_region_sample(key, files, names.get(key, "")) for key in sorted(files.references)]


def _region_sample(key: str, files: RegionFiles, file_name: str) -> Sample:
    said = files.predictions.get(key)
    source = files.sources.get(key)
    return {
        "id": key,
        "question": "",
        "prediction": None if said is None else _listed(said),
        "references": [_listed(files.references[key])],
        "slices": {"source": source} if source else {},
        "names": [name for name in (file_name, key) if name],
        "said": [] if said is None else _boxes(said),
        "truth": _boxes(files.references[key]),
    }


_SAMPLES = {"vqa": _questions, "report": _reports, "grounding": _regions}


def _listed(regions: RegionSet) -> str:
    """The regions in words, the surest first: "liver 0.91, spleen 0.40"."""
    scores = regions.scores
    if scores is None:
        return ", ".join(regions.labels) or "(no region)"
    order = np.argsort(-scores, kind="stable")
    return _cut(", ".join(f"{regions.labels[k]} {scores[k]:.2f}" for k in order) or "(no region)")


def _boxes(regions: RegionSet) -> list[list]:
    scores = regions.scores
    return [
        [*(round(float(v), 4) for v in regions.boxes[k]), label, None if scores is None else round(float(scores[k]), 3)]
        for k, label in enumerate(regions.labels)
    ]


def _box(region: Mapping) -> list | None:
    """[x1, y1, x2, y2, label, score or None] of a region as JSON has it; None where it is none."""
    box, score = region.get("box"), region.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return None
    return [*(round(float(v), 4) for v in box), str(region.get("label", "")), score if _is_number(score) else None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text):,} characters)"


# --- scores


def _columns(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every per-sample column: {"name", "verdict": shown as right or wrong, "values", "notes": {sample_id: ...}}.

    In grounding a sample has a row for each class: the mean is its value, the classes are its note.
    """
    columns = []
    for path, score in scores_in(results["protocols"]):
        if score.per_sample and all("value" in row for row in score.per_sample):
            values, notes = _by_sample(score.per_sample)
            binary = {row["value"] for row in score.per_sample} <= {0, 1, None}
            verdict = path[-1] == "overall" if results["task"] == "vqa" else binary
            name = path[0] if verdict and path[-1] == "overall" else " · ".join(path)
            columns.append({"name": name, "verdict": verdict, "values": values, "notes": notes})
    return columns


def _by_sample(rows: Sequence[Mapping]) -> tuple[dict[str, float | None], dict[str, str]]:
    grouped: dict[str, list[Mapping]] = {}
    for row in rows:
        grouped.setdefault(str(row["sample_id"]), []).append(row)
    values: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for key, group in grouped.items():
        known = [row["value"] for row in group if row["value"] is not None]
        values[key] = sum(known) / len(known) if known else None
        said = [str(row["status"]) for row in group if row.get("status") not in (None, "ok")]
        said += [f"{row['class']} {row['value']:.2f}" for row in group if "class" in row and row["value"] is not None]
        if said:
            notes[key] = ", ".join(said[:12])
    return values, notes


def _entry(sample: Sample, columns: Sequence[Mapping], store: "_Images") -> dict[str, Any]:
    key = sample["id"]
    values = [column["values"].get(key) for column in columns]
    return {name: value for name, value in sample.items() if name != "names"} | {
        "values": [None if value is None else round(float(value), 4) for value in values],
        "notes": [column["notes"].get(key, "") for column in columns],
        "image": store.number(sample["names"]),
    }


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


# --- images


class _Images:
    """Images of a folder as data URIs, each once."""

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else folder.resolve()
        self.encoded: list[str] = []
        self.wanted, self.unreadable, self.over = 0, 0, 0
        self._numbers: dict[Path, int | None] = {}

    def number(self, names: Sequence[str]) -> int | None:
        """Which of `encoded` shows the sample; None without one."""
        path = self._find(names)
        if path is None:
            self.wanted += self.folder is not None
            return None
        if path not in self._numbers:
            self._numbers[path] = self._add(path)
        return self._numbers[path]

    def facts(self) -> list[list[str]]:
        if self.folder is None:
            return [["images", "none; give --images FOLDER"]]
        parts = [f"{len(self.encoded)} embedded"]
        for count, what in ((self.wanted, "samples have none"), (self.unreadable, "cannot be read")):
            parts += [f"{count} {what}"] if count else []
        return [["images", ", ".join(parts + ([f"{self.over} over the limit of {IMAGES}"] if self.over else []))]]

    def _find(self, names: Sequence[str]) -> Path | None:
        if self.folder is None:
            return None
        for name in names:
            for suffix in SUFFIXES:
                path = (
                    (self.folder / (name + suffix)).resolve() if "\0" not in name and len(name) < 200 else self.folder
                )
                if path.is_relative_to(self.folder) and path.is_file():
                    return path
        return None

    def _add(self, path: Path) -> int | None:
        if len(self.encoded) >= IMAGES:
            self.over += 1
            return None
        try:
            self.encoded.append(_encode(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            self.unreadable += 1
            return None
        return len(self.encoded) - 1


def _encode(path: Path) -> str:
    """JPEG as data URI, turned as EXIF says (boxes are of the turned image), the longer side SIDE at most."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode not in ("L", "RGB", "RGBA", "P", "1", "LA", "CMYK"):
            pixels = np.asarray(image, dtype=float)
            low, high = float(pixels.min()), float(pixels.max())
            image = Image.fromarray(((pixels - low) / max(high - low, 1e-9) * 255).astype(np.uint8))
        image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
