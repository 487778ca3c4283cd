"""Chest X-ray sources with a CSV table: the head of NIH's real one, and fixtures of RSNA, VinDr-CXR and the COVID
structures, written here in the layout of the page that each reader cites."""

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from grounding.convert.chest_csv import covid_structures, fuse, nih_boxes, rsna_pneumonia, vindr_cxr
from grounding.convert.record import AnnotationError
from tests.grounding.convert.builders import (
    boxes_in_pixels,
    collect_by_id,
    decoded,
    label,
    picture,
    read_mutants,
    real,
    save,
)


def write_dicom(path, width, height):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, generate_uid()
    dataset = Dataset()
    dataset.file_meta, dataset.Modality = meta, "DX"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = height, width, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = np.arange(height * width, dtype=np.uint8).tobytes() + b"\0" * (height * width % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=False)


# NIH


def test_nih_head_of_the_real_table(tmp_path):
    table = real("layout-samples", "NIH_BBox_List_2017_head.csv")
    shutil.copy(table, tmp_path / "BBox_List_2017.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    for k, row in enumerate(rows[:-1]):
        picture(tmp_path / f"images_00{k % 2}" / "images" / row[0], 224 if k == 1 else 1024, 224 if k == 1 else 1024)
    samples, skipped = collect_by_id(nih_boxes(tmp_path, "nih", "CC0"))
    assert [(record.key, record.why) for record in skipped] == [(Path(rows[-1][0]).stem, "image is not on disk")]
    assert len(samples) == len(rows) - 1
    for name, finding, *values in rows[:-1]:
        x, y, w, h = map(float, values)
        sample = samples[f"nih/{Path(name).stem}"]
        np.testing.assert_allclose(sample.regions.boxes[0] * 1024, [x, y, x + w, y + h], atol=0.01)
        assert sample.regions.texts == [finding] and sample.patient_id == f"nih/{name[:8]}"
        assert sample.labelled == ()


def test_nih_rows_that_lie(tmp_path):
    lines = [
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        "00000001_000.png,Infiltrate,100,200,300,400,,,",
        "00000001_000.png,Infiltrate,100,200,300,400,,,",
        "",
        "00000001_000.png,Mass,100,200,300",
        "00000001_000.png,Mass,100,200,300,wide",
        "00000001_000.png,Nodule,10,20,30,40,50",
    ]
    (tmp_path / "BBox_List_2017.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    picture(tmp_path / "images" / "00000001_000.png")
    samples, skipped = collect_by_id(nih_boxes(tmp_path, "nih", ""))
    assert samples["nih/00000001_000"].regions.labels == [label("infiltration")]
    assert [boxes_in_pixels(samples["nih/00000001_000"]).tolist()] == [[[100, 200, 400, 600]]]
    assert len(skipped) == 4 and "line 2" in skipped[0].why


# RSNA


def test_rsna_boxes_and_empty_images(tmp_path):
    rows = [
        ("p1", "264.0", "152.0", "213.0", "379.0", "1"),
        ("p1", "562.0", "152.0", "256.0", "453.0", "1"),
        ("p2", "", "", "", "", "0"),
        ("p3", "", "", "", "", "1"),  # pneumonia, but no box
        ("p4", "1", "1", "5", "5", "0"),  # a box, but no pneumonia
        ("p5", "1", "1", "5", "5", "1"),  # not on disk
        ("p2", "", "", "", "", "0"),
        ("p6", "1", "1"),
    ]
    with (tmp_path / "stage_2_train_labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patientId", "x", "y", "width", "height", "Target"), *rows])
    for name in ("p1", "p2", "p3", "p4"):
        write_dicom(tmp_path / "stage_2_train_images" / f"{name}.dcm", 64, 64)
    samples, skipped = collect_by_id(rsna_pneumonia(tmp_path, "rsna", ""))
    assert set(samples) == {"rsna/p1", "rsna/p2", "rsna/p3", "rsna/p4"}
    expected = np.array([[264, 152, 477, 531], [562, 152, 818, 605]]) / 16
    np.testing.assert_allclose(boxes_in_pixels(samples["rsna/p1"]), expected, atol=1e-3)
    known = (label("pneumonia"),)
    assert [samples[f"rsna/p{k}"].labelled for k in (1, 2, 3, 4)] == [known, known, (), ()]
    assert [len(samples[f"rsna/p{k}"].regions) for k in (1, 2, 3, 4)] == [2, 0, 0, 0]
    assert len(skipped) == 5


