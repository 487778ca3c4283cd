"""MMDetection's ODVG JSON Lines → samples: one row an image, with boxes of classes or of phrases of a caption.

The format: https://github.com/open-mmlab/mmdetection/blob/main/configs/mm_grounding_dino/usage.md; boxes are xyxy in
pixels of the height and width that the row states.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    below,
    finish,
    frame_scale,
    load,
    named,
    unused_name,
)
from grounding.convert.tables import NOT_ON_DISK, complete, inside, number, numbers, read_json, skip
from grounding.images import MODALITIES
from grounding.types import GroundingSample

LONGEST = 16_000_000  # bytes of a row; far more than any image's regions take, far less than fills the memory
Where = tuple[Path, int, int]  # file, line from 1, byte at which it starts


def odvg(
    root: Path,
    source: str,
    licence: str,
    modality: str = "",
    annotations: str = "",
    images: str = "",
    label_map: str = "",
) -> Iterator[Item]:
    """ODVG rows of detection, ``{"filename", "height", "width", "detection": {"instances": [{"bbox", "label",
    "category"}]}}``, or of grounding, ``{"filename", "grounding": {"caption", "regions": [{"bbox": [...] or [[...],
    ...], "phrase", "tokens_positive": [[start, end], ...]}]}}``. Rows of one image become one sample.

    annotations, label_map: files below `root`; without them every file there whose first line is such a row, and
    ``*label_map*.json``, ``{"0": "polyp"}``. images: the folder of `filename`. modality: for images that tell none. A
    label counts by the map and not by `category`, a phrase by its tokens_positive in the caption, as in MMDetection.
    Boxes follow an image that was resized. Detection rows are exhaustive for the classes of the map; grounding rows for
    nothing. Patients are not told. Raises AnnotationError where there are no rows, or several maps.
    """
    root = Path(root)
    known = sorted(set(MODALITIES.values()))
    if modality and modality not in known:
        raise AnnotationError(f"modality={modality}: unknown; give one of {', '.join(known)}")
    patterns = ("*.jsonl", "*.json", "annotations/*.jsonl", "annotations/*.json")
    files = [root / annotations] if annotations else [path for path in below(root, *patterns) if _holds_rows(path)]
    if not files or not all(path.is_file() for path in files):
        raise AnnotationError(f"{root}: no file of ODVG rows; name it, for example annotations=train_od.json")
    classes = _label_map(root, label_map)
    rows, wrong, taken = {}, [], set()
    for file in files:
        _group(file, rows, wrong)
    for key, why in wrong:
        yield skip(key, why)
    for name, places in rows.items():
        path = inside(root / images, name)
        if path is None:
            yield skip(name, NOT_ON_DISK)
        else:
            unique = f"{source}/{unused_name(name, taken)}"
            yield Item(name, partial(_read, name, path, places, classes, modality, unique, source, licence))


def _label_map(root: Path, label_map: str) -> dict[str, str]:
    found = sorted({*root.glob("*label_map*.json"), *root.glob("annotations/*label_map*.json")})
    files = [root / label_map] if label_map else found
    if len(files) > 1:
        raise AnnotationError(f"{root}: several label maps; give one, for example label_map={files[0].name}")
    table = read_json(files[0]) if files and files[0].is_file() else {}
    usable = isinstance(table, dict) and all(isinstance(name, str) for name in table.values())
    if files and not (usable and table):
        raise AnnotationError(f"{files[0]}: not a label map; write for example {{'0': 'polyp'}}")
    return table


def _holds_rows(path: Path) -> bool:
    with path.open("rb") as file:
        row = _parse(next(_lines(file), (0, 0, b""))[2])
    return isinstance(row, dict) and "filename" in row


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte at which it starts, its bytes) of lines that are not blank; b"" for one over LONGEST."""
    count, start = 0, file.tell()
    while line := file.readline(LONGEST):
        count, at, long = count + 1, start, False
        while not line.endswith(b"\n") and len(line) == LONGEST:
            line, long = file.readline(LONGEST), True
        start = file.tell()
        if long or line.strip():
            yield count, at, b"" if long else line


