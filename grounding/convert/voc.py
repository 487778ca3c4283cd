"""Pascal VOC xml boxes → samples, and the blood cells of BCCD on top of that.

The format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. One xml an image, and
xmin, ymin, xmax, ymax count pixels from 1, the last one included, so the left edge of a box is xmin - 1.
"""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    below,
    find_labels,
    finish,
    frame_scale,
    left_out,
    load,
    named,
    unused_name,
)
from grounding.types import GroundingSample

MAX_BYTES = 10_000_000  # of one xml: ten times the fullest image of cells
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = ("difficult", "truncated", "occluded")
BLOOD_CELLS = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}


@dataclass(frozen=True)
class _Page:
    """What one xml says. size: (H, W) or None. objects: name and text of each corner, as written, and the flags set."""

    filename: str = ""
    size: tuple[float, float] | None = None
    objects: list[tuple[str, list[str | None], dict[str, str]]] = field(default_factory=list)


def voc(
    root: Path, source: str, licence: str, modality: str, split: str = "", labelled: str | None = None
) -> Iterator[Item]:
    """Every xml below `root`, with the image of the same name (or of the name that the xml gives).

    split: only what ImageSets/Main/SPLIT.txt lists. labelled: comma list of the classes that were annotated
    exhaustively; every class that occurs if not given, none if empty. Raises AnnotationError where there is no xml or
    no such split.
    """
    yield from _convert(Path(root), source, licence, modality, split, labelled, {})


def bccd(root: Path, source: str, licence: str) -> Iterator[Item]:
    """Red and white blood cells and platelets: https://github.com/Shenggan/BCCD_Dataset. Two of its boxes are single
    points, and are left out. Patients are not told: each image counts as one."""
    yield from _convert(Path(root), source, licence, "microscopy", "", ",".join(BLOOD_CELLS), BLOOD_CELLS)


def _convert(
    root: Path,
    source: str,
    licence: str,
    modality: str,
    split: str,
    labelled: str | None,
    names: Mapping[str, str],
) -> Iterator[Item]:
    pages = {file: _page(file) for file in below(root, "**/*.xml")}
    words = [name for page in pages.values() if isinstance(page, _Page) for name, _, _ in page.objects]
    if labelled is not None:
        words = [word.strip() for word in labelled.split(",") if word.strip()]
    about: dict[str, Any] = {"source": source, "modality": modality, "licence": licence}
    about["labelled"] = find_labels(
        (names.get(word, word) for word in sorted({word for word in words if word})), modality
    )
    pictures = _pictures(root)
    chosen, missing = _split(root, split, pages) if split else (list(pages), [])
    taken: set[str] = set()
    used: set[str] = set()
    for file in chosen:
        key = file.relative_to(root).as_posix()
        try:
            page = pages[file]
            if not isinstance(page, _Page):
                raise page
            image = _image(file, page, root, pictures)
            if image in used:
                raise ValueError(f"{image}: another xml is about this image, too")
        except ValueError as error:
            yield Item(key, partial(left_out, key, [str(error)]))
            continue
        used.add(image)
        short = f"{source}/{unused_name(image, taken)}"
        sample = about | {"image_id": short, "patient_id": short, "image": str(root / image)}
        yield Item(key, partial(_read, key, page, names, sample))
    alone = missing or ([] if split else _without_xml(root, pictures, used, pages))
    for key, why in alone:
        yield Item(key, partial(left_out, key, [why]))


def _split(root: Path, split: str, pages: Mapping[Path, object]) -> tuple[list[Path], list[tuple[str, str]]]:
    """(the xml files that a list names, (line, reason) of names without one)."""
    if not split.replace("_", "").isalnum():
        raise AnnotationError(f"split={split}: give the name of a list in ImageSets/Main, without .txt")
    lists = below(root, f"**/ImageSets/Main/{split}.txt")
    by_stem = {file.stem: file for file in pages}
    chosen, missing = {}, []
    for file in lists:
        for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
            name = line.split()[0] if line.split() else ""
            if name in by_stem:
                chosen[by_stem[name]] = True
            elif name:
                missing.append(
                    (f"{file.relative_to(root).as_posix()}:{number}", f"{name[:200]!r}: no xml of that name")
                )
    return list(chosen), missing


