import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from grounding.convert.coco import coco, cxr_lungboxes
from grounding.convert.record import AnnotationError
from grounding.labels import load_label_tree
from tests.grounding.convert.builders import collect, decoded, real

CATEGORIES = [{"id": 1, "name": "Nodule"}, {"id": 2, "name": "Mass"}]


def write(root, annotations, images=None, size=(40, 30), **more):
    """A COCO source of one 40 x 30 image a.png, unless `images` says otherwise."""
    root.mkdir(exist_ok=True)
    Image.new("L", size, 90).save(root / "a.png")
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}] if images is None else images
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES} | more
    (root / "all.json").write_text(json.dumps(data))
    return root


def row(**values):
    return {"id": 0, "image_id": 7, "category_id": 1, "bbox": [4, 3, 20, 15], "iscrowd": 0} | values


def read(root, **options):
    return collect(coco(root, "set", "CC0", "ct", **options))


def test_boxes_and_what_every_sample_carries(tmp_path):
    (sample,), skipped = read(
        write(tmp_path, [row(), row(category_id=2, attributes={"size": 3, "seen": ["PA", "AP"]})])
    )
    assert not skipped
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6]] * 2, atol=1e-6)
    assert sample.regions.texts == ["Nodule", "Mass"] and sample.regions.image_size == (30, 40)
    assert sample.regions.attributes == [{}, {"size": "3", "seen": "PA, AP"}]
    assert (sample.image_id, sample.patient_id, sample.source) == ("set/a", "set/a", "set")
    assert (sample.modality, sample.licence, sample.image) == ("ct", "CC0", str(tmp_path / "a.png"))
    tree = load_label_tree()
    assert sample.labelled == tuple(tree.find(word) or word for word in ("nodule", "mass"))


@pytest.mark.parametrize("labelled, expected", [("Mass", 1), ("", 0), ("Mass, Nodule", 2)])
def test_the_user_says_what_is_exhaustive(tmp_path, labelled, expected):
    (sample,), _ = read(write(tmp_path, []), labelled=labelled)
    assert len(sample.labelled) == expected and len(sample.regions) == 0


def test_polygons_of_several_rings_cover_what_they_enclose(tmp_path):
    rings = [[4, 3, 24, 3, 24, 18, 4, 18], [30, 20, 36, 20, 36, 26, 30, 26]]
    (sample,), skipped = read(write(tmp_path, [row(segmentation=rings, bbox=[0, 0, 1, 1])]))
    expected = np.zeros((30, 40), bool)
    expected[3:18, 4:24] = expected[20:26, 30:36] = True
    assert not skipped and (decoded(sample.regions.masks[0]) == expected).all()
    np.testing.assert_allclose(sample.regions.boxes[0], [0.1, 0.1, 0.9, 26 / 30], atol=1e-6)


def test_a_region_without_a_mask_does_not_cost_the_others_theirs(tmp_path):
    square, thin = [[4, 3, 24, 3, 24, 18, 4, 18]], [[4, 3.1, 24, 3.1, 24, 3.2]]  # the latter holds no pixel
    (sample,), skipped = read(write(tmp_path, [row(segmentation=square), row(), row(segmentation=thin)]))
    assert not skipped and [mask is None for mask in sample.regions.masks] == [False, True, True]
    assert decoded(sample.regions.masks[0]).sum() == 15 * 20


def test_both_kinds_of_run_lengths_give_the_same_mask_for_any_shape(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random((30, 40)) < share for share in (0.001, 0.02, 0.5, 0.98)]
    masks += [np.ones((30, 40), bool), np.tri(30, 40, 5, bool)]
    rows = []
    for mask in masks:
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
        counts = np.diff([0, *edges, flat.size]).tolist()
        coded = rle.encode(np.asfortranarray(mask, np.uint8))
        rows += [row(segmentation={"size": [30, 40], "counts": counts}, iscrowd=1)]
        rows += [row(segmentation={"size": [30, 40], "counts": coded["counts"].decode()})]
    (sample,), skipped = read(write(tmp_path, rows))
    assert not skipped
    for k, mask in enumerate(masks):
        assert (decoded(sample.regions.masks[2 * k]) == mask).all() and (
            decoded(sample.regions.masks[2 * k + 1]) == mask
        ).all()
    assert [a.get("iscrowd") for a in sample.regions.attributes] == ["1", None] * len(masks)