def _parse(line: bytes) -> Any:
    """The JSON value of a line, None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _group(file: Path, rows: dict[str, list[Where]], wrong: list[tuple[str, str]]) -> None:
    """Adds to `rows` where those of each image stand, and to `wrong` those that name none."""
    with file.open("rb") as lines:
        for line_number, at, line in _lines(lines):
            row = _parse(line)
            name = row.get("filename") if isinstance(row, dict) else None
            if isinstance(name, str) and name:
                rows.setdefault(name, []).append((file, line_number, at))
            else:
                why = "not a JSON object" if not isinstance(row, dict) else "row without a filename"
                wrong.append((f"{file.name}:{line_number}", why))


def _read(
    name: str,
    path: Path,
    places: list[Where],
    classes: Mapping[str, str],
    modality: str,
    unique: str,
    source: str,
    licence: str,
) -> Iterator[GroundingSample | Skipped]:
    image = load(str(path))
    modality = modality or image.modality or ""
    if not modality:
        raise ValueError("the image does not tell its modality; give one, for example modality=ct")
    regions = Regions(image.pixels.shape[:2], modality=modality)
    detected, texts, used = False, [], 0
    for file, line, at in places:
        with named(regions, f"{file.name}:{line}"):
            row = _row(file, at)
            scale = frame_scale(_stated(row), regions.image_size)
            if "detection" in row:
                texts += _add_instances(regions, row["detection"], classes, scale)
                detected = True
            if "grounding" in row:
                _add_phrases(regions, row["grounding"], scale)
            if "detection" not in row and "grounding" not in row:
                raise ValueError("has neither detection nor grounding")
            used += 1
    if not used:
        raise ValueError("; ".join(regions.left_out))
    kept = regions.done()
    sample = GroundingSample(
        image_id=unique,
        patient_id=unique,
        source=source,
        modality=modality,
        image=str(path),
        regions=kept,
        labelled=complete(classes.values(), texts, kept, {}, modality) if detected else (),
        spacing=image.spacing,
        licence=licence,
    )
    yield from finish(sample, regions, name)


def _row(file: Path, at: int) -> dict:
    with file.open("rb") as lines:
        lines.seek(at)
        return json.loads(lines.readline(LONGEST))


def _stated(row: Mapping) -> tuple[float, float] | None:
    if row.get("height") is None or row.get("width") is None:
        return None
    return number(row["height"]), number(row["width"])


def _list(value: Any, key: str) -> list:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"has no list of {key}")
    return found


def _box(values: Any, scale: tuple[float, float]) -> np.ndarray:
    return np.array(numbers(values, 4)) * [*scale, *scale]


def _add_instances(
    regions: Regions, detection: Any, classes: Mapping[str, str], scale: tuple[float, float]
) -> list[str]:
    """→ the class of every instance whose class is known, also of one that was left out."""
    texts = []
    for k, instance in enumerate(_list(detection, "instances")):
        with named(regions, f"instance {k}"):
            text = _class(instance, classes)
            texts.append(text)
            regions.add_box(_box(instance.get("bbox"), scale), text)
    return texts


def _class(instance: Any, classes: Mapping[str, str]) -> str:
    if not isinstance(instance, dict):
        raise ValueError("is not a JSON object")
    label, category = instance.get("label"), instance.get("category")
    if classes and str(label) not in classes:
        raise ValueError(f"label {str(label)[:40]!r} is not in the label map")
    if not classes and not (isinstance(category, str) and category.strip()):
        raise ValueError("has no category, and there is no label map")
    return classes[str(label)] if classes else category


def _add_phrases(regions: Regions, grounding: Any, scale: tuple[float, float]) -> None:
    for k, region in enumerate(_list(grounding, "regions")):
        with named(regions, f"region {k}"):
            text = _phrase(region, grounding.get("caption"))
            boxes = _list(region, "bbox")
            for j, box in enumerate(boxes if boxes and isinstance(boxes[0], list) else [boxes]):
                with named(regions, f"box {j}"):
                    regions.add_box(_box(box, scale), text)


def _phrase(region: Any, caption: Any) -> str:
    """The words of the caption that tokens_positive points at (characters from, to); `phrase` where it does not."""
    spans, phrase = (region.get("tokens_positive"), region.get("phrase")) if isinstance(region, dict) else (None, None)
    spans = [spans] if isinstance(spans, list) and len(spans) == 2 and not isinstance(spans[0], list) else spans
    words = [_words(span, caption) for span in spans] if isinstance(spans, list) and isinstance(caption, str) else []
    if words and all(words):
        return " ".join(words)
    if isinstance(phrase, str) and phrase.strip():
        return phrase.strip()
    raise ValueError("has no phrase, and its tokens_positive do not lie in the caption")


def _words(span: Any, caption: str) -> str:
    if not isinstance(span, list) or len(span) != 2 or not all(isinstance(end, int) for end in span):
        return ""
    start, end = span
    return caption[start:end].strip() if 0 <= start < end <= len(caption) else ""
