import json

import numpy as np
import pytest
from PIL import Image

from grounding.convert.odvg import odvg
from grounding.convert.record import AnnotationError
from tests.grounding.convert.builders import collect_with_reasons, label


def picture(path, width=200, height=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(height * width, dtype=np.uint32).astype(np.uint8).reshape(height, width)).save(path)


def rows(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in entries))


def detection(name, *instances, height=100, width=200):
    return {"filename": name, "height": height, "width": width, "detection": {"instances": list(instances)}}


def grounding(name, caption, *regions, height=100, width=200):
    row = {"filename": name, "height": height, "width": width}
    return row | {"grounding": {"caption": caption, "regions": list(regions)}}


def read(root, **options):
    return collect_with_reasons(odvg(root, "set", "CC0", **({"modality": "endoscopy"} | options)))


def test_detection_rows_with_a_label_map(tmp_path):
    picture(tmp_path / "train/p1.png")
    picture(tmp_path / "train/empty.png")
    rows(
        tmp_path / "set_od.json",  # JSON Lines, although it ends in .json, as coco2odvg.py writes it
        detection(
            "p1.png",
            {"bbox": [20, 10, 60, 50], "label": 0, "category": "wrong word"},
            {"bbox": [100.5, 0, 260, 100], "label": 1, "category": "instrument"},
            {"bbox": [1, 1, 9, 9], "label": 7, "category": "polyp"},
        ),
        detection("empty.png"),
    )
    (tmp_path / "set_label_map.json").write_text(json.dumps({"0": "polyp", "1": "instrument"}))
    samples, skipped = read(tmp_path, images="train")
    assert [sample.image_id for sample in samples] == ["set/p1", "set/empty"]
    assert samples[0].regions.texts == ["polyp", "instrument"]  # the map counts, as in MMDetection
    np.testing.assert_allclose(samples[0].regions.boxes, [[0.1, 0.1, 0.3, 0.5], [0.5025, 0, 1, 1]], atol=1e-6)
    both = (label("polyp"), label("instrument"))
    assert len(samples[1].regions) == 0 and samples[0].labelled == samples[1].labelled == both
    assert samples[0].modality == "endoscopy" and samples[0].image == str(tmp_path / "train/p1.png")
    assert skipped == [("p1.png", "set_od.json:1: instance 2: label '7' is not in the label map")]


def test_grounding_rows_with_tokens_positive(tmp_path):
    caption = "Two surfers walking down the shore. sand on the beach."
    picture(tmp_path / "a.png")
    rows(
        tmp_path / "vg.jsonl",
        grounding(
            "a.png",
            caption,
            {"bbox": [20, 10, 60, 50], "phrase": "Two surfers", "tokens_positive": [[0, 3], [4, 11]]},
            {"bbox": [[0, 0, 20, 10], [100, 50, 200, 100]], "phrase": "beach", "tokens_positive": [[48, 53]]},
            {"bbox": [0, 0, 2, 1], "phrase": "from the phrase", "tokens_positive": [[90, 99]]},
            {"bbox": [0, 0, 2, 1], "phrase": "something else", "tokens_positive": [36, 40]},
            {"bbox": [0, 0, 2, 1], "tokens_positive": [[-4, 0]]},
        ),
    )
    samples, skipped = read(tmp_path)
    assert samples[0].regions.texts == ["Two surfers", "beach", "beach", "from the phrase", "sand"]
    np.testing.assert_allclose(
        samples[0].regions.boxes[:3], [[0.1, 0.1, 0.3, 0.5], [0, 0, 0.1, 0.1], [0.5, 0.5, 1, 1]], atol=1e-6
    )
    assert samples[0].labelled == ()  # a caption names what it names, and is silent on the rest
    assert len(skipped) == 1 and "vg.jsonl:1: region 4" in skipped[0][1]


def test_rows_of_one_image_become_one_sample(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    first = grounding("a.png", "a polyp", {"bbox": [0, 0, 20, 10], "phrase": "a polyp", "tokens_positive": [[2, 7]]})
    rows(tmp_path / "x.jsonl", first, detection("b.png"), "")
    rows(tmp_path / "y.jsonl", "", detection("a.png", {"bbox": [20, 10, 60, 50], "label": 0, "category": "fold"}))
    samples, skipped = read(tmp_path)
    assert not skipped and [sample.image_id for sample in samples] == ["set/a", "set/b"]
    assert samples[0].regions.texts == ["polyp", "fold"]


def test_boxes_follow_a_resized_image_and_no_other_change_of_size(tmp_path):
    picture(tmp_path / "half.png", 100, 50)
    picture(tmp_path / "turned.png", 100, 200)
    box = {"bbox": [20, 10, 60, 50], "label": 0, "category": "polyp"}
    rows(tmp_path / "od.jsonl", detection("half.png", box), detection("turned.png", box))
    samples, skipped = read(tmp_path)
    assert samples[0].regions.boxes[0].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.5])
    assert len(samples) == 1 and skipped[0][0] == "turned.png" and "200 x 100" in skipped[0][1]


