"""Chest X-rays with one CSV table: NIH's boxes, RSNA pneumonia, VinDr-CXR, and the structures of COVID X-rays."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from grounding.convert.record import AnnotationError, Item, Regions, Skipped, below, finish, frame_scale, load
from grounding.convert.tables import (
    NOT_ON_DISK,
    Row,
    complete,
    corners,
    csv_lines,
    group,
    index_images,
    inside,
    name_in,
    number,
    once,
    read_table,
    skip,
)
from grounding.images import read_image
from grounding.types import GroundingSample

SIDE = 1024  # pixels of the images that NIH and RSNA annotated
NAMES = {
    "Edema": "pulmonary edema",
    "Effusion": "pleural effusion",
    "Enlarged PA": "enlarged pulmonary artery",
    "ILD": "interstitial lung disease",
    "Infiltrate": "infiltration",
    "Lung Opacity": "lung opacity",
    "Nodule/Mass": "nodule or mass",
}
RSNA_CLASS = "Pneumonia"
NO_FINDING = "No finding"
OTHER = ("Other lesion", "Other disease")  # what is not in a class by itself says nothing about where it is absent
OVERLAP = 0.5  # IoU from which two readers' boxes are one finding
STRUCTURES = {
    "Left Lung": "left lung",
    "Right Lung": "right lung",
    "Cardiomediastinum": "cardiomediastinum",
    "Airways": "airways",
    "Ground Glass Opacities": "ground glass opacity",
    "Consolidation": "consolidation",
    "Pleural Effusion": "pleural effusion",
    "Pneumothorax": "pneumothorax",
    "Endotracheal Tube": "endotracheal tube",
    "Central Venous Line": "central venous line",
    "Monitoring Probes": "monitoring probe",
    "Nosogastric Tube": "nasogastric tube",  # the table's spelling
    "Chest Tube": "chest tube",
    "Tubings": "tubing",
}


# NIH


def nih_boxes(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """NIH ChestX-ray14's `BBox_List_2017.csv`: image name, finding, x, y, width, height in pixels of 1024 x 1024.

    The header has three names (``Image Index,Finding Label,Bbox [x,y,w,h]``) for six values, so columns are read by
    place (https://nihcc.app.box.com/v/ChestXray-NIHCC, https://arxiv.org/abs/1705.02315). `images`: a folder with the
    images at any depth (images_001/images/...), `root` where it is not given; boxes follow images that were resized.
    Not every finding of an image has a box: `labelled` is empty. The patient is the name up to "_".
    """
    files = below(root, "*BBox_[Ll]ist_2017*.csv")
    yield from once(_nih(files, index_images(Path(root, images)), source, licence))


def _nih(files: list[Path], found: dict[str, list[Path]], source: str, licence: str) -> Iterator[Item]:
    make = partial(GroundingSample, source=source, modality="xray", licence=licence, labelled=())
    for file in files:
        groups, bad = group(file, _nih_rows(file), "image")
        yield from bad
        for name, rows in groups.items():
            path = next(iter(found.get(name, [])), None)
            yield Item(name, partial(_read_nih, path, name, rows, make)) if path else skip(name, NOT_ON_DISK)


def _nih_rows(file: Path) -> list[Row]:
    """Cells image (its name without suffix), label, x, y, w, h."""
    rows = []
    for line, cells, wrong in csv_lines(file):
        if len(cells) < 6 or any(cells[6:]):
            wrong = wrong or f"{len(cells)} values where a row has 6"
        if cells[:1] != ["Image Index"]:
            cells[:1] = [Path(cell).stem for cell in cells[:1]]
            rows.append(Row(line, dict(zip(("image", "label", *"xywh"), cells, strict=False)), wrong))
    return rows


def _read_nih(path: Path, name: str, rows: list[Row], make: partial) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    regions, scale = Regions((height, width), NAMES), np.tile(frame_scale((SIDE, SIDE), (height, width)), 2)
    for row in rows:
        try:
            box = np.array(corners(*(row.cells[name] for name in "xywh")))
            regions.add_box(box * scale, row.cells["label"])
        except ValueError as error:
            regions.left_out.append(f"line {row.line}: {error}")
    source = make.keywords["source"]
    patient = f"{source}/{name.split('_')[0]}"
    sample = make(image_id=f"{source}/{name}", patient_id=patient, image=str(path), regions=regions.done())
    yield from finish(sample, regions, name)


# RSNA


def rsna_pneumonia(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """RSNA Pneumonia Detection Challenge: `stage_2_train_labels.csv` with patientId, x, y, width, height, Target; one
    row a box, in pixels of the 1024 x 1024 DICOM file `<patientId>.dcm`, and one without a box where Target is 0
    (https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data). `images`: stage_2_train_images, found below
    `root` where it is not given; boxes follow images that were converted to another size.

    Every image was read for pneumonia, so it is labelled exhaustively. The images are NIH ChestX-ray14's under other
    names: a patientId is an image, and the two sources must be audited against each other.
    """
    files = below(root, "stage_2_train_labels.csv", "*/stage_2_train_labels.csv")
    yield from once(_rsna(files, index_images(Path(root, images)), source, licence))


def _rsna(files: list[Path], found: dict[str, list[Path]], source: str, licence: str) -> Iterator[Item]:
    make = partial(GroundingSample, source=source, modality="xray", licence=licence)
    for file in files:
        table = read_table(file, ("patientId", "x", "y", "width", "height", "Target"))
        groups, bad = group(file, table, "patientId")
        yield from bad
        for patient, rows in groups.items():
            path = next(iter(found.get(patient, [])), None)
            yield Item(patient, partial(_read_rsna, path, patient, rows, make)) if path else skip(patient, NOT_ON_DISK)


def _read_rsna(path: Path, patient: str, rows: list[Row], make: partial) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    scale = np.tile(frame_scale((SIDE, SIDE), (height, width)), 2)
    regions, annotated = Regions((height, width), NAMES), []
    for row in rows:
        xywh = [row.cells[name] for name in ("x", "y", "width", "height")]
        if row.cells["Target"] == "0" and not any(xywh):
            continue
        annotated.append(RSNA_CLASS)
        try:
            if row.cells["Target"] != "1":
                raise ValueError(f"Target {row.cells['Target']!r} with the box {', '.join(xywh)}")
            regions.add_box(np.array(corners(*xywh)) * scale, RSNA_CLASS)
        except ValueError as error:
            regions.left_out.append(f"line {row.line}: {error}")
    kept, source = regions.done(), make.keywords["source"]
    sample = make(
        image_id=f"{source}/{patient}",
        patient_id=f"{source}/{patient}",
        image=str(path),
        regions=kept,
        labelled=complete((RSNA_CLASS,), annotated, kept, NAMES),
    )
    yield from finish(sample, regions, patient)


# VinDr-CXR


def vindr_cxr(root: Path, source: str, licence: str, images: str = "", agree: str = "2") -> Iterator[Item]:
    """VinDr-CXR: `annotations/annotations_train.csv` with image_id, rad_id, class_name, x_min, y_min, x_max, y_max in
    pixels of the DICOM files `train/<image_id>.dicom`, three readers an image, and rows "No finding" without a box;
    `annotations_test.csv` is the consensus of five, without rad_id (https://www.physionet.org/content/vindr-cxr/). Also
    the Kaggle release, one `train.csv` of the same columns.

    Several readers become one region a finding by `fuse`: boxes of a class that overlap with IoU 0.5 or more, at most
    one a reader, are averaged, and kept where at least `agree` readers marked it (or all, where fewer read the image).
    The attribute "agreement" says "2/3". A finding without enough readers is named as left out, and its class is
    neither positive nor negative in that image; all other classes of the file are exhaustive, but for "Other lesion".
    Where the table has columns width and height, as tables beside resized images do, boxes follow them; without them a
    box beyond the image skips it. `images`: the folder of the images, `root` where not given. Patients are not told.
    """
    if not agree.isdecimal() or int(agree) < 1:
        raise AnnotationError(f"agree={agree}: give the number of readers that must agree, for example 2")
    files = below(root, "annotations/annotations_*.csv", "annotations_*.csv", "train.csv")
    yield from once(_vindr(files, index_images(Path(root, images)), int(agree), source, licence))


def _vindr(files: list[Path], found: dict[str, list[Path]], agree: int, source: str, licence: str) -> Iterator[Item]:
    make = partial(GroundingSample, source=source, modality="xray", licence=licence)
    for file in files:
        table = read_table(file, ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max"))
        names = {row.cells["class_name"] for row in table if not row.wrong and row.cells["class_name"] != NO_FINDING}
        groups, bad = group(file, table, "image_id")
        yield from bad
        classes = tuple(sorted(names.difference(OTHER)))
        for image, rows in groups.items():
            path = next(iter(found.get(image, [])), None)
            read = partial(_read_vindr, path, image, rows, agree, classes, make)
            yield Item(image, read) if path else skip(image, NOT_ON_DISK)


def _read_vindr(
    path: Path, image: str, rows: list[Row], agree: int, classes: tuple[str, ...], make: partial
) -> Iterable[GroundingSample | Skipped]:
    size = load(str(path)).pixels.shape[:2]
    regions, annotated = Regions((size[0], size[1]), NAMES), []
    readers = {row.cells.get("rad_id", "") for row in rows}
    marks: dict[str, list[tuple[str, np.ndarray]]] = {}
    for row in rows:
        name = row.cells["class_name"]
        if name == NO_FINDING:
            continue
        try:
            marks.setdefault(name, []).append((row.cells.get("rad_id", f"{row.line}"), _vindr_box(row, size)))
        except ValueError as error:
            annotated.append(name)
            regions.left_out.append(f"line {row.line}: {name}: {error}")
    ends = np.array([box[2:] for boxes in marks.values() for _, box in boxes]).reshape(-1, 2)
    if (ends > 1.05 * np.array(size[::-1])).any():
        raise ValueError(f"boxes reach {ends.max(0).tolist()} on an image of {size[1]} x {size[0]}; was it resized?")
    told = any(row.cells.get("rad_id") for row in rows)
    for name, boxes in marks.items():
        for box, votes in fuse(boxes) if told else [(box, agree) for _, box in boxes]:
            annotated.append(name)
            if votes < min(agree, len(readers)):
                regions.left_out.append(f"{name}: {votes} of {len(readers)} readers marked it, {agree} must")
            else:
                regions.add_box(box.tolist(), name, {"agreement": f"{votes}/{len(readers)}"} if told else None)
    kept, source = regions.done(), make.keywords["source"]
    ids = {"image_id": f"{source}/{image}", "patient_id": f"{source}/{image}", "image": str(path)}
    yield from finish(make(**ids, regions=kept, labelled=complete(classes, annotated, kept, NAMES)), regions, image)


def _vindr_box(row: Row, size: tuple[int, int]) -> np.ndarray:
    """xyxy in pixels of the (H, W) image on disk. Raises ValueError where it is no box of that image."""
    box = np.array([number(row.cells[name]) for name in ("x_min", "y_min", "x_max", "y_max")])
    if (box[2:] <= box[:2]).any():
        raise ValueError(f"box {box.tolist()} is inverted or has no area")
    if row.cells.get("width") and row.cells.get("height"):
        return box * np.tile(frame_scale((number(row.cells["height"]), number(row.cells["width"])), size), 2)
    return box


def fuse(marks: Sequence[tuple[str, np.ndarray]]) -> list[tuple[np.ndarray, int]]:
    """(reader, xyxy box) of one class in one image → (mean box, number of readers) of each finding.

    Weighted box fusion with equal weights (Solovyev, Wang, Gabruseva, https://arxiv.org/abs/1910.13302): a box joins
    the finding whose mean so far it overlaps most, if that is IoU `OVERLAP` or more and its reader is not in it yet,
    and opens a new finding otherwise. Larger boxes go first, so that the order of the rows does not matter.
    """
    findings: list[dict[str, np.ndarray]] = []
    for reader, box in sorted(marks, key=lambda mark: (-np.prod(mark[1][2:] - mark[1][:2]), *mark[1], mark[0])):
        others = [finding for finding in findings if reader not in finding]
        overlaps = [_iou(np.mean(list(finding.values()), 0), box) for finding in others]
        if overlaps and max(overlaps) >= OVERLAP:
            others[int(np.argmax(overlaps))][reader] = box
        else:
            findings.append({reader: box})
    return [(np.mean(list(finding.values()), 0), len(finding)) for finding in findings]


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    both = np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0))
    return float(both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both))


# COVID structures


def covid_structures(root: Path, source: str, licence: str) -> Iterator[Item]:
    """Segmentations of COVID-19 chest X-rays: `structure.csv`, one row a structure, with Template Name, Filename,
    Image, Mask, Resolution, Top, Left, Width, Height; `images/<Filename>`; `masks/...png`, a crop of Width x Height
    pixels that belongs at Left, Top (https://github.com/GeneralBlockchain/covid-19-chest-xray-segmentations-dataset).

    The column Image names the file by a hash, the folder by Filename: both are tried. A row without a mask says that
    the structure is there, not where: it is left out, and its class is not exhaustive in that image; the others are.
    `metadata.csv` (filename, patientid, license), where it is there, tells the patients, and the licence of each image;
    `licence` is for images that name none.
    """
    yield from once(_covid(Path(root), below(root, "structure.csv")[0], source, licence))


def _covid(root: Path, file: Path, source: str, licence: str) -> Iterator[Item]:
    table = read_table(file, ("Template Name", "Filename", "Image", "Mask", "Top", "Left", "Width", "Height"))
    groups, bad = group(file, table, "Filename")
    yield from bad
    found, known = index_images(root / "images"), _covid_metadata(root)
    for name, rows in groups.items():
        stems = (Path(name).stem, Path(rows[0].cells["Image"]).stem)
        path = next((paths[0] for stem in stems if (paths := found.get(stem))), None)
        facts = known.get(name, {})
        make = partial(
            GroundingSample,
            source=source,
            modality="xray",
            patient_id=f"{source}/{facts.get('patientid') or Path(name).stem}",
            licence=facts.get("license") or licence,
        )
        if path is None:
            yield skip(name, NOT_ON_DISK)
        else:
            key = name_in(root / "images", path)
            yield Item(key, partial(_read_covid, path, root, key, rows, make))


def _covid_metadata(root: Path) -> dict[str, dict[str, str]]:
    file = inside(Path(root), "metadata.csv")
    rows = read_table(file, ("filename", "patientid")) if file else []
    return {row.cells["filename"]: row.cells for row in rows if not row.wrong}


def _read_covid(
    path: Path, root: Path, key: str, rows: list[Row], make: partial
) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    said = rows[0].cells.get("Resolution", "")
    if said and said != f"{width}x{height}":
        raise ValueError(f"image of {width}x{height} where the table says {said}; was it resized?")
    regions = Regions((height, width), STRUCTURES)
    for row in rows:
        try:
            regions.add_mask(_paste(root, row, (height, width)), row.cells["Template Name"])
        except (ValueError, OSError) as error:
            regions.left_out.append(f"line {row.line}: {row.cells['Template Name']}: {error}")
    kept, source = regions.done(), make.keywords["source"]
    sample = make(
        image_id=f"{source}/{key}",
        image=str(path),
        regions=kept,
        labelled=complete(STRUCTURES, [row.cells["Template Name"] for row in rows], kept, STRUCTURES),
    )
    yield from finish(sample, regions, key)


def _paste(root: Path, row: Row, size: tuple[int, int]) -> np.ndarray:
    """The row's mask on the whole image, (H, W) bool. Raises ValueError where it does not fit."""
    file = inside(root, row.cells["Mask"])
    if file is None:
        raise ValueError("mask is not on disk" if row.cells["Mask"] else "no mask")
    crop = read_image(file).pixels != 0  # not `load`, which is to remember the image
    crop = crop.any(2) if crop.ndim == 3 else crop
    top, left, width, height = (int(number(row.cells[key])) for key in ("Top", "Left", "Width", "Height"))
    if not crop.any():
        raise ValueError("mask is empty")
    if crop.shape != (height, width):
        raise ValueError(f"mask of {crop.shape[1]} x {crop.shape[0]} where the table says {width} x {height}")
    if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"mask at {left}, {top} reaches out of the image")
    whole = np.zeros(size, bool)
    whole[top : top + height, left : left + width] = crop
    return whole
