"""Medical report sets in the layouts that their publishers give them: one small adapter a layout, as in
`downstream.question_sets`. A study's frontal images come first, since the first is the one that is looked at."""

import gzip
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from downstream.question_build import Box, Found, Picture, Pictures, Yield, renamed
from downstream.question_sets import cells_of, each, files_of, part_of, question, rows_of, text
from downstream.samples import ReportSample
from grounding.convert.chest_json import padchest_gr as padchest_regions
from grounding.convert.record import AnnotationError, Skipped
from grounding.convert.tables import number, numbers, read_json, read_table

FRONTAL = ("frontal", "pa", "ap", "")
# Headers of a report's sections, in capitals and with a colon (github.com/MIT-LCP/mimic-cxr, txt/section_parser.py).
HEADERS = {
    "indication": ("INDICATION", "HISTORY", "CLINICAL HISTORY", "CLINICAL INFORMATION", "REASON FOR EXAM"),
    "findings": ("FINDINGS", "FINDING", "FINDINGS AND IMPRESSION"),
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "OPINION"),
}
HEADER = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ()/,&-]{2,60}):", re.M)


def report(
    where: str, study: str, patient: str, pictures: Sequence[Picture], row: Mapping[str, Any], split: str, modality: str
) -> Found:
    """A study and its report. `row`: indication, findings, impression, each a text or nothing. Raises ValueError where
    findings and impression are missing, or there is no image."""
    parts = {name: " ".join(str(row.get(name) or "").split()) or None for name in HEADERS}
    if not parts["findings"] and not parts["impression"]:
        raise ValueError("neither findings nor impression")
    if not pictures:
        raise ValueError("no image of the study is listed")
    images = tuple(dict.fromkeys(picture.image_id for picture in pictures))
    sample = ReportSample(study_id=study, patient_id=patient, images=images, modality=modality, **parts)
    return Found(where, sample, tuple(pictures), split)


def sections(words: str) -> dict[str, str]:
    """indication, findings and impression of a report, by its headers; the first section of each kind."""
    found = list(HEADER.finditer(words))
    ends = [match.start() for match in found[1:]] + [len(words)]
    said: dict[str, str] = {}
    for match, end in zip(found, ends, strict=True):
        name = next((kind for kind, headers in HEADERS.items() if match[1].strip() in headers), "")
        if name and words[match.end() : end].strip():
            said.setdefault(name, words[match.end() : end])
    return said


# IU X-ray


def iu_xray(root: Path, source: str, licence: str, images: str = "") -> Yield:
    """IU X-ray: R2Gen's `annotation.json` (github.com/cuhksz-nlp/R2Gen), or Kaggle's `indiana_reports.csv` (uid,
    indication, findings, impression, …) with `indiana_projections.csv` (uid, filename, projection)
    (kaggle.com/datasets/raddar/chest-xrays-indiana-university). The words XXXX, which stand for what was
    de-identified, stay: published scores count them."""
    files, folder = files_of(root, ("*annotation*.json",), ("indiana_reports.csv", "*/indiana_reports.csv"))
    pictures = Pictures(folder / images, source, licence)
    if files[0].suffix == ".json":
        yield from _r2gen(files[0], pictures)
        return
    views: dict[str, list[tuple[str, str]]] = {}
    for row in read_table(files[0].with_name("indiana_projections.csv"), ("uid", "filename", "projection")):
        if not row.wrong:
            views.setdefault(row.cells["uid"], []).append((row.cells["projection"], row.cells["filename"]))

    def make(where: str, row: Mapping[str, Any]) -> Found:
        uid = text(row["uid"], "uid")
        names = [name for _, name in sorted(views.get(uid, []), key=lambda view: view[0].lower() not in FRONTAL)]
        of_study = [pictures(name, "xray", patient=uid, study=uid) for name in names]
        return report(where, f"{source}/{uid}", f"{source}/{uid}", of_study, row, "", "xray")

    yield from each(cells_of(files[0], ("uid", "indication", "findings", "impression")), make)


