"""``medglip data audit`` and ``forbid=``: what two stores, or a store and a question set, have in common."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main
from grounding import train
from grounding.store import write_store
from grounding.types import GroundingSample, RegionSet


def picture(seed: int) -> Image.Image:
    """Blobs, no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6), np.uint8)
    return Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def sample(name: str, image: bytes, size=(160, 160), **more) -> GroundingSample:
    regions = RegionSet(np.array([[0.1, 0.1, 0.5, 0.5]]), ["brain/lesion"], size)
    return replace(GroundingSample(name, f"patient of {name}", "s", "mri", image, regions, ("brain/lesion",)), **more)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Twelve images to train on; a clean test set of others; and one that leaks in four ways."""
    folder = tmp_path_factory.mktemp("stores")
    known = [sample(f"t{k}", encoded(picture(k)), study_id=f"scan {k}", frame=5) for k in range(12)]
    clean = [sample(f"c{k}", encoded(picture(100 + k))) for k in range(6)]
    small = picture(0).resize((120, 120)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    leaks = [
        sample("copy", encoded(picture(3))),
        sample("smaller", encoded(small, format="JPEG", quality=60), (120, 120)),
        sample("next", encoded(picture(200)), study_id="scan 5", frame=6),
        sample("again", encoded(picture(201)), patient_id="patient of t7"),
    ]
    for name, rows in (("train", known), ("clean", clean), ("leaky", [*clean, *leaks])):
        write_store(rows, folder / name, "")
    return folder


def test_leaks_between_stores_are_named_by_kind(stores, tmp_path, capsys):
    out = tmp_path / "leaks.json"
    code = main(["data", "audit", str(stores / "train"), str(stores / "leaky"), "--out", str(out)])
    found = {(row["kind"], row["id_a"], row["id_b"]) for row in json.loads(out.read_text())}
    assert code == 1 and {("pixels", "t3", "copy"), ("near-duplicate", "t0", "smaller")} <= found
    assert {("neighbour", "t5", "next"), ("study", "t5", "next"), ("patient", "t7", "again")} <= found
    assert {row[2] for row in found} == {"copy", "smaller", "next", "again"}
    assert "near-duplicate" in capsys.readouterr().out


def test_clean_stores_pass(stores):
    assert main(["data", "audit", str(stores / "train"), str(stores / "clean")]) == 0


def test_questions_on_training_images_are_named(stores, tmp_path):
    (tmp_path / "images").mkdir()
    for name, seed in (("a", 4), ("b", 300)):
        picture(seed).save(tmp_path / "images" / f"{name}.png")
    rows = [{"sample_id": f"q{k}", "image": f"{'ab'[k % 2]}.png", "question": "?", "answer": "yes"} for k in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--questions", f"{tmp_path}/q.jsonl", "--images", f"{tmp_path}/images", "--out", f"{tmp_path}/o.json"]
    assert main(["data", "audit", str(stores / "train"), *arguments]) == 1
    assert {row["id_b"] for row in json.loads((tmp_path / "o.json").read_text())} == {"q0", "q2", "q4"}


def test_training_stops_on_a_leak(stores, tmp_path):
    settings = [f"store={stores}/train", f"out={tmp_path}/run", "trunk=tiny", "steps=1", "batch_size=2"]
    with pytest.raises(
        SystemExit, match=r"train leaks into .*leaky, which is forbidden: 4 images, such as t3 and copy"
    ):
        train.main([*settings, f"forbid=[{stores}/clean, {stores}/leaky]"])
    assert not (tmp_path / "run").exists()
    train.main([*settings, f"forbid={stores}/clean", "calibration=2", "image_size=64"])
    assert (tmp_path / "run" / "config.json").exists()
