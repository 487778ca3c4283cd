"""MedGLIP as a contestant: its own programs, its own settings, and so many steps as fit into the minutes."""

import json
import statistics
from pathlib import Path
from typing import Any

from configs import write_atomic
from eval.bench.grounding.children import Child, run

PROBE_STEPS = 16
PROBE_SKIPPED = 4  # the first steps also pay for what is set up once


def train_medglip(place: Path, data: Path, settings: dict[str, Any]) -> Child:
    """`place`/grounder. Its cosine needs the number of steps beforehand: a probe measures how long one takes. Goes on
    from its last checkpoint where it was killed."""
    if not (place / "probe.json").exists():
        _train(place / "probe", place / "probe.log", data, settings, PROBE_STEPS)
        log = (place / "probe" / "train_log.jsonl").read_text().splitlines()
        step = statistics.median(json.loads(line)["seconds"] for line in log[PROBE_SKIPPED:])
        steps = max(1, round(settings["minutes"] * 60 / step))
        write_atomic(place / "probe.json", json.dumps({"step_s": step, "steps": steps}))
    steps = json.loads((place / "probe.json").read_text())["steps"]
    return _train(place / "grounder", place / "train.log", data, settings, steps)


def _train(out: Path, log: Path, data: Path, settings: dict[str, Any], steps: int) -> Child:
    command = ["-m", "grounding.train", "--config", settings["config"], f"store={data / 'train'}", f"out={out}"]
    command += [f"steps={steps}", f"seed={settings['seed']}", f"forbid=[{data / 'val'}]", "save_every=100"]
    return run(command, log, settings["threads"])


def prediction_of(place: Path, store: Path, name: str) -> list[str]:
    """Arguments of grounding.predict, to write `place`/regions-NAME."""
    return [f"checkpoint={place / 'grounder'}", f"store={store}", f"out={place / f'regions-{name}'}", "batch_size=8"]


def translated(folder: Path, truth: dict) -> list[dict]:
    """The COCO results of a prediction, in the image and category ids of another ground truth; labels that it does not
    have (broader ones, which no image is annotated with) are left out."""
    own = json.loads((folder / "coco_truth.json").read_text())
    images = {image["file_name"]: image["id"] for image in truth["images"]}
    categories = {category["name"]: category["id"] for category in truth["categories"]}
    image_of = {image["id"]: images[image["file_name"]] for image in own["images"]}
    category_of = {category["id"]: categories.get(category["name"]) for category in own["categories"]}
    return [
        row | {"image_id": image_of[row["image_id"]], "category_id": category_of[row["category_id"]]}
        for row in json.loads((folder / "coco_results.json").read_text())
        if category_of[row["category_id"]] is not None
    ]
