"""Collections of medical masks: BiomedParse, IMed-361M, SA-Med2D-20M, and MedSAM's npz files.

Dimension key: C classes, D slices, H, W one image.
"""

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from grounding.convert.record import AnnotationError, Item, Regions, Skipped, below, find_labels, finish, load
from grounding.convert.tables import NOT_ON_DISK, inside, read_json, skip
from grounding.convert.volume_layouts import label_values, modality_of, spoken
from grounding.convert.volumes import pieces, png
from grounding.images import MAX_VOXELS, MODALITIES, read_image
from grounding.pixels import to_uint8
from grounding.types import GroundingSample

MAX_BYTES = 2**30  # of an npz file's arrays, unpacked
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


# BiomedParse


def biomedparse(root: Path, source: str, licence: str) -> Iterator[Item]:
    """``train/ID_MODALITY_SITE.png`` with masks ``train_mask/ID_MODALITY_SITE_TARGET.png``, where + stands for a space
    in TARGET, which holds no underscore; foreground is not zero; in `root` or in folders of it
    (https://github.com/microsoft/BiomedParse, "Dataset Description and Preparation").

    A mask holds all of its target in the image, but what was looked for without success is not told: an image is
    labelled for the targets it has. Patients are not told. Images of other modalities than ours (OCT) are skipped.
    """
    root = Path(root)
    folders = [path for path in sorted(root.glob("**/*_mask")) if path.is_dir()]
    if not folders:
        raise AnnotationError(f"{root}: no folder such as train_mask beside train; is this a BiomedParse folder?")
    for folder in folders:
        images = folder.with_name(folder.name.removesuffix("_mask"))
        masks: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*.png")):
            masks.setdefault(path.stem.rpartition("_")[0], []).append(path)
        for path in sorted(images.glob("*.png")):
            own = tuple(masks.pop(path.stem, ()))
            yield Item(path.relative_to(root).as_posix(), partial(_read_biomedparse, path, own, root, source, licence))
        for path in (path for orphans in masks.values() for path in orphans):
            yield skip(path.relative_to(root).as_posix(), "mask without an image")


def _read_biomedparse(
    path: Path, masks: tuple[Path, ...], root: Path, source: str, licence: str
) -> Iterator[GroundingSample | Skipped]:
    parts = path.stem.rsplit("_", 2)
    if len(parts) != 3:
        raise ValueError("name is not ID_MODALITY_SITE.png")
    image, modality = load(str(path)), _ours(parts[1])
    texts = {mask: mask.stem.rpartition("_")[2].replace("+", " ") for mask in masks}
    regions, short = Regions(image.pixels.shape[:2], modality=modality), set()
    for mask, text in texts.items():
        kept = len(regions.left_out)
        _add_file(regions, mask, text)
        short |= {text} if len(regions.left_out) > kept else set()
    key = path.relative_to(root).with_suffix("").as_posix()
    sample = GroundingSample(
        image_id=f"{source}/{key}",
        patient_id=f"{source}/{path.stem}",
        source=source,
        modality=modality,
        image=str(path),
        regions=regions.done(),
        labelled=find_labels((text for text in texts.values() if text not in short), modality),
        licence=licence,
    )
    yield from finish(sample, regions, key)


def _add_file(regions: Regions, path: Path, text: str) -> None:
    """One region of a mask file; one that cannot be read is left out."""
    try:
        pixels = read_image(path).pixels
        regions.add_mask(pixels.any(-1) if pixels.ndim == 3 else pixels, text)
    except (ValueError, OSError) as error:
        regions.left_out.append(f"{text}: {path.name}: {str(error).splitlines()[0]}")


def _ours(word: str) -> str:
    modality = modality_of(word)
    if modality is None:
        raise ValueError(f"modality {word!r} is none of ours")
    return modality


# IMed-361M


