"""Annotation lists (JSON, CSV) and the images that they name: what converters of one list for many images share."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grounding.convert.record import AnnotationError, Item, Skipped, find_labels
from grounding.images import DICOM_SUFFIXES
from grounding.types import RegionSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", *DICOM_SUFFIXES)
NOT_ON_DISK = "image is not on disk"


@dataclass(frozen=True)
class Row:
    """One line of a table. `wrong`: why its cells cannot be used, "" where they can."""

    line: int
    cells: dict[str, str]
    wrong: str = ""


def read_json(path: Path) -> Any:
    """A JSON file, with or without a byte order mark. Raises AnnotationError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: not a JSON file ({error}); fetch it again") from error


def read_json_list(path: Path) -> list:
    """As `read_json`, for a file that holds a list."""
    value = read_json(path)
    if not isinstance(value, list):
        raise AnnotationError(f"{path}: holds a {type(value).__name__}, not a list; is this the annotation file?")
    return value


def csv_lines(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(line number, cells, what is wrong) of every line that is not blank. Bytes that are not UTF-8 are replaced."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        while True:
            try:
                cells = [cell.strip() for cell in next(reader)]
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                yield reader.line_num, [], str(error)
                continue
            if any(cells):
                yield reader.line_num, cells, ""


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV file with a header. A row of another length than the header is `wrong`; empty cells beyond the
    header's do not count. Raises AnnotationError where a column of `columns` is missing."""
    lines = csv_lines(path)
    header = next(lines, (0, [], ""))[1]
    header = header[: max((k for k, name in enumerate(header, 1) if name), default=0)]  # a comma may end it
    missing = [name for name in columns if name not in header]
    if missing:
        raise AnnotationError(f"{path}: the header has no {', '.join(missing)}; is this the annotation file?")
    return [_row(line, cells, wrong, header) for line, cells, wrong in lines]


def _row(line: int, cells: list[str], wrong: str, header: list[str]) -> Row:
    extra = [cell for cell in cells[len(header) :] if cell]
    if not wrong and (len(cells) < len(header) or extra):
        wrong = f"{len(cells)} values where the header has {len(header)}"
    return Row(line, dict(zip(header, cells, strict=False)), wrong)


def group(file: Path, table: Iterable[Row], column: str) -> tuple[dict[str, list[Row]], list[Item]]:
    """Rows by their value of `column`; and items for the rows that cannot be used: those that are wrong, have no such
    value, or say the same as an earlier one."""
    groups: dict[str, list[Row]] = {}
    bad: list[Item] = []
    first: dict[tuple[str, ...], int] = {}
    for row in table:
        said = tuple(row.cells.values())
        wrong = row.wrong or ("" if row.cells.get(column) else f"no {column}")
        if not wrong and first.setdefault(said, row.line) != row.line:
            wrong = f"says the same as line {first[said]}"
        if wrong:
            bad.append(skip(f"{file.name}:{row.line}", wrong))
        else:
            groups.setdefault(row.cells[column], []).append(row)
    return groups, bad


def number(value: Any) -> float:
    """A finite number, also one written as text. Raises ValueError."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not a number") from None
    if not math.isfinite(result):
        raise ValueError(f"{str(value)[:40]!r} is not a finite number")
    return result


def numbers(values: Any, count: int) -> list[float]:
    """`count` finite numbers. Raises ValueError."""
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(f"{str(values)[:60]} is not a list of {count} numbers")
    return [number(value) for value in values]


def corners(x: Any, y: Any, width: Any, height: Any) -> list[float]:
    """xywh → xyxy. Raises ValueError where one is not a finite number."""
    left, top = number(x), number(y)
    return [left, top, left + number(width), top + number(height)]


def index_images(folder: Path) -> dict[str, list[Path]]:
    """Every image file below `folder`, by its name without suffix. Links to folders are not followed."""
    found: dict[str, list[Path]] = {}
    for directory, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(directory, name) for name in sorted(names)):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(path.stem, []).append(path)
    return found


def inside(folder: Path, relative: str) -> Path | None:
    """The file `relative` of `folder`; None where there is none, or where the path leads out of the folder."""
    path = folder / relative
    if ".." in Path(relative).parts or Path(relative).is_absolute():
        return None
    try:
        return path if path.is_file() else None
    except OSError:  # a name that no file can have
        return None


def name_in(folder: Path, path: Path) -> str:
    """A path's name in its source: relative to `folder`, with slashes, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def skip(key: str, why: str) -> Item:
    """An item of which nothing can be kept."""
    return Item(key, partial(_skipped, key, why))


def once(items: Iterable[Item]) -> Iterator[Item]:
    """The items, but for those of an image that came before: lists and copies of a list may name one twice."""
    keys = set()
    for item in items:
        yield skip(item.key, "is listed a second time") if item.key in keys else item
        keys.add(item.key)


def _skipped(key: str, why: str) -> list[Skipped]:
    return [Skipped(key, why)]


def complete(
    classes: Iterable[str],
    annotated: Iterable[str],
    kept: RegionSet,
    names: Mapping[str, str],
    modality: str | None = None,
) -> tuple[str, ...]:
    """`labelled` of one image: the classes that its source annotates exhaustively, but for those of which a region was
    left out. `annotated`: the source's word for every region it has of the image. `kept`: those that were kept."""
    short = Counter(annotated) - Counter(kept.texts or [])
    return find_labels((names.get(name, name) for name in classes if name not in short), modality)
