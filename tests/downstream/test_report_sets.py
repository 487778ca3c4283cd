"""``medglip data questions`` on the layouts of report sets: IU X-ray on its real files, the others on fixtures written
here in the layout of the page that each adapter cites."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main
from downstream.report_sets import sections
from downstream.samples import read_reports
from grounding.labels import load_label_tree
from grounding.store import open_store

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"shared/data/{name} is not here")
    return DATA / name


def picture(path, seed=0, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8)).save(path)


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def build(source, out, *more):
    return main(["data", "questions", "--source", str(source), "--out", str(out), *more])


def reports(folder):
    """By id; every image that they name is in the store."""
    found = {report.study_id: report for report in read_reports(folder / "reports.jsonl")}
    there = set(open_store(folder / "store").image_ids)
    assert found and all(report.images and set(report.images) <= there for report in found.values())
    assert (folder / "questions.jsonl").read_text() == ""
    return found


def why(out):
    rows = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    return {row["key"]: row["why"] for row in rows}


# IU X-ray


def test_iu_xray_of_kaggle_takes_the_frontal_image_first(tmp_path):
    folder, out = real("iu-xray-text"), tmp_path / "out"
    for file in ("indiana_reports.csv", "indiana_projections.csv"):
        shutil.copy(folder / file, tmp_path)
    with (tmp_path / "indiana_projections.csv").open() as file:
        views = [row for row in csv.DictReader(file) if row["uid"] in ("4", "5", "6")]
    for k, row in enumerate(row for row in views if row["uid"] != "6"):
        picture(tmp_path / "images" / "images_normalized" / row["filename"], k)
    assert build(f"iu-xray:{tmp_path}", out) == 0
    found = reports(out)
    assert set(found) == {"iu-xray/4", "iu-xray/5"}
    for uid in ("4", "5"):
        front = next(row["filename"] for row in views if row["uid"] == uid and row["projection"] == "Frontal")
        assert found[f"iu-xray/{uid}"].images[0] == f"iu-xray/{front.removesuffix('.png')}"
    reasons = why(out)
    assert sum(reason == "neither findings nor impression" for reason in reasons.values()) == 25
    assert reasons[next(row["filename"] for row in views if row["uid"] == "6")] == "image is not on disk"
    assert not any(report.indication == "" for report in found.values())


def test_iu_xray_of_r2gen(tmp_path):
    shutil.copy(real("layout-samples") / "R2Gen_iu_xray_annotation_head.json", tmp_path / "annotation.json")
    rows = json.loads((tmp_path / "annotation.json").read_text())["train"]
    for k, name in enumerate([*rows[0]["image_path"], rows[1]["image_path"][0]]):
        picture(tmp_path / "images" / name, k)
    assert build(f"iu-xray:{tmp_path}", tmp_path / "out", "--split", "train") == 0
    found = reports(tmp_path / "out")
    first, second = (found[f"iu-xray/{row['id']}"] for row in rows)
    assert first.findings == rows[0]["report"] and first.impression is None and first.patient_id == "iu-xray/CXR2384"
    assert first.images == ("iu-xray/CXR2384_IM-0942/0", "iu-xray/CXR2384_IM-0942/1")
    assert second.images == ("iu-xray/CXR1451_IM-0291/0",)  # its other image is not there
    assert why(tmp_path / "out") == {rows[1]["image_path"][1]: "image is not on disk"}


# MIMIC-CXR

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 FINDINGS:

 There is no focal consolidation. Ratio 1:2.
 Heart is normal.

 IMPRESSION:  No acute process.
"""


def test_sections_are_cut_at_headers():
    said = sections(REPORT)
    assert " ".join(said["findings"].split()) == "There is no focal consolidation. Ratio 1:2. Heart is normal."
    assert said["impression"].strip() == "No acute process." and "ascites" in said["indication"]
    assert sections("WET READ: nothing\nplain words") == {}