def imed361m(root: Path, source: str, licence: str) -> Iterator[Item]:
    """``DATASET/dataset.json`` with ``labels`` ``{"0": "background", "1": "spleen"}``, ``modality`` and lists
    ``training`` and ``test`` of ``{"image": "image/A_1.png", "label": "label/x___A_1.(13, 512, 512, 1).npz"}``: scipy
    sparse matrices of (C, H * W), a row a class without background, with their shape in the name
    (https://github.com/uni-medical/IMIS-Bench, "Datasets"; https://huggingface.co/datasets/General-Medical-AI/IMed-361M).
    ``imask`` are pseudo-labels, which are not read.

    An image of CT or MRI whose label starts with an axis is a slice: its last number is `frame`, the rest of its name
    the volume and the patient. Raises AnnotationError where there is no dataset.json, or one without labels.
    """
    root = Path(root)
    for file in below(root, "dataset.json", "*/dataset.json"):
        about = read_json(file)
        about = about if isinstance(about, dict) else {}
        classes = tuple(name for _, name in sorted(label_values(about.get("labels"), file)))
        words = about.get("modality")
        word = str(next(iter(words.values()), "")) if isinstance(words, dict) else str(words)
        for part in ("training", "test"):
            for k, entry in enumerate(about[part] if isinstance(about.get(part), list) else []):
                image, label = (entry.get(key) if isinstance(entry, dict) else None for key in ("image", "label"))
                key = (file.parent.relative_to(root) / f"dataset.json:{part}[{k}]").as_posix()
                if not isinstance(image, str) or not isinstance(label, str):
                    yield skip(key, "entry has no image and label")
                elif inside(file.parent, image) is None or inside(file.parent, label) is None:
                    yield skip(key, f"{NOT_ON_DISK}, or its label: {image}")
                else:
                    path, mask = file.parent / image, file.parent / label
                    name = path.relative_to(root).with_suffix("").as_posix()
                    yield Item(name, partial(_read_imed, path, mask, name, classes, word, source, licence))


def _read_imed(
    path: Path, label: Path, name: str, classes: tuple[str, ...], word: str, source: str, licence: str
) -> Iterator[GroundingSample | Skipped]:
    modality, size = _ours(word), load(str(path)).pixels.shape[:2]
    masks = sparse_masks(label, size)
    if masks.shape[0] != len(classes):
        raise ValueError(f"{masks.shape[0]} masks, where dataset.json names {len(classes)} classes")
    regions = Regions(size, {text: spoken(text) for text in classes}, modality)
    for text, mask in zip(classes, masks, strict=True):
        for piece in pieces(mask, regions.names[text]) if mask.any() else ():
            regions.add_mask(piece, text)
    place = re.fullmatch(r"(.+)_(\d+)", name) if label.name[:4] in ("x___", "y___", "z___") else None
    place = place if modality in ("ct", "mri") else None
    sample = GroundingSample(
        image_id=f"{source}/{name}",
        patient_id=f"{source}/{place[1] if place else name}",
        source=source,
        modality=modality,
        image=str(path),
        regions=regions.done(),
        labelled=find_labels(regions.names.values(), modality),
        study_id=f"{source}/{place[1]}" if place else None,
        frame=int(place[2]) if place else None,
        licence=licence,
    )
    yield from finish(sample, regions, name)


