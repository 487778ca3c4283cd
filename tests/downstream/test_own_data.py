"""docs/your_own_data.md, command by command as it is written there, on a small generated set with small settings."""

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from downstream.cli import main as medglip
from downstream.samples import read_predictions, read_questions
from grounding.store import open_store
from grounding.types import RegionSet, read_regions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "your_own_data.md"
PATIENTS, SIDE = 10, 64
SMALL = {  # what the test gives beside the page's own settings
    "grounding.train": "steps=2 batch_size=2 warmup=1 calibration=2 image_size=64 scales=[] augment=false workers=0",
    "grounding.predict": "batch_size=4",
    "downstream.train": "base=tiny max_answer=700 steps=4 align_steps=2 batch_size=2 eval_every=2 val_samples=4",
    "downstream.predict": "batch_size=4",
}


def commands():
    """The page's commands in its order, lines that end in a backslash joined."""
    blocks = re.sub(r"\\\n\s*", "", PAGE.read_text())
    lines = [line.strip() for line in blocks.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("medglip ", "accelerate launch "))]


def make_mine(folder):
    """Two slices a patient, synthetic, each with other tissue; a bright disc is the nodule, where there is one."""
    rng, rows = np.random.default_rng(0), []
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "lung nodule"}]}
    (folder / "images").mkdir(parents=True)
    for number in range(2 * PATIENTS):
        name, patient = f"scan{number + 1:02d}.png", f"patient{number // 2 + 1:02d}"
        tissue = Image.fromarray(rng.integers(0, 120, (7, 7), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        coco["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        has_one, (x, y) = number % 3 > 0, rng.integers(8, SIDE - 24, 2).tolist()
        if has_one:
            ImageDraw.Draw(tissue).ellipse((x, y, x + 16, y + 16), fill=250)
            coco["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, 16, 16]})
        tissue.save(folder / "images" / name)
        rows.append([name, "Is there a lung nodule?", "yes" if has_one else "no", patient, "presence"])
        rows.append([name, "How many lung nodules are there?", str(int(has_one)), patient, "count"])
    with (folder / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer", "patient_id", "question_type"], *rows])
    (folder / "regions.json").write_text(json.dumps(coco))
    ids = [f"mine/scan{number + 1:02d}" for number in range(2 * PATIENTS)]
    region = {"box": [0.25, 0.25, 0.5, 0.5], "label": "chest/lung/nodule"}
    given = [{"image_id": image_id, "image_size": [SIDE, SIDE], "regions": [region]} for image_id in ids]
    (folder / "radiologist.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def here(command):
    """(program, arguments) with the small settings; a program is `medglip` or a module."""
    words = shlex.split(command)
    if words[0] == "medglip":
        return "medglip", words[1:]
    module = words[words.index("-m") + 1]
    return module, [*words[words.index("-m") + 2 :], *SMALL[module].split()]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The folder in which all commands of the page were run, each in this process."""
    folder = tmp_path_factory.mktemp("own")
    make_mine(folder / "mine")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands():
            program, arguments = here(command)
            if program == "medglip":
                assert medglip(arguments) == 0, command
            else:
                importlib.import_module(program).main(arguments)
    return folder / "runs" / "mine"


def test_the_page_names_every_step():
    programs = [here(command)[0] for command in commands()]
    assert {*SMALL, "medglip"} == set(programs) and len(programs) == 21
    assert all(Path(word).exists() for c in commands() for word in re.findall(r"configs/\S+?\.yaml", str(ROOT / c)))


def test_no_patient_and_no_image_is_in_two_parts(mine):
    stores = [open_store(mine / "data" / part / "store") for part in ("train", "val", "test")]
    patients = [set(store.column("patient_id")) for store in stores]
    assert sum(map(len, patients)) == PATIENTS == len(set.union(*patients))
    assert sum(map(len, stores)) == 2 * PATIENTS and sum(store.regions for store in stores) == 13
    labelled = {sample.labelled for store in stores for sample in (store[k] for k in range(len(store)))}
    assert labelled == {("chest/lung/nodule",)}
    assert (mine / "data" / "skipped.jsonl").read_text() == ""


def test_every_question_is_answered_and_scored(mine):
    asked = [question.sample_id for question in read_questions(mine / "data/test/questions.jsonl")]
    for name in ("tokens", "shuffled", "none", "radiologist"):
        rows = read_predictions(mine / "answers" / name / "predictions.jsonl")
        assert [row.sample_id for row in rows] == asked
        scores = json.loads((mine / "scores" / f"{name}.json").read_text())
        assert scores["protocols"]["strict"]["overall"]["n"] == len(asked)
    table = (mine / "scores" / "compare.md").read_text()
    assert all(name in table for name in ("tokens", "shuffled", "none"))
    assert (mine / "scores" / "tokens.html").stat().st_size > 10_000


def test_training_was_judged_on_the_validation_part(mine):
    for route in ("tokens", "none"):
        rows = [json.loads(line) for line in (mine / route / "val_log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 3] and {row["n"] for row in rows} == {4}
        card = (mine / route / "checkpoint" / "README.md").read_text()
        assert "Judged on" in card and "| presence |" in card and "| mine |" in card


def test_the_radiologist_takes_the_detectors_place(mine):
    regions = read_regions(mine / "regions" / "radiologist" / "regions.jsonl")
    assert all(found.labels == ["chest/lung/nodule"] for found in regions.values())
    rows = read_predictions(mine / "answers" / "radiologist" / "predictions.jsonl")
    evidence = [RegionSet.from_dict(row.evidence) for row in rows]
    for found in evidence:
        np.testing.assert_allclose(found.boxes, [[0.25, 0.25, 0.5, 0.5]], atol=1e-6)


def test_one_image_is_answered_with_what_was_trained(mine):
    said = json.loads((mine / "answer.json").read_text())
    assert said["question"] == "Is there a lung nodule?" and said["route"] == "tokens" and "answer" in said


@pytest.mark.slow
def test_the_commands_run_in_a_shell(tmp_path):
    """As a reader would give them: each a process of its own, with the page's quotes and line ends."""
    make_mine(tmp_path / "mine")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    programs = {"medglip": "-m downstream.cli", "accelerate": "-m accelerate.commands.accelerate_cli"}
    (tmp_path / "bin").mkdir()
    for name, module in programs.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands():
        line = f"{command} {SMALL.get(here(command)[0], '')}"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert len(read_predictions(tmp_path / "runs/mine/answers/tokens/predictions.jsonl")) > 0
