"""Reads what is scored: JSON Lines of answers and reports, region files, COCO json; and says which row is wrong."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faster_coco_eval.core import mask as rle

from eval.types import ScoreError
from grounding.types import RegionError, RegionSet

_ANSWER_TYPES = ("open", "closed")


@dataclass(frozen=True)
class RegionFiles:
    """Predicted and true regions by image id. coco: (ground truth, results) where they came from COCO json."""

    predictions: dict[str, RegionSet]
    references: dict[str, RegionSet]
    patients: dict[str, str] = field(default_factory=dict)
    coco: tuple[dict, list[dict]] | None = None


def read_predictions(path: str | Path) -> dict[str, str]:
    """`{"sample_id", "prediction"}` a line → sample_id → text; an empty text is kept. Raises ScoreError."""
    return {key: _text(path, number, row, "prediction", empty=True) for key, number, row in _keyed(path, "sample_id")}


def read_questions(path: str | Path) -> list[dict]:
    """VQA references, one dict a line; `answer` or `references`; `answer_type` open or closed. Raises ScoreError."""
    rows = []
    for key, number, row in _keyed(path, "sample_id"):
        answer_type = str(row.get("answer_type", "")).strip().lower()
        if answer_type not in _ANSWER_TYPES:
            _fail(path, number, f'"answer_type" is {row.get("answer_type")!r}', "give open or closed")
        rows.append(
            {**row, "sample_id": key, "answer_type": answer_type, "references": _texts(path, number, row, "answer")}
        )
    return rows


def read_reports(path: str | Path) -> list[dict]:
    """Report references: `{"sample_id", "report" or "references", "patient_id"}` a line. Raises ScoreError.

    The project's own reports.jsonl is read as well: `study_id` is the sample, `findings` or else `impression` the
    report.
    """
    rows = []
    for key, number, row in _keyed(path, "sample_id", "study_id"):
        row = {"report": row.get("findings") or row.get("impression"), **row}
        rows.append({**row, "sample_id": key, "references": _texts(path, number, row, "report")})
    return rows


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
    truth, patients = _read_regions(references)
    return RegionFiles(said, truth, patients)


def check_ids(
    predictions: Sequence[str] | Mapping, references: Sequence[str], path: str | Path
) -> dict[str, list[str]]:
    """Sorted ids that are missing from the predictions, and extra ones. Raises ScoreError where none is shared."""
    said, truth = set(predictions), set(references)
    if not said & truth:
        raise ScoreError(
            f"{path}: none of its {len(said)} ids is among the references; is it the file of another split?"
        )
    return {"missing": sorted(truth - said), "extra": sorted(said - truth)}


def _fail(path: str | Path, number: int, what: str, remedy: str) -> None:
    raise ScoreError(f"{path}:{number}: {what}; {remedy}")


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ScoreError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _read_lines(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank; the error names the first bad line and counts the rest."""
    rows, bad = [], []
    # Not splitlines(): texts may hold U+2028, which is no line end in JSON Lines.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            bad.append((number, f"not JSON ({error.msg}, column {error.colno})"))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            bad.append((number, "not a JSON object"))
    if bad:
        more = f" (and {len(bad) - 1} more lines)" if len(bad) > 1 else ""
        _fail(path, bad[0][0], bad[0][1] + more, "write one JSON object a line")
    if not rows:
        raise ScoreError(f"{path}: holds no records; write one JSON object a line")
    return rows


def _keyed(path: str | Path, *names: str) -> Iterator[tuple[str, int, dict]]:
    """(id, line number, row); the id stands under the first of the names that the row has."""
    first_seen: dict[str, int] = {}
    for number, row in _read_lines(path):
        key = next((row[name] for name in names if row.get(name) not in (None, "")), None)
        if key is None:
            _fail(path, number, f'no "{names[0]}"', "every line needs one")
        if str(key) in first_seen:
            _fail(
                path, number, f"{names[0]} {str(key)!r} again, first on line {first_seen[str(key)]}", "keep one of them"
            )
        first_seen[str(key)] = number
        yield str(key), number, row


