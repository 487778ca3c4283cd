"""``medglip demo``: the whole chain on the embedded brain set, stage by stage, and what it shows.

Each stage leaves its result in a folder of ``out`` and is skipped where that is complete and was made with the same
settings, so that a run goes on where it was stopped.
"""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from configs import CONFIG_DIR, load_config, save_run_info, write_atomic
from downstream.embedded import smollm2_dir
from downstream.predict import load_answerer, predict, read_samples
from downstream.samples import Prediction, write_samples
from downstream.scores import System, score_everything
from downstream.sources import open_source, read_table
from grounding.brain import brain_card, build_brain
from grounding.detect import load_grounder
from grounding.predict import PredictConfig, write_predictions
from grounding.store import open_store
from grounding.types import RegionSet, read_regions, write_regions

console = Console(width=max(110, shutil.get_terminal_size().columns))


@dataclass(frozen=True)
class DemoConfig:
    """``systems``: ``route``, ``route/source`` or ``route/source/zero`` (features zeroed); one bridge a route is
    trained, sources switch at inference. Source ``file`` is a regions.jsonl, here of the annotations."""

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
    seed: int = 0

    @property
    def parsed(self) -> list[System]:
        return [System.parse(name) for name in self.systems]

    @property
    def routes(self) -> list[str]:
        return list(dict.fromkeys(system.route for system in self.parsed))


class Stages:
    """Runs stages with their times; a stage whose folder says that it is complete with the same settings is reused."""

    def __init__(self, out: Path, config: DemoConfig):
        self.out, self.config = out, dataclasses.asdict(config)
        self.seconds: dict[str, float] = {}

    def run(self, name: str, title: str, settings: tuple[str, ...], work: Callable[[Path], None]) -> Path:
        """``work(folder)`` fills ``out/name``; ``settings`` are the keys of the configuration that it depends on."""
        folder = self.out / name
        marker, started = folder / ".complete.json", folder / ".started.json"
        wanted = json.dumps({key: self.config[key] for key in settings}, sort_keys=True, default=str)
        number = len(self.seconds) + 1
        done = json.loads(marker.read_text()) if marker.exists() else {}
        if done.get("settings") == wanted:
            console.print(f"[bold]{number}. {title}[/bold]: reused from {folder}")
            self.seconds[title] = done["seconds"]
            return folder
        console.print(f"[bold]{number}. {title}[/bold]")
        if folder.exists() and not (started.exists() and started.read_text() == wanted):
            shutil.rmtree(folder)  # begun or made with other settings: nothing of it may be resumed
        write_atomic(started, wanted)
        began = time.perf_counter()
        work(folder)
        self.seconds[title] = round(time.perf_counter() - began, 1)
        write_atomic(marker, json.dumps({"settings": wanted, "seconds": self.seconds[title]}))
        console.print(f"   done in {self.seconds[title]:.0f} s")
        return folder


def launch(module: str, *arguments: str) -> None:
    """The command that README gives for training, as a process of its own. Raises RuntimeError where it fails."""
    accelerate = ["accelerate.commands.launch", "--config_file", str(CONFIG_DIR / "accelerate" / "cpu.yaml")]
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    command = [sys.executable, "-m", *accelerate, "--num_cpu_threads_per_process", threads, "-m", module, *arguments]
    shown = f"   accelerate launch --config_file configs/accelerate/cpu.yaml -m {module} {' '.join(arguments)}"
    console.print(shown, style="dim", soft_wrap=True, highlight=False)
    done = subprocess.run(command, env=os.environ | _quiet())
    if done.returncode:
        raise RuntimeError(f"{module} stopped with exit code {done.returncode}; its last lines above say why")


def _quiet() -> dict[str, str]:
    """No hub, and no messages of libraries between progress bars."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return quiet if torch.accelerator.is_available() else quiet | {"DS_ACCELERATOR": "cpu"}


def run(out: Path, full: bool, config_path: Path | None, overrides: list[str]) -> None:
    """Raises ConfigError for wrong settings, RuntimeError where a training process fails."""
    path = config_path or CONFIG_DIR / "demo" / ("full.yaml" if full else "quick.yaml")
    config = load_config(DemoConfig, path, overrides)
    systems = config.parsed
    console.print(f"Med-GLIP demo: {path.name}, seed {config.seed}, results in {out}")
    console.print("Generated lesions on slices of MRI templates. Research use only; not a medical device.\n")
    stages = Stages(out, config)
    grounder_keys = ("train_images", "seed", "grounder_steps", "grounder_batch", "trunk")
    region_keys = (*grounder_keys, "test_images")
    data_keys = ("train_images", "test_images", "train_questions", "train_reports", "questions", "reports", "seed")
    bridge_keys = (*grounder_keys, *data_keys, "base", "max_answer", *(key for key in stages.config if "bridge" in key))
    if config.base == "embedded":
        stages.run("weights", "Language model weights", (), lambda folder: _weights(folder))
    data = stages.run("data", "Images, questions and reports", data_keys, lambda folder: build_data(folder, config))
    grounder = stages.run("grounder", "Train the grounding model", grounder_keys, lambda f: _ground(f, data, config))
    regions = stages.run("regions", "Find regions", region_keys, lambda f: _regions(f, data, grounder))
    for route in config.routes:
        stages.run(route, f"Train route {route}", bridge_keys, lambda f, r=route: _bridge(f, r, data, regions, config))
    answers = stages.run("answers", "Answer and report", (*bridge_keys, "systems"), lambda f: _answers(f, out, config))
    console.print("[bold]Scores[/bold]")
    facts = {"seconds": stages.seconds | {"all": round(sum(stages.seconds.values()), 1)}, **_memory()}
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


def _bridge(folder: Path, route: str, data: Path, regions: Path, config: DemoConfig) -> None:
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
    launch("downstream.train", "--config", str(path), *(f"{key}={value}" for key, value in settings.items()))
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
