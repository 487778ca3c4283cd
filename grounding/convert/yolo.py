"""YOLO text labels (boxes and polygons) → samples, and the lesions of IDRiD on top of that.

The format: https://docs.ultralytics.com/datasets/detect/ and https://docs.ultralytics.com/datasets/segment/. One txt
an image, under labels/ where the image is under images/, or beside it; a line is `class cx cy w h` or
`class x1 y1 x2 y2 ...`, all in [0, 1]. An image without objects needs no txt.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    add_polygon_rings,
    below,
    find_labels,
    finish,
    left_out,
    load,
    named,
    unused_name,
)
from grounding.types import GroundingSample

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm")
LISTS = ("classes.txt", "train.txt", "val.txt", "test.txt", "README.txt")  # texts that may stand among the labels
MAX_BYTES = 10_000_000  # of one txt
MAX_YAML = 1_000_000
ROUNDING = 0.01  # how far beyond [0, 1] a value may lie
IDRID = {
    "MA": "microaneurysm",
    "HE": "retinal haemorrhage",
    "EX": "hard exudate",
    "SE": "soft exudate",
    "OD": "optic disc",
}


def yolo(
    root: Path, source: str, licence: str, modality: str, names: str = "", labelled: str | None = None
) -> Iterator[Item]:
    """All images below `root` that have a txt, or whose folder of labels has any.

    names: comma list of the classes, from class 0; else they are read from data.yaml or classes.txt. labelled: comma
    list of the classes that were annotated exhaustively; all of them if not given, none if empty. Raises
    AnnotationError where there are no labels, no names, or labels of key points.
    """
    yield from _convert(Path(root), source, licence, modality, names, labelled, {})


def idrid_yolo(root: Path, source: str, licence: str) -> Iterator[Item]:
    """Lesions and the optic disc on fundus images of IDRiD, padded to squares with black:
    https://github.com/AmoghaSriKommera/EyeDR (DR_dataset). Boxes were made from IDRiD's masks; most are a few pixels
    wide. Patients are not told: each image counts as one."""
    yield from _convert(Path(root), source, licence, "fundus", "", None, IDRID)


def _convert(
    root: Path,
    source: str,
    licence: str,
    modality: str,
    names: str,
    labelled: str | None,
    words: Mapping[str, str],
) -> Iterator[Item]:
    files = [path.relative_to(root).as_posix() for path in below(root, "**/*")]
    classes = dict(enumerate(_words(names))) if names else _class_names(root, files)
    exhaustive = classes.values() if labelled is None else _words(labelled)
    about: dict[str, Any] = {"source": source, "modality": modality, "licence": licence}
    about["labelled"] = find_labels((words.get(name, name) for name in exhaustive), modality)
    images = [path for path in files if PurePosixPath(path).suffix.lower() in PICTURES]
    labels = {path for path in files if path.endswith(".txt") and PurePosixPath(path).name not in LISTS}
    used = {_label_path(path) for path in images} & labels
    if not used:
        raise AnnotationError(f"{root}: no image has a .txt of its name beside it or under labels/; is this YOLO?")
    folders = {str(PurePosixPath(path).parent) for path in used}
    taken: set[str] = set()
    for path in images:
        label = _label_path(path)
        if str(PurePosixPath(label).parent) not in folders:
            yield Item(path, partial(left_out, path, ["no labels: neither a .txt, nor a folder of them"]))
            continue
        short = f"{source}/{unused_name(path, taken)}"
        sample = about | {"image_id": short, "patient_id": short, "image": str(root / path)}
        rows = str(root / label) if label in labels else None
        yield Item(path, partial(_read, path, rows, classes, words, sample))
    for path in sorted(labels - used):
        if str(PurePosixPath(path).parent) in folders:
            yield Item(path, partial(left_out, path, ["image not on disk"]))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _label_path(image: str) -> str:
    """Where the labels of an image stand: the last folder `images` becomes `labels`, the suffix .txt."""
    parts = list(PurePosixPath(image).with_suffix(".txt").parts)
    for k in reversed(range(len(parts) - 1)):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return "/".join(parts)


def _class_names(root: Path, files: list[str]) -> dict[int, str]:
    """{class: name} of data.yaml, or of the lines of classes.txt."""
    by_name = {PurePosixPath(path).name: root / path for path in reversed(files)}
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if name in by_name:
            return _yaml_names(by_name[name])
    for name in ("classes.txt", "obj.names"):
        if name in by_name:
            lines = by_name[name].read_text("utf-8", errors="replace").split("\n")
            return {k: line.strip() for k, line in enumerate(lines) if line.strip()}
    raise AnnotationError(f"{root}: neither data.yaml nor classes.txt; give the classes with names=A,B,C")


def _yaml_names(file: Path) -> dict[int, str]:
    if file.stat().st_size > MAX_YAML:
        raise AnnotationError(f"{file}: more than {MAX_YAML:,} bytes; give the classes with names=A,B,C")
    try:
        data = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AnnotationError(f"{file}: not YAML ({reason}); give the classes with names=A,B,C") from None
    data = data if isinstance(data, dict) else {}
    if "kpt_shape" in data:
        raise AnnotationError(f"{file}: labels of key points, which are not regions; export boxes or polygons")
    names = data.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    usable = isinstance(names, dict) and names and all(type(k) is int for k in names)
    if not usable or not all(isinstance(name, str | int | float) for name in names.values()):
        raise AnnotationError(f"{file}: no list of names; give the classes with names=A,B,C")
    return {k: str(name) for k, name in names.items()}


def _read(
    key: str, label: str | None, classes: Mapping[int, str], words: Mapping[str, str], sample: dict[str, Any]
) -> Iterator[GroundingSample | Skipped]:
    size = load(sample["image"]).pixels.shape[:2]
    regions = Regions(size, words, sample["modality"])
    for number, line in enumerate(_lines(label) if label else (), 1):
        if line.strip():
            with named(regions, f"line {number}"):
                _add(regions, line.split(), classes)
    yield from finish(GroundingSample(**sample, regions=regions.done()), regions, key)


def _lines(label: str) -> list[str]:
    if Path(label).stat().st_size > MAX_BYTES:
        raise ValueError(f"{label}: more than {MAX_BYTES:,} bytes, which are no labels of one image")
    return Path(label).read_text("utf-8", errors="replace").split("\n")


def _add(regions: Regions, row: list[str], classes: Mapping[int, str]) -> None:
    if len(row) != 5 and (len(row) < 7 or len(row) % 2 == 0):
        raise ValueError(f"{len(row)} values; a box has 5, a polygon 7, 9, 11, ...")
    try:
        number, *values = map(float, row)
    except ValueError:
        raise ValueError(f"{' '.join(row)[:80]!r} are not numbers") from None
    if number not in classes:  # 3.0 finds class 3
        raise ValueError(f"unknown class {row[0][:20]}")
    if not all(-ROUNDING <= value <= 1 + ROUNDING for value in values):  # not-a-number compares false
        raise ValueError(f"{' '.join(row[1:])[:80]} are not in [0, 1] of the image")
    height, width = regions.image_size
    pixels = [value * (height if k % 2 else width) for k, value in enumerate(values)]
    text = classes[int(number)]
    if len(pixels) > 4:
        add_polygon_rings(regions, [pixels], text, {})
    else:
        x, y, w, h = pixels
        regions.add_box([x - w / 2, y - h / 2, x + w / 2, y + h / 2], text)