def sparse_masks(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(C, H, W) bool of a scipy sparse matrix (C, H * W) in an npz file, for an image of (H, W). Raises ValueError
    where it is another size, is broken, or holds pickled objects.

    The arrays are put together here, every index checked: scipy's compiled loops do not, and crash on a broken file.
    """
    named = re.search(r"\((\d+), (\d+), (\d+), 1\)\.npz$", path.name)
    if named and (int(named[2]), int(named[3])) != size:
        raise ValueError(f"masks of {named[3]} x {named[2]} on an image of {size[1]} x {size[0]}")
    arrays = load_npz(path)
    if missing := {"format", "shape", "data"} - arrays.keys():
        raise ValueError(f"not a sparse matrix: has no {', '.join(sorted(missing))}")
    count, length = map(int, _whole(arrays["shape"], 2))
    if length != size[0] * size[1] or not 1 <= count <= MAX_VOXELS // length:
        raise ValueError(f"masks of shape {(count, length)} on an image of {size[1]} x {size[0]}")
    try:
        rows, columns = _coordinates(arrays, (count, length))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a sparse matrix ({error})") from error
    if arrays["data"].shape != rows.shape or arrays["data"].dtype.kind not in "biuf":
        raise ValueError(f"{len(rows)} places and data of shape {arrays['data'].shape}")
    masks, inside = np.zeros((count, length), bool), arrays["data"] != 0
    masks[rows[inside], columns[inside]] = True
    return masks.reshape(count, *size)


def _coordinates(arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of every value of a matrix in rows (csr), columns (csc) or coordinates (coo)."""
    kind = arrays["format"].tolist()
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else kind
    if kind == "coo":
        pair = arrays["coords"] if "coords" in arrays else np.stack([arrays[key] for key in ("row", "col")])
        rows, columns = (_whole(one) for one in pair)
    elif kind in ("csr", "csc"):
        inner, starts = _whole(arrays["indices"]), _whole(arrays["indptr"])
        lines = shape[0] if kind == "csr" else shape[1]
        lengths = np.diff(starts)
        if len(starts) != lines + 1 or starts[0] != 0 or lengths.min() < 0 or starts[-1] != len(inner):
            raise ValueError("not a sparse matrix: indptr does not fit")
        outer = np.repeat(np.arange(lines), lengths)
        rows, columns = (outer, inner) if kind == "csr" else (inner, outer)
    else:
        raise ValueError(f"a sparse matrix of format {str(kind)[:20]!r}; csr, csc and coo are read")
    for places, end in zip((rows, columns), shape, strict=True):
        if len(places) and not 0 <= places.min() <= places.max() < end:
            raise ValueError("not a sparse matrix: an index lies outside of it")
    return rows, columns


def _whole(values: np.ndarray, count: int | None = None) -> np.ndarray:
    """(n,) int64. Raises ValueError where it is none, or not of `count` values."""
    if values.ndim != 1 or values.dtype.kind not in "iu" or (count is not None and len(values) != count):
        raise ValueError(f"not a sparse matrix: {values.dtype} of shape {values.shape}")
    return values.astype(np.int64)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file, by name, never unpickled. Raises ValueError as `check_npz`, and for a broken file."""
    check_npz(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError):
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError ...
        raise ValueError(f"{path.name}: cannot be read ({type(error).__name__}: {error})") from error


def check_npz(path: Path) -> None:
    """Looks at the headers of an npz file's arrays alone. Raises ValueError for pickled objects, for more than
    MAX_BYTES in all, and for an array that claims another size than it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(_check_member(archive, info) for info in archive.infolist())
        if total > MAX_BYTES:
            raise ValueError(f"{path.name}: {total:,} bytes, where {MAX_BYTES:,} are the most")
    except (ValueError, OSError):
        raise
    except Exception as error:  # BadZipFile, zlib.error, NotImplementedError, RuntimeError (encrypted) ...
        raise ValueError(f"{path.name}: not an npz file ({type(error).__name__}: {error})") from error


def _check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Its bytes."""
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version not in HEADERS:
            raise ValueError(f"{info.filename}: npy version {version} is not read")
        shape, _, dtype = HEADERS[version](member)
        if dtype.hasobject:
            raise ValueError(f"{info.filename}: holds pickled objects, which are not read")
        claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    if claimed != held:
        raise ValueError(f"{info.filename}: claims {claimed:,} bytes, and holds {held:,}")
    return claimed


# SA-Med2D-20M


def samed2d(root: Path, source: str, licence: str) -> Iterator[Item]:
    """``SAMed2D_v1.json``, ``{"images/MODALITY--DATASET--CASE--x_0040.png": ["masks/...--x_0040--0001_000.png"]}``,
    where the last part is the class and the instance, and ``SAMed2D_v1_class_mapping_id.json``, ``{DATASET: {class:
    number}}`` (https://huggingface.co/datasets/OpenGVLab/SA-Med2D-20M, https://arxiv.org/abs/2311.11969).

    A mask is a region. Nothing counts as labelled exhaustively, since the release does not say so. CASE is the patient;
    the letter and number are the axis and the slice. Images of PET, which is none of our modalities, are skipped.
    """
    root = Path(root)
    listed = read_json(below(root, "SAMed2D_v1.json")[0])
    classes = read_json(below(root, "SAMed2D_v1_class_mapping_id.json")[0])
    if not isinstance(listed, dict) or not isinstance(classes, dict):
        raise AnnotationError(f"{root}: SAMed2D_v1.json and its class mapping are not JSON objects; fetch them again")
    for image, masks in listed.items():
        parts = Path(image).stem.split("--")
        path = inside(root, image)
        if len(parts) != 4 or not re.fullmatch(r"[xyz]_\d+", parts[3]):
            yield skip(image, "name is not MODALITY--DATASET--CASE--x_0040.png")
        elif path is None:
            yield skip(image, NOT_ON_DISK)
        elif not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
            yield skip(image, "its masks are not a list of names")
        else:
            table = classes.get(parts[1])
            words = {str(number): text for text, number in table.items()} if isinstance(table, dict) else {}
            yield Item(image, partial(_read_samed2d, root, image, parts, masks, words, source, licence))


def _read_samed2d(
    root: Path, image: str, parts: list[str], masks: list[str], words: Mapping[str, str], source: str, licence: str
) -> Iterator[GroundingSample | Skipped]:
    modality, path = _ours(parts[0]), root / image
    regions = Regions(load(str(path)).pixels.shape[:2], {text: spoken(text) for text in words.values()}, modality)
    for mask in masks:
        number, file = re.search(r"--0*(\d+)_\d+\.png$", mask), inside(root, mask)
        text = words.get(number[1]) if number else None
        if text is None or file is None:
            why = "is not on disk" if file is None else "has a class that the mapping does not name"
            regions.left_out.append(f"{mask}: {why}")
        else:
            _add_file(regions, file, text)
    axis, frame = parts[3].split("_")
    case = f"{source}/{parts[1]}/{parts[2]}"
    sample = GroundingSample(
        image_id=f"{source}/{Path(image).stem}",
        patient_id=case,
        source=source,
        modality=modality,
        image=str(path),
        regions=regions.done(),
        labelled=(),
        study_id=f"{case}/{parts[0]}/{axis}",
        frame=int(frame),
        licence=licence,
    )
    yield from finish(sample, regions, image)


# MedSAM


def medsam(root: Path, source: str, licence: str, labels: str, modality: str = "") -> Iterator[Item]:
    """``MODALITY_ANATOMY_CASE.npz`` with ``imgs`` (D, H, W) or (H, W, 3) of 0 to 255, ``gts`` (D, H, W) or (H, W) of
    class numbers, and for volumes ``spacing`` (x, y, z) (https://github.com/bowang-lab/MedSAM/blob/main/pre_CT_MR.py,
    https://github.com/bowang-lab/MedSAM/blob/main/pre_grey_rgb.py); one item is one file.

    labels: what the numbers mean, which the files do not tell: ``1:liver,2:right kidney``. modality: instead of that of
    the name. `frame` counts the slices that the file holds, which leaves out those without a label. An image is
    labelled for the classes that occur in its file: others may have been removed from it.
    Raises AnnotationError where `labels` is not such a table, or there is no npz file.
    """
    root = Path(root)
    names = {}
    for entry in filter(None, labels.split(",")):
        value, _, phrase = entry.partition(":")
        if not value.strip().isdecimal() or not phrase.strip():
            raise AnnotationError(f"labels={entry}: write a number and a phrase, as in 1:liver")
        names[int(value)] = phrase.strip()
    if not names or (modality and modality not in MODALITIES.values()):
        raise AnnotationError(f"labels={labels}, modality={modality}: write for example labels=1:liver and modality=ct")
    for path in below(root, "**/*.npz"):
        key = path.relative_to(root).as_posix()
        yield Item(key, partial(_read_medsam, path, key.removesuffix(".npz"), names, modality, source, licence))


def _read_medsam(
    path: Path, key: str, names: Mapping[int, str], modality: str, source: str, licence: str
) -> Iterator[GroundingSample | Skipped]:
    modality = modality or _ours(path.name.split("_")[0])
    images, labels, spacing = _medsam_arrays(path)
    volume = labels.ndim == 3
    labelled = find_labels((names[value] for value in np.unique(labels).tolist() if value in names), modality)
    pairs = zip(images, labels, strict=True) if volume else [(images, labels)]
    for frame, (pixels, values) in enumerate(pairs):
        regions = Regions(values.shape, modality=modality)
        for value in np.unique(values).tolist():
            if value in names:
                for piece in pieces(values == value, names[value]):
                    regions.add_mask(piece, names[value])
            elif value:
                regions.left_out.append(f"value {value} has no name; give labels={value}:...")
        sample = GroundingSample(
            image_id=f"{source}/{key}/{frame:04d}" if volume else f"{source}/{key}",
            patient_id=f"{source}/{key}",
            source=source,
            modality=modality,
            image=png(to_uint8(pixels, 0, 255)),
            regions=regions.done(),
            labelled=labelled,
            spacing=spacing,
            study_id=f"{source}/{key}" if volume else None,
            frame=frame if volume else None,
            licence=licence,
        )
        yield from finish(sample, regions, f"{key}:{frame}")


def _medsam_arrays(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float] | None]:
    """(imgs, gts, mm a pixel (row, column) or None). Raises ValueError where they do not belong together."""
    arrays = load_npz(path)
    if "imgs" not in arrays or "gts" not in arrays:
        raise ValueError("has no imgs and gts")
    images, labels = arrays["imgs"], arrays["gts"]
    colour = images.shape[labels.ndim :]
    if labels.ndim not in (2, 3) or images.shape[: labels.ndim] != labels.shape or colour not in ((), (3,)):
        raise ValueError(f"imgs of {images.shape} and gts of {labels.shape}")
    if labels.dtype.kind not in "biu" or images.dtype.kind not in "biuf" or min(labels.shape) < 1:
        raise ValueError(f"imgs of {images.dtype} and gts of {labels.dtype}")
    if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 255):
        raise ValueError("imgs are not between 0 and 255")
    return images, labels, _medsam_spacing(arrays["spacing"]) if "spacing" in arrays and labels.ndim == 3 else None


def _medsam_spacing(values: np.ndarray) -> tuple[float, float] | None:
    """SimpleITK's order is x, y, z: columns before rows."""
    if values.shape != (3,) or values.dtype.kind not in "iuf" or not (np.isfinite(values).all() and values.min() > 0):
        return None
    return float(values[1]), float(values[0])
