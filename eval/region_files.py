"""Reads regions that are scored: regions.jsonl, or COCO results against COCO ground truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faster_coco_eval.core import mask as rle

from eval.lines import Bad, keyed, read_json, refuse
from eval.types import ScoreError
from grounding.types import RegionSet

_BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # what a wrong type inside a row raises


@dataclass(frozen=True)
class RegionFiles:
    """Predicted and true regions by image id. coco: (ground truth, results) where they came from COCO json.

    sources, modalities: what dataset an image is of and what kind of image, where that is told; labelled: the labels
    annotated exhaustively in an image; spacing: mm a pixel (row, column); clipped: images with a box that reached out
    of them by over a pixel and was cut.
    """

    predictions: dict[str, RegionSet]
    references: dict[str, RegionSet]
    patients: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    labelled: dict[str, list[str]] = field(default_factory=dict)
    spacing: dict[str, tuple[float, float]] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    coco: tuple[dict, list[dict]] | None = None


def read_region_files(predictions: str | Path, references: str | Path) -> RegionFiles:
    """Both as regions.jsonl, or both as COCO json (a list of results, a ground-truth object). Raises ScoreError."""
    kinds = [Path(path).suffix.lower() for path in (predictions, references)]
    if kinds == [".json", ".json"]:
        return _read_coco(Path(predictions), Path(references))
    if ".json" in kinds:
        raise ScoreError(
            f"{predictions} and {references} differ in kind; give two .jsonl region files or two COCO .json"
        )
    said, _ = _read_regions(predictions)
    truth, rows = _read_regions(references)
    return RegionFiles(said, truth, **_told(rows))


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
        rows[key] = row
    refuse(path, bad)
    return regions, rows


def _read_coco(predictions: Path, references: Path) -> RegionFiles:
    truth, results = read_json(references), read_json(predictions)
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
    _check_rows(predictions, results, images, None, ("bbox", "score"))
    known = [row for row in results if row["category_id"] in categories]
    return RegionFiles(
        predictions=_coco_regions(predictions, known, images, categories),
        references=_coco_regions(references, truth["annotations"], images, categories),
        clipped=sorted({str(row["image_id"]) for row in (*truth["annotations"], *known) if _is_out(row, images)}),
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
    wrong = _wrong_mask(row.get("segmentation"), (image["height"], image["width"]))
    if wrong:
        return f"has a segmentation that cannot be read: {wrong}"
    if "score" in keys and not _is_number(row["score"]):
        return f"has score {row['score']!r}; it is a number"
    return ""


def _is_out(row: Mapping, images: Mapping) -> bool:
    (x, y, width, height), image = row["bbox"], images[row["image_id"]]
    return min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1


def _wrong_mask(mask: Any, size: tuple[int, int]) -> str:
    """What is wrong with a COCO segmentation; "" where nothing is. The C code that reads it would not say."""
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
    return "" if isinstance(counts, str | bytes) and counts else '"counts" of a mask is a text or a list of run lengths'


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