# VinDr-CXR

VINDR = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"


def vindr(tmp_path, text, sizes, suffix=".dicom", **options):
    (tmp_path / "annotations").mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations" / "annotations_train.csv").write_text(text)
    for name, (width, height) in sizes.items():
        if suffix == ".dicom":
            write_dicom(tmp_path / "train" / (name + suffix), width, height)
        else:
            picture(tmp_path / "train" / (name + suffix), width, height)
    return collect_by_id(vindr_cxr(tmp_path, "vindr", "", **options))


def test_vindr_readers_become_one_region_a_finding(tmp_path):
    text = VINDR + "\n".join(
        [
            "a,R1,Cardiomegaly,10,10,50,40",
            "a,R2,Cardiomegaly,12,12,52,42",
            "a,R3,Cardiomegaly,14,14,54,44",
            "a,R1,Pleural effusion,60,40,80,58",
            "a,R3,Pleural effusion,62,40,82,58",
            "a,R2,Pleural effusion,1,1,9,9",  # somewhere else: one reader
            "a,R2,Nodule/Mass,20,20,24,24",  # one reader
            "a,R1,Other lesion,30,30,40,40",
            "a,R2,Other lesion,30,30,40,40",
            "b,R1,No finding,,,,",
            "b,R2,No finding,,,,",
            "b,R3,No finding,,,,",
            "c,R9,Cardiomegaly,1,2,30,40",  # read by one only
            "c,R9,Cardiomegaly,1,2,30,40",  # the same row again
            "d,R1,Cardiomegaly,1,2,3,4",  # not on disk
            "b,R1,Cardiomegaly,1,2",
            "c,R9,Pleural effusion,1,2,x,40",
        ]
    )
    samples, skipped = vindr(tmp_path, text, dict.fromkeys("abc", (90, 60)))
    assert set(samples) == {"vindr/a", "vindr/b", "vindr/c"}
    a, b, c = (samples[f"vindr/{name}"] for name in "abc")
    rows = zip(boxes_in_pixels(a).tolist(), a.regions.attributes, strict=True)
    regions = dict(zip(a.regions.texts, rows, strict=True))
    assert (
        np.allclose(regions["Cardiomegaly"][0], [12, 12, 52, 42]) and regions["Cardiomegaly"][1]["agreement"] == "3/3"
    )
    assert np.allclose(regions["Pleural effusion"][0], [61, 40, 81, 58], atol=1e-3)
    assert regions["Pleural effusion"][1]["agreement"] == "2/3"
    assert set(regions) == {"Cardiomegaly", "Pleural effusion", "Other lesion"}
    assert a.labelled == (label("cardiomegaly"),)  # the others have a finding that one reader saw, or are a rest class
    assert set(b.labelled) == {label("cardiomegaly"), label("nodule or mass"), label("pleural effusion")}
    assert len(b.regions) == 0 and len(c.regions) == 1 and label("pleural effusion") not in c.labelled
    assert len(skipped) == 6 and sum("readers marked it" in record.why for record in skipped) == 2