def test_a_resized_copy_keeps_its_boxes_and_another_shape_is_refused(tmp_path):
    images = [{"id": 7, "file_name": "a.png", "width": 400, "height": 300}]
    big = row(bbox=[40, 30, 200, 150], segmentation=[[40, 30, 240, 30, 240, 180, 40, 180]])
    (sample,), _ = read(write(tmp_path, [row(bbox=[40, 30, 200, 150]), big], images))
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6]] * 2, atol=1e-6)
    images[0]["height"] = 400
    samples, skipped = read(write(tmp_path, [row()], images))
    assert not samples and "400 x 400" in skipped[0].why and "40 x 30" in skipped[0].why


def test_one_bad_row_does_not_lose_the_others(tmp_path):
    square = [1, 1, 9, 1, 9, 9, 1, 9]
    bad = [
        (row(bbox=[4, 3, -2, 15]), "inverted"),
        (row(bbox=[4, 3, 0, 15]), "no area"),
        (row(bbox=[400, 3, 5, 5]), "outside"),
        (row(bbox=[float("nan"), 3, 5, 5]), "finite"),
        (row(bbox=[10**400, 3, 5, 5]), "too large"),
        (row(bbox=[1, 2, 3]), "4 numbers"),
        (row(bbox=["1", 2, 3, 4]), "4 numbers"),
        (row(bbox=None), "4 numbers"),
        (row(category_id=99), "unknown category id 99"),
        (row(category_id=[1]), "no category_id"),
        (row(category_id=True), "no category_id"),
        ({"image_id": 7, "bbox": [1, 2, 3, 4]}, "no category_id"),
        (row(segmentation=[[1, 1, 5, 5]]), "three points"),
        (row(segmentation=[[1, 1, 9, 1, 1e12, 9]]), "far outside"),
        (row(segmentation=[[1, 1, 9, 1, None, 9]]), "numbers"),
        (row(segmentation=[square, "x"]), "numbers"),
        (row(segmentation={"size": [30, 40], "counts": [5, 5]}), "add up"),
        (row(segmentation={"size": [30, 40], "counts": [-5, 1205]}), "add up"),
        (row(segmentation={"size": [30, 40], "counts": "~~~~"}), "compressed"),
        (row(segmentation={"size": [30, 40], "counts": "o" * 99}), "compressed"),
        (row(segmentation={"size": [10**9, 10**9], "counts": [1]}), "1000000000"),
        (row(segmentation={"size": [6, 4], "counts": [20, 4]}), "mask of 4 x 6"),
        (row(segmentation={"counts": "abc"}), "2 numbers"),
    ]
    orphans = [row(image_id=8), row(image_id=None), {"category_id": 1}, "row", None]
    rows = [row(), *(entry for entry, _ in bad), *orphans, row(bbox=[30, 20, 50, 50])]
    (sample,), skipped = read(write(tmp_path, rows))
    np.testing.assert_allclose(sample.regions.boxes, [[0.1, 0.1, 0.6, 0.6], [0.75, 20 / 30, 1, 1]], atol=1e-6)
    assert len(sample.regions) + len(skipped) == len(rows)
    reasons = {why.why.split(":")[0]: why.why for why in skipped}
    for number, (_, word) in enumerate(bad, 1):
        assert word in reasons[f"annotations[{number}]"]


def test_images_that_cannot_be_had_are_skipped_and_counted(tmp_path):
    names = ["a.png", "gone.png", "a.png", "../../../etc/passwd", "x" * 5000, "a\0.png", "cut.png", "empty.png", ""]
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    images += [
        {"id": 0, "file_name": "b.png"},
        {"file_name": "b.png"},
        {"id": 99},
        "b.png",
        None,
        {"id": [], "file_name": "b"},
    ]
    root = write(tmp_path / "set", [row(image_id=k) for k in range(len(names))], images)
    data = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(data[: len(data) // 2])
    (root / "empty.png").write_bytes(b"")
    (sample,), skipped = read(root)
    assert sample.image_id == "set/a" and len(skipped) == len(images) - 1
    reasons = " | ".join(why.why for why in skipped)
    lost = sum(map(int, re.findall(r"\((\d+) annotations\)", reasons)))
    assert lost + len(sample.regions) == len(names) - 2  # images that cannot be decoded say so alone
    assert "gone.png" in reasons and "1 annotations" in reasons and "listed twice" in reasons and "cut.png" in reasons


def test_images_are_found_in_the_folder_of_their_split(tmp_path):
    for k, split in enumerate(("train", "val")):
        (tmp_path / split).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        Image.new("L", (40, 30), k).save(tmp_path / split / "1.png")
        data = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [], "categories": CATEGORIES}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    samples, skipped = read(tmp_path)
    assert not skipped and [sample.image_id for sample in samples] == ["set/train/1", "set/val/1"]
    (only,), _ = read(tmp_path, annotations="annotations/instances_val.json", images="train")
    assert only.image == str(tmp_path / "train" / "1.png")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", "{}", '{"images": {}, "annotations": [], "categories": []}', "\xff"]
)
def test_a_file_that_is_not_coco_is_named_with_a_remedy(tmp_path, text):
    write(tmp_path, [])
    (tmp_path / "all.json").write_text(text, encoding="latin1")
    with pytest.raises(AnnotationError, match=r"all.json.*(name|copy)"):
        read(tmp_path)


