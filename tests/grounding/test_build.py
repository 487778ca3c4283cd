"""``medglip data build`` and what follows it, through the command line."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.cli import main
from grounding.build import PART_ITEMS
from grounding.convert.record import Item
from grounding.converters import CONVERTERS, FIXTURE, Converter
from grounding.store import open_store, read_skipped

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """YOLO, 200 images of 5 patients' worth of names; four are spoilt: empty, cut off, not an image, a bad line."""
    folder, rng = tmp_path_factory.mktemp("yolo"), np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    (folder / "classes.txt").write_text("polyp\nsome odd thing\n")
    for k in range(200):
        pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k:03d}.png")
        (folder / "labels" / f"{k:03d}.txt").write_text(f"{k % 2} 0.5 0.5 0.25 0.5\n")
    (folder / "images" / "010.png").write_bytes(b"")
    (folder / "images" / "020.png").write_bytes((folder / "images" / "021.png").read_bytes()[:200])
    (folder / "images" / "030.png").write_text("hello")
    (folder / "labels" / "040.txt").write_text("0 0.5 0.5 0.25 0.5\n0 nan 0.5 0.25 0.5\n")
    return folder


def command(dataset: Path, out: Path, *more: str) -> list[str]:
    source = f"yolo:{dataset}?modality=endoscopy&name=made-up&licence=CC0"
    return ["data", "build", "--source", source, "--out", str(out), *more]


@pytest.fixture(scope="module")
def store(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("build") / "store"
    assert main(command(dataset, out, "workers=1")) == 0
    return out


def rows(store: Path) -> list[dict]:
    found = open_store(store)
    return [{"id": s.image_id, "regions": s.regions.to_dict(), "image": s.image, "licence": s.licence} for s in found]


def test_everything_is_kept_or_listed(store, dataset):
    kept, skipped = open_store(store), read_skipped(store)
    assert len(kept) == 197 and {row["source"] for row in skipped} == {"made-up"}
    spoilt = {Path(row["key"]).stem for row in skipped}
    assert spoilt == {"010", "020", "030", "040"} and len(skipped) == 4
    assert len(kept.by_id(next(x for x in kept.image_ids if "040" in x)).regions) == 1
    assert not list(store.parent.glob(".*"))


def test_the_card_says_where_it_is_from_and_what_is_missing(store, capsys):
    card = open_store(store).card
    assert "| made-up | yolo | CC0 | 200 | 197 | 4 |" in card and "some odd thing" in card
    assert str(store.parent) not in card
    assert main(["data", "card", str(store)]) == 0
    assert capsys.readouterr().out.strip() == card.strip()


def test_stats_count_and_draw(store, tmp_path):
    assert main(["data", "stats", str(store), "--out", f"{tmp_path}/s.json", "--plot", f"{tmp_path}/s.png"]) == 0
    groups = json.loads((tmp_path / "s.json").read_text())
    assert [(row["name"], row["images"], row["regions"]) for row in groups["modality"]] == [("endoscopy", 197, 197)]
    classes = {row["name"]: row["regions"] for row in groups["class"]}
    assert classes["polyp"] + classes["some odd thing"] == 197
    assert np.allclose(groups["source"][0]["sizes"], np.sqrt(0.25 * 0.5))
    assert Image.open(tmp_path / "s.png").size[0] > 800


def test_two_processes_build_the_same(store, dataset, tmp_path):
    assert main(command(dataset, tmp_path / "two", "workers=2")) == 0
    assert rows(tmp_path / "two") == rows(store)


def test_embedded_images_need_no_folder(dataset, store, tmp_path):
    assert main(command(dataset, tmp_path / "e", "workers=1", "embed=true")) == 0
    first, pointed = open_store(tmp_path / "e")[0], open_store(store)[0]
    assert first.image == Path(pointed.image).read_bytes()


def start(arguments: list[str], **more) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "downstream.cli", *arguments]
    return subprocess.Popen(run, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


def test_a_build_that_was_killed_is_completed(dataset, store, tmp_path):
    """Killed after its first part; the second run keeps that part, loses nothing and has nothing twice."""
    process = start(command(dataset, tmp_path / "s", "workers=1"))
    part = tmp_path / ".s.building" / "part-000000" / "store.json"
    while process.poll() is None and not part.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "s").exists()
    # A part that is kept is not read again: it may hold what the files no longer do.
    about = json.loads(part.read_text())
    part.write_text(json.dumps(about | {"labels": ["kept", *about["labels"][1:]]}))
    joined = part.parents[1] / "joined"  # of a build that was killed later, while it joined the parts
    joined.mkdir()
    (joined / "data-00000.arrow").write_bytes(b"half of it")
    assert main(command(dataset, tmp_path / "s", "workers=1")) == 0
    again, whole = rows(tmp_path / "s"), rows(store)
    assert [row["id"] for row in again] == [row["id"] for row in whole] and again[PART_ITEMS:] == whole[PART_ITEMS:]
    assert again[0]["regions"]["regions"][0]["label"] == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(dataset, store, tmp_path):
    """A limit on the size of files stands for a disk without space: writing fails in the same call."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(command(dataset, tmp_path / "s", "workers=1", "embed=true"), preexec_fn=limit)
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1 and error.startswith("medglip data: ") and "File too large" in error
    assert not (tmp_path / "s").exists()
    assert main(command(dataset, tmp_path / "s", "workers=1", "embed=true")) == 0
    assert len(rows(tmp_path / "s")) == 197


@pytest.mark.parametrize(
    ("source", "message", "code"),
    [
        ("nothing:DATA", "converters: coco, voc", 2),
        ("yolo:NOWHERE?modality=ct", "NOWHERE does not exist", 2),
        ("yolo:DATA", "modality", 2),
        ("yolo:DATA?modality=ct&colour=red", "colour", 2),
        ("coco:DATA?modality=ct", "json", 1),
    ],
)
def test_wrong_use_is_one_line(source, message, code, dataset, tmp_path, capsys):
    arguments = ["data", "build", "--source", source.replace("DATA", str(dataset)), "--out", str(tmp_path / "s")]
    assert main([*arguments, "workers=1"]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("medglip data: ") and message in error
    assert not (tmp_path / "s").exists()


def test_a_worker_that_dies_is_one_line(dataset, tmp_path, capsys, monkeypatch):
    def read(root, source, licence):
        yield Item("a.png", partial(os._exit, 3))

    monkeypatch.setitem(CONVERTERS, "deadly", Converter(read, FIXTURE))
    arguments = ["data", "build", "--source", f"deadly:{dataset}", "--out", str(tmp_path / "s"), "workers=2"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("medglip data: a worker process died") and "workers=1" in error


def test_too_much_that_is_bad_stops_the_build(dataset, tmp_path, capsys):
    assert main(command(dataset, tmp_path / "s", "workers=1", "max_bad=2")) == 1
    assert "more than 2 records were skipped" in capsys.readouterr().err
