"""The samples of a scored file as a page shows them: texts, slices, and the regions of both sides."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.html import TOLERANCE, contour
from eval.page_images import SIDE
from eval.records import RegionFiles, read_prediction_rows, read_questions, read_region_files, read_reports
from eval.region_files import wrong_mask
from eval.vqa_slices import SLICES
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

TEXT = 3000  # characters of a text that are shown
UNITS = 1000  # of a drawing, across and down the image

Sample = dict[str, Any]


def read_samples(task: str, predictions: str | Path | None, references: str | Path) -> list[Sample]:
    """{"id", "question", "prediction" (None: missing), "references", "slices", "names": what the image may be called,
    "said", "truth": regions as `RegionSet.to_dict` has them} of each sample, in the references' order."""
    if task == "grounding":
        return _regions(read_region_files(predictions, references))
    assert predictions is not None
    lines = read_prediction_rows(predictions)
    if task == "vqa":
        return [_sample(row, lines, str(row.get("question", ""))) for row in read_questions(references)]
    return [_sample(row, lines, str(row.get("indication") or "")) for row in read_reports(references)]


def draw_regions(regions: Sequence[Any]) -> list[dict[str, Any]]:
    """{"box": xyxy in UNITS, "label": as it is said, "place": is it no finding?, "score" or None, "path": outline in
    UNITS or ""}, without what is no region."""
    return [drawn for region in regions if isinstance(region, dict) and (drawn := _draw(region, load_label_tree()))]


def _draw(region: Mapping[str, Any], tree: LabelTree) -> dict[str, Any] | None:
    box, score = region.get("box"), region.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return None
    label = str(region.get("label", ""))
    known = tree.find(label)
    return {
        "box": [round(UNITS * v, 1) for v in box],
        "label": _said(label, tree),
        "place": known is not None and not tree.is_finding(known),
        "score": round(score, 3) if _is_number(score) else None,
        "path": _path(region.get("mask")),
    }


def _path(mask: Any) -> str:
    """Outline of a mask, as fine as an embedded image is; "" without one that can be read."""
    if not isinstance(mask, dict) or wrong_mask(mask):
        return ""
    height, width = mask["size"]
    return contour(mask, (UNITS / width, UNITS / height), TOLERANCE * max(1.0, max(height, width) / SIDE))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        "said": [*_listed(evidence.get("regions") if isinstance(evidence, dict) else None), *_sentence_boxes(line)],
        "truth": [*_listed(row.get("regions")), *_sentence_boxes(row)],
    }


def _sentence_boxes(row: Mapping | None) -> list[dict[str, Any]]:
    """The boxes of a grounded report as regions that are called as their sentence."""
    sentences = [s for s in _listed(row and row.get("sentences")) if isinstance(s, dict)]
    return [{"box": box, "label": str(s.get("text", ""))} for s in sentences for box in _listed(s.get("boxes"))]


def _listed(regions: Any) -> list:
    return regions if isinstance(regions, list) else []


def _slice(row: Mapping, columns: Sequence[str]) -> str:
    return next((str(row[column]).strip().lower() for column in columns if row.get(column) not in (None, "")), "")


def _regions(files: RegionFiles) -> list[Sample]:
    names = {str(i["id"]): str(i.get("file_name", "")) for i in files.coco[0]["images"]} if files.coco else {}
    return [_region_sample(key, files, names.get(key, "")) for key in sorted(files.references)]


def _region_sample(key: str, files: RegionFiles, file_name: str) -> Sample:
    said, truth = files.predictions.get(key), files.references[key]
    slices = {"source": files.sources.get(key), "modality": files.modalities.get(key)}
    return {
        "id": key,
        "question": "",
        "prediction": None if said is None else _in_words(said),
        "references": [_in_words(truth)],
        "slices": {name: value for name, value in slices.items() if value},
        "names": [name for name in (file_name, key) if name],
        "said": [] if said is None else said.to_dict()["regions"],
        "truth": truth.to_dict()["regions"],
    }


def _in_words(regions: RegionSet) -> str:
    """The regions, the surest first, a line a name: "red blood cell 0.70, 0.65"; of annotations "liver, 3 × red
    blood cell"."""
    names, scores = [_said(label, load_label_tree()) for label in regions.labels], regions.scores
    if scores is None:
        counts = Counter(names)
        return _cut(", ".join(f"{n} × {name}" if n > 1 else name for name, n in counts.items()) or "(no region)")
    listed: dict[str, list[str]] = {}
    for k in np.argsort(-scores, kind="stable"):
        listed.setdefault(names[k], []).append(f"{scores[k]:.2f}")
    return _cut("\n".join(f"{name} {', '.join(values)}" for name, values in listed.items()) or "(no region)")


def _said(label: str, tree: LabelTree) -> str:
    return tree.phrase(label) if label in tree.nodes else label


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text):,} characters)"
