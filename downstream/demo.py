"""``medglip demo``: the whole chain on the embedded brain set, stage by stage, and what it shows.

Each stage leaves its result in a folder of ``out`` and is skipped where that is complete and was made with the same
settings, so that a run goes on where it was stopped.
"""

import dataclasses
import json
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs import CONFIG_DIR, load_config, save_run_info, write_atomic
from downstream.embedded import smollm2_dir
from downstream.predict import load_answerer, predict, read_samples
from downstream.samples import Prediction, write_samples
from downstream.scores import System, score_everything
from downstream.sources import open_source, read_table
from downstream.stages import Stage, Stages, console, launch
from grounding.brain import brain_card, build_brain
from grounding.detect import load_grounder
from grounding.predict import PredictConfig, write_predictions
from grounding.store import open_store
from grounding.types import RegionSet, read_regions, write_regions


@dataclass(frozen=True)
class DemoConfig:
    """``systems``: ``route``, ``route/source`` or ``route/source/zero`` (features zeroed); one bridge a route is
    trained, sources switch at inference. Source ``file`` is a regions.jsonl, here of the annotations. ``jobs``: so many
    bridges are trained at one time, each with its share of the cores and with its own memory."""

    systems: tuple[str, ...]
    train_images: int
    test_images: int
    train_questions: int
    train_reports: int
    questions: int
    reports: int
    grounder_steps: int
    bridge_steps: int
    grounder_batch: int = 16
    bridge_batch: int = 8
    bridge_pack: int = 1
    bridge_names: bool = False
    trunk: str = "embedded"
    base: str = "embedded"
    max_answer: int = 160
    jobs: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs}; it must be positive")

    @property
    def parsed(self) -> list[System]:
        return [System.parse(name) for name in self.systems]

    @property
    def routes(self) -> list[str]:
        return list(dict.fromkeys(system.route for system in self.parsed))


