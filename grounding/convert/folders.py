"""Images and masks in folders → samples: black and white masks, one or several an image, and colour masks.

What is one region: every piece of a class named in `instances` (pieces touch at an edge or a corner), else all that a
mask shows of a class. No piece is too small, with one exception: JPEG leaves specks around an outline, so in a JPEG
mask pieces of fewer than 64 pixels (one of its 8 x 8 blocks) are left out, and named. JPEG greys count from 128 up.
"""

import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    below,
    find_labels,
    finish,
    left_out,
    load,
    unused_name,
)
from grounding.images import read_image
from grounding.types import GroundingSample

Colour = tuple[int, int, int]
SUFFIX = r"\.(?:png|jpe?g|bmp|tiff?)"
SPECK = 64  # pixels
MOST_PIECES = 1000  # of one class in one mask; more are noise, not lesions
TOUCHING = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Layout:
    """Which files are images, which are masks, and what the masks show.

    image, mask: regular expressions for the whole path below the root, upper and lower case alike; an image and its
    masks agree in the groups `folder` and `name`. Further groups of `image`: `patient`, `study`, `frame` (a whole
    number), `text` (what its masks show); any other is an attribute of its regions. text: what every mask shows;
    colours: what each colour shows, instead. instances: of what every piece is a region of its own. names: text →
    phrase. labelled: phrases annotated exhaustively. sequences: first frames of the video sequences, where the number
    of a frame tells its sequence.
    """

    modality: str
    image: str
    mask: str
    labelled: tuple[str, ...]
    text: str = ""
    colours: Mapping[Colour, str] | None = None
    instances: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    sequences: tuple[int, ...] = ()


def binary_masks(
    root: Path,
    source: str,
    licence: str,
    modality: str,
    phrase: str,
    images: str = "images",
    masks: str = "masks",
    suffix: str = "",
    instances: str = "no",
    labelled: str | None = None,
) -> Iterator[Item]:
    """Black and white masks of one thing, `phrase`.

    images, masks: folders, at any depth; "." for both where images and masks lie side by side. suffix: what the name of
    a mask adds to that of its image: with `_mask`, a_mask.png and a_mask_1.png belong to a.png. instances: "yes" makes
    every piece of a mask a region. labelled: comma list; the phrase if not given, none if empty. Raises AnnotationError
    where no image is found.
    """
    yield from convert_folder(
        root,
        source,
        licence,
        Layout(
            modality=modality,
            image=_pattern(images),
            mask=_pattern(masks, suffix),
            text=phrase,
            instances=(phrase,) if instances == "yes" else (),
            labelled=(phrase,) if labelled is None else _phrases(labelled),
        ),
    )


def colour_masks(
    root: Path,
    source: str,
    licence: str,
    modality: str,
    colours: str,
    images: str = "images",
    masks: str = "masks",
    suffix: str = "",
    instances: str = "",
    labelled: str | None = None,
) -> Iterator[Item]:
    """Masks with a colour a class.

    colours: `ff0000:kidney tumour,0000ff:kidney`; black is background. instances: comma list of those of which every
    piece is a region. The rest as in `binary_masks`. Raises AnnotationError where `colours` is not such a table.
    """
    table = {}
    for entry in filter(None, colours.split(",")):
        colour, _, phrase = entry.partition(":")
        if not re.fullmatch(r"[0-9a-fA-F]{6}", colour.strip()) or not phrase.strip():
            raise AnnotationError(f"colours={entry}: write a colour and a phrase, as in ff0000:kidney tumour")
        table[tuple(bytes.fromhex(colour.strip()))] = phrase.strip()
    layout = Layout(
        modality=modality,
        image=_pattern(images),
        mask=_pattern(masks, suffix),
        colours=table,
        instances=_phrases(instances),
        labelled=tuple(table.values()) if labelled is None else _phrases(labelled),
    )
    yield from convert_folder(root, source, licence, layout)