def test_vindr_agreement_can_be_chosen(tmp_path):
    text = VINDR + "a,R1,ILD,1,1,30,30\na,R2,ILD,1,1,30,30\na,R3,No finding,,,,\n"
    for agree, count in (("1", 1), ("2", 1), ("3", 0)):
        samples, _ = vindr(tmp_path / agree, text, {"a": (40, 40)}, agree=agree)
        assert len(samples["vindr/a"].regions) == count
    with pytest.raises(AnnotationError, match="agree=many"):
        vindr(tmp_path, text, {}, agree="many")


def test_vindr_resized_images_need_their_old_size(tmp_path):
    text = VINDR + "a,R1,ILD,100,200,1000,2000\na,R2,ILD,100,200,1000,2000\n"
    samples, skipped = vindr(tmp_path / "unknown", text, {"a": (256, 256)}, ".png")
    assert not samples and "was it resized" in skipped[0].why
    lines = text.splitlines()
    text = "\n".join([lines[0] + ",width,height", *(line + ",2048,2048" for line in lines[1:])])
    samples, _ = vindr(tmp_path / "told", text, {"a": (256, 256)}, ".png")
    np.testing.assert_allclose(boxes_in_pixels(samples["vindr/a"]), [[12.5, 25, 125, 250]])


def test_vindr_consensus_table_is_taken_as_it_is(tmp_path):
    (tmp_path / "annotations").mkdir()
    lines = ["image_id,class_name,x_min,y_min,x_max,y_max", "t,ILD,1,1,20,20", "t,ILD,2,2,21,21", "u,No finding,,,,"]
    (tmp_path / "annotations" / "annotations_test.csv").write_text("\n".join(lines))
    for name in "tu":
        write_dicom(tmp_path / "test" / f"{name}.dicom", 40, 40)
    samples, skipped = collect_by_id(vindr_cxr(tmp_path, "v", ""))
    assert len(samples["v/t"].regions) == 2 and samples["v/t"].regions.attributes is None and not skipped
    assert samples["v/u"].labelled == samples["v/t"].labelled != ()


def test_fusing_does_not_depend_on_the_order_of_rows():
    marks = [("R1", [0, 0, 10, 10]), ("R2", [1, 1, 11, 11]), ("R3", [6, 0, 16, 10]), ("R1", [2, 0, 12, 10])]
    marks = [(reader, np.array(box, float)) for reader, box in marks]
    results = [sorted((*box.tolist(), n) for box, n in fuse(order)) for order in itertools.permutations(marks)]
    assert all(np.allclose(result, results[0]) for result in results)
    assert sum(row[-1] for row in results[0]) == len(marks)  # every box is in one finding


def test_fusing_leaves_one_reader_alone():
    boxes = [np.array([0, 0, 10, 10.0]), np.array([1, 0, 10, 10.0]), np.array([50, 50, 60, 70.0])]
    fused = fuse([("R1", box) for box in boxes])
    assert sorted(box.tolist() for box, _ in fused) == sorted(box.tolist() for box in boxes)
    assert {votes for _, votes in fused} == {1}


# COVID structures


