import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding.convert.record import AnnotationError
from grounding.convert.yolo import idrid_yolo, yolo
from grounding.labels import load_label_tree
from tests.grounding.convert.builders import collect, decoded, real


def write(root, name, text, split="train"):
    """images/SPLIT/NAME.png of 40 x 30 and, where `text` is not None, labels/SPLIT/NAME.txt; the label's path."""
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 30), 90).save(root / "images" / split / f"{name}.png")
    label = root / "labels" / split / f"{name}.txt"
    if text is not None:
        label.write_text(text)
    return label


def read(root, **options):
    return collect(yolo(root, "set", "CC0", "fundus", **options))


def test_boxes_and_polygons(tmp_path):
    write(tmp_path, "a", "1 0.35 0.35 0.5 0.5\r\n\n0.0 0.95 0.5 0.2 0.2\n")
    write(tmp_path, "b", "0 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n")
    (boxes, polygons), skipped = read(tmp_path, names="MA, OD")
    assert not skipped
    np.testing.assert_allclose(boxes.regions.boxes, [[0.1, 0.1, 0.6, 0.6], [0.85, 0.4, 1, 0.6]], atol=1e-6)
    assert boxes.regions.texts == ["OD", "MA"] and boxes.image_id == boxes.patient_id == "set/images/train/a"
    np.testing.assert_allclose(polygons.regions.boxes, [[0.1, 0.1, 0.6, 0.6]], atol=1e-6)
    inside = np.zeros((30, 40), bool)
    inside[3:18, 4:24] = True
    assert (decoded(polygons.regions.masks[0]) == inside).all()


@pytest.mark.parametrize(
    "file, text",
    [
        ("data.yaml", "names: [MA, OD]\nnc: 2\n"),
        ("sub/data.yaml", "names:\n  0: MA\n  1: OD\n"),
        ("classes.txt", "MA\r\nOD\r\n"),
        ("labels/train/classes.txt", "MA\nOD"),
    ],
)
def test_names_come_from_a_file(tmp_path, file, text):
    write(tmp_path, "a", "1 0.5 0.5 0.2 0.2")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    (sample,), skipped = read(tmp_path)
    assert sample.regions.texts == ["OD"] and len(sample.labelled) == 2 and not skipped
    assert read(tmp_path, labelled="OD")[0][0].labelled == sample.labelled[1:]
    assert read(tmp_path, labelled="")[0][0].labelled == ()


def test_an_image_without_objects_is_a_sample_and_files_without_a_partner_are_named(tmp_path):
    write(tmp_path, "a", "0 0.5 0.5 0.2 0.2")
    write(tmp_path, "none", None)
    write(tmp_path, "empty", "")
    (tmp_path / "labels" / "train" / "gone.txt").write_text("0 0.5 0.5 0.2 0.2")
    Image.new("L", (9, 9)).save(tmp_path / "figure.png")
    samples, skipped = read(tmp_path, names="MA")
    assert {sample.image_id[-1]: len(sample.regions) for sample in samples} == {"a": 1, "e": 0, "y": 0}
    assert {why.key for why in skipped} == {"figure.png", "labels/train/gone.txt"}


