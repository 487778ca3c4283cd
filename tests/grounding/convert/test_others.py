"""HC18, REFUGE, IDRiD and SLAKE: fixtures in the layout of the page that each reader cites, drawn here; SLAKE also
against the names of its real lists."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from grounding.convert.others import fill_outline, hc18, idrid, refuge
from grounding.convert.record import AnnotationError
from grounding.convert.slake import VALUES, slake
from tests.grounding.convert.builders import collect_by_id, label, masks_of, real, save

SIZE = (120, 80)  # width, height


def photograph(path, size=SIZE):
    save(path, Image.effect_noise(size, 50).convert("RGB"))


def drawn(*shapes, size=SIZE, mode="L", background=0):
    """Shapes ("ellipse" | "rectangle", xyxy, {fill | outline: grey or colour}) on an image."""
    image = Image.new(mode, size, background)
    for name, box, colours in shapes:
        getattr(ImageDraw.Draw(image), name)(box, **colours)
    return image


# HC18


def test_hc18_outlines_are_filled_and_examinations_kept_together(tmp_path):
    shapes = {"010_HC": (20, 10, 100, 70), "010_2HC": (30, 15, 90, 60), "011_HC": (10, 10, 60, 60)}
    for name, box in shapes.items():
        save(tmp_path / "training_set" / f"{name}.png", drawn(("ellipse", (5, 5, 70, 70), {"fill": 90})))
        outline = drawn(("ellipse", box, {"outline": 255}))
        save(tmp_path / "training_set" / f"{name}_Annotation.png", outline)
    save(tmp_path / "test_set" / "000_HC.png", drawn())
    save(tmp_path / "training_set" / "012_HC.png", drawn())
    save(tmp_path / "training_set" / "012_HC_Annotation.png", drawn())
    table = "filename,pixel size(mm),head circumference (mm)\n010_HC.png,0.25,44.3\n010_2HC.png,wide,\n"
    (tmp_path / "training_set_pixel_size_and_HC.csv").write_text("\ufeff" + table, encoding="utf-8")
    samples, skipped = collect_by_id(hc18(tmp_path, "hc18", "CC BY 4.0"))
    assert set(samples) == {f"hc18/training_set/{name}" for name in shapes}
    for name, box in shapes.items():
        sample = samples[f"hc18/training_set/{name}"]
        filled = np.asarray(drawn(("ellipse", box, {"fill": 255}))) > 0
        assert (masks_of(sample)[0] == filled).mean() > 0.995
        np.testing.assert_allclose(
            sample.regions.boxes[0] * [*SIZE, *SIZE], [*box[:2], box[2] + 1, box[3] + 1], atol=1.1
        )
        assert sample.labelled == (label("fetal head"),) and sample.modality == "ultrasound"
    first, second = (samples[f"hc18/training_set/{name}"] for name in ("010_HC", "010_2HC"))
    assert first.patient_id == second.patient_id == first.study_id == second.study_id == "hc18/010"
    assert (first.frame, second.frame, first.spacing, second.spacing) == (0, 1, (0.25, 0.25), None)
    assert first.regions.attributes == [{"head_circumference_mm": "44.3"}]
    assert len(skipped) == 3  # the test image, the empty annotation, the pixel size that is a word


def test_outlines_with_gaps_and_cut_off_by_the_frame_are_filled():
    box = (60, 20, 150, 60)  # reaches over the right edge
    filled = np.asarray(drawn(("ellipse", box, {"fill": 1}))) > 0
    outline = np.asarray(drawn(("ellipse", box, {"outline": 1}))) > 0
    assert (fill_outline(outline) == filled).mean() > 0.995
    whole = np.asarray(drawn(("ellipse", (20, 20, 90, 60), {"outline": 1}))) > 0
    gap = whole.copy()
    gap[:, 50:58] = False
    assert (fill_outline(gap) ^ fill_outline(whole)).mean() < 0.01
    assert not fill_outline(np.zeros((4, 5), bool)).any()


def test_hc18_mask_of_another_size_is_named(tmp_path):
    save(tmp_path / "001_HC.png", drawn())
    save(tmp_path / "001_HC_Annotation.png", drawn(("ellipse", (5, 5, 50, 50), {"outline": 255}), size=(60, 60)))
    samples, skipped = collect_by_id(hc18(tmp_path, "h", ""))
    assert len(samples["h/001_HC"].regions) == 0 and samples["h/001_HC"].labelled == ()
    assert "mask of 60 x 60" in skipped[0].why


# REFUGE


def test_refuge_disc_includes_the_cup(tmp_path):
    disc, cup = (40, 20, 80, 60), (55, 35, 70, 50)
    mask = drawn(("ellipse", disc, {"fill": 128}), ("ellipse", cup, {"fill": 0}), background=255)
    pairs = {"Glaucoma/g0001": mask, "Non-Glaucoma/n0001": mask.resize((60, 40)), "Non-Glaucoma/n0002": None}
    pairs["Non-Glaucoma/n0003"] = drawn(background=255)
    for name, image in pairs.items():
        photograph(tmp_path / "Training400" / f"{name}.jpg")
        if image:
            save(tmp_path / "Annotation-Training400" / "Disc_Cup_Masks" / f"{name}.bmp", image)
    samples, skipped = collect_by_id(refuge(tmp_path, "refuge", ""))
    assert set(samples) == {"refuge/Training400/Glaucoma/g0001", "refuge/Training400/Non-Glaucoma/n0001"}
    sample = samples["refuge/Training400/Glaucoma/g0001"]
    assert sample.regions.labels == [label("optic disc"), label("optic cup")]
    whole, inner = masks_of(sample)
    assert (whole == (np.asarray(drawn(("ellipse", disc, {"fill": 1}))) > 0)).all()
    assert (inner == (np.asarray(drawn(("ellipse", cup, {"fill": 1}))) > 0)).all() and not (inner & ~whole).any()
    assert set(sample.labelled) == {label("optic disc"), label("optic cup")}
    other = samples["refuge/Training400/Non-Glaucoma/n0001"]  # its mask has half the size
    assert len(other.regions) == 0 and other.labelled == ()
    assert len(skipped) == 2 + 1 + 1


def test_refuge_takes_the_mask_of_the_same_release(tmp_path):
    for split, fill in (("train", 128), ("test", 0)):
        photograph(tmp_path / split / "Images" / "0001.jpg")
        save(tmp_path / split / "gts" / "0001.bmp", drawn(("ellipse", (9, 9, 40, 40), {"fill": fill}), background=255))
    samples, _ = collect_by_id(refuge(tmp_path, "r", ""))
    assert samples["r/train/Images/0001"].regions.texts == ["optic disc"]
    assert samples["r/test/Images/0001"].regions.texts == ["optic disc", "optic cup"]


# IDRiD


def write_idrid(root):
    seg = root / "A. Segmentation"
    for split, name in (("a. Training Set", "IDRiD_01"), ("b. Testing Set", "IDRiD_55")):
        photograph(seg / "1. Original Images" / split / f"{name}.jpg")
        truth = seg / "2. All Segmentation Groundtruths" / split
        spots = [("rectangle", (5 + 10 * k, 5, 7 + 10 * k, 6 + k), {"fill": (255, 0, 0)}) for k in range(5)]
        lesions = drawn(*spots, ("rectangle", (119, 79, 119, 79), {"fill": (255, 0, 0)}), mode="RGB")
        save(truth / "1. Microaneurysms" / f"{name}_MA.tif", lesions)
        halves = drawn(("rectangle", (70, 30, 80, 40), {"fill": 76}), ("rectangle", (81, 41, 90, 50), {"fill": 76}))
        save(truth / "2. Haemorrhages" / f"{name}_HE.tif", halves)  # they touch at a corner
        save(truth / "3. Hard Exudates" / f"{name}_EX.tif", drawn())
        two = drawn(("rectangle", (10, 30, 20, 40), {"fill": 1}), ("rectangle", (30, 30, 40, 40), {"fill": 1}))
        save(truth / "5. Optic Disc" / f"{name}_OD.tif", two)  # a vessel cuts the disc
    return seg


def test_idrid_every_connected_part_is_a_lesion(tmp_path):
    seg = write_idrid(tmp_path)
    samples, skipped = collect_by_id(idrid(tmp_path, "idrid", "CC BY 4.0"))
    assert len(samples) == 2 and not skipped
    sample = samples["idrid/A. Segmentation/1. Original Images/b. Testing Set/IDRiD_55"]
    expected = {"Microaneurysms": 6, "Haemorrhages": 1, "Optic Disc": 1}
    assert Counter(sample.regions.texts) == expected
    assert label("microaneurysm") in sample.regions.labels
    phrases = ("microaneurysm", "retinal haemorrhage", "hard exudate", "soft exudate", "optic disc")
    assert set(sample.labelled) == {label(phrase) for phrase in phrases}  # also what has no mask
    truth = seg / "2. All Segmentation Groundtruths" / "b. Testing Set"
    for kind, file in (
        ("Microaneurysms", "1. Microaneurysms/IDRiD_55_MA"),
        ("Haemorrhages", "2. Haemorrhages/IDRiD_55_HE"),
    ):
        whole = np.asarray(Image.open(truth / f"{file}.tif").convert("L")) > 0
        parts = [mask for text, mask in zip(sample.regions.texts, masks_of(sample), strict=True) if text == kind]
        assert (np.sum(parts, 0) == whole).all()  # all of it, nothing twice
    for box, mask in zip(sample.regions.boxes, masks_of(sample), strict=True):
        rows, columns = np.nonzero(mask)
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box * [*SIZE, *SIZE], tight, atol=1e-3)


def test_idrid_masks_that_cannot_be_used_leave_their_class_open(tmp_path):
    seg = write_idrid(tmp_path)
    truth = seg / "2. All Segmentation Groundtruths" / "a. Training Set"
    (truth / "3. Hard Exudates" / "IDRiD_01_EX.tif").write_bytes(b"II*\0 broken")
    save(truth / "1. Microaneurysms" / "IDRiD_01_MA.tif", drawn(size=(60, 40)))
    save(truth / "1. Microaneurysms" / "IDRiD_02_MA.tif", drawn())
    photograph(seg / "1. Original Images" / "a. Training Set" / "IDRiD_03.jpg")
    samples, skipped = collect_by_id(idrid(seg, "idrid", ""))
    sample = samples["idrid/1. Original Images/a. Training Set/IDRiD_01"]
    assert label("hard exudate") not in sample.labelled and label("microaneurysm") not in sample.labelled
    assert label("soft exudate") in sample.labelled and set(sample.regions.texts) == {"Haemorrhages", "Optic Disc"}
    assert len(samples) == 2 and len(skipped) == 4
    with pytest.raises(AnnotationError, match="Groundtruths"):
        list(idrid(tmp_path / "nothing", "idrid", ""))


# SLAKE


def write_slake(root):
    folder = root / "imgs" / "xmlab1"
    photograph(folder / "source.jpg")
    liver, right = ("rectangle", (10, 10, 39, 29), {"fill": 70}), ("rectangle", (50, 10, 59, 19), {"fill": 155})
    save(folder / "mask.png", drawn(liver, right, ("rectangle", (70, 50, 79, 59), {"fill": 230})))
    boxes = [
        {"Liver": [9.5, 10.0, 31.0, 20.0]},
        {"Atelectasis": [100.0, 60.0, 10.0, 10.0]},
        {"Right Kidney": [50, 10, 10, 10]},
    ]
    (folder / "detection.json").write_text(json.dumps(boxes))
    question = {"img_id": 1, "img_name": "xmlab1/source.jpg", "modality": "CT", "location": "Abdomen"}
    (folder / "question.json").write_text(json.dumps([question]))
    return folder


def test_slake_boxes_and_masks_of_one_structure_are_one_region(tmp_path):
    folder = write_slake(tmp_path)
    samples, skipped = collect_by_id(slake(tmp_path, "slake", "CC BY 4.0"))
    sample = samples["slake/xmlab1"]
    assert not skipped and sample.modality == "ct" and sample.labelled == ()
    assert len(sample.regions) == 4
    boxes = dict(zip(sample.regions.texts, (sample.regions.boxes * [*SIZE, *SIZE]).round(3).tolist(), strict=True))
    assert boxes == {
        "Liver": [10, 10, 40, 30],
        "Atelectasis": [100, 60, 110, 70],
        "Right Kidney": [50, 10, 60, 20],
        "Spleen": [70, 50, 80, 60],
    }
    assert sample.regions.labels[2] == label("right kidney")
    assert [mask is None for mask in sample.regions.masks] == [text == "Atelectasis" for text in sample.regions.texts]
    (folder / "detection.json").write_text("[]")
    sample = collect_by_id(slake(tmp_path, "slake", ""))[0]["slake/xmlab1"]
    pixels = np.asarray(Image.open(folder / "mask.png"))
    names = {70: "Liver", 155: "Right Kidney", 230: "Spleen"}
    assert {text: int(mask.sum()) for text, mask in zip(sample.regions.texts, masks_of(sample), strict=True)} == {
        name: int((pixels == value).sum()) for value, name in names.items()
    }


def test_slake_files_that_lie(tmp_path):
    folder = write_slake(tmp_path)
    boxes = [{"Liver": [9, 10, 31]}, {"Heart": "here"}, 5, {"Colon": [1, 1, -4, 5]}, {"Spleen": [500, 500, 5, 5]}]
    (folder / "detection.json").write_text(json.dumps(boxes))
    (tmp_path / "mask.txt").write_text("70:Liver\n230:Spleen\n\nnoise\n")
    samples, skipped = collect_by_id(slake(tmp_path, "slake", ""))
    assert sorted(samples["slake/xmlab1"].regions.texts) == ["Liver", "Spleen"]
    assert len(skipped) == 5 and any("value 155" in record.why for record in skipped)
    (folder / "mask.png").write_bytes(b"\x89PNG")
    (folder / "detection.json").write_text("{")
    samples, skipped = collect_by_id(slake(tmp_path, "slake", ""))
    assert len(samples["slake/xmlab1"].regions) == 0 and len(skipped) == 2
    (folder / "question.json").unlink()
    samples, skipped = collect_by_id(slake(tmp_path, "slake", ""))
    assert not samples and "modality" in skipped[0].why
    with pytest.raises(AnnotationError, match="xmlab"):
        list(slake(tmp_path / "imgs" / "xmlab1", "slake", ""))


def test_slake_every_image_of_the_real_lists_is_kept_or_skipped(tmp_path):
    lists = real("slake-json", "Slake1.0")
    rows = [row for name in ("train", "validate", "test") for row in json.loads((lists / f"{name}.json").read_text())]
    for name in ("train", "validate", "test"):
        shutil.copy(lists / f"{name}.json", tmp_path)
    images = {Path(row["img_name"]).parent.name: row["modality"] for row in rows}
    chosen = random.Random(0).sample(sorted(images), 24)
    for k, name in enumerate(chosen):
        value = list(VALUES)[k]
        photograph(tmp_path / "imgs" / name / "source.jpg", (40, 30))
        save(
            tmp_path / "imgs" / name / "mask.png", drawn(("rectangle", (3, 4, 20, 20), {"fill": value}), size=(40, 30))
        )
    samples, skipped = collect_by_id(slake(tmp_path, "slake", ""))
    assert set(samples) == {f"slake/{name}" for name in chosen}
    assert {record.key for record in skipped} == set(images) - set(chosen)
    assert {record.why for record in skipped} == {"image is not on disk"}
    words = {"CT": "ct", "MRI": "mri", "X-Ray": "xray"}
    for k, name in enumerate(chosen):
        sample = samples[f"slake/{name}"]
        assert sample.modality == words[images[name]] and sample.regions.texts == [list(VALUES.values())[k]]


def test_masks_of_every_value_have_a_name():
    assert len(VALUES) == 39 and len(set(VALUES.values())) == 39
    assert all(0 < value < 256 for value in VALUES)