def mimic(root):
    rows = [
        {"dicom_id": "d-lat", "study_id": "50000001", "subject_id": "10000001", "split": "train"},
        {"dicom_id": "d-pa", "study_id": "50000001", "subject_id": "10000001", "split": "train"},
        {"dicom_id": "e-ap", "study_id": "50000002", "subject_id": "10000002", "split": "validate"},
        {"dicom_id": "f-ap", "study_id": "50000003", "subject_id": "10000003", "split": "test"},
    ]
    table(root / "mimic-cxr-2.0.0-split.csv", rows)
    plain = root / "mimic-cxr-2.0.0-split.csv"
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    views = {"d-lat": "LATERAL", "d-pa": "PA", "e-ap": "AP"}
    table(
        root / "mimic-cxr-2.0.0-metadata.csv",
        [{"dicom_id": name, "ViewPosition": view, "Rows": 200, "Columns": 400} for name, view in views.items()],
    )
    for k, row in enumerate(rows):
        inner = f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"
        picture(root / inner / f"{row['dicom_id']}.jpg", k)
        if row["dicom_id"] != "f-ap":
            (root / f"{inner}.txt").write_text(REPORT)


def test_mimic_cxr_with_reports_cut_at_headers_and_scene_graphs_as_regions(tmp_path):
    mimic(tmp_path)
    graph = {"objects": [{"bbox_name": "right lung", "original_x1": 40, "original_y1": 20, "original_x2": 200}]}
    graph["objects"][0]["original_y2"] = 100
    graph["attributes"] = [{"bbox_name": "right lung", "phrases": ["Right lung is clear."]}]
    (tmp_path / "scene_graph").mkdir()
    (tmp_path / "scene_graph" / "d-pa_SceneGraph.json").write_text(json.dumps(graph))
    source, out = f"mimic-cxr:{tmp_path}?scene_graphs=scene_graph", tmp_path / "out"
    assert build(source, out, "--split", "train") == 0
    (report,) = reports(out).values()
    assert report.images == ("mimic-cxr/d-pa", "mimic-cxr/d-lat") and report.patient_id == "mimic-cxr/p10000001"
    assert report.findings.endswith("Heart is normal.") and report.impression == "No acute process."
    sample = open_store(out / "store").by_id("mimic-cxr/d-pa")
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.5, 0.5]], atol=1e-6)  # half as wide on disk
    assert sample.regions.labels == [load_label_tree().find("right lung")]
    assert sample.regions.attributes == [{"sentence": "Right lung is clear."}] and sample.labelled == ()
    assert (sample.patient_id, sample.study_id) == ("mimic-cxr/p10000001", "mimic-cxr/s50000001")
    assert build(source, tmp_path / "all") == 0
    assert set(reports(tmp_path / "all")) == {"mimic-cxr/s50000001", "mimic-cxr/s50000002"}
    (reason,) = why(tmp_path / "all").values()
    assert reason == "report files/p10/p10000003/s50000003.txt is not on disk"


def test_mimic_cxr_with_its_own_sections(tmp_path):
    mimic(tmp_path)
    said = {"study": "s50000003", "impression": "Effusion.", "findings": "", "last_paragraph": "x", "comparison": "y"}
    table(tmp_path / "mimic_cxr_sectioned.csv", [said])
    assert build(f"mimic-cxr:{tmp_path}", tmp_path / "out", "--split", "published") == 0
    (report,) = reports(tmp_path / "out" / "test").values()
    assert report.findings is None and report.impression == "Effusion."
    assert set(reports(tmp_path / "out" / "val")) == {"mimic-cxr/s50000002"}


def test_mimic_cxr_of_r2gen_has_one_report_a_study(tmp_path):
    row = {"id": "a", "study_id": 50000001, "subject_id": 10000001, "report": "clear.", "split": "val"}
    rows = [row | {"image_path": ["p10/a.jpg"]}, row | {"id": "b", "image_path": ["p10/b.jpg"]}]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [], "val": rows, "test": []}))
    picture(tmp_path / "images" / "p10" / "a.jpg")
    assert build(f"mimic-cxr:{tmp_path}", tmp_path / "out", "--split", "val") == 0
    assert set(reports(tmp_path / "out")) == {"mimic-cxr/50000001"}
    assert why(tmp_path / "out") == {"val[1]": "the report of study 50000001 is at val[0]"}


# CheXpert Plus


