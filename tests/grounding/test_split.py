"""Splits: no patient or study on two sides, shares kept in every stratum, nothing lost, the order of rows no matter."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main
from eval.fingerprint import fingerprint
from grounding.split import groups_of, split_by_group
from grounding.store import StoreWriter, open_store
from grounding.types import GroundingSample, RegionSet

SHARES = {"train": 0.8, "val": 0.2}


@pytest.fixture
def store(tmp_path):
    """300 images of 60 patients in two sources; every tenth study holds two patients."""
    writer, box = StoreWriter(tmp_path / "store"), np.array([[0, 0, 0.5, 0.5]])
    for k in range(300):
        patient, source = k // 5, "a" if k < 200 else "b"
        regions = RegionSet(box, ["brain" if k % 3 else "a phrase"], (8, 8), texts=[f"text {k % 7}"])
        study = f"s{patient // 2}" if patient % 20 < 2 else None
        sample = GroundingSample(f"i{k}", f"p{patient}", source, "mri", "x.png", regions, ("brain",))
        writer.add(replace(sample, study_id=study))
    writer.close()
    writer.describe("of the whole")
    return open_store(tmp_path / "store")


def test_a_split_store_loses_nothing_and_shares_no_patient(store, tmp_path, capsys):
    arguments = ["--share", "train=0.8", "--share", "val=0.2", "--out", str(tmp_path / "split")]
    assert main(["data", "split", str(store.folder), *arguments]) == 0
    assert "val: " in capsys.readouterr().out
    train, val = (open_store(tmp_path / "split" / name) for name in SHARES)
    assert sorted(train.image_ids + val.image_ids) == sorted(store.image_ids)
    for column in ("patient_id", "study_id"):
        assert not set(filter(None, train.column(column))) & set(filter(None, val.column(column)))
    for one in (train[3], val[3]):
        whole = store.by_id(one.image_id)
        assert (one.regions.labels, one.regions.texts, one.labelled) == (
            whole.regions.labels,
            whole.regions.texts,
            whole.labelled,
        )
    sources = Counter(val.column("source"))
    assert abs(sources["a"] - 40) <= 5 and abs(sources["b"] - 20) <= 5
    assert "of the whole" in val.card and train.column("source") != sorted(train.column("source"))


def test_a_study_of_two_patients_joins_them(store):
    groups = groups_of(store)
    assert len({*groups[:10]}) == 1 and len(set(groups)) == 60 - 3


def test_the_order_of_rows_changes_nothing():
    rows = [(f"g{k // 3}", f"s{k % 4}") for k in range(90)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def sides(rows):
        groups, strata = zip(*rows, strict=True)
        return dict(zip(groups, split_by_group(groups, strata, SHARES, 1), strict=True))

    assert sides(rows) == sides(shuffled)
    again = [split_by_group(*zip(*rows, strict=True), SHARES, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("share", [["train=0.8"], ["train=0.8", "val=0.3"], ["train"], ["train=2", "val=-1"]])
def test_shares_that_make_no_sense(store, share, tmp_path, capsys):
    arguments = [word for text in share for word in ("--share", text)]
    assert main(["data", "split", str(store.folder), *arguments, "--out", str(tmp_path / "x")]) == 2
    assert "medglip data: " in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_picture_under_two_names_is_on_one_side(tmp_path):
    rng, written = np.random.default_rng(0), StoreWriter(tmp_path / "store")
    for k in range(12):
        picture = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        for name, shown in (("a", picture), ("b", picture.resize((80, 80)))):
            image = tmp_path / f"{name}{k}.png"
            shown.save(image)
            regions = RegionSet(np.array([[0, 0, 0.5, 0.5]]), ["brain"], shown.size)
            mark = fingerprint(np.asarray(shown))
            sample = GroundingSample(image.stem, image.stem, "s", "mri", str(image), regions, ("brain",))
            written.add(sample, mark.pixels, mark.thumbnail.tobytes())
    written.close()
    pictures, groups = open_store(tmp_path / "store"), groups_of(open_store(tmp_path / "store"))
    of = dict(zip(pictures.image_ids, groups, strict=True))
    assert len(set(groups)) == 12 and all(of[f"a{k}"] == of[f"b{k}"] for k in range(12))
