"""Chest X-rays with one JSON list: ChestX-Det10, ChestX-Det, PadChest-GR and MS-CXR (also its CSV form)."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grounding.convert.record import (
    AnnotationError,
    Item,
    Regions,
    Skipped,
    add_polygon_rings,
    below,
    finish,
    frame_scale,
    load,
)
from grounding.convert.tables import (
    NOT_ON_DISK,
    complete,
    corners,
    index_images,
    inside,
    name_in,
    number,
    numbers,
    once,
    read_json,
    read_json_list,
    read_table,
    skip,
)
from grounding.types import GroundingSample, RegionSet

SIDE = 1024  # pixels of the images that ChestX-Det was annotated on
DET10_CLASSES = (
    "Atelectasis",
    "Calcification",
    "Consolidation",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Fracture",
    "Mass",
    "Nodule",
    "Pneumothorax",
)
DET_CLASSES = (*DET10_CLASSES, "Cardiomegaly", "Diffuse Nodule", "Pleural Thickening")
NAMES = {"Effusion": "pleural effusion", "Edema": "pulmonary edema", "Lung Opacity": "lung opacity"}
MSCXR_COLUMNS = ("dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height")


# ChestX-Det10 and ChestX-Det


def chestx_det10(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """ChestX-Det10: `train.json`, `test.json`, in `root` or `root/annotations`, each a list of ``{"file_name", "syms",
    "boxes"}`` with xyxy boxes in pixels of 1024 x 1024 images (https://github.com/Deepwise-AILab/ChestX-Det10-Dataset).

    `images`: the folder that train_data and test_data lie in, `root` where it is not given. Boxes follow images that
    were resized. Empty lists are images without a finding. The ten classes are annotated exhaustively. Patients are not
    told; the images are from NIH ChestX-ray14 under other names, so audit the two against each other.
    Raises AnnotationError where there is no annotation file, or one is not a JSON list.
    """
    files = below(root, "train.json", "test.json", "annotations/train.json", "annotations/test.json")
    yield from once(_chestx(files, Path(root, images), DET10_CLASSES, source, licence))


def chestx_det(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """ChestX-Det: as ChestX-Det10, in `ChestX_Det_train.json` and `ChestX_Det_test.json`, with three more classes and
    ``"polygons"``, one list of [x, y] points a region (https://github.com/Deepwise-AILab/ChestX-Det-Dataset). A
    region's box is that of its polygon, which differs from the list's by up to 9 pixels."""
    files = below(root, "ChestX_Det_*.json", "annotations/ChestX_Det_*.json")
    yield from once(_chestx(files, Path(root, images), DET_CLASSES, source, licence))


def _chestx(files: list[Path], folder: Path, classes: tuple[str, ...], source: str, licence: str) -> Iterator[Item]:
    found = index_images(folder)
    make = partial(GroundingSample, source=source, modality="xray", licence=licence)
    for file in files:
        split = "test" if "test" in file.stem.lower() else "train"
        for k, entry in enumerate(read_json_list(file)):
            name = entry.get("file_name") if isinstance(entry, dict) else None
            path = _of_split(found.get(Path(name).stem, []), folder, split) if isinstance(name, str) else None
            if not isinstance(name, str):
                yield skip(f"{file.name}[{k}]", "entry has no file_name")
            elif path is None:
                yield skip(f"{split}/{name}", NOT_ON_DISK)
            else:
                yield Item(name_in(folder, path), partial(_read_chestx, path, folder, entry, classes, make))


def _of_split(paths: list[Path], folder: Path, split: str) -> Path | None:
    """The image in a folder of the split, should both splits have one of that name."""
    own = [path for path in paths if any(part.startswith(split) for part in path.relative_to(folder).parts)]
    return next(iter([*own, *paths]), None)


def _read_chestx(
    path: Path, folder: Path, entry: dict, classes: tuple[str, ...], make: partial
) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    scale = np.array(frame_scale((SIDE, SIDE), (height, width)))
    names, boxes, polygons = entry.get("syms"), entry.get("boxes"), entry.get("polygons")
    if not isinstance(names, list) or not isinstance(boxes, list) or len(names) != len(boxes):
        raise ValueError("syms and boxes are not two lists of one length")
    if polygons is not None and (not isinstance(polygons, list) or len(polygons) != len(names)):
        raise ValueError("polygons is not a list as long as syms")
    regions = Regions((height, width), NAMES)
    for k, (name, box) in enumerate(zip(map(str, names), boxes, strict=True)):
        try:
            if polygons is None:
                regions.add_box(np.array(numbers(box, 4)) * np.tile(scale, 2), name)
            else:
                add_polygon_rings(regions, [(_ring(polygons[k]) * scale).ravel().tolist()], name, {})
        except ValueError as error:
            regions.left_out.append(f"{name}: {error}")
    kept, image = regions.done(), name_in(folder, path)
    sample = make(
        image_id=f"{make.keywords['source']}/{image}",
        patient_id=f"{make.keywords['source']}/{path.stem}",
        image=str(path),
        regions=kept,
        labelled=complete(classes, map(str, names), kept, NAMES),
    )
    yield from finish(sample, regions, image)


def _ring(points: Any) -> np.ndarray:
    """(N, 2) float64 of a list of [x, y]. Raises ValueError."""
    if not isinstance(points, list):
        raise ValueError("a polygon is not a list of points")
    return np.array([numbers(point, 2) for point in points], np.float64).reshape(-1, 2)


# Regions that a sentence names


def _sentences_as_texts(regions: RegionSet) -> RegionSet:
    """The attribute "sentence" becomes the text, the source's word for the finding the attribute "category"."""
    rows = regions.attributes or []
    return replace(
        regions,
        texts=[row["sentence"] for row in rows],
        attributes=[
            {"category": text} | {key: value for key, value in row.items() if key != "sentence"}
            for text, row in zip(regions.texts or [], rows, strict=True)
        ]
        or None,
    )


# PadChest-GR


def padchest_gr(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """PadChest-GR: `grounded_reports_*.json`, a list of studies ``{"StudyID", "ImageID", "findings": [{"sentence_en",
    "abnormal", "boxes", "extra_boxes", "labels", "locations", "progression"}]}``, boxes xyxy in [0, 1]; findings that
    are absent mostly lack the last five (https://arxiv.org/html/2411.05085v1,
    https://bimcv.cipf.es/bimcv-projects/padchest-gr/). `master_table.csv`, where it is there, tells the patients.

    A region's label is the finding's first label, its text the English sentence; further labels, locations and
    progression are attributes. `boxes` are one reader's; `extra_boxes`, a second reader's of the same sentence, are not
    added to them, since that would annotate the finding twice. Exhaustive are the labels all of whose sentences have
    boxes, and, where no finding of the study is abnormal, every label of the file, since the lists are complete.
    """
    files = below(root, "grounded_reports*.json", "*/grounded_reports*.json")
    yield from once(_padchest(files, Path(root, images), _padchest_patients(root), source, licence))


def _padchest(files: list[Path], folder: Path, patients: dict[str, str], source: str, licence: str) -> Iterator[Item]:
    found = index_images(folder)
    make = partial(GroundingSample, source=source, modality="xray", licence=licence)
    for file in files:
        studies = read_json_list(file)
        vocabulary = tuple(sorted({_first_label(finding) for study in studies for finding in _boxed(study)}))
        for k, study in enumerate(studies):
            image = study.get("ImageID") if isinstance(study, dict) else None
            paths = found.get(Path(image).stem, []) if isinstance(image, str) else []
            if not isinstance(image, str):
                yield skip(f"{file.name}[{k}]", "study has no ImageID")
            elif not paths:
                yield skip(image, NOT_ON_DISK)
            else:
                who = f"{source}/{patients.get(image, study.get('StudyID', Path(image).stem))}"
                read = partial(_read_padchest, paths[0], folder, study, vocabulary, partial(make, patient_id=who))
                yield Item(name_in(folder, paths[0]), read)


def _padchest_patients(root: Path) -> dict[str, str]:
    file = inside(Path(root), "master_table.csv")
    rows = read_table(file, ("ImageID", "PatientID")) if file else []
    return {row.cells["ImageID"]: row.cells["PatientID"] for row in rows if not row.wrong}


def _findings(study: Any) -> list[dict]:
    findings = study.get("findings") if isinstance(study, dict) else None
    return [finding for finding in findings if isinstance(finding, dict)] if isinstance(findings, list) else []


def _boxed(study: Any) -> list[dict]:
    return [finding for finding in _findings(study) if finding.get("boxes") and finding.get("abnormal") is not False]


def _first_label(finding: dict) -> str:
    return next(iter(_strings(finding.get("labels"))), str(finding.get("sentence_en", "finding")))


def _strings(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _read_padchest(
    path: Path, folder: Path, study: dict, vocabulary: tuple[str, ...], make: partial
) -> Iterable[GroundingSample | Skipped]:
    if not isinstance(study.get("findings"), list):
        raise ValueError("study has no list of findings")
    height, width = load(str(path)).pixels.shape[:2]
    regions = Regions((height, width), NAMES)
    findings = _findings(study)
    regions.left_out += ["finding: not an object"] * (len(study["findings"]) - len(findings))
    annotated = [name for finding in findings for name in _add_finding(regions, finding, width, height)]
    kept = regions.done()
    absent = [finding.get("abnormal") is False for finding in findings]
    normal = bool(absent) and all(absent) and not regions.left_out
    image, source = name_in(folder, path), make.keywords["source"]
    sample = make(
        image_id=f"{source}/{image}",
        study_id=f"{source}/{study.get('StudyID', path.stem)}",
        image=str(path),
        regions=_sentences_as_texts(kept),
        labelled=complete(vocabulary if normal else dict.fromkeys(kept.texts or []), annotated, kept, NAMES),
    )
    yield from finish(sample, regions, image)


def _add_finding(regions: Regions, finding: dict, width: int, height: int) -> list[str]:
    """Adds the boxes of a finding. Returns its label once a box, and once where it is there but has no box."""
    label, boxes = _first_label(finding), finding.get("boxes") or []
    attributes = {"sentence": str(finding.get("sentence_en", label)), **_finding_attributes(finding)}
    if finding.get("abnormal") is False:
        regions.left_out += [f"{label}: boxes of a finding that is said to be absent"] * bool(boxes)
        return []
    if not isinstance(boxes, list):
        regions.left_out.append(f"{label}: boxes is not a list")
        return [label]
    for box in boxes:
        try:
            regions.add_box(np.array(numbers(box, 4)) * [width, height, width, height], label, attributes)
        except ValueError as error:
            regions.left_out.append(f"{label}: {error}")
    return [label] * max(1, len(boxes))


def _finding_attributes(finding: dict) -> dict[str, str]:
    """What is known of a finding beside its label and sentence; empty where nothing is."""
    values = {
        "labels": "; ".join(_strings(finding.get("labels"))[1:]),
        "locations": "; ".join(_strings(finding.get("locations"))),
        "progression": str(finding.get("progression") or ""),
    }
    return {key: value for key, value in values.items() if value}


# MS-CXR


def ms_cxr(root: Path, source: str, licence: str, images: str = "") -> Iterator[Item]:
    """MS-CXR: `MS_CXR_Local_Alignment_*.csv` with dicom_id, category_name, label_text, path, x, y, w, h, image_width,
    image_height, one row a box, several a sentence; or, where there is no CSV, its JSON in COCO form, whose annotations
    carry label_text and whose images carry path (https://www.physionet.org/content/ms-cxr/).

    `images`: the MIMIC-CXR-JPG folder that the column path (`files/p10/p10000032/s50414267/<dicom_id>.jpg`) starts
    from, with or without `files`, or a folder of <dicom_id> files, JPEG or DICOM; boxes follow images of another size.
    The label is the category, the text the sentence. Only what the sentences mention is annotated: `labelled` is empty.
    Patient and study come from path. Raises AnnotationError where there is no annotation file.
    """
    tables = sorted(Path(root).glob("MS_CXR_Local_Alignment*.csv"))
    files = tables or below(root, "MS_CXR_Local_Alignment*.json")
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for where, cells, wrong in _table_rows(file) if tables else _coco_rows(file):
            if wrong:
                yield skip(where, wrong)
            else:
                rows.setdefault(str(cells["dicom_id"]), []).append({"where": where} | cells)
    make = partial(GroundingSample, source=source, modality="xray", licence=licence, labelled=())
    for dicom, boxes in rows.items():
        path = _mimic_image(Path(root, images), str(boxes[0]["path"]), dicom)
        yield Item(dicom, partial(_read_mscxr, path, dicom, boxes, make)) if path else skip(dicom, NOT_ON_DISK)


def _table_rows(file: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    for row in read_table(file, MSCXR_COLUMNS):
        wrong = row.wrong or ("" if row.cells["dicom_id"] else "no dicom_id")
        yield f"{file.name}:{row.line}", row.cells, wrong


def _coco_rows(file: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """COCO's annotations with the names that the CSV has."""
    coco = read_json(file)
    keys = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in keys):
        raise AnnotationError(f"{file}: has no lists {', '.join(keys)}; is this the annotation file?")
    images = {str(row.get("id")): row for row in coco["images"] if isinstance(row, dict)}
    categories = {str(row.get("id")): row.get("name") for row in coco["categories"] if isinstance(row, dict)}
    for k, row in enumerate(coco["annotations"]):
        row = row if isinstance(row, dict) else {}
        image, category = images.get(str(row.get("image_id"))), categories.get(str(row.get("category_id")))
        box = row.get("bbox") if isinstance(row.get("bbox"), list) and len(row["bbox"]) == 4 else None
        wrong = "" if image and category and box else "no bbox, or an image_id or category_id that does not exist"
        if wrong:
            yield f"{file.name} annotations[{k}]", {}, wrong
            continue
        path = str(image.get("path") or image.get("file_name"))
        size = (image.get("width", row.get("width")), image.get("height", row.get("height")))
        values = (Path(path).stem, category, row.get("label_text", category), path, *box, *size)
        yield f"{file.name} annotations[{k}]", dict(zip(MSCXR_COLUMNS, values, strict=True)), ""


def _mimic_image(folder: Path, path: str, dicom: str) -> Path | None:
    """The first that is on disk: the path as given, without `files/`, as DICOM, or the bare file."""
    short = path.removeprefix("files/")
    stems = [os.path.splitext(path)[0], os.path.splitext(short)[0], dicom]
    names = [path, short, *(stem + suffix for stem in stems for suffix in (".jpg", ".dcm", ".png"))]
    return next((file for name in names if (file := inside(folder, name))), None)


def _read_mscxr(
    path: Path, dicom: str, rows: Sequence[dict[str, Any]], make: partial
) -> Iterable[GroundingSample | Skipped]:
    height, width = load(str(path)).pixels.shape[:2]
    regions = Regions((height, width), NAMES)
    for row in rows:
        try:
            scale = frame_scale((number(row["image_height"]), number(row["image_width"])), (height, width))
            box = np.array(corners(*(row[name] for name in "xywh"))) * np.tile(scale, 2)
            regions.add_box(box, str(row["category_name"]), {"sentence": str(row["label_text"])})
        except ValueError as error:
            regions.left_out.append(f"{row['where']}: {error}")
    patient = re.search(r"(?:^|/)(p\d{8})/", str(rows[0]["path"]))
    study = re.search(r"/(s\d{8})/", str(rows[0]["path"]))
    source = make.keywords["source"]
    sample = make(
        image_id=f"{source}/{dicom}",
        patient_id=f"{source}/{patient[1] if patient else dicom}",
        study_id=f"{source}/{study[1]}" if study else None,
        image=str(path),
        regions=_sentences_as_texts(regions.done()),
    )
    yield from finish(sample, regions, dicom)