def _pictures(root: Path) -> dict[str, list[str]]:
    """Stem → images of that name below the root."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in below(root, "**/*"):
        if path.suffix.lower() in PICTURES:
            found[path.stem].append(path.relative_to(root).as_posix())
    return found


def _image(file: Path, page: _Page, root: Path, pictures: Mapping[str, list[str]]) -> str:
    """The image that an xml is about, as a path below the root. Raises ValueError where there is not exactly one."""
    stems = (file.stem, Path(page.filename.replace("\\", "/")).stem)
    paths = next((pictures[stem] for stem in stems if stem in pictures), [])
    if len(paths) > 1:  # Annotations/1.xml of train and of val: the picture that stands nearer
        near = [path for path in paths if file.parent.parent in (root / path).parents]
        paths = near or paths
    if len(paths) != 1:
        raise ValueError("image not on disk" if not paths else f"{len(paths)} images are called {file.stem}")
    return paths[0]


def _without_xml(
    root: Path, pictures: Mapping[str, list[str]], used: set[str], pages: Mapping[Path, object]
) -> Iterator[tuple[str, str]]:
    """Images of the image folders that no xml is about: nobody says what is on them."""
    folders = {(root / path).parent for path in used}
    stems = {file.stem for file in pages}
    for stem, paths in sorted(pictures.items()):
        for path in paths:
            if stem not in stems and path not in used and (root / path).parent in folders:
                yield path, "no xml for this image"


def _page(file: Path) -> _Page | ValueError:
    """What an xml says, or why it cannot be read."""
    try:
        top = _parse(file)
    except (ValueError, OSError) as error:
        return ValueError(str(error))
    width, height = (_number(top.findtext(f"size/{side}")) for side in ("width", "height"))
    size = (height, width) if width and height and min(width, height) > 0 and max(width, height) < 1e6 else None
    objects = []
    for row in top.findall("object"):
        flags = {flag: "1" for flag in FLAGS if (row.findtext(flag) or "").strip() == "1"}
        name = " ".join((row.findtext("name") or "").split())
        objects.append((name, [row.findtext(f"bndbox/{corner}") for corner in CORNERS], flags))
    return _Page((top.findtext("filename") or "").strip(), size, objects)


def _parse(file: Path) -> ElementTree.Element:
    """Raises ValueError where the file is not plain XML. Entities, which can grow without bound, are refused."""
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes, which is no annotation of one image")
    data = file.read_bytes()
    if b"\0" in data or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError("not plain UTF-8 XML: null bytes, or entities, which are not read")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"not XML ({error})") from None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _read(
    key: str, page: _Page, names: Mapping[str, str], sample: dict[str, Any]
) -> Iterator[GroundingSample | Skipped]:
    size = load(sample["image"]).pixels.shape[:2]
    scale = frame_scale(page.size, size)
    regions = Regions(size, names, sample["modality"])
    for number, (name, corners, flags) in enumerate(page.objects, 1):
        with named(regions, f"object {number}"):
            _add(regions, name, corners, flags, scale)
    yield from finish(GroundingSample(**sample, regions=regions.done()), regions, key)


def _add(
    regions: Regions, name: str, corners: list[str | None], flags: dict[str, str], scale: tuple[float, float]
) -> None:
    if not name:
        raise ValueError("no name")
    values = [_number(text) for text in corners]
    for corner, text, value in zip(CORNERS, corners, values, strict=True):
        if value is None:
            raise ValueError(f"{name}: {corner} is {'missing' if text is None else repr(text[:50])}, not a number")
    left, top, right, bottom = values
    if right <= left or bottom <= top:  # by the letter one pixel wide; in fact a slip of the hand
        raise ValueError(f"{name}: box {values} has no area")
    regions.add_box([(left - 1) * scale[0], (top - 1) * scale[1], right * scale[0], bottom * scale[1]], name, flags)