def _r2gen(file: Path, pictures: Pictures) -> Yield:
    """R2Gen's annotation.json: {"train": [{"id", "report", "image_path": [...], "split"}], "val", "test"}; MIMIC-CXR's
    also has subject_id and study_id. The report is the findings. In IU X-ray, CXR2384 of CXR2384_IM-0942 is the
    patient. Rows of one study (MIMIC-CXR has one an image) are one report."""
    lists = read_json(file)
    if not isinstance(lists, dict) or not all(isinstance(rows, list) for rows in lists.values()):
        raise AnnotationError(f'{file}: holds no lists "train", "val", "test"; is this R2Gen\'s annotation.json?')
    seen: dict[str, str] = {}

    def make(where: str, row: Mapping[str, Any]) -> Found:
        one = text(row.get("id"), "id")
        patient = str(row.get("subject_id") or one.split("_")[0])
        study = str(row.get("study_id") or one)
        if seen.setdefault(study, where) != where:
            raise ValueError(f"the report of study {study} is at {seen[study]}")
        names = row.get("image_path")
        if not isinstance(names, list):
            raise ValueError("image_path is no list")
        of_study = [pictures(text(name, "image_path"), "xray", patient, study) for name in names]
        ids = (f"{pictures.source}/{study}", f"{pictures.source}/{patient}")
        part = part_of(str(row.get("split") or where.split("[")[0]))
        return report(where, *ids, of_study, {"findings": row.get("report")}, part, "xray")

    yield from each(((f"{part}[{k}]", row) for part, rows in lists.items() for k, row in enumerate(rows)), make)


# MIMIC-CXR


def mimic_cxr(root: Path, source: str, licence: str, images: str = "", scene_graphs: str = "") -> Yield:
    """MIMIC-CXR: `mimic-cxr-2.*-split.csv` (dicom_id, study_id, subject_id, split), also .csv.gz; where they are there,
    `mimic-cxr-2.*-metadata.csv` (ViewPosition, Rows, Columns) and `mimic_cxr_sectioned.csv` (study, findings,
    impression), else the reports `files/p10/p10000032/s50414267.txt`, which are cut at their headers
    (physionet.org/content/mimic-cxr, mimic-cxr-jpg). Or R2Gen's `annotation.json`.

    `scene_graphs`: the folder of Chest ImaGenome's `<dicom_id>_SceneGraph.json`, whose objects become regions: label
    bbox_name, box original_x1 … original_y2 in pixels of the original image (physionet.org/content/chest-imagenome).
    """
    files, folder = files_of(root, ("mimic-cxr-2*-split.csv", "mimic-cxr-2*-split.csv.gz"), ("*annotation*.json",))
    pictures = Pictures(folder / images, source, licence)
    if files[0].suffix == ".json":
        yield from _r2gen(files[0], pictures)
        return
    columns = ("dicom_id", "study_id", "subject_id", "split")
    studies: dict[str, list[dict[str, str]]] = {}
    for where, cells in _table(files[0], columns):
        if isinstance(cells, str):
            yield Skipped(where, cells)
        else:
            studies.setdefault(cells["study_id"], []).append(cells | {"where": where})
    about, told = _metadata(folder), _sectioned(folder)
    graphs = folder / scene_graphs if scene_graphs else None

    def make(where: str, rows: Mapping[str, Any]) -> Found:
        of_study, first = sorted(rows["rows"], key=lambda r: _lateral(about.get(r["dicom_id"]))), rows["rows"][0]
        patient, study = f"p{first['subject_id']}", f"s{first['study_id']}"
        of_images = [
            pictures(r["dicom_id"], "xray", patient, study, _scene(graphs, r["dicom_id"], about)) for r in of_study
        ]
        said = told[study] if study in told else _report_file(folder, patient, study)
        ids = (f"{source}/{study}", f"{source}/{patient}")
        return report(where, *ids, of_images, said, part_of(first["split"]), "xray")

    yield from each(((rows[0]["where"], {"rows": rows}) for rows in studies.values()), make)


