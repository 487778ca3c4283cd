"""Sources whose layout is their own: HC18 (fetal heads), REFUGE and IDRiD (fundus)."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from scipy import ndimage

from grounding.convert.record import AnnotationError, Item, Regions, Skipped, below, finish, load
from grounding.convert.tables import (
    NOT_ON_DISK,
    complete,
    index_images,
    name_in,
    number,
    read_table,
    skip,
)
from grounding.images import read_image
from grounding.types import GroundingSample

HC18_NAME = re.compile(r"(\d+)_(\d*)HC")
FETAL_HEAD = "fetal head"
CUP, DISC = "optic cup", "optic disc"
IDRID = {  # folder of the masks, without its number → phrase
    "Microaneurysms": "microaneurysm",
    "Haemorrhages": "retinal haemorrhage",
    "Hard Exudates": "hard exudate",
    "Soft Exudates": "soft exudate",
    "Optic Disc": DISC,
}


# HC18


def hc18(root: Path, source: str, licence: str) -> Iterator[Item]:
    """HC18: `training_set/010_HC.png` with `010_HC_Annotation.png`, the outline of the head, one pixel wide; pixel
    sizes and head circumferences in `training_set_pixel_size_and_HC.csv` (https://hc18.grand-challenge.org/Home/).

    The outline is filled. Images of one examination, `010_HC.png` and `010_2HC.png`, are one patient and one study.
    Images without an annotation (the test set) are skipped.
    """
    root, sizes = Path(root), _hc18_table(Path(root))
    make = partial(GroundingSample, source=source, modality="ultrasound", licence=licence)
    for path in below(root, "*HC.png", "*/*HC.png", "*/*/*HC.png"):
        key, outline = name_in(root, path), path.with_name(f"{path.stem}_Annotation.png")
        name = HC18_NAME.fullmatch(path.stem)
        if name is None:
            yield skip(key, "file name is not <number>_HC.png or <number>_<number>HC.png")
        elif not outline.is_file():
            yield skip(key, f"no annotation {outline.name} (the test set has none)")
        else:
            who = f"{source}/{name[1]}"
            start = partial(make, patient_id=who, study_id=who, frame=int(name[2] or 1) - 1)
            yield Item(key, partial(_read_hc18, path, outline, key, sizes.get(path.name, {}), start))


def _hc18_table(root: Path) -> dict[str, dict[str, str]]:
    """File name → {"pixel size": ..., "head circumference": ...} in mm, from every table there is."""
    files = sorted({*root.glob("*pixel_size*.csv"), *root.glob("*/*pixel_size*.csv")})
    rows = [row.cells for file in files for row in read_table(file, ("filename",)) if not row.wrong]
    return {row["filename"]: {name.split("(")[0].strip(): value for name, value in row.items()} for row in rows}


def _read_hc18(
    path: Path, outline: Path, key: str, row: dict[str, str], make: partial
) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    regions = Regions((height, width))
    mask = fill_outline(_any(read_image(outline).pixels > 127))
    if not mask.any():
        raise ValueError(f"{outline.name} has no outline")
    circumference = row.get("head circumference")
    regions.add_mask(mask, FETAL_HEAD, {"head_circumference_mm": circumference} if circumference else None)
    try:
        size = number(row["pixel size"]) if "pixel size" in row else 0.0
    except ValueError as error:
        size = 0.0
        regions.left_out.append(f"pixel size: {error}")
    kept = regions.done()
    sample = make(
        image_id=f"{make.keywords['source']}/{key}",
        image=str(path),
        regions=kept,
        labelled=complete((FETAL_HEAD,), (FETAL_HEAD,), kept, {}),
        spacing=(size, size) if size > 0 else None,
    )
    yield from finish(sample, regions, key)


def fill_outline(outline: np.ndarray) -> np.ndarray:
    """(H, W) bool, the outline of a convex shape → the shape: what lies between two outline pixels of its row or of its
    column. Unlike flooding, that bears gaps, and a shape cut off by the edge of the image."""

    def between(axis: int) -> np.ndarray:
        after = np.maximum.accumulate(outline, axis)
        before = np.flip(np.maximum.accumulate(np.flip(outline, axis), axis), axis)
        return after & before

    return between(0) | between(1)


def _any(mask: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) bool → (H, W): true in any channel."""
    return mask.any(2) if mask.ndim == 3 else mask


# REFUGE


def refuge(root: Path, source: str, licence: str) -> Iterator[Item]:
    """REFUGE: fundus images (.jpg) at any depth, each with a mask of its size and name (.bmp or .png) elsewhere:
    0 optic cup, 128 the rest of the optic disc, 255 elsewhere (https://refuge.grand-challenge.org/Details/).

    The disc includes the cup. An image without a mask is skipped. Patients are not told.
    """
    root = Path(root)
    make = partial(GroundingSample, source=source, modality="fundus", licence=licence)
    masks: dict[str, list[Path]] = {}
    for path in below(root, "**/*.bmp", "**/*.png"):
        masks.setdefault(path.stem, []).append(path)
    for path in below(root, "**/*.jpg"):
        key = name_in(root, path)
        # Two releases in one folder may use a name twice: the mask that shares most of the path is the image's.
        near = max(masks.get(path.stem, []), key=partial(_shared, path), default=None)
        yield Item(key, partial(_read_refuge, path, near, key, make)) if near else skip(key, "no mask of that name")


def _shared(a: Path, b: Path) -> int:
    """How many folders two paths have in common, from the top."""
    return next(n for n in range(len(a.parts), -1, -1) if a.parts[:n] == b.parts[:n])


def _read_refuge(path: Path, mask: Path, key: str, make: partial) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    regions, values = Regions((height, width)), read_image(mask).pixels
    if values.ndim == 3:
        raise ValueError(f"{mask.name} is a colour image, not a mask of 0, 128 and 255")
    if not (values < 192).any():
        raise ValueError(f"{mask.name} shows no optic disc")
    regions.add_mask(values < 192, DISC)
    regions.add_mask(values < 64, CUP)
    kept, source = regions.done(), make.keywords["source"]
    labelled = complete((DISC, CUP), (DISC, CUP) if regions.left_out else (), kept, {})
    ids = {"image_id": f"{source}/{key}", "patient_id": f"{source}/{path.stem}", "image": str(path)}
    yield from finish(make(**ids, regions=kept, labelled=labelled), regions, key)


# IDRiD


def idrid(root: Path, source: str, licence: str) -> Iterator[Item]:
    """IDRiD, `A. Segmentation`: `1. Original Images/a. Training Set/IDRiD_01.jpg` and, in `2. All Segmentation
    Groundtruths/a. Training Set`, a folder of binary masks a lesion: `1. Microaneurysms/IDRiD_01_MA.tif`,
    `2. Haemorrhages` (_HE), `3. Hard Exudates` (_EX), `4. Soft Exudates` (_SE), `5. Optic Disc` (_OD)
    (https://idrid.grand-challenge.org/Data/). `root` is that folder or the one above.

    Every connected part of a lesion mask is a region; the optic disc is one. No mask of a kind means no such lesion, so
    all five are exhaustive. Patients are not told.
    """
    root = Path(root)
    make = partial(GroundingSample, source=source, modality="fundus", licence=licence)
    masks: dict[str, dict[str, Path]] = {}
    for path in sorted({*root.glob("**/* Groundtruths/**/*.tif"), *root.glob("**/* Groundtruths/**/*.png")}):
        kind = path.parent.name.partition(". ")[2]
        if kind in IDRID:
            masks.setdefault(path.stem.rpartition("_")[0], {})[kind] = path
    if not masks:
        raise AnnotationError(f"{root}: no masks in '2. All Segmentation Groundtruths'; is this 'A. Segmentation'?")
    images = index_images(root)
    for name in sorted({*masks, *(stem for stem, paths in images.items() if any(map(_is_photograph, paths)))}):
        paths = [path for path in images.get(name, []) if _is_photograph(path)]
        if not paths:
            yield skip(name, NOT_ON_DISK)
        elif name not in masks:
            yield skip(name_in(root, paths[0]), "no masks of that name")
        else:
            key = name_in(root, paths[0])
            yield Item(key, partial(_read_idrid, paths[0], masks[name], key, make))


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg") and any("Original Images" in part for part in path.parts)


def _read_idrid(path: Path, masks: dict[str, Path], key: str, make: partial) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    regions, unread = Regions((height, width), IDRID), []
    for kind, file in masks.items():
        try:
            mask = _any(read_image(file).pixels != 0)
        except (ValueError, OSError) as error:
            regions.left_out.append(f"{kind}: {error}")
            unread.append(kind)
            continue
        if kind == "Optic Disc" or mask.shape != (height, width):
            regions.add_mask(mask, kind)  # which names a mask of another size
            unread += [kind] * (mask.shape != (height, width))
        else:
            _add_parts(regions, mask, kind)
    kept, source = regions.done(), make.keywords["source"]
    ids = {"image_id": f"{source}/{key}", "patient_id": f"{source}/{path.stem}", "image": str(path)}
    yield from finish(make(**ids, regions=kept, labelled=complete(IDRID, unread, kept, IDRID)), regions, key)


def _add_parts(regions: Regions, mask: np.ndarray, text: str) -> None:
    """One region for every connected part (also over corners) of a (H, W) mask of the image's size."""
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    for k, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
        box = [columns.start, rows.start, columns.stop, rows.stop]
        y, x = np.nonzero(parts[rows, columns] == k)
        coded = _encode_pixels(y + rows.start, x + columns.start, regions.image_size)
        regions.add_box(box, text, mask=coded)


def _encode_pixels(rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> dict:
    """COCO RLE of some pixels of an (H, W) image. A photograph has hundreds of lesions, each a few of its 12 million
    pixels: this does not look at the others."""
    places = np.sort(columns * size[0] + rows)  # COCO counts down the columns
    breaks = np.nonzero(np.diff(places) > 1)[0]
    starts, ends = places[np.r_[0, breaks + 1]], places[np.r_[breaks, len(places) - 1]] + 1
    edges = np.column_stack([starts, ends]).ravel()
    counts = np.diff(np.r_[0, edges, size[0] * size[1]]).tolist()
    coded = rle.frPyObjects({"size": list(size), "counts": counts if counts[-1] else counts[:-1]}, *size)
    return {"size": list(size), "counts": coded["counts"].decode()}
