"""Reads regions that are scored: regions.jsonl, or COCO results against COCO ground truth; and heat maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from eval.heatmap_files import Heatmaps, read_heatmaps
from eval.lines import Bad, keyed, read_json, refuse
from eval.types import ScoreError
from grounding.types import RegionSet

_BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # what a wrong type inside a row raises


@dataclass(frozen=True)
class RegionFiles:
    """Predicted and true regions by image id. coco: (ground truth, results) where they came from COCO json.

    sources, modalities: what dataset an image is of and what kind of image, where that is told; labelled: the labels
    annotated exhaustively in an image; spacing: mm a pixel (row, column); clipped: images with a box that reached out
    of them by over a pixel and was cut; unknown: category ids of predictions that the ground truth does not list.
    heatmaps: where there is a file of them.
    """

    predictions: dict[str, RegionSet]
    references: dict[str, RegionSet]
    patients: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    labelled: dict[str, list[str]] = field(default_factory=dict)
    spacing: dict[str, tuple[float, float]] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    coco: tuple[dict, list[dict]] | None = None
    heatmaps: Heatmaps | None = None


def read_region_files(
    predictions: str | Path | None, references: str | Path, heatmaps: str | Path | None = None
) -> RegionFiles:
    """Both as regions.jsonl, or both as COCO json (a list of results, a ground-truth object); predictions are none
    where a model gives heat maps alone. Raises ScoreError."""
    maps = None if heatmaps is None else read_heatmaps(heatmaps)
    kinds = {Path(path).suffix.lower() for path in (predictions, references) if path is not None}
    if kinds == {".json"}:
        return replace(_read_coco(None if predictions is None else Path(predictions), Path(references)), heatmaps=maps)
    if ".json" in kinds:
        raise ScoreError(
            f"{predictions} and {references} differ in kind; give two .jsonl region files or two COCO .json"
        )
    said = {} if predictions is None else _read_regions(predictions)[0]
    truth, rows = _read_regions(references)
    return RegionFiles(said, truth, **_told(rows), heatmaps=maps)


def _told(rows: Mapping[str, Mapping]) -> dict[str, Any]:
    """What image rows tell beside the regions, in the fields of RegionFiles."""
    texts = {"patients": "patient_id", "sources": "source", "modalities": "modality"}
    told: dict[str, Any] = {
        name: {key: str(row[column]) for key, row in rows.items() if row.get(column)} for name, column in texts.items()
    }
    told["labelled"] = {key: row["labelled"] for key, row in rows.items() if isinstance(row.get("labelled"), list)}
    told["spacing"] = {key: tuple(row["spacing"]) for key, row in rows.items() if _is_spacing(row.get("spacing"))}
    return told


def _is_spacing(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(side) and side > 0 for side in value)


def _read_regions(path: str | Path) -> tuple[dict[str, RegionSet], dict[str, dict]]:
    regions, rows = {}, {}
    bad: list[Bad] = []
    for key, number, row in keyed(path, "image_id"):
        try:
            regions[key] = RegionSet.from_dict(row)
        except _BROKEN as error:
            bad.append((number, str(error), "boxes are xyxy in [0, 1]"))
        else:
            wrong = (wrong_mask(mask) for mask in regions[key].masks or () if mask is not None)
            bad += [(number, f"a mask cannot be read: {why}", "a mask is COCO RLE") for why in wrong if why][:1]
        rows[key] = row
    refuse(path, bad)
    return regions, rows


def _read_coco(predictions: Path | None, references: Path) -> RegionFiles:
    truth, results = read_json(references), read_json(predictions) if predictions else []
    if not isinstance(truth, dict) or not all(
        isinstance(truth.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise ScoreError(f"{references}: not COCO ground truth; it needs the lists images, annotations, categories")
    if not isinstance(results, list):
        raise ScoreError(
            f"{predictions}: not COCO results; it is a list of objects with image_id, category_id, bbox, score"
        )
    images = _images(references, truth["images"])
    categories = _categories(references, truth["categories"])
    _check_rows(references, truth["annotations"], images, categories, ("bbox",))
    _check_rows(predictions or references, results, images, None, ("bbox", "score"))
    known = [row for row in results if row["category_id"] in categories]
    return RegionFiles(
        predictions=_coco_regions(predictions, known, images, categories) if predictions else {},
        references=_coco_regions(references, truth["annotations"], images, categories),
        clipped=sorted({str(row["image_id"]) for row in (*truth["annotations"], *known) if _is_out(row, images)}),
        unknown=sorted({f"category {row['category_id']}" for row in results if row["category_id"] not in categories}),
        **_told({str(key): image for key, image in images.items()}),
        coco=(truth, results),
    )


def _images(path: Path, rows: Sequence) -> dict[Any, dict]:
    images = {}
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int) or row["id"] in images:
            raise ScoreError(f"{path}: an image without id, height and width, or an id twice (images, row {k})")
        if not all(isinstance(row.get(side), int) and row[side] > 0 for side in ("height", "width")):
            raise ScoreError(f"{path}: image {row['id']} needs height and width in pixels")
        images[row["id"]] = row
    return images


def _categories(path: Path, rows: Sequence) -> dict[Any, str]:
    categories = {}
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int) or not row.get("name"):
            raise ScoreError(f"{path}: a category without id and name (categories, row {k}); give each its own")
        categories[row["id"]] = str(row["name"])
    return categories


def _check_rows(path: Path, rows: Sequence, images: Mapping, categories: Mapping | None, keys: tuple[str, ...]) -> None:
    for k, row in enumerate(rows):
        wrong = _wrong_row(row, images, categories, keys)
        if wrong:
            raise ScoreError(f"{path}: row {k} {wrong}")


def _wrong_row(row: Any, images: Mapping, categories: Mapping | None, keys: tuple[str, ...]) -> str:
    """What is wrong with one annotation or result, and the remedy; "" where nothing is."""
    for key in ("image_id", "category_id", *keys):
        if not isinstance(row, dict) or row.get(key) is None:
            return f"has no {key}; every row needs one"
    for key in ("image_id", "category_id"):
        if not isinstance(row[key], str | int):
            return f"has {key} {row[key]!r}; an id is a text or a whole number"
    if row["image_id"] not in images:
        return f"has image_id {row['image_id']!r}, which is not among the images; remove it"
    if categories is not None and row["category_id"] not in categories:
        return f"has category_id {row['category_id']!r}, which is no category; add it"
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        return f"has bbox {box}; it is x, y, width, height in pixels"
    image = images[row["image_id"]]
    wrong = _wrong_segmentation(row.get("segmentation"), (image["height"], image["width"]))
    if wrong:
        return f"has a segmentation that cannot be read: {wrong}"
    if "score" in keys and not _is_number(row["score"]):
        return f"has score {row['score']!r}; it is a number"
    return ""


def _is_out(row: Mapping, images: Mapping) -> bool:
    (x, y, width, height), image = row["bbox"], images[row["image_id"]]
    return min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1


def _wrong_segmentation(mask: Any, size: tuple[int, int]) -> str:
    """What is wrong with a COCO segmentation; "" where nothing is."""
    if not mask:
        return ""
    if isinstance(mask, list):
        proper = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p)) for p in mask)
        return "" if proper else "a polygon is a list of at least three x, y pairs in pixels"
    if not isinstance(mask, dict) or mask.get("size") != list(size):
        return f"a mask needs the size {list(size)} of its image"
    counts = mask.get("counts")
    if isinstance(counts, list):
        proper = all(isinstance(run, int) and run >= 0 for run in counts) and sum(counts) == size[0] * size[1]
        return "" if proper else "its run lengths do not add up to the image"
    return wrong_mask(mask)


def wrong_mask(mask: Mapping[str, Any]) -> str:
    """What is wrong with a mask in compressed run lengths (COCO RLE); "" where nothing is. The library that decodes it
    says neither which nor, of pycocotools, always that."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        return '"size" of a mask is its height and width in pixels'
    if not isinstance(counts, str | bytes) or not counts:
        return '"counts" of a mask is a text or a list of run lengths'
    runs = _runs(counts.encode() if isinstance(counts, str) else counts)
    if runs is None:
        return '"counts" of a mask is no text of run lengths'
    return "" if (runs >= 0).all() and runs.sum() == size[0] * size[1] else "its run lengths do not add up to the image"