def test_chexpert_plus_joins_the_images_of_a_study(tmp_path):
    row = {
        "deid_patient_id": "patient1",
        "split": "train",
        "section_findings": "Clear\nlungs.",
        "section_impression": "",
    }
    row |= {"section_clinical_history": "", "section_history": "cough"}
    study = "train/patient1/study2"
    rows = [
        {"path_to_image": f"{study}/view1_lateral.jpg", "frontal_lateral": "Lateral", **row},
        {"path_to_image": f"{study}/view2_frontal.jpg", "frontal_lateral": "Frontal", **row},
        {"path_to_image": "valid/patient2/study1/view1_frontal.jpg", "frontal_lateral": "Frontal"}
        | row
        | {"deid_patient_id": "patient2", "section_findings": ""},
    ]
    table(tmp_path / "df_chexpert_plus_240401.csv", rows)
    picture(tmp_path / "PNG" / study / "view1_lateral.png", 1)
    picture(tmp_path / "PNG" / study / "view2_frontal.png", 2)
    assert build(f"chexpert-plus:{tmp_path}", tmp_path / "out") == 0
    (report,) = reports(tmp_path / "out").values()
    assert report.images[0].endswith("view2_frontal") and len(report.images) == 2
    assert (report.indication, report.findings, report.impression) == ("cough", "Clear lungs.", None)
    assert list(why(tmp_path / "out").values()) == ["neither findings nor impression"]


# Boxes by sentence


def test_padchest_gr_sentences_with_their_boxes(tmp_path):
    box = [0.1, 0.2, 0.5, 0.8]
    findings = [
        {"sentence_en": "Nodule in the left lung", "sentence_es": "Nódulo", "abnormal": True, "boxes": [box]},
        {"sentence_en": "No effusion.", "sentence_es": "Sin derrame.", "abnormal": False},
    ]
    findings[0] |= {"extra_boxes": [], "labels": ["nodule"], "locations": ["left"], "progression": None}
    study = {"StudyID": "1", "ImageID": "1_a.png", "findings": findings}
    gone = study | {"StudyID": "2", "ImageID": "2_b.png"}
    (tmp_path / "grounded_reports_20240819.json").write_text(json.dumps([study, gone, {"StudyID": "3"}]))
    table(tmp_path / "master_table.csv", [{"ImageID": "1_a.png", "PatientID": "77", "split": "validation"}])
    picture(tmp_path / "images" / "1_a.png")
    assert build(f"padchest-gr:{tmp_path}", tmp_path / "out") == 0
    (report,) = reports(tmp_path / "out").values()
    assert report.findings == "Nodule in the left lung. No effusion." and report.patient_id == "padchest-gr/77"
    sample = open_store(tmp_path / "out" / "store").by_id(report.images[0])
    np.testing.assert_allclose(sample.regions.boxes, [box], atol=1e-6)
    assert sample.patient_id == report.patient_id
    reasons = why(tmp_path / "out")
    assert reasons["2_b.png"] == "image is not on disk" and "no ImageID" in " ".join(reasons.values())
    assert build(f"padchest-gr:{tmp_path}?language=es", tmp_path / "es", "--split", "val") == 0
    assert next(iter(reports(tmp_path / "es").values())).findings == "Nódulo. Sin derrame."


def test_json_lines_of_studies_and_questions(tmp_path):
    sentence = {"text": "A nodule in the left lung.", "boxes": [[0.5, 0.5, 0.75, 1]], "label": "nodule"}
    rows = [
        {
            "images": ["a.png", "b.png"],
            "sentences": [sentence],
            "impression": "Nodule.",
            "patient_id": "p",
            "id": "one",
        },
        {"image": "a.png", "question": "Side?", "answer": "left", "options": {"A": "left", "B": "right"}, "id": "q"},
        {"image": "a.png", "sentences": [sentence | {"boxes": [[1, 2, 3]]}]},
        {"image": "b.png", "findings": ""},
        {"image": "b.png", "findings": "half \ud800"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    (tmp_path / "mine.jsonl").write_text(text)
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    assert build(f"jsonl:{tmp_path / 'mine.jsonl'}?modality=xray", tmp_path / "out") == 0
    (report,) = read_reports(tmp_path / "out" / "reports.jsonl")
    (question,) = map(json.loads, (tmp_path / "out" / "questions.jsonl").read_text().splitlines())
    assert report.findings == sentence["text"] and report.images == ("jsonl/a", "jsonl/b")
    assert question["options"] == {"A": "left", "B": "right"} and question["answer_type"] == "closed"
    store = open_store(tmp_path / "out" / "store")
    np.testing.assert_allclose(store.by_id("jsonl/a").regions.boxes, [[0.5, 0.5, 0.75, 1]])
    assert len(store.by_id("jsonl/b").regions) == 0
    reasons = why(tmp_path / "out")
    assert "not a list of 4 numbers" in reasons["mine.jsonl:3"] and "not JSON" in reasons["mine.jsonl:6"]
    assert reasons["mine.jsonl:4"] == "neither findings nor impression" and "ud800" in reasons["mine.jsonl:5"]