def _text(path: str | Path, number: int, row: Mapping, key: str, empty: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _fail(path, number, f'"{key}" is {"missing" if key not in row else json.dumps(value)[:40]}', "give a text")
    if not empty and not str(value).strip():
        _fail(path, number, f'"{key}" is empty', "a reference needs a text; leave the sample out where there is none")
    return str(value)


def _texts(path: str | Path, number: int, row: Mapping, key: str) -> list[str]:
    several = row.get("references")
    if several is None:
        return [_text(path, number, row, key)]
    if not isinstance(several, list) or not several:
        _fail(path, number, '"references" is not a list of texts', f'give a list, or one "{key}"')
    return [_text(path, number, {"references": text}, "references") for text in several]


def _read_regions(path: str | Path) -> tuple[dict[str, RegionSet], dict[str, str]]:
    regions, patients = {}, {}
    for key, number, row in _keyed(path, "image_id"):
        try:
            regions[key] = RegionSet.from_dict(row)
        except RegionError as error:
            _fail(path, number, str(error), "boxes are xyxy in [0, 1]")
        if row.get("patient_id"):
            patients[key] = str(row["patient_id"])
    return regions, patients


def _read_coco(predictions: Path, references: Path) -> RegionFiles:
    truth, results = _read_json(references), _read_json(predictions)
    if not isinstance(truth, dict) or not all(
        isinstance(truth.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise ScoreError(f"{references}: not COCO ground truth; it needs the lists images, annotations, categories")
    if not isinstance(results, list):
        raise ScoreError(
            f"{predictions}: not COCO results; it is a list of objects with image_id, category_id, bbox, score"
        )
    images = {image["id"]: image for image in truth["images"] if {"id", "height", "width"} <= set(image)}
    if len(images) != len(truth["images"]):
        raise ScoreError(f"{references}: an image without id, height and width, or an id twice; give each its own")
    categories = {category["id"]: str(category["name"]) for category in truth["categories"]}
    _check_rows(references, truth["annotations"], images, categories, ("bbox",))
    _check_rows(predictions, results, images, None, ("bbox", "score"))
    known = [row for row in results if row["category_id"] in categories]
    return RegionFiles(
        predictions=_coco_regions(predictions, known, images, categories),
        references=_coco_regions(references, truth["annotations"], images, categories),
        patients={str(k): str(image["patient_id"]) for k, image in images.items() if image.get("patient_id")},
        coco=(truth, results),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ScoreError(f"{path}:{error.lineno}: not JSON ({error.msg}); write the file again") from None


def _check_rows(path: Path, rows: Sequence, images: Mapping, categories: Mapping | None, keys: tuple[str, ...]) -> None:
    for k, row in enumerate(rows):
        missing = [
            key for key in ("image_id", "category_id", *keys) if not isinstance(row, dict) or row.get(key) is None
        ]
        if missing:
            raise ScoreError(f"{path}: row {k} has no {missing[0]}; every row needs one")
        if row["image_id"] not in images:
            raise ScoreError(
                f"{path}: row {k} has image_id {row['image_id']!r}, which is not among the images; remove it"
            )
        if categories is not None and row["category_id"] not in categories:
            raise ScoreError(f"{path}: row {k} has category_id {row['category_id']!r}, which is no category; add it")
        if len(row["bbox"]) != 4 or min(row["bbox"][2:]) < 0:
            raise ScoreError(f"{path}: row {k} has bbox {row['bbox']}; it is x, y, width, height in pixels")


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
        except ValueError as error:
            raise ScoreError(f"{path}: image {image_id}: {error}; correct the box or mask") from None
    return regions


def _with_rle(row: dict, size: tuple[int, int]) -> dict:
    """Polygons and uncompressed run lengths as compressed RLE; a row without a mask as it is."""
    segmentation = row.get("segmentation")
    if not segmentation or (isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list)):
        return row
    coded = rle.frPyObjects(segmentation, *size)
    return {**row, "segmentation": rle.merge(coded) if isinstance(coded, list) else coded}