def _table(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`cells_of`, also of a .csv.gz."""
    if file.suffix != ".gz":
        yield from cells_of(file, columns)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            plain = Path(folder, file.stem)
            plain.write_bytes(gzip.decompress(file.read_bytes()))
            yield from cells_of(plain, columns)
        except (OSError, EOFError, AnnotationError) as error:
            raise AnnotationError(str(error).replace(str(plain), str(file))) from None


def _metadata(folder: Path) -> dict[str, dict[str, str]]:
    """dicom_id → ViewPosition, Rows, Columns."""
    files = sorted(folder.glob("mimic-cxr-2*-metadata.csv*"))[:1]
    rows = (cells for file in files for _, cells in _table(file, ("dicom_id", "ViewPosition", "Rows", "Columns")))
    return {cells["dicom_id"]: cells for cells in rows if isinstance(cells, dict)}


def _lateral(about: Mapping[str, str] | None) -> bool:
    return (about or {}).get("ViewPosition", "").lower() not in FRONTAL


def _sectioned(folder: Path) -> dict[str, dict[str, str]]:
    """study ("s50414267") → findings, impression, of MIMIC's own section parser."""
    files = sorted(folder.glob("mimic_cxr_sectioned.csv*"))
    rows = (cells for file in files for _, cells in _table(file, ("study", "findings", "impression")))
    return {cells["study"]: cells for cells in rows if isinstance(cells, dict)}


def _report_file(folder: Path, patient: str, study: str) -> dict[str, str]:
    inner = f"{patient[:3]}/{patient}/{study}.txt"
    for name in (f"files/{inner}", f"mimic-cxr-reports/files/{inner}", inner):
        if (folder / name).is_file():
            return sections((folder / name).read_text(encoding="utf-8", errors="replace"))
    raise ValueError(f"report files/{inner} is not on disk")


def _scene(graphs: Path | None, dicom: str, about: Mapping[str, Mapping[str, str]]) -> list[Box]:
    """The objects of an image's scene graph. Raises ValueError where it is another file."""
    file = graphs / f"{dicom}_SceneGraph.json" if graphs else None
    if file is None or not file.is_file():
        return []
    graph, size = read_json(file), about.get(dicom, {})
    frame = (number(size.get("Rows")), number(size.get("Columns"))) if size.get("Rows") else None
    objects = graph.get("objects") if isinstance(graph, dict) else None
    if not isinstance(objects, list):
        raise ValueError(f"{file.name}: has no list of objects")
    said = {row.get("bbox_name"): row.get("phrases") for row in graph.get("attributes") or [] if isinstance(row, dict)}
    boxes = []
    for row in (row for row in objects if isinstance(row, dict) and row.get("bbox_name")):
        corners = numbers([row.get(f"original_{name}") for name in ("x1", "y1", "x2", "y2")], 4)
        told = said.get(row["bbox_name"])
        phrases = " ".join(" ".join(map(str, told)).split()) if isinstance(told, list) else ""
        attributes = {"sentence": phrases} if phrases else {}
        boxes.append(Box(tuple(corners), str(row["bbox_name"]), attributes, frame=frame))
    return boxes


# CheXpert Plus


def chexpert_plus(root: Path, source: str, licence: str, images: str = "") -> Yield:
    """CheXpert Plus: `df_chexpert_plus_*.csv`, one row an image: path_to_image
    (train/patient1/study2/view1_frontal.jpg, which may lie there as PNG), frontal_lateral, deid_patient_id, split,
    section_findings, section_impression, section_clinical_history, section_history
    (github.com/Stanford-AIMI/chexpert-plus). A study is its folder."""
    files, folder = files_of(root, ("df_chexpert_plus*.csv",))
    pictures = Pictures(folder / images, source, licence)
    studies: dict[str, list[dict[str, str]]] = {}
    columns = ("path_to_image", "deid_patient_id", "section_findings", "section_impression")
    for where, cells in (row for file in files for row in cells_of(file, columns)):
        if isinstance(cells, str) or not cells["path_to_image"]:
            yield Skipped(where, cells if isinstance(cells, str) else "no path_to_image")
        else:
            study = PurePosixPath(cells["path_to_image"]).parent.as_posix()
            studies.setdefault(study, []).append(cells | {"where": where})

    def make(where: str, given: Mapping[str, Any]) -> Found:
        rows = sorted(given["rows"], key=lambda row: row.get("frontal_lateral", "").lower() not in FRONTAL)
        first, patient = rows[0], text(rows[0]["deid_patient_id"], "deid_patient_id")
        of_study = [pictures(row["path_to_image"], "xray", patient, given["study"]) for row in rows]
        said = {
            "indication": first.get("section_clinical_history") or first.get("section_history"),
            "findings": first["section_findings"],
            "impression": first["section_impression"],
        }
        ids, part = (f"{source}/{given['study']}", f"{source}/{patient}"), first.get("split") or given["study"]
        return report(where, *ids, of_study, said, part_of(part), "xray")

    yield from each(((rows[0]["where"], {"study": s, "rows": rows}) for s, rows in studies.items()), make)


# Boxes by sentence


def padchest_gr(root: Path, source: str, licence: str, images: str = "", language: str = "en") -> Yield:
    """PadChest-GR: `grounded_reports_*.json`, studies of StudyID, ImageID and findings, each with sentence_en,
    sentence_es, boxes, labels; `master_table.csv` tells patients and, in a column split, the parts
    (https://arxiv.org/html/2411.05085v1). The sentences are the report's findings; their boxes become regions as
    `medglip data build` reads them. `language`: en or es."""
    names = ("grounded_reports*.json", "*/grounded_reports*.json")
    files, folder = files_of(root, names)
    items = list(padchest_regions(folder, source, licence, images))
    read = {PurePosixPath(item.key).name: item for item in items}
    tables = [folder / "master_table.csv"] if (folder / "master_table.csv").is_file() else []
    rows = (row.cells for file in tables for row in read_table(file, ("ImageID", "PatientID")) if not row.wrong)
    about = {row["ImageID"]: row for row in rows}
    pictures = Pictures((folder / images).resolve(), source, licence)

    def make(where: str, row: Mapping[str, Any]) -> Found:
        name, study = text(row.get("ImageID"), "ImageID"), text(row.get("StudyID"), "StudyID")
        known, file = about.get(name, {}), pictures.file(name)
        patient = f"{source}/{known.get('PatientID', study)}"
        item, image_id = read.get(PurePosixPath(name).stem) if file else None, f"{source}/{PurePosixPath(name).stem}"
        if not isinstance(row.get("findings"), list):
            raise ValueError("study has no list of findings")
        findings = row["findings"]
        said = [str(f.get(f"sentence_{language}") or "").strip() for f in findings if isinstance(f, dict)]
        words = " ".join(sentence.rstrip(".") + "." for sentence in said if sentence)
        picture = Picture(image_id, patient, name, item and renamed(item, image_id, patient))
        part = part_of(known.get("split", ""))
        return report(where, f"{source}/{study}", patient, [picture], {"findings": words}, part, "xray")

    yield from each((row for file in files for row in rows_of(file)), make)


def jsonl(root: Path, source: str, licence: str, images: str = "", modality: str = "") -> Yield:
    """JSON Lines of your own, one study or question a line:

    {"image": "a.png", "question": "…", "answer": "…"} or {"images": ["a.png", "b.png"], "sentences": [{"text": "…",
    "boxes": [[x1, y1, x2, y2], …], "label": "nodule"}], "indication": "…", "impression": "…"}, boxes xyxy in [0, 1] of
    the first image; or "findings" in the place of "sentences". Both may have id, patient_id, modality, split,
    question_type, answer_type and options (letter → text). A region's label is "label", else the sentence.
    """
    files, folder = files_of(root, ("*.jsonl",))
    pictures, rows = Pictures(folder / images, source, licence), list(_json_lines(files))
    patients, boxes = _of_images(rows)

    def make(where: str, row: Mapping[str, Any]) -> Found:
        names, kind, said = _names(row), str(row.get("modality") or modality), _sentences(row)
        one, part = f"{source}/{row.get('id') or where}", part_of(str(row.get("split") or ""))
        shown = [pictures(name, kind, patients.get(name, ""), None, boxes.get(name, [])) for name in names]
        if row.get("question"):
            options = row.get("options") if isinstance(row.get("options"), dict) else None
            return question(where, one, shown[0], kind, row, str(row.get("question_type") or ""), part, options)
        words = {"findings": " ".join(words for words, _ in said)} if said else {}
        return report(where, one, shown[0].patient_id, shown, {**row, **words}, part, kind)

    yield from each(rows, make)


def _names(row: Mapping[str, Any]) -> list[str]:
    given = row["images"] if isinstance(row.get("images"), list) and row["images"] else [row.get("image")]
    return [text(name, "image") for name in given]


def _of_images(rows: Sequence[tuple[str, Any]]) -> tuple[dict[str, str], dict[str, list[Box]]]:
    """Image → its patient, and the boxes of all rows that it is the first image of; bad rows are another's to name."""
    patients: dict[str, str] = {}
    boxes: dict[str, list[Box]] = {}
    for _, row in rows:
        try:
            names, said = _names(row), _sentences(row)
        except (ValueError, AttributeError):
            continue
        if row.get("patient_id"):
            patients |= {name: str(row["patient_id"]) for name in names if name not in patients}
        own = boxes.setdefault(names[0], [])
        own += [box for _, of_sentence in said for box in of_sentence if box not in own]
    return patients, boxes


def _json_lines(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for k, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            if line.strip():
                try:
                    yield f"{file.name}:{k}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{file.name}:{k}", f"not JSON ({error})"


def _sentences(row: Mapping[str, Any]) -> list[tuple[str, list[Box]]]:
    """Each sentence with its boxes. Raises ValueError for a sentence without text or a box that is not four numbers."""
    found = []
    sentences = row.get("sentences") or []
    if not isinstance(sentences, list):
        raise ValueError("sentences is no list")
    for sentence in sentences:
        boxes = sentence.get("boxes") or [] if isinstance(sentence, Mapping) else None
        if not isinstance(boxes, list):
            raise ValueError("a sentence is no object with a text and a list of boxes")
        words = text(sentence.get("text"), "text of a sentence")
        label = str(sentence.get("label") or words)
        corners = [tuple(numbers(box, 4)) for box in boxes]
        found.append((words, [Box(box, label, {"sentence": words}, fraction=True) for box in corners]))
    return found