def convert_folder(
    root: Path, source: str, licence: str, layout: Layout, facts: Mapping[str, dict[str, str]] | None = None
) -> Iterator[Item]:
    """Everything below `root` that is laid out as `layout`. facts: patient → attributes of their regions.

    An image without a mask and a mask without an image are left out, and named; a black mask is an image without
    regions. Raises AnnotationError where no image is found.
    """
    root = Path(root)
    images, masks = _sort(root, layout)
    taken: set[str] = set()
    for key, found in images.items():
        for path, groups in found:
            if key not in masks:
                yield Item(path, partial(left_out, path, ["no mask for this image"]))
                continue
            name = unused_name(path, taken)
            about = _about(source, name, groups, layout)
            about |= {"image": str(root / path), "licence": licence, "modality": layout.modality, "source": source}
            about["labelled"] = find_labels(layout.labelled, layout.modality)
            attributes = _attributes(groups) | (facts or {}).get(groups.get("patient") or "", {})
            own = [str(root / mask) for mask in masks[key]]
            text = (groups.get("text") or "").lower() or layout.text
            yield Item(path, partial(_read, path, layout, own, text, attributes, about))
    for key, paths in masks.items():
        for path in paths if key not in images else ():
            yield Item(path, partial(left_out, path, ["no image for this mask"]))


# Walking

Key = tuple[str | None, str | None]
GROUPS = ("folder", "name", "patient", "study", "frame", "text")


def _sort(root: Path, layout: Layout) -> tuple[dict[Key, list[tuple[str, dict]]], dict[Key, list[str]]]:
    """({key: images and the groups of their names}, {key: masks}), paths below the root."""
    image, mask = (re.compile(pattern, re.IGNORECASE) for pattern in (layout.image, layout.mask))
    images: dict[Key, list[tuple[str, dict]]] = defaultdict(list)
    masks: dict[Key, list[str]] = defaultdict(list)
    for file in below(root, "**/*"):
        path = file.relative_to(root).as_posix()
        if match := mask.fullmatch(path):
            masks[_key(match)].append(path)
        elif match := image.fullmatch(path):
            images[_key(match)].append((path, match.groupdict()))
    if not images:
        raise AnnotationError(f"{root}: no file is called as the images of this source are; is this its folder?")
    return images, masks


def _key(match: re.Match) -> Key:
    groups = match.groupdict()
    return groups.get("folder"), groups.get("name")


def _about(source: str, name: str, groups: Mapping[str, str | None], layout: Layout) -> dict[str, Any]:
    """Ids of a sample. Whoever has no patient number stands for one patient an image."""
    frame = int(groups["frame"]) if groups.get("frame") else None
    patient = groups.get("patient") or name
    study = groups.get("study") or (patient if frame is not None else None)
    if layout.sequences and frame is not None:
        patient = study = f"sequence_{bisect(layout.sequences, frame)}"
    return {
        "image_id": f"{source}/{name}",
        "patient_id": f"{source}/{patient}",
        "study_id": None if study is None else f"{source}/{study}",
        "frame": frame,
    }


def _attributes(groups: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in groups.items() if value and name not in GROUPS}


def _pattern(folder: str, suffix: str = "") -> str:
    """Any file below folders of that name (at any depth; "." for everywhere), with the suffix and perhaps a number."""
    place = "" if folder in ("", ".") else re.escape(folder.strip("/")) + "/"
    number = r"(?:_\d+)?" if suffix else ""
    return rf"(?P<folder>(?:.*/)?){place}(?P<name>{'[^/]+' if not place else '.+'}){re.escape(suffix)}{number}{SUFFIX}"


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(",") if phrase.strip())


# Reading


