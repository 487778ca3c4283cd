import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding.convert.record import AnnotationError
from grounding.convert.voc import bccd, voc
from grounding.labels import load_label_tree
from tests.grounding.convert.builders import collect, real


def box(name="cell", xmin=5, ymin=4, xmax=24, ymax=18, more=""):
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def write(root, name, *objects, width=40, height=30, filename=None, image=True):
    """Annotations/NAME.xml and a 40 x 30 JPEGImages/NAME.png."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    size = f"<size><width>{width}</width><height>{height}</height><depth>1</depth></size>"
    text = f"<annotation><filename>{filename or name + '.jpg'}</filename>{size}{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)
    if image:
        Image.new("L", (40, 30), 90).save(root / "JPEGImages" / f"{name}.png")
    return root / "Annotations" / f"{name}.xml"


def read(root, **options):
    return collect(voc(root, "set", "CC0", "microscopy", **options))


def test_boxes_count_pixels_from_one(tmp_path):
    write(tmp_path, "a", box(), box("Other  cell", 1, 1, 40, 30, "<difficult>1</difficult><truncated>0</truncated>"))
    (sample,), skipped = read(tmp_path)
    assert not skipped
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6], [0, 0, 1, 1]], atol=1e-6)
    assert sample.regions.texts == ["cell", "Other cell"] and sample.regions.attributes == [{}, {"difficult": "1"}]
    assert sample.image_id == sample.patient_id == "set/JPEGImages/a" and sample.licence == "CC0"
    tree = load_label_tree()
    assert set(sample.labelled) == {tree.find(word) or word for word in ("cell", "other cell")}


def test_exhaustive_classes_are_those_of_the_source_or_of_the_user(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", box("cell"))
    empty, full = read(tmp_path)[0]
    assert len(empty.regions) == 0 and len(empty.labelled) == 1 and empty.labelled == full.labelled
    assert read(tmp_path, labelled="")[0][0].labelled == ()
    assert len(read(tmp_path, labelled="cell, debris")[0][0].labelled) == 2


def test_a_split_is_read_from_its_list(tmp_path):
    for name in "abc":
        write(tmp_path, name, box())
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c\na  1\n\ngone -1\n")
    samples, skipped = read(tmp_path, split="val")
    assert [sample.image_id[-1] for sample in samples] == ["c", "a"]
    assert [why.key for why in skipped] == ["ImageSets/Main/val.txt:4"]
    for wrong in ("test", "../val"):
        with pytest.raises(AnnotationError):
            read(tmp_path, split=wrong)


def test_a_resized_copy_keeps_its_boxes_and_another_shape_is_refused(tmp_path):
    write(tmp_path, "a", box(xmin=41, ymin=31, xmax=240, ymax=180), width=400, height=300)
    write(tmp_path, "b", box(), width=30, height=40)
    write(tmp_path, "c", box(), width=0, height=0)
    samples, (refused,) = read(tmp_path)
    for sample in samples:
        np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6]], atol=1e-6)
    assert len(samples) == 2 and "b.xml" in refused.key and "30 x 40" in refused.why


def test_one_bad_object_does_not_lose_the_others(tmp_path):
    bad = [
        (box(xmin=30), "no area"),
        (box(xmin=24), "no area"),
        (box(ymin=-9, ymax=-5), "outside"),
        (box(xmin=60, xmax=70), "outside"),
        (box(xmax="nan"), "finite"),
        (box(xmax="1e999"), "finite"),
        (box(xmax="wide"), "xmax is 'wide'"),
        (box(name=""), "no name"),
        ("<object><name>cell</name></object>", "xmin is missing"),
        ("<object/>", "no name"),
    ]
    write(tmp_path, "a", box(), *(text for text, _ in bad), box(xmin=20, xmax=99))
    (sample,), skipped = read(tmp_path)
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6], [19 / 40, 0.1, 1, 0.6]], atol=1e-6)
    assert len(skipped) == len(bad)
    for number, (why, (_, word)) in enumerate(zip(skipped, bad, strict=True), 2):
        assert why.why.startswith(f"object {number}:") and word in why.why


def test_files_that_cannot_be_read_are_skipped_and_named(tmp_path):
    good = write(tmp_path, "good", box())
    write(tmp_path, "gone", box(), image=False)
    write(tmp_path, "cut_image", box())
    (tmp_path / "JPEGImages" / "cut_image.png").write_bytes((tmp_path / "JPEGImages" / "good.png").read_bytes()[:40])
    Image.new("L", (4, 4)).save(tmp_path / "JPEGImages" / "unlabelled.png")
    text = good.read_bytes()
    bombs = b'<!DOCTYPE a [<!ENTITY x "y">]>' + text
    broken = {
        "zero": b"",
        "cut": text[:-9],
        "entities": bombs,
        "wide": text.decode().encode("utf-16"),
        "huge": b" " * 10_000_001,
    }
    for name, data in broken.items():
        write(tmp_path, name).write_bytes(data)
    (tmp_path / "Annotations" / "self.xml").symlink_to(tmp_path / "Annotations" / "self.xml")
    (tmp_path / "Annotations" / "loop").symlink_to(tmp_path)
    (sample,), skipped = read(tmp_path)
    assert sample.image_id == "set/JPEGImages/good"
    stems = {Path(why.key).stem for why in skipped}
    assert stems == {"gone", "cut_image", "unlabelled", *broken} and len(skipped) == len(stems)


def test_an_image_is_found_by_the_name_in_the_xml_and_only_once(tmp_path):
    write(tmp_path, "a", box())
    write(tmp_path, "page_2", filename=r"C:\scans\b.jpg", image=False)
    write(tmp_path, "page_3", filename="b.jpg", image=False)
    Image.new("L", (40, 30)).save(tmp_path / "JPEGImages" / "b.jpg")
    samples, (twice,) = read(tmp_path)
    assert [Path(sample.image).name for sample in samples] == ["a.png", "b.jpg"] and "page_3" in twice.key


def test_no_xml_is_an_error_with_the_folder(tmp_path):
    with pytest.raises(AnnotationError, match=re.escape(str(tmp_path))):
        read(tmp_path)


def test_mutated_files_end_in_records(tmp_path):
    file = write(tmp_path, "a", box(), box("b", more="<difficult>1</difficult>"))
    text = file.read_bytes()
    chance = random.Random(0)
    kept = 0
    for _ in range(400):
        mutated = bytearray(text)
        place = chance.randrange(len(mutated))
        mutated[place : place + chance.randint(0, 2)] = chance.choice(
            [b"9", b"-", b"<", b">", b"&lt;", b"1e999", b"\x00", b"\xff", b"9" * 30, b"<!ENTITY", b"</object>"]
        )
        file.write_bytes(bytes(mutated))
        samples, skipped = read(tmp_path)
        assert samples or skipped
        kept += bool(samples)
    assert 20 < kept < 380


@pytest.fixture(scope="module")
def cells():
    return collect(bccd(real("bccd"), "bccd", "MIT"))


def test_blood_cells_equal_a_count_of_the_files(cells):
    samples, skipped = cells
    files = sorted((real("bccd") / "BCCD" / "Annotations").glob("*.xml"))
    boxes = [
        (file.stem, name, tuple(map(int, corners)))
        for file in files
        for name, *corners in re.findall(
            r"<name>(\w+)</name>.*?<xmin>(\d+)</xmin>\s*<ymin>(\d+)</ymin>\s*<xmax>(\d+)</xmax>\s*<ymax>(\d+)</ymax>",
            file.read_text(),
            re.DOTALL,
        )
    ]
    points = [(stem, at) for stem, _, at in boxes if at[:2] == at[2:]]
    assert len(points) == 2 and sorted(Path(why.key).stem for why in skipped) == sorted(stem for stem, _ in points)
    assert len(samples) == len(files) == len(list((real("bccd") / "BCCD" / "JPEGImages").iterdir()))
    counts = Counter(text for sample in samples for text in sample.regions.texts)
    assert counts == Counter(name for stem, name, at in boxes if (stem, at) not in points)
    by_stem = {Path(sample.image).stem: sample for sample in samples}
    for stem, name, (left, top, right, bottom) in boxes:
        if (stem, (left, top, right, bottom)) not in points:
            regions = by_stem[stem].regions
            away = np.abs(regions.boxes * [640, 480, 640, 480] - [left - 1, top - 1, right, bottom]).max(1)
            assert any(d < 0.01 and text == name for d, text in zip(away, regions.texts, strict=True))


def test_blood_cells_have_the_trees_words(cells):
    tree = load_label_tree()
    words = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
    for sample in cells[0]:
        assert sample.regions.labels == [tree.find(words[text]) or words[text] for text in sample.regions.texts]
        assert len(sample.labelled) == 3 and sample.modality == "microscopy"