def chosen(config: DemoConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The settings that a stage depends on."""
    return {key: getattr(config, key) for key in keys}


def run(out: Path, full: bool, config_path: Path | None, overrides: list[str]) -> None:
    """Raises ConfigError for wrong settings, RuntimeError where a training process fails."""
    path = config_path or CONFIG_DIR / "demo" / ("full.yaml" if full else "quick.yaml")
    config = load_config(DemoConfig, path, overrides)
    systems = config.parsed
    console.print(f"Med-GLIP demo: {path.name}, seed {config.seed}, results in {out}")
    console.print("Generated lesions on slices of MRI templates. Research use only; not a medical device.\n")
    stages = Stages(out)
    grounder_keys = ("train_images", "seed", "grounder_steps", "grounder_batch", "trunk")
    data_keys = ("train_images", "test_images", "train_questions", "train_reports", "questions", "reports", "seed")
    keys = [field.name for field in dataclasses.fields(config)]
    bridge_keys = ("base", "max_answer", *(key for key in keys if "bridge" in key))
    of_data, of_grounder = chosen(config, data_keys), chosen(config, grounder_keys)
    of_regions = of_grounder | chosen(config, ("test_images",))
    of_bridge = of_grounder | of_data | chosen(config, bridge_keys)
    if config.base == "embedded":
        stages.run("weights", "Language model weights", {}, lambda folder: _weights(folder))
    data = stages.run("data", "Images, questions and reports", of_data, lambda folder: build_data(folder, config))
    grounder = stages.run("grounder", "Train the grounding model", of_grounder, lambda f: _ground(f, data, config))
    regions = stages.run("regions", "Find regions", of_regions, lambda f: _regions(f, data, grounder))
    longest_first = sorted(config.routes, key=lambda route: route != "text")  # begun last, it would be left alone
    bridge = partial(_bridge, data=data, regions=regions, config=config)
    trainings = [Stage(r, f"Train route {r}", of_bridge, partial(bridge, route=r)) for r in longest_first]
    stages.run_all(trainings, config.jobs)
    of_answers = of_bridge | chosen(config, ("systems",))
    answers = stages.run("answers", "Answer and report", of_answers, lambda f: _answers(f, out, config))
    console.print("[bold]Scores[/bold]")
    facts = {"seconds": stages.seconds | {"all": stages.elapsed}, **_memory()}
    scores = score_everything(data / "test", regions, answers, systems, facts, config)
    save_run_info(config, out)
    write_atomic(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    from downstream.pages import print_tables, write_demo_page

    print_tables(scores, console)
    write_demo_page(out / "index.html", scores, data / "test", regions, answers, systems)
    console.print(f"\n{out / 'scores.json'}\n{out / 'index.html'}")


def _memory() -> dict[str, float]:
    """Peak resident memory in GB of this process and of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = {"this process": resource.RUSAGE_SELF, "largest child": resource.RUSAGE_CHILDREN}
    return {f"peak GB, {name}": round(resource.getrusage(w).ru_maxrss * unit / 1e9, 2) for name, w in who.items()}


def _weights(folder: Path) -> None:
    console.print("   SmolLM2-135M from GGUF to safetensors, once a machine")
    write_atomic(folder / "path.txt", f"{smollm2_dir()}\n")


def build_data(folder: Path, config: DemoConfig) -> None:
    """``folder``/{train,test}/{store,questions.jsonl,reports.jsonl} and CARD.md."""
    from downstream.brain_qa import build_questions

    parts = {
        "train": (config.train_images, config.train_questions, config.train_reports),
        "test": (config.test_images, config.questions, config.reports),
    }
    for split, (images, questions, reports) in parts.items():
        with tqdm(total=images, desc=f"{split} images", mininterval=2) as bar:
            build_brain(folder / split / "store", split, images, config.seed, lambda done, b=bar: b.update(done - b.n))
        build_questions(folder / split / "store", folder / split, config.seed, questions, reports)
    write_atomic(folder / "CARD.md", brain_card())


def _ground(folder: Path, data: Path, config: DemoConfig) -> None:
    settings = {
        "store": data / "train" / "store",
        "out": folder,
        "steps": config.grounder_steps,
        "batch_size": config.grounder_batch,
        "trunk": config.trunk,
        "seed": config.seed,
        "save_every": max(1, config.grounder_steps // 4),
        "calibration": min(96, config.train_images // 4),
    }
    path = CONFIG_DIR / "grounding" / "brain.yaml"
    launch("grounding.train", "--config", str(path), *(f"{key}={value}" for key, value in settings.items()))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _regions(folder: Path, data: Path, checkpoint: Path) -> None:
    """``folder``/{train,test}-{predicted,annotated}, test-file; test-candidates.jsonl has low scores too."""
    grounder = load_grounder(checkpoint)
    for split in ("train", "test"):
        store = open_store(data / split / "store")
        for kind in ("predicted", "annotated"):
            out = folder / f"{split}-{kind}"
            candidates = write_predictions(
                grounder, store, PredictConfig(checkpoint, data / split / "store", out, kind)
            )
            if (split, kind) == ("test", "predicted"):
                write_regions(folder / "test-candidates.jsonl", candidates)
    # A regions.jsonl as another program or a radiologist would hand in: boxes and label names, no masks, no scores.
    bare = {
        image_id: _bare(regions) for image_id, regions in read_regions(folder / "test-annotated/regions.jsonl").items()
    }
    write_regions(folder / "radiologist.jsonl", bare)
    settings = PredictConfig(
        checkpoint, data / "test" / "store", folder / "test-file", f"file:{folder / 'radiologist.jsonl'}"
    )
    write_predictions(grounder, open_store(data / "test" / "store"), settings)


def _bare(regions: RegionSet) -> RegionSet:
    return RegionSet(regions.boxes, regions.labels, regions.image_size)


def _bridge(folder: Path, *, route: str, data: Path, regions: Path, config: DemoConfig) -> None:
    settings = {
        "route": route,
        "data": data / "train",
        "predicted": regions / "train-predicted" / "region_tokens.safetensors",
        "annotated": regions / "train-annotated" / "region_tokens.safetensors",
        "out": folder,
        "base": config.base,
        "steps": config.bridge_steps,
        "align_steps": config.bridge_steps // 3,
        "batch_size": config.bridge_batch,
        "pack": config.bridge_pack,
        "names": config.bridge_names,
        "warmup": min(30, config.bridge_steps // 12),
        "max_answer": config.max_answer,
        "seed": config.seed,
        "save_every": max(1, config.bridge_steps // 4),
    }
    path = CONFIG_DIR / "downstream" / "brain.yaml"
    keys = [f"{key}={value}" for key, value in settings.items()]
    launch("downstream.train", "--config", str(path), *keys, jobs=config.jobs)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _answers(folder: Path, out: Path, config: DemoConfig) -> None:
    """``folder``/SYSTEM/predictions.jsonl; one loaded bridge answers for all sources of its route."""
    test = out / "data" / "test"
    store, samples = open_store(test / "store"), read_samples(test, ("vqa", "report"))
    kinds = ("predicted", "annotated", "file")
    tables = {kind: read_table(out / "regions" / f"test-{kind}" / "region_tokens.safetensors") for kind in kinds}
    patients = dict(zip(store.image_ids, (store[k].patient_id for k in range(len(store))), strict=True))
    for route in config.routes:
        answerer = load_answerer(out / route / "checkpoint")
        for system in (system for system in config.parsed if system.route == route):
            path = folder / system.folder / "predictions.jsonl"
            if path.exists():  # stopped half-way before
                continue
            source = "predicted" if system.source is None else system.source
            given = {"predicted": tables["file"]} if source == "file" else tables
            regions = open_source(
                "predicted" if source == "file" else source, given, patients, system.features, config.seed
            )
            said: list[Prediction] = predict(answerer, store, samples, regions, describe=f"   {system.name}")
            write_samples(path, said)
