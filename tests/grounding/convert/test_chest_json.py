"""Chest X-ray sources with a JSON list: ChestX-Det10 and ChestX-Det on their real lists, PadChest-GR and MS-CXR on
fixtures written here, in the layout of the page that each reader cites."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle

from grounding.convert.chest_json import DET10_CLASSES, DET_CLASSES, chestx_det, chestx_det10, ms_cxr, padchest_gr
from grounding.convert.record import AnnotationError
from tests.grounding.convert.builders import boxes_in_pixels, collect_by_id, label, picture, read_mutants, real

DICOM = "a-0001"


# ChestX-Det10 and ChestX-Det, real lists


def test_chestx_det10_counts_and_boxes_are_those_of_the_real_lists(tmp_path):
    folder = real("chestx-det10")
    lists = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test")}
    chosen = {split: {entry["file_name"]: entry for entry in lists[split][:14]} for split in lists}
    for split in lists:
        shutil.copy(folder / f"{split}.json", tmp_path)
        for name, entry in chosen[split].items():
            side = 256 if len(entry["syms"]) > 1 else 1024  # these were resized
            picture(tmp_path / f"{split}_data" / name, side, side)
    samples, skipped = collect_by_id(chestx_det10(tmp_path, "det10", "no licence"))
    assert set(samples) == {f"det10/{s}_data/{Path(name).stem}" for s in chosen for name in chosen[s]}
    assert len(skipped) == sum(map(len, lists.values())) - len(samples)
    assert {record.why for record in skipped} == {"image is not on disk"}
    for split, name in [(s, name) for s in chosen for name in chosen[s]]:
        sample, entry = samples[f"det10/{split}_data/{Path(name).stem}"], chosen[split][name]
        assert sample.regions.texts == entry["syms"]
        np.testing.assert_allclose(sample.regions.boxes * 1024, np.reshape(entry["boxes"], (-1, 4)), atol=1e-3)
        assert len(sample.labelled) == len(DET10_CLASSES) and label("nodule") in sample.labelled
        assert (sample.modality, sample.licence, sample.source) == ("xray", "no licence", "det10")
    assert any(not sample.regions for sample in samples.values())  # no finding is an image, too


def test_chestx_splits_that_share_a_name_keep_their_images(tmp_path):
    for split, side in (("train", 64), ("test", 32)):
        entry = {"file_name": "1.png", "syms": ["Mass"], "boxes": [[0, 0, 512, 512]]}
        (tmp_path / f"{split}.json").write_text(json.dumps([entry]))
        picture(tmp_path / f"{split}_data" / "1.png", side, side)
    samples, skipped = collect_by_id(chestx_det10(tmp_path, "x", ""))
    assert {name: sample.regions.image_size for name, sample in samples.items()} == {
        "x/train_data/1": (64, 64),
        "x/test_data/1": (32, 32),
    }
    assert not skipped


def test_chestx_det_polygons_become_masks_of_their_area(tmp_path):
    folder = real("chestx-det-poly")
    entries = json.loads((folder / "ChestX_Det_test.json").read_text())
    (tmp_path / "annotations").mkdir()
    shutil.copy(folder / "ChestX_Det_test.json", tmp_path / "annotations")
    chosen = [entry for entry in entries if entry["syms"]][:6] + [entry for entry in entries if not entry["syms"]][:2]
    for entry in chosen:
        picture(tmp_path / "elsewhere" / entry["file_name"])
    samples, skipped = collect_by_id(chestx_det(tmp_path, "det", "Apache-2.0", images="elsewhere"))
    assert len(samples) == len(chosen) and len(skipped) == len(entries) - len(chosen)
    for entry in chosen:
        sample = samples[f"det/{Path(entry['file_name']).stem}"]
        assert sample.regions.texts == entry["syms"] and len(sample.labelled) == len(DET_CLASSES)
        for box, mask, ring in zip(boxes_in_pixels(sample), sample.regions.masks or [], entry["polygons"], strict=True):
            x, y = np.array(ring, float).T
            shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
            around = np.hypot(np.diff(x, append=x[0]), np.diff(y, append=y[0])).sum()
            assert abs(float(rle.area(mask)) - shoelace) <= around
            np.testing.assert_allclose(box, [x.min(), y.min(), x.max(), y.max()], atol=1e-3)


def test_chestx_entries_that_lie_are_named_and_lose_no_other(tmp_path):
    entries = [
        {"file_name": "1.png", "syms": ["Mass", "Nodule"], "boxes": [[10, 10, 20, 20], [30, 30, 30, 40]]},
        {"file_name": "1.png", "syms": [], "boxes": []},  # twice
        {"file_name": "2.png", "syms": ["Mass"], "boxes": []},
        {"file_name": "3.png", "syms": ["Mass", "Fracture"], "boxes": [[1, 2, "x", 4], [1, 1, float("nan"), 2]]},
        {"file_name": "../../secret.png", "syms": [], "boxes": []},
        {"syms": []},
        7,
        {"file_name": "4.png", "syms": ["Mass"], "boxes": [[0, 0, 10**400, 5]]},
        {"file_name": "5.png", "syms": [], "boxes": []},  # 1024 x 700: cropped or squeezed, nobody knows
    ]
    (tmp_path / "train.json").write_text("\ufeff" + json.dumps(entries), encoding="utf-8")
    for name in "1234":
        picture(tmp_path / "train_data" / f"{name}.png")
    picture(tmp_path / "train_data" / "5.png", 1024, 700)
    samples, skipped = collect_by_id(chestx_det10(tmp_path, "x", ""))
    assert set(samples) == {"x/train_data/1", "x/train_data/3", "x/train_data/4"}
    first = samples["x/train_data/1"]
    assert first.regions.texts == ["Mass"]
    assert label("nodule") not in first.labelled and label("fibrosis") in first.labelled
    assert len(skipped) == 1 + 1 + 1 + 2 + 1 + 1 + 1 + 1 + 1
    assert any("no area" in record.why for record in skipped)


def test_chestx_polygon_that_would_fill_the_memory_is_left_out(tmp_path):
    far = [[0, 0], [10**9, 5], [5, 10**9]]
    entry = {"file_name": "1.png", "syms": ["Mass"], "boxes": [[0, 0, 9, 9]], "polygons": [far]}
    (tmp_path / "ChestX_Det_train.json").write_text(json.dumps([entry]))
    picture(tmp_path / "train_data" / "1.png")
    samples, skipped = collect_by_id(chestx_det(tmp_path, "x", ""))
    assert len(samples["x/train_data/1"].regions) == 0 and len(skipped) == 1


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[" * 100_000, "\x00"])
def test_a_broken_list_is_named(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(AnnotationError, match="train.json"):
        list(chestx_det10(tmp_path, "x", ""))


def test_a_folder_without_a_list_is_named(tmp_path):
    for source in (chestx_det10, chestx_det, padchest_gr, ms_cxr):
        with pytest.raises(AnnotationError, match="is this the folder of the source"):
            list(source(tmp_path, "x", ""))


# MS-CXR

SENTENCES = [  # dicom, category, sentence, path, box, size
    (DICOM, "Pneumonia", "Patchy opacity, right base", "files/p10/p10000001/s50000001/a-0001.jpg", (50, 60, 30, 20)),
    (DICOM, "Consolidation", "Patchy opacity, right base", "files/p10/p10000001/s50000001/a-0001.jpg", (5, 6, 30, 20)),
    ("b-0002", "Lung Opacity", 'opacity "hazy"', "files/p11/p11000001/s50000002/b-0002.jpg", (1, 2, 30, 20)),
    ("c-0003", "Edema", "edema", "files/p11/p11000001/s50000003/c-0003.jpg", (1, 2, 30, 20)),
]


def write_mscxr_csv(root):
    header = ["dicom_id", "category_name", "label_text", "path", *"xywh", "image_width", "image_height", "split"]
    with (root / "MS_CXR_Local_Alignment_v1.1.0.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *([*row[:4], *row[4], 200, 100, "train"] for row in SENTENCES)])


def write_mscxr_json(root):
    paths = list(dict.fromkeys(row[3] for row in SENTENCES))
    names = list(dict.fromkeys(row[1] for row in SENTENCES))
    size = {"width": 200, "height": 100}
    coco = {
        "images": [{"id": k, "file_name": Path(p).name, "path": p, **size} for k, p in enumerate(paths)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {
                "id": k,
                "image_id": paths.index(row[3]),
                "category_id": names.index(row[1]),
                "label_text": row[2],
                "bbox": list(row[4]),
            }
            for k, row in enumerate(SENTENCES)
        ],
    }
    (root / "MS_CXR_Local_Alignment_v1.1.0.json").write_text(json.dumps(coco))


@pytest.mark.parametrize("write", [write_mscxr_csv, write_mscxr_json])
def test_ms_cxr_sentences_name_regions_of_a_category(tmp_path, write):
    write(tmp_path)
    mimic = tmp_path / "mimic"
    picture(mimic / "files/p10/p10000001/s50000001/a-0001.jpg", 200, 100)
    picture(mimic / "p11/p11000001/s50000002/b-0002.jpg", 100, 50)  # without files/, half the size
    samples, skipped = collect_by_id(ms_cxr(tmp_path, "ms", "", images=str(mimic)))
    assert [(record.key, record.why) for record in skipped] == [("c-0003", "image is not on disk")]
    first, second = samples["ms/a-0001"], samples["ms/b-0002"]
    assert first.regions.texts == ["Patchy opacity, right base"] * 2
    assert first.regions.labels == [label("pneumonia"), label("consolidation")]
    assert [row["category"] for row in first.regions.attributes] == ["Pneumonia", "Consolidation"]
    assert (first.patient_id, first.study_id) == ("ms/p10000001", "ms/s50000001")
    np.testing.assert_allclose(boxes_in_pixels(first), [[50, 60, 80, 80], [5, 6, 35, 26]], atol=1e-3)
    np.testing.assert_allclose(boxes_in_pixels(second), [[0.5, 1, 15.5, 11]], atol=1e-3)
    assert first.labelled == ()


def test_ms_cxr_annotations_that_point_nowhere(tmp_path):
    write_mscxr_json(tmp_path)
    file = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json"
    coco = json.loads(file.read_text())
    coco["annotations"] += [{"image_id": 99, "category_id": 0, "bbox": [1, 2, 3, 4]}, None, {"image_id": 0}]
    coco["annotations"][0]["bbox"] = [1, 2, "three", 4]
    file.write_text(json.dumps(coco))
    picture(tmp_path / f"{DICOM}.jpg", 200, 100)
    samples, skipped = collect_by_id(ms_cxr(tmp_path, "ms", ""))
    assert len(samples["ms/a-0001"].regions) == 1
    assert Counter(record.why for record in skipped)["image is not on disk"] == 2 and len(skipped) == 2 + 3 + 1


# PadChest-GR


def test_padchest_sentences_labels_and_what_is_exhaustive(tmp_path):
    effusion = {
        "sentence_en": "Left pleural effusion.",
        "sentence_es": "Derrame pleural izquierdo.",
        "abnormal": True,
        "boxes": [[0.5, 0.5, 0.75, 1.0]],
        "extra_boxes": [[0.52, 0.5, 0.75, 1.0]],
        "labels": ["pleural effusion", "costophrenic angle blunting"],
        "locations": ["loc left"],
        "progression": None,
    }
    studies = [
        {
            "StudyID": "s1",
            "ImageID": "1_a.png",
            "findings": [
                effusion,
                {"sentence_en": "Nodule.", "abnormal": True, "boxes": [], "labels": ["nodule"]},
                {"sentence_en": "No pneumothorax.", "abnormal": False},
                {"sentence_en": "Mass.", "abnormal": True, "labels": ["mass"], "boxes": [[0.1, 0.1, 0.1, 0.4]]},
                "text",
            ],
        },
        {"StudyID": "s2", "ImageID": "2_b.png", "findings": [{"sentence_en": "Normal.", "abnormal": False}]},
        {"StudyID": "s3", "ImageID": "3_c.png", "findings": []},
        {"StudyID": "s4", "ImageID": "4_d.png", "findings": [effusion]},
        {"StudyID": "s5", "ImageID": "5_e.png"},
        {"StudyID": "s6"},
    ]
    (tmp_path / "grounded_reports_20240819.json").write_text(json.dumps(studies))
    (tmp_path / "master_table.csv").write_text("StudyID,ImageID,PatientID\ns1,1_a.png,p77\ns2,2_b.png\n")
    for name in ("1_a.png", "2_b.png", "3_c.png", "5_e.png"):
        picture(tmp_path / "Padchest_GR_files" / name, 200, 100)
    samples, skipped = collect_by_id(padchest_gr(tmp_path, "pc", ""))
    first, normal, empty = (samples[f"pc/Padchest_GR_files/{name}"] for name in ("1_a", "2_b", "3_c"))
    assert boxes_in_pixels(first).tolist() == [[100, 50, 150, 100]]  # one reader's box, not both
    assert first.regions.labels == [label("pleural effusion")] and first.regions.texts == ["Left pleural effusion."]
    assert first.regions.attributes[0]["locations"] == "loc left"
    assert (first.patient_id, first.study_id) == ("pc/p77", "pc/s1")
    assert first.labelled == (label("pleural effusion"),)
    assert set(normal.labelled) == {label("pleural effusion"), label("mass")} and len(normal.regions) == 0
    assert empty.labelled == ()
    assert len(skipped) == 2 + 1 + 1 + 1 and len(samples) == 3


# Hostile files


def test_mutated_lists_raise_nothing_but_value_errors(tmp_path):
    write_mscxr_json(tmp_path)
    picture(tmp_path / f"{DICOM}.jpg", 200, 100)
    picture(tmp_path / "train_data" / "1.png", 32, 32)
    findings = [{"sentence_en": "a", "abnormal": True, "boxes": [[0, 0, 1, 1]], "labels": ["b"], "locations": ["c"]}]
    entry = {"file_name": "1.png", "syms": ["Mass"], "boxes": [[1, 2, 30, 40]]}
    name = "MS_CXR_Local_Alignment_v1.1.0.json"
    files = {
        "train.json": (json.dumps([entry] * 2), chestx_det10),
        "ChestX_Det_train.json": (json.dumps([entry | {"polygons": [[[1, 2], [30, 4], [5, 60]]]}]), chestx_det),
        "grounded_reports.json": (
            json.dumps([{"StudyID": "s", "ImageID": "1.png", "findings": findings}]),
            padchest_gr,
        ),
        name: ((tmp_path / name).read_text(), ms_cxr),
    }
    assert read_mutants(tmp_path, files) >= 100 * len(files)


@pytest.mark.parametrize("value", [None, 7, "text", {"a": 1}, [[]], 10**400, float("nan")])
@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_coco_parts_of_another_type(tmp_path, key, value):
    write_mscxr_json(tmp_path)
    file = tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    if isinstance(value, list):
        assert not collect_by_id(ms_cxr(tmp_path, "x", ""))[0]
    else:
        with pytest.raises(AnnotationError, match="has no lists"):
            list(ms_cxr(tmp_path, "x", ""))
