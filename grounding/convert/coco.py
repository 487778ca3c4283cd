"""COCO annotation files (boxes, polygons, run lengths) → samples, and the COVID chest X-ray lung boxes on top of that.

The format: https://cocodataset.org/#format-data; its run lengths: maskApi.h of https://github.com/cocodataset/cocoapi.
`bbox` is x, y, width, height in pixels; a row's segmentation, where there is one, counts instead of its bbox.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    add_polygon_rings,
    below,
    find_labels,
    finish,
    frame_scale,
    left_out,
    load,
    named,
    unused_name,
)
from grounding.images import MAX_PIXELS
from grounding.types import GroundingSample

Rows = list[tuple[int, Any]]  # annotation rows, each with its place in the file
Describe = Callable[[Mapping, str], dict[str, str]]  # (row of "images", name below the source) → patient and licence


def coco(
    root: Path,
    source: str,
    licence: str,
    modality: str,
    annotations: str = "",
    images: str = "",
    labelled: str | None = None,
) -> Iterator[Item]:
    """Any COCO instances file or files.

    root: the folder of the source, or its one json file. annotations, images: json file and image folder below `root`;
    without them every json in `root`, in `root/annotations` and beside the images of a split is read, and images are
    searched by name. labelled: comma list of the categories that were annotated exhaustively; all of them if not given,
    none if empty. A crowd row stays a region, with the attribute `iscrowd`. Raises AnnotationError where there is no
    json, or one that is not COCO.
    """

    def describe(row: Mapping, name: str) -> dict[str, str]:
        return {"patient_id": f"{source}/{name}", "licence": licence}

    yield from _convert(root, source, modality, describe, annotations, images, labelled)


def cxr_lungboxes(root: Path, source: str, licence: str) -> Iterator[Item]:
    """Boxes of the left and right lung on chest X-rays, with the patient and the licence of each image.

    Layout: https://github.com/GeneralBlockchain/covid-19-chest-xray-lung-bounding-boxes-dataset: images/ and
    annotations/annotations.json, which lists more images than a copy may hold. `licence` is for images that name none.
    """

    def describe(row: Mapping, name: str) -> dict[str, str]:
        facts = row.get("metadata")
        facts = facts if isinstance(facts, Mapping) else {}
        return {
            "patient_id": f"{source}/{_text(facts.get('patientid') or name)}",
            "licence": _text(facts.get("license") or licence),
        }

    yield from _convert(root, source, "xray", describe, "annotations/annotations.json", "images")


# Walking


def _convert(
    root: Path,
    source: str,
    modality: str,
    describe: Describe,
    annotations: str = "",
    images: str = "",
    labelled: str | None = None,
) -> Iterator[Item]:
    root = Path(root)
    folder = root.parent if root.is_file() else root
    place = folder / images
    found = _by_name(place)
    taken: set[str] = set()
    listed: set[str] = set()
    for file in _annotation_files(root, annotations):
        name = file.relative_to(folder).as_posix()
        data = _load_json(file)
        categories, wrong = _categories(data["categories"])
        phrases = categories.values() if labelled is None else filter(None, map(str.strip, labelled.split(",")))
        about = {"source": source, "modality": modality, "labelled": find_labels(phrases, modality)}
        rows, orphans = _group(data["annotations"], {_id(row.get("id")) for row in data["images"] if _is_row(row)})
        if wrong or orphans:
            yield Item(name, partial(left_out, name, wrong + orphans))
        used: set = set()
        for number, row in enumerate(data["images"]):
            key = f"{name}: images[{number}]"
            own = _id(row.get("id")) if _is_row(row) else None
            lost = 0 if own in used else len(rows.get(own, ()))
            try:
                identity = _image_identity(row, used)
                relative = _find(found, row["file_name"], file, listed)
            except ValueError as error:
                yield Item(key, partial(left_out, key, [f"{error} ({lost} annotations)"]))
                continue
            short = unused_name(relative, taken)
            listed.add(relative)
            sample = about | describe(row, short) | {"image_id": f"{source}/{short}", "image": str(place / relative)}
            yield Item(relative, partial(_read, relative, _stated_size(row), rows[identity], categories, sample))


def _annotation_files(root: Path, annotations: str) -> list[Path]:
    if root.is_file():
        return [root]
    if not annotations:
        return below(root, "*.json", "annotations/*.json", "*/_annotations.coco.json")
    if not (root / annotations).is_file():
        raise AnnotationError(f"{root / annotations}: no such file; name the COCO json with annotations=")
    return [root / annotations]


def _load_json(file: Path) -> dict:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise AnnotationError(f"{file}: not JSON ({reason}); copy it again, or name another one") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise AnnotationError(f"{file}: not COCO, which has lists {', '.join(keys)}; name the one with annotations=")
    return data


def _by_name(folder: Path) -> dict[str, list[str]]:
    """File name → paths below the folder; only files that stand there can be named by a json."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in below(folder, "**/*"):
        found[path.name].append(path.relative_to(folder).as_posix())
    return found


def _find(found: Mapping[str, list[str]], name: str, file: Path, listed: set[str]) -> str:
    """The one file that `name` (perhaps with folders, perhaps of another machine) means. Raises ValueError."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    paths = found.get(wanted.name, [])
    for test in (
        lambda path: f"/{path}".endswith(f"/{wanted}"),
        lambda path: PurePosixPath(path).parent.name in (*file.stem.split("_"), file.parent.name),  # instances_val.json
    ):
        paths = [path for path in paths if test(path)] or paths
    if not paths:
        raise ValueError(f"{name[:200]!r}: image not on disk")
    if len(paths) > 1:
        raise ValueError(f"{name[:200]!r}: {len(paths)} files have this name; give their folder with images=")
    if paths[0] in listed:
        raise ValueError(f"{name[:200]!r}: listed twice")
    return paths[0]


def _image_identity(row: Any, used: set) -> Any:
    """The id of a row of "images", which is added to `used`. Raises ValueError where the row names no image."""
    identity = _id(row.get("id")) if _is_row(row) else None
    if identity is None or not isinstance(row.get("file_name"), str):
        raise ValueError("an image needs an id and a file_name")
    if identity in used:
        raise ValueError(f"{row['file_name'][:200]!r}: the id {identity} stands for another image already")
    used.add(identity)
    return identity


def _categories(rows: list) -> tuple[dict[Any, str], list[str]]:
    """({id: name}, what is wrong)."""
    names, wrong = {}, []
    for number, row in enumerate(rows):
        identity = _id(row.get("id")) if _is_row(row) else None
        if identity is None or not isinstance(row.get("name"), str) or identity in names:
            wrong.append(f"categories[{number}]: needs an id of its own and a name")
        else:
            names[identity] = _text(row["name"])
    return names, wrong


def _group(rows: list, images: set) -> tuple[dict[Any, Rows], list[str]]:
    """({image id: rows}, rows that belong to no image)."""
    groups: dict[Any, Rows] = defaultdict(list)
    orphans = []
    for number, row in enumerate(rows):
        identity = _id(row.get("image_id")) if _is_row(row) else None
        if identity is None or identity not in images:
            orphans.append(f"annotations[{number}]: names no image of this file")
        else:
            groups[identity].append((number, row))
    return groups, orphans


def _stated_size(row: Mapping) -> tuple[float, float] | None:
    """(H, W) that the annotations refer to; None where the file does not say."""
    try:
        height, width = _numbers([row.get("height"), row.get("width")])
    except ValueError:
        return None
    return (height, width) if min(height, width) > 0 and max(height, width) < 1e6 else None


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _id(value: Any) -> int | float | str | None:
    """An id that can be looked up: a number or a text, but neither true (which equals 1) nor NaN."""
    usable = isinstance(value, int | float | str) and not isinstance(value, bool) and value == value
    return value if usable else None


# Reading


def _read(
    key: str, stated: tuple[float, float] | None, rows: Rows, categories: Mapping[Any, str], sample: dict[str, Any]
) -> Iterator[GroundingSample | Skipped]:
    size = load(sample["image"]).pixels.shape[:2]
    scale = frame_scale(stated, size)
    regions = Regions(size, modality=sample["modality"])
    for number, row in rows:
        with named(regions, f"annotations[{number}]"):
            _add(regions, row, categories, scale)
    yield from finish(GroundingSample(**sample, regions=regions.done()), regions, key)


def _add(regions: Regions, row: Mapping, categories: Mapping[Any, str], scale: tuple[float, float]) -> None:
    category = _id(row.get("category_id"))
    if category not in categories:
        raise ValueError("no category_id" if category is None else f"unknown category id {str(category)[:50]}")
    text, attributes, shape = categories[category], _attributes(row), row.get("segmentation")
    if isinstance(shape, dict) and shape:
        regions.add_mask(_decode(shape), text, attributes)
    elif shape and shape != [[]]:
        rings = shape if isinstance(shape, list) and isinstance(shape[0], list) else [shape]
        scaled = [[v * scale[k % 2] for k, v in enumerate(_numbers(ring))] for ring in rings]
        add_polygon_rings(regions, scaled, text, attributes)
    else:
        x, y, width, height = _numbers(row.get("bbox"), 4)
        corners = [x * scale[0], y * scale[1], (x + width) * scale[0], (y + height) * scale[1]]
        regions.add_box(corners, text, attributes)


def _attributes(row: Mapping) -> dict[str, str]:
    """`iscrowd`, and the row's own attributes as annotation tools write them: texts, numbers, or lists of those."""
    given = row.get("attributes")
    attributes = {}
    for name, value in given.items() if isinstance(given, dict) else ():
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(v, str | int | float) for v in values):
            attributes[_text(name)] = ", ".join(map(_text, values))
    return attributes | {"iscrowd": "1"} if row.get("iscrowd") == 1 else attributes


def _text(value: Any) -> str:
    """JSON can spell half of a character, which no file can hold."""
    return str(value).encode("utf-8", "replace").decode()


def _numbers(values: Any, count: int | None = None) -> list[float]:
    """`values` as floats. Raises ValueError where it is not a list of (`count`) numbers."""
    wanted = f"{count or 'a list of'} numbers"
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise ValueError(f"{str(values)[:80]} is not {wanted}")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{str(values)[:80]} is not {wanted}")
    try:
        return [float(v) for v in values]
    except OverflowError:
        raise ValueError("a number too large to be a coordinate") from None


def _decode(coded: Mapping) -> np.ndarray:
    """COCO RLE, compressed or not → (H, W) bool. Checked here: pycocotools trusts the counts it is given."""
    height, width = map(int, _finite(coded.get("size"), 2))
    if not 0 < height * width <= MAX_PIXELS or min(height, width) < 0:
        raise ValueError(f"run lengths of an image of {width} x {height}")
    counts = coded.get("counts")
    runs = np.array(_run_lengths(counts) if isinstance(counts, str) else _finite(counts), np.float64)
    if (runs < 0).any() or (runs % 1).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths that do not add up to {width} x {height} pixels")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64))
    return inside.reshape(width, height).T


def _finite(values: Any, count: int | None = None) -> list[float]:
    numbers = _numbers(values, count)
    if not np.isfinite(numbers).all():
        raise ValueError("run lengths that are not finite")
    return numbers


def _run_lengths(text: str) -> list[int]:
    """Compressed counts: digits of five bits, least first, written as characters from "0" on; bit 6 says that another
    digit follows, bit 5 of the last one is the sign; from the fourth run on, less the run two before it."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError("compressed run lengths that are not COCO's")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        value -= (1 << shift) if digit & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