@pytest.mark.parametrize(
    "instance",
    [
        {"bbox": [20, 10, 20, 50], "label": 0},
        {"bbox": [60, 50, 20, 10], "label": 0},
        {"bbox": [300, 10, 400, 50], "label": 0},
        {"bbox": [float("nan"), 10, 60, 50], "label": 0},
        {"bbox": [10**400, 10, 60, 50], "label": 0},
        {"bbox": ["a", 10, 60, 50], "label": 0},
        {"bbox": [10, 60, 50], "label": 0},
        {"bbox": {"x": 1}, "label": 0},
        {"bbox": None, "label": 0},
        {"bbox": [[20, 10, 60, 50]], "label": 0},
        {"label": 0},
        {"bbox": [20, 10, 60, 50]},
        {"bbox": [20, 10, 60, 50], "label": [0]},
        [20, 10, 60, 50],
        None,
    ],
)
def test_a_bad_instance_does_not_lose_the_others(tmp_path, instance):
    picture(tmp_path / "a.png")
    good = {"bbox": [20, 10, 60, 50], "label": 1}
    rows(tmp_path / "od.jsonl", detection("a.png", instance, good))
    (tmp_path / "label_map.json").write_text(json.dumps({"0": "polyp", "1": "fold"}))
    samples, skipped = read(tmp_path)
    assert samples[0].regions.texts == ["fold"] and len(skipped) == 1
    assert "od.jsonl:1: instance 0" in skipped[0][1]


def test_a_class_of_which_an_instance_was_left_out_is_not_called_exhaustive(tmp_path):
    picture(tmp_path / "a.png")
    rows(tmp_path / "od.jsonl", detection("a.png", {"bbox": [9, 9, 9, 9], "label": 0}))
    (tmp_path / "label_map.json").write_text(json.dumps({"0": "polyp", "1": "fold"}))
    assert read(tmp_path)[0][0].labelled == (label("fold"),)


def test_every_row_is_kept_or_named(tmp_path):
    secret = tmp_path / "secret.png"
    root = tmp_path / "set"
    picture(secret)
    picture(root / "a.png")
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    (root / "empty.png").write_bytes(b"")
    rows(
        root / "od.jsonl",
        detection("a.png"),
        "{not json",
        "[" * 50_000,
        "[1, 2]",
        {"height": 1},
        {"filename": 7},
        detection("gone.png"),
        detection("../secret.png"),
        detection(str(secret)),
        detection("broken.png"),
        detection("empty.png"),
        {"filename": "a\0b.png"},
    )
    samples, skipped = read(root)
    assert [sample.image_id for sample in samples] == ["set/a"] and len(skipped) == 11
    assert sum("secret" in key and "not on disk" in why for key, why in skipped) == 2


def test_an_image_with_nothing_but_unusable_rows_is_skipped(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    rows(
        tmp_path / "od.jsonl",
        {"filename": "a.png", "detection": []},
        {"filename": "b.png", "grounding": {"caption": "x", "regions": "none"}},
        {"filename": "c.png", "height": 100, "width": 200},
        {"filename": "d.png", "height": "tall", "width": 200, "detection": {"instances": []}},
    )
    samples, skipped = read(tmp_path)
    assert not samples and [key for key, _ in skipped] == ["a.png", "b.png", "c.png", "d.png"]


def test_the_modality_must_be_told_by_someone(tmp_path):
    picture(tmp_path / "a.png")
    rows(tmp_path / "od.jsonl", detection("a.png"))
    samples, skipped = read(tmp_path, modality="")
    assert not samples and "modality=ct" in skipped[0][1]
    with pytest.raises(AnnotationError, match="endoscopy"):
        read(tmp_path, modality="photo")


def test_sources_without_rows_or_with_two_label_maps(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(AnnotationError, match="annotations=train_od.json"):
        read(tmp_path)
    rows(tmp_path / "od.jsonl", detection("a.png"))
    for name in ("one_label_map.json", "two_label_map.json"):
        (tmp_path / name).write_text('{"0": "polyp"}')
    with pytest.raises(AnnotationError, match="several label maps"):
        read(tmp_path)
    (tmp_path / "two_label_map.json").write_text("[1]")
    with pytest.raises(AnnotationError, match="not a label map"):
        read(tmp_path, label_map="two_label_map.json")