def _runs(counts: bytes) -> np.ndarray | None:
    """Run lengths of a COCO RLE; None where the text is none. A number is written in digits of 5 bits, the lowest
    first: 48 + digit, 32 more where another follows, 16 set in the last of a negative one; from the fourth number on,
    it is the difference to the one before the last (maskApi.c of https://github.com/cocodataset/cocoapi)."""
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > 7:  # 35 bits: more pixels than any image has
        return None
    place = np.arange(len(codes)) - np.repeat(first, digits)
    runs = np.add.reduceat((codes & 31) << 5 * place, first) - np.where(codes[last] & 16, 1 << 5 * digits, 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _coco_regions(path: Path, rows: Sequence[dict], images: Mapping, categories: Mapping) -> dict[str, RegionSet]:
    """Every image of the ground truth, also those without a row."""
    grouped: dict[Any, list[dict]] = {image_id: [] for image_id in images}
    for row in rows:
        grouped[row["image_id"]].append(row)
    regions = {}
    for image_id, group in grouped.items():
        size = (images[image_id]["height"], images[image_id]["width"])
        try:
            regions[str(image_id)] = RegionSet.from_coco([_with_rle(row, size) for row in group], categories, size)
        except _BROKEN as error:
            raise ScoreError(f"{path}: image {image_id}: {error}; correct the box or mask") from None
    return regions


def _with_rle(row: dict, size: tuple[int, int]) -> dict:
    """Polygons and uncompressed run lengths as compressed RLE; a row without a mask as it is."""
    segmentation = row.get("segmentation")
    if not segmentation or (isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list)):
        return row
    coded = rle.frPyObjects(segmentation, *size)
    return {**row, "segmentation": rle.merge(coded) if isinstance(coded, list) else coded}