def test_halves_of_characters_do_not_reach_the_store(tmp_path):
    categories = [{"id": 1, "name": "Nodule \ud800"}]
    (sample,), _ = read(write(tmp_path, [row(attributes={"\udc00": "\ud800"})], categories=categories))
    regions = sample.regions
    assert json.dumps([regions.texts, regions.labels, regions.attributes, sample.labelled], ensure_ascii=False).encode()
    assert regions.texts[0].startswith("Nodule")


def test_no_json_at_all_and_loops_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.json").symlink_to(tmp_path / "self.json")
    with pytest.raises(AnnotationError):
        read(tmp_path)
    (sample,), skipped = read(write(tmp_path, [row()]))
    assert not skipped and sample.image == str(tmp_path / "a.png")


def test_mutated_files_end_in_records_or_an_annotation_error(tmp_path):
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    coded = {"size": [30, 40], "counts": rle.encode(np.asfortranarray(np.tri(30, 40), np.uint8))["counts"].decode()}
    root = write(tmp_path, [row(), row(segmentation=square), row(segmentation=coded), row(attributes={"a": ["b"]})])
    text = (root / "all.json").read_bytes()
    chance = random.Random(0)
    outcomes = Counter()
    for _ in range(400):
        mutated = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(mutated))
            mutated[place : place + chance.randint(0, 2)] = chance.choice(
                [b"9", b"-", b"null", b"[", b"1e999", b'"', b"NaN", b"\xc3", b"9" * 30, b"true", b"}"]
            )
        (root / "all.json").write_bytes(bytes(mutated))
        try:
            samples, _ = read(root)
            outcomes[len(samples)] += 1
        except AnnotationError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20 and outcomes[1] > 20


@pytest.fixture(scope="module")
def lungs():
    return collect(cxr_lungboxes(real("cxr-lungboxes"), "lungs", "unknown"))


def test_lung_boxes_equal_a_count_of_the_files(lungs):
    samples, skipped = lungs
    files = {file.name for file in (real("cxr-lungboxes") / "images").iterdir()}
    data = json.loads((real("cxr-lungboxes") / "annotations" / "annotations.json").read_text())
    listed = {image["id"]: image["file_name"] for image in data["images"]}
    usable = [a for a in data["annotations"] if listed[a["image_id"]] in files and a.get("category_id") in (1, 2)]
    assert len(samples) == len(files & set(listed.values())) == len(files)
    assert len(samples) + len(skipped) == len(data["images"])
    assert all("not on disk (2 annotations)" in why.why for why in skipped)
    words = Counter(text for sample in samples for text in sample.regions.texts)
    numbers = Counter(annotation["category_id"] for annotation in usable)
    assert words == {"Right Lung": numbers[1], "Left Lung": numbers[2]}
    by_name = {Path(sample.image).name: sample for sample in samples}
    for annotation in usable:  # every box is where the json has it
        sample = by_name[listed[annotation["image_id"]]]
        height, width = sample.regions.image_size
        x, y, w, h = annotation["bbox"]
        corners = np.clip([x / width, y / height, (x + w) / width, (y + h) / height], 0, 1)
        assert np.abs(sample.regions.boxes - corners).max(1).min() < 1e-5


def test_lung_boxes_know_patients_and_licences(lungs):
    samples, _ = lungs
    assert all(sample.modality == "xray" and len(sample.labelled) == 2 for sample in samples)
    assert len({sample.patient_id for sample in samples}) == 54 and {s.licence for s in samples} == {
        "CC BY-NC-SA", "CC BY-NC-SA 4.0", "CC BY-NC-ND", "CC BY 4.0"
    }  # fmt: skip
