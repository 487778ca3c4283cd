"""Prediction over a store: several processes, killed runs, overlays; by the real command where processes matter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding import predict
from grounding.detect import load_grounder
from grounding.model import MedGLIPConfig, build_model, save_checkpoint
from grounding.predict import PredictConfig, blocks_of, fill, write_predictions
from grounding.store import open_store
from grounding.types import load_region_tokens, read_regions, write_regions

ROOT = Path(__file__).resolve().parents[2]
FILES = ("regions.jsonl", "region_tokens.safetensors", "coco_results.json", "coco_truth.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    labels = ("brain", "brain/lesion", "brain/insula/left_insula")
    thresholds = {"brain": 0.1, "brain/lesion": 0.12}
    config = MedGLIPConfig(
        trunk="tiny", image_size=64, width=32, region_width=24, vocabulary=labels,
        phrases=("brain", "brain lesion", "left insula"), thresholds=thresholds,
    )  # fmt: skip
    model = build_model(config, seed=0)
    model.bias.data[:] = -1.0  # of an untrained model nothing would be found
    save_checkpoint(folder, model.config, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint, brain_store, tmp_path_factory):
    """Of one process, without a stop."""
    config = PredictConfig(checkpoint, brain_store, tmp_path_factory.mktemp("whole"), batch_size=2)
    candidates = write_predictions(load_grounder(checkpoint), open_store(brain_store), config)
    return config, candidates


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_files_hold_what_detect_says_in_the_order_of_the_store(whole, checkpoint, brain_store):
    config, candidates = whole
    store, grounder = open_store(brain_store), load_grounder(checkpoint)
    ids, tokens, _, vocabulary = load_region_tokens(config.out / "region_tokens.safetensors")
    assert ids == store.image_ids == list(candidates) and set(vocabulary) == set(grounder.label_table())
    from grounding.images import read_image

    pair = [read_image(store[k].image).pixels for k in (4, 5)]
    for k, detection in zip((4, 5), grounder.detect(pair), strict=True):
        n = detection.tokens.valid.shape[1]
        assert tokens.valid[k].sum() == n and tokens.features[k, :n].equal(detection.tokens.features[0])
        assert tokens.labels[k][:n] == detection.tokens.labels[0] and set(tokens.labels[k][n:]) <= {""}
        assert np.array_equal(candidates[ids[k]].boxes, detection.candidates.boxes)
        assert np.array_equal(candidates[ids[k]].scores, detection.candidates.scores)
        assert candidates[ids[k]].masks == detection.candidates.masks
        found = read_regions(config.out / "regions.jsonl")[ids[k]]
        assert found.labels == detection.found.labels and found.queries == detection.found.queries
    results = json.loads((config.out / "coco_results.json").read_text())
    assert len(results) == sum(map(len, candidates.values())) and {row["image_id"] for row in results} <= set(
        range(1, 25)
    )
    assert not list(config.out.glob("blocks-*"))


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(whole, checkpoint, brain_store, launch, tmp_path):
    arguments = (f"checkpoint={checkpoint}", f"store={brain_store}", f"out={tmp_path}", "batch_size=2", "overlays=3")
    launch("ddp", "grounding.predict", *arguments)
    assert contents(tmp_path) == contents(whole[0].out)
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 3


def test_a_killed_run_goes_on_and_computes_nothing_twice(whole, checkpoint, brain_store, tmp_path):
    command = [sys.executable, "-m", "grounding.predict", f"checkpoint={checkpoint}", f"store={brain_store}"]
    command += [f"out={tmp_path}", "batch_size=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(tmp_path.glob("blocks-*/*/*.safetensors")):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    config = PredictConfig(checkpoint, brain_store, tmp_path, batch_size=2)
    grounder, store = load_grounder(checkpoint), open_store(brain_store)
    blocks = blocks_of(grounder, store, config)
    done = {path: path.stat().st_mtime_ns for path in blocks.folder.glob("*/*.safetensors")}
    assert done and not (tmp_path / "regions.jsonl").exists()
    pending = blocks.pending()
    assert len(pending) == 3 - len(done)
    fill(grounder, store, config, blocks, pending)
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    write_predictions(grounder, store, config)  # merges; nothing is left to predict
    assert contents(tmp_path) == contents(whole[0].out)


def test_blocks_of_other_settings_are_not_taken(checkpoint, brain_store, tmp_path):
    grounder, store = load_grounder(checkpoint), open_store(brain_store)
    settings = [
        {}, {"batch_size": 2}, {"tiles": 2}, {"regions": "annotated"},
    ]  # fmt: skip
    keys = {
        blocks_of(grounder, store, PredictConfig(checkpoint, brain_store, tmp_path, **more)).key for more in settings
    }
    assert len(keys) == 4


def test_annotated_and_given_regions_go_the_same_way(whole, checkpoint, brain_store, tmp_path):
    grounder, store = load_grounder(checkpoint), open_store(brain_store)
    config = PredictConfig(checkpoint, brain_store, tmp_path / "a", "annotated", batch_size=4)
    sets = write_predictions(grounder, store, config)
    assert all(
        np.array_equal(sets[s.image_id].boxes, s.regions.boxes) and sets[s.image_id].scores is None for s in store
    )
    write_regions(tmp_path / "some.jsonl", dict(list(sets.items())[:3]))
    given = PredictConfig(checkpoint, brain_store, tmp_path / "b", f"file:{tmp_path / 'some.jsonl'}", batch_size=4)
    assert [len(x) > 0 for x in write_predictions(grounder, store, given).values()] == [True] * 3 + [False] * 21


def test_overlays_show_the_regions(checkpoint, brain_store, tmp_path):
    config = PredictConfig(checkpoint, brain_store, tmp_path, batch_size=8, overlays=2)
    write_predictions(load_grounder(checkpoint), open_store(brain_store), config)
    first, last = sorted((tmp_path / "overlays").glob("*.png"))
    assert first.name.startswith("000000-") and last.name.startswith("000023-")
    pixels = np.asarray(Image.open(first).convert("RGB")).astype(int)
    orange = np.abs(pixels - [0xE6, 0x9F, 0x00]).sum(2) < 30
    assert orange.sum() > 200  # the first label's colour, in the picture and in the legend


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiles=0",), "tiles must be positive"),
        (("regions=mine",), "known: predicted, annotated, file:PATH"),
        (("store=nowhere",), "nowhere: not a region store"),
        (("checkpoint=nowhere",), "nowhere"),
    ],
)
def test_wrong_settings_are_one_line(arguments, says, checkpoint, brain_store, tmp_path):
    usual = [f"checkpoint={checkpoint}", f"store={brain_store}", f"out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as error:
        predict.main([*usual, *arguments])
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_model_makes_the_masks(whole, checkpoint, brain_store, tmp_path):
    from tests.grounding.detectors import sam

    segmenter = sam(tmp_path / "sam", "sam")
    config = PredictConfig(checkpoint, brain_store, tmp_path / "out", batch_size=2, masks=str(segmenter))
    write_predictions(load_grounder(checkpoint), open_store(brain_store), config)
    ours, theirs = (read_regions(folder / "regions.jsonl") for folder in (whole[0].out, config.out))
    assert any(len(regions) for regions in theirs.values())
    for image_id, regions in theirs.items():
        assert np.array_equal(regions.boxes, ours[image_id].boxes) and regions.labels == ours[image_id].labels
    assert any(regions.masks != ours[image_id].masks for image_id, regions in theirs.items())