def test_labels_beside_the_images(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    (tmp_path / "classes.txt").write_text("MA\n")
    (sample,), skipped = read(tmp_path)
    assert len(sample.regions) == 1 and not skipped


def test_one_bad_line_does_not_lose_the_others(tmp_path):
    bad = [
        ("0 0.5 0.5 0.2", "4 values"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 values"),
        ("2 0.5 0.5 0.2 0.2", "unknown class 2"),
        ("-1 0.5 0.5 0.2 0.2", "unknown class"),
        ("0.5 0.5 0.5 0.2 0.2", "unknown class"),
        ("nan 0.5 0.5 0.2 0.2", "unknown class"),
        ("MA 0.5 0.5 0.2 0.2", "not numbers"),
        ("0 320 240 50 50", "not in [0, 1]"),
        ("0 0.5 0.5 -0.2 0.2", "not in [0, 1]"),
        ("0 0.5 0.5 nan 0.2", "not in [0, 1]"),
        ("0 0.5 0.5 inf 0.2", "not in [0, 1]"),
        ("0 0.5 0.5 0 0.2", "no area"),
        ("0 0.1 0.1 0.6 0.1 7 0.6", "not in [0, 1]"),
        ("0 " + "9" * 5000 + " 0.5 0.2 0.2", "not in [0, 1]"),
        ("\0\0", "values"),
    ]
    lines = ["0 0.35 0.35 0.5 0.5", *(line for line, _ in bad), "1 0.35 0.35 0.5 0.5"]
    write(tmp_path, "a", "\n".join(lines))
    (sample,), skipped = read(tmp_path, names="MA,OD")
    assert sample.regions.texts == ["MA", "OD"] and len(skipped) == len(bad)
    for number, (why, (_, word)) in enumerate(zip(skipped, bad, strict=True), 2):
        assert why.why.startswith(f"line {number}:") and word in why.why


def test_images_and_labels_that_cannot_be_read(tmp_path):
    write(tmp_path, "good", "0 0.5 0.5 0.2 0.2")
    write(tmp_path, "binary", "").write_bytes(bytes(range(256)))
    write(tmp_path, "huge", " " * 10_000_001)
    write(tmp_path, "cut", "0 0.5 0.5 0.2 0.2")
    image = tmp_path / "images" / "train" / "cut.png"
    image.write_bytes(image.read_bytes()[:40])
    (tmp_path / "images" / "train" / "self.png").symlink_to(tmp_path / "images" / "train" / "self.png")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    samples, skipped = read(tmp_path, names="MA")
    assert [Path(sample.image).stem for sample in samples] == ["binary", "good"]
    assert {Path(why.key).stem for why in skipped} == {"binary", "huge", "cut"}


@pytest.mark.parametrize(
    "text",
    ["names: [", "names: 3", "names: {a: b}", "[]", "names: []", "kpt_shape: [17, 3]\nnames: [a]", "names: [[a], [b]]"],
)
def test_names_that_cannot_be_used_are_an_error_with_a_remedy(tmp_path, text):
    write(tmp_path, "a", "0 0.5 0.5 0.2 0.2")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(AnnotationError, match=r"data.yaml.*(names=|export)"):
        read(tmp_path)


def test_a_folder_that_is_not_yolo_is_an_error(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(AnnotationError, match="is this YOLO"):
        read(tmp_path, names="MA")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    with pytest.raises(AnnotationError, match="names="):
        read(tmp_path)


def test_mutated_labels_end_in_records(tmp_path):
    label = write(tmp_path, "a", "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n")
    text = label.read_bytes()
    chance = random.Random(0)
    losses = 0
    for _ in range(400):
        mutated = bytearray(text)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(mutated))
            mutated[place : place + chance.randint(0, 2)] = chance.choice(
                [b"9", b"-", b" ", b"\n", b"1e999", b"\x00", b"\xff", b"9" * 30, b"nan", b"."]
            )
        label.write_bytes(bytes(mutated))
        (sample,), skipped = read(tmp_path, names="MA,OD")
        lines = sum(bool(line.strip()) for line in mutated.decode("utf-8", errors="replace").split("\n"))
        assert len(sample.regions) + len(skipped) == lines
        losses += bool(skipped)
    assert 20 < losses < 400


def test_fundus_lesions_equal_a_count_of_the_files():
    root = real("idrid-yolo")
    samples, skipped = collect(idrid_yolo(root, "idrid", "CC-BY-4.0"))
    labels = {file.stem: np.loadtxt(file, ndmin=2) for file in (root / "DR_dataset" / "labels").rglob("*.txt")}
    images = list((root / "DR_dataset" / "images").rglob("*.jpg"))
    assert len(samples) == len(images) == len(labels) and not skipped
    counts = Counter(text for sample in samples for text in sample.regions.texts)
    numbers = Counter(np.concatenate([rows[:, 0] for rows in labels.values()]).astype(int).tolist())
    assert counts == {name: numbers[k] for k, name in enumerate(("MA", "HE", "EX", "SE", "OD"))}
    tree = load_label_tree()
    for sample in samples:
        rows = labels[Path(sample.image).stem]
        corners = np.concatenate([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], 1)
        np.testing.assert_allclose(sample.regions.boxes, corners, atol=2e-6)
        assert sample.regions.labels[sample.regions.texts.index("OD")] == (tree.find("optic disc") or "optic disc")
        assert len(sample.labelled) == 5
