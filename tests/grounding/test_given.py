"""Regions of other programs for the images of a store."""

import json

import numpy as np
import pytest

from grounding.given import read_given
from grounding.store import StoreWriter, open_store
from grounding.types import GroundingSample, RegionError, RegionSet


@pytest.fixture
def store(tmp_path):
    """Three CT images without regions; two have one name in different folders."""
    writer = StoreWriter(tmp_path / "store")
    for image_id in ("mine/one/a", "mine/two/a", "mine/b.1"):
        nothing = RegionSet(np.zeros((0, 4)), [], (100, 200))
        writer.add(GroundingSample(image_id, image_id, "mine", "ct", b"", nothing, ()))
    writer.close()
    return open_store(tmp_path / "store")


def coco(path, *names, **more):
    box = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [20, 10, 40, 50]}
    images = [{"id": k, "file_name": name} | more for k, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": [box], "categories": [{"id": 7, "name": "Nodules"}]}))
    return path


def test_a_coco_json_is_known_by_its_file_names(store, tmp_path):
    found = read_given(coco(tmp_path / "r.json", "one\\a.png", "b.1.dcm", "elsewhere.png"), store)
    assert set(found) == {"mine/one/a", "mine/b.1"} and found["mine/one/a"].labels == ["chest/lung/nodule"]
    np.testing.assert_allclose(found["mine/one/a"].boxes, [[0.1, 0.1, 0.3, 0.6]], atol=1e-6)
    assert len(found["mine/b.1"]) == 0 and found["mine/one/a"].image_size == (100, 200)
    larger = read_given(coco(tmp_path / "r.json", "one/a.png", height=200, width=400), store)  # drawn on a larger copy
    np.testing.assert_allclose(larger["mine/one/a"].boxes, [[0.05, 0.05, 0.15, 0.3]], atol=1e-6)
    assert larger["mine/one/a"].image_size == (100, 200)


def test_lines_of_regions_are_read_as_they_are(store, tmp_path):
    row = {"image_id": "x", "image_size": [4, 4], "regions": [{"box": [0, 0, 1, 1], "label": "mass"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    assert read_given(tmp_path / "r.jsonl", store)["x"].labels == ["mass"]


def test_what_cannot_be_used_is_named(store, tmp_path):
    file = tmp_path / "r.json"
    with pytest.raises(RegionError, match=r"'a.png' is mine/one/a and mine/two/a; name their folders"):
        read_given(coco(file, "a.png"), store)
    with pytest.raises(RegionError, match="annotated at 90 x 90, but the image on disk is 200 x 100"):
        read_given(coco(file, "one/a.png", height=90, width=90), store)
    with pytest.raises(RegionError, match="r.json: names no image of"):
        read_given(coco(file, "elsewhere.png"), store)
    for text in ("[]", '{"images": []}', "not json", '{"images": [{"id": 1}], "annotations": [], "categories": []}'):
        file.write_text(text)
        with pytest.raises(RegionError, match="r.json: cannot be used"):
            read_given(file, store)
    with pytest.raises(RegionError, match="gone.json: cannot be used"):
        read_given(tmp_path / "gone.json", store)