def _read(
    key: str, layout: Layout, masks: list[str], text: str, attributes: dict[str, str], about: dict[str, Any]
) -> Iterator[GroundingSample | Skipped]:
    size = load(about["image"]).pixels.shape[:2]
    regions = Regions(size, layout.names, layout.modality)
    for mask in masks:
        name, lossy = Path(mask).name, mask.lower().endswith((".jpg", ".jpeg"))
        pixels = read_image(mask).pixels
        if pixels.shape[:2] != size:  # with a region less, its classes would count as absent
            shape = " x ".join(map(str, pixels.shape[1::-1]))
            raise ValueError(f"{mask}: a mask of {shape} for an image of {size[1]} x {size[0]}")
        classes = _colour_classes(pixels, layout.colours, lossy, name, regions) if layout.colours else None
        for shown, inside in classes or [(text, _foreground(pixels, lossy))]:
            _add(regions, inside, shown, shown in layout.instances, attributes, lossy, name)
    yield from finish(GroundingSample(**about, regions=regions.done()), regions, key)


def _foreground(pixels: np.ndarray, lossy: bool) -> np.ndarray:
    """(H, W) bool. Masks come as 0 and 1, or as 0 and 255 with perhaps a soft edge, which is cut at one half."""
    grey = pixels.max(2) if pixels.ndim == 3 else pixels
    return grey > (127 if lossy or grey.max() > 127 else 0)


def _colour_classes(
    pixels: np.ndarray, table: Mapping[Colour, str], lossy: bool, name: str, regions: Regions
) -> list[tuple[str, np.ndarray]]:
    """(text, (H, W) bool) of every class of the table. JPEG blurs colours: there the nearest one counts, else only the
    very same; pixels of other colours are named in `regions.left_out`."""
    channels = [pixels[..., c] if pixels.ndim == 3 else pixels for c in range(3)]
    if lossy:
        nearest = _nearest(channels, [(0, 0, 0), *table])
        return [(text, nearest == k) for k, text in enumerate(table.values(), 1)]
    codes = [_code(colour) for colour in table]
    packed = _code([channel.astype(np.int32) for channel in channels])
    strange = packed[~np.isin(packed, [0, *codes])]
    if strange.size:
        regions.left_out.append(
            f"{name}: {strange.size} pixels of colours without a name, such as {int(strange[0]):06x}"
        )
    return [(text, packed == code) for text, code in zip(table.values(), codes, strict=True)]


def _code(colour: Sequence) -> Any:
    """Red, green and blue (numbers or arrays) as one number each."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _nearest(channels: list[np.ndarray], colours: Sequence[Colour]) -> np.ndarray:
    """(H, W): which of the colours is nearest, by the sum of the differences of the channels."""
    nearest = np.zeros(channels[0].shape, np.uint8)
    least = np.full(channels[0].shape, 3 * 255 + 1, np.int16)
    for k, colour in enumerate(colours):
        distance = np.zeros_like(least)
        for channel, value in zip(channels, colour, strict=True):
            distance += np.abs(channel.astype(np.int16) - value)
        closer = distance < least
        nearest[closer], least[closer] = k, distance[closer]
    return nearest


def _add(
    regions: Regions,
    inside: np.ndarray,
    text: str,
    separate: bool,
    attributes: dict[str, str],
    lossy: bool,
    name: str,
) -> None:
    """One region of `inside` (H, W) bool, or one of every piece of it."""
    if not lossy and not separate:
        regions.add_mask(inside, text, attributes)
        return
    pieces, count = ndimage.label(inside, TOUCHING)
    areas = np.bincount(pieces.reshape(-1), minlength=count + 1)
    specks = lossy & (areas < SPECK)
    specks[0] = False
    if specks.any():
        regions.left_out.append(f"{name}: {text}: {specks.sum()} specks of fewer than {SPECK} pixels in a JPEG mask")
    kept = [k for k in range(1, count + 1) if not specks[k]]
    if not separate:
        regions.add_mask(np.isin(pieces, kept), text, attributes)
    elif len(kept) > MOST_PIECES:
        raise ValueError(f"{name}: {text} in {len(kept)} pieces: noise, or not a mask of separate lesions")
    else:
        for k in kept:
            regions.add_mask(pieces == k, text, attributes)