def write_structures(root):
    """Two images; whole masks, of which the files hold the crop; rows as microwork exports them."""
    random_, whole, rows = np.random.default_rng(0), {}, []
    names = ("Left Lung", "Right Lung", "Nosogastric Tube")
    for image, (width, height) in (("x.day0.jpeg", (60, 40)), ("y.png", (50, 30))):
        picture(root / "images" / image, width, height)
        for name in names:
            top, left = (int(random_.integers(0, side // 2)) for side in (height, width))
            tall, wide = (int(random_.integers(5, side // 2)) for side in (height, width))
            crop = random_.random((tall, wide)) < 0.6
            crop[[0, -1]] = crop[:, [0, -1]] = True
            whole[image, name] = np.zeros((height, width), bool)
            whole[image, name][top : top + tall, left : left + wide] = crop
            file = f"masks/{len(rows)}.png"
            save(root / file, np.stack([crop * np.uint8(200)] * 3 + [crop * np.uint8(255)], -1))
            row = [len(rows), f"COVID-19 {name}", name, image, f"images/{len(rows)}f.jpg", file]
            rows.append([*row, f"{width}x{height}", top, left, wide, tall])
    return whole, rows


def write_structure_table(root, rows):
    header = [
        "#",
        "Class",
        "Template Name",
        "Filename",
        "Image",
        "Mask",
        "Resolution",
        "Top",
        "Left",
        "Width",
        "Height",
    ]
    with (root / "structure.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_structures_are_pasted_where_they_belong(tmp_path):
    whole, rows = write_structures(tmp_path)
    presence = [90, "", "Tubings", "y.png", "", "", "50x30", 0, 0, 50, 30]
    edge = [*rows[0][:7], 39, *rows[0][8:]]
    absent = [91, "", "Airways", "z.png", "", "masks/0.png", "9x9", 0, 0, 9, 9]
    write_structure_table(tmp_path, [*rows, presence, edge, absent, [92, "short"]])
    (tmp_path / "metadata.csv").write_text("patientid,filename,license,\n17,x.day0.jpeg,CC BY-NC-SA\n")
    samples, skipped = collect_by_id(covid_structures(tmp_path, "covid", "CC BY 4.0"))
    x, y = samples["covid/x.day0"], samples["covid/y"]
    for sample, image in ((x, "x.day0.jpeg"), (y, "y.png")):
        assert sample.regions.texts == ["Left Lung", "Right Lung", "Nosogastric Tube"]
        for text, mask in zip(sample.regions.texts, sample.regions.masks, strict=True):
            assert (decoded(mask) == whole[image, text]).all()
    assert (x.patient_id, x.licence) == ("covid/17", "CC BY-NC-SA") and (y.patient_id, y.licence) == (
        "covid/y",
        "CC BY 4.0",
    )
    assert x.regions.labels[:2] == [label("left lung"), label("right lung")]
    assert label("left lung") not in x.labelled and label("tubing") in x.labelled and label("tubing") not in y.labelled
    assert len(skipped) == 4


def test_structures_of_a_resized_image_are_not_used(tmp_path):
    _, rows = write_structures(tmp_path)
    write_structure_table(tmp_path, rows)
    picture(tmp_path / "images" / "y.png", 100, 60)
    samples, skipped = collect_by_id(covid_structures(tmp_path, "covid", ""))
    assert set(samples) == {"covid/x.day0"} and "the table says 50x30" in skipped[0].why


# Hostile files


def test_mutated_tables_raise_nothing_but_value_errors(tmp_path):
    picture(tmp_path / "1.png", 32, 32)
    _, rows = write_structures(tmp_path)
    write_structure_table(tmp_path, rows)
    files = {
        "BBox_List_2017.csv": ("Image Index,F,B\n1.png,Mass,1,2,3,4\n1.png,Mass,5,6,7,8\n", nih_boxes),
        "stage_2_train_labels.csv": ("patientId,x,y,width,height,Target\n1,2,3,4,5,1\n1,,,,,0\n", rsna_pneumonia),
        "train.csv": (VINDR + "1,R1,ILD,1,2,30,31\n1,R2,ILD,1,2,30,32\n", vindr_cxr),
        "structure.csv": ((tmp_path / "structure.csv").read_text(), covid_structures),
    }
    assert read_mutants(tmp_path, files) >= 100 * len(files)


def test_a_folder_without_a_table_is_named(tmp_path):
    for source in (nih_boxes, rsna_pneumonia, vindr_cxr, covid_structures):
        with pytest.raises(AnnotationError, match="is this the folder of the source"):
            list(source(tmp_path, "x", ""))


def test_a_table_with_another_header_is_named(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text("patient,x,y\n1,2,3\n")
    with pytest.raises(AnnotationError, match="stage_2_train_labels.csv: the header has no patientId, width"):
        list(rsna_pneumonia(tmp_path, "x", ""))
