"""The whole experiment from one YAML: do regions make the answers better, and is it the regions that do?

    python -m downstream.experiment --config configs/experiment/brain.yaml [key=value …]

One training a route, one prediction a system, and more seeds for those that are named in `seeded`. Each cell of this
grid is a process of `accelerate launch` and leaves a folder whose name ends in the hash of all that it depends on:

    regions/SPLIT-KIND-HASH     region tokens (with `grounder`)
    bridges/ROUTE-seedN-HASH    the trained bridge
    answers/SYSTEM-seedN-HASH   predictions.jsonl
    table.md, scores.json, curve.png, curve.svg, config.yaml, run.json

The same command goes on where it was stopped. A cell is run again only where something that it depends on has changed;
the folder of before is kept.
"""

import argparse
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from configs import CONFIG_DIR, load_config, save_run_info, write_atomic
from downstream.base import BaseModelError
from downstream.cells import Artefact, Cell, cell, file_hash, folder_hash, grounder_hash, store_hash
from downstream.experiment_scores import TestSet, curve, score_experiment
from downstream.experiment_tables import draw_curve, markdown, tables
from downstream.pages import print_tables
from downstream.predict import TASKS, PredictConfig
from downstream.samples import Prediction, read_predictions, read_questions
from downstream.scores import System
from downstream.sources import RegionSource, check_source, open_source, read_table
from downstream.stages import Stage, Stages, console, launch
from downstream.train import TrainConfig
from eval.types import plain
from grounding.labels import load_label_tree
from grounding.predict import PredictConfig as RegionsConfig

SPLITS, KINDS = ("train", "test"), ("predicted", "annotated")
CONTROLS = {"blank": "none, blank image", "text-only": "text only"}
PROGRAMS = ("grounding.predict", "downstream.train", "downstream.predict")  # each reads what those before it wrote
SAVED = 8  # states of a training, from which it goes on
# What the grid itself sets, so that no two cells differ in anything else.
TAKEN = {
    "training": ("data", "predicted", "annotated", "out", "route", "seed", "blank_image"),
    "prediction": (
        *("checkpoint", "data", "predicted", "annotated", "out", "source", "features", "seed", "tasks", "limit"),
        "blank_image",
    ),
}


@dataclass(frozen=True)
class ExperimentConfig:
    """`train`, `test`: folders with store/, questions.jsonl and reports.jsonl. Their regions are found by `grounder` (a
    checkpoint, or a zero-shot detector of transformers), or lie in the folder `regions`, as
    {train,test}-{predicted,annotated}/region_tokens.safetensors.

    `systems`: ROUTE, ROUTE/SOURCE or ROUTE/SOURCE/zero (features zeroed), sources as in `bridges.routes.SOURCES`;
    file:PATH is a region-token file, or a regions.jsonl that `grounder` makes tokens of. `jitter`: the regions that
    "jittered:SIGMA" moves, "annotated" or "predicted". `controls`: "blank" (the bridge of route none, asked about grey
    images) and "text-only" (trained and asked with grey images). `seeded`: systems that are trained and asked with each
    of `seeds`; all others with the first. `bridge`: YAML of downstream.train; `training` and `prediction`: further
    key=value of downstream.train and downstream.predict. `accelerate`: name of a file of configs/accelerate. `limit`:
    so many test samples a task. `jobs`: so many programs run at one time, each with its share of the cores.
    """

    train: Path
    test: Path
    out: Path
    systems: tuple[str, ...]
    grounder: str | None = None
    regions: Path | None = None
    controls: tuple[str, ...] = tuple(CONTROLS)
    jitter: str = "annotated"
    seeds: tuple[int, ...] = (0,)
    seeded: tuple[str, ...] = ("none", "tokens/predicted")
    bridge: Path = CONFIG_DIR / "downstream" / "brain.yaml"
    training: tuple[str, ...] = ()
    prediction: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    accelerate: str = "cpu"
    jobs: int = 1

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs}; it must be positive")
        if (self.grounder is None) == (self.regions is None):
            raise ValueError("give either grounder=CHECKPOINT or regions=FOLDER")
        if self.jitter not in KINDS:
            raise ValueError(f"jitter={self.jitter!r}; known: {', '.join(KINDS)}")
        for name, values in (("systems", [name_of(system) for system in self.systems]), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is empty, or names something twice: {', '.join(map(str, values)) or '-'}")
        if unknown := set(self.controls) - set(CONTROLS):
            raise ValueError(f"controls: {sorted(unknown)[0]!r}; known: {', '.join(CONTROLS)}")
        self._check_systems()
        for name, taken in TAKEN.items():
            for key in (assignment.partition("=")[0].strip() for assignment in getattr(self, name)):
                if key in taken:
                    raise ValueError(f"{name}: {key!r} is what the grid varies or shares; leave it out")

    def _check_systems(self) -> None:
        names = [name_of(system) for system in self.systems]
        for name in self.seeded:
            if len(self.seeds) > 1 and name_of(name) not in names:
                raise ValueError(f"seeded: {name!r} is none of the systems")
        for system in map(system_of, self.systems):
            check_source(system.source or "predicted")
            if self.grounder is None and (system.source or "").endswith(".jsonl"):
                raise ValueError(f"system {system.name!r}: a regions.jsonl needs grounder=CHECKPOINT for its features")


@dataclass(frozen=True)
class Plan:
    """The cells in the order in which they run. `tokens`: "test-predicted" → region-token file. `bridges` and
    `answers`: by name and seed. `sources`: of each system that has regions, the source as `open_source` takes it."""

    cells: list[Cell] = field(default_factory=list)
    tokens: dict[str, Artefact] = field(default_factory=dict)
    bridges: dict[tuple[str, int], Cell] = field(default_factory=dict)
    answers: dict[str, dict[int, Cell]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def system_of(name: str) -> System:
    """`System.parse`, also for a source file:PATH, whose path may have slashes. Raises ValueError for another name."""
    route, _, source = name.partition("/")
    if not source.startswith("file:"):
        return System.parse(name)
    path = source.removesuffix("/zero")
    return System(route, path, "full" if path == source else "zero")


def name_of(system: str) -> str:
    """As tables have it: "tokens/predicted zero", and of a file its name without the folder."""
    parsed = system_of(system)
    kind, colon, path = (parsed.source or "").partition(":")
    return replace(parsed, source=f"file:{Path(path).name}").name if kind + colon == "file:" else parsed.name


class Column(NamedTuple):
    """A system asked with one bridge. `blank`: about grey images; `blind`: by a bridge that never saw others."""

    name: str
    system: System
    seed: int
    blank: bool = False
    blind: bool = False


def columns(config: ExperimentConfig) -> Iterator[Column]:
    """What is asked, seed by seed; the controls last."""
    seeded = set(map(name_of, config.seeded))
    for seed in config.seeds:
        for system in config.systems:
            if seed == config.seeds[0] or name_of(system) in seeded:
                yield Column(name_of(system), system_of(system), seed)
    for control in config.controls:
        yield Column(CONTROLS[control], System("none"), config.seeds[0], True, control == "text-only")


def plan(config: ExperimentConfig) -> Plan:
    """All cells, none of them run. Raises ValueError where a program would refuse its settings, or input is missing."""
    needed = [f"{name}.jsonl" for name, task in (("questions", "vqa"), ("reports", "report")) if task in config.tasks]
    data = {split: folder_hash(getattr(config, split), needed) for split in SPLITS}
    grid = Plan()
    _add_regions(grid, config)
    for column in columns(config):
        bridge = _bridge(grid, config, data["train"], column)
        _add_answers(grid, config, data["test"], column, bridge)
    return grid


def _add_regions(grid: Plan, config: ExperimentConfig) -> None:
    for split, kind in product(SPLITS, KINDS):
        name = f"{split}-{kind}"
        if config.regions is not None:
            path = config.regions / name / "region_tokens.safetensors"
            grid.tokens[name] = Artefact(str(path), file_hash(path))
        else:
            grid.tokens[name] = _found(grid, config, getattr(config, split), name, Artefact(kind, kind))


def _found(grid: Plan, config: ExperimentConfig, data: Path, name: str, regions: Artefact) -> Artefact:
    """The region tokens that `grounder` makes of `regions`: "predicted", "annotated" or "file:PATH"."""
    grounder = Artefact(str(config.grounder), grounder_hash(str(config.grounder)))
    reads = {"checkpoint": grounder, "store": store_hash(data / "store"), "regions": regions}
    made = cell(config.out, f"regions/{name}", "grounding.predict", RegionsConfig, None, [], reads)
    grid.cells.append(made)
    return made.result / "region_tokens.safetensors"


def _bridge(grid: Plan, config: ExperimentConfig, data: Artefact, column: Column) -> Cell:
    """The bridge that a column is asked with; each is trained once."""
    name = "text-only" if column.blind else column.system.route
    if (name, column.seed) not in grid.bridges:
        keys = [*config.training, f"route={column.system.route}", f"seed={column.seed}"]
        keys += ["blank_image=true"] if column.blind else []
        reads = {"data": data, **{kind: grid.tokens[f"train-{kind}"] for kind in KINDS}}
        given = (f"bridges/{name}-seed{column.seed}", "downstream.train", TrainConfig, config.bridge)
        more = (reads, config.accelerate)  # batch_size is that of each process
        made = cell(config.out, *given, keys, *more)
        if not made.settings["save_every"]:
            made = cell(config.out, *given, [*keys, f"save_every={max(1, made.settings['steps'] // SAVED)}"], *more)
        grid.bridges[name, column.seed] = made
        grid.cells.append(made)
    return grid.bridges[name, column.seed]


def _add_answers(grid: Plan, config: ExperimentConfig, data: Artefact, column: Column, bridge: Cell) -> None:
    limit = "null" if config.limit is None else config.limit
    keys = [*config.prediction, f"tasks={','.join(config.tasks)}", f"limit={limit}", f"seed={config.seeds[0]}"]
    keys += [f"features={column.system.features}", *(["blank_image=true"] if column.blank else [])]
    regions = _regions(grid, config, column.system.source or "predicted")
    reads = {"checkpoint": bridge.result / "checkpoint", "data": data, **regions}
    folder = System(column.name).folder.replace(",", "").replace(":", "-")  # not every disk takes a colon
    name = f"answers/{folder}-seed{column.seed}"
    made = cell(config.out, name, "downstream.predict", PredictConfig, None, keys, reads)
    grid.cells.append(made)
    grid.answers.setdefault(column.name, {})[column.seed] = made
    if column.system.source is not None:
        grid.sources[column.name] = regions["source"].path


def _regions(grid: Plan, config: ExperimentConfig, source: str) -> dict[str, Artefact]:
    """The keys of downstream.predict that say whose regions a prompt has."""
    if source.startswith("file:"):
        return {"source": _own_regions(grid, config, source.removeprefix("file:"))}
    if source == "annotated":
        return {"source": Artefact(source, source), "annotated": grid.tokens["test-annotated"]}
    kind = config.jitter if source.startswith("jittered:") else "predicted"
    return {"source": Artefact(source, source), "predicted": grid.tokens[f"test-{kind}"]}


def _own_regions(grid: Plan, config: ExperimentConfig, path: str) -> Artefact:
    """The region-token file of a source file:PATH; of a regions.jsonl, `grounder` makes one, once."""
    given = Artefact(f"file:{path}", file_hash(Path(path)))
    if not path.endswith(".jsonl"):
        return given
    name = f"test-file-{Path(path).stem}-{given.hash}"
    if name not in grid.tokens:
        grid.tokens[name] = _found(grid, config, config.test, name, given)
    made = grid.tokens[name]
    return Artefact(f"file:{made.path}", made.hash)


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Runs what is not yet there, scores, writes; returns scores.json.

    Raises ConfigError for wrong settings, ValueError for input that cannot be used, RuntimeError where a program fails.
    """
    grid = plan(config)
    with _only_run(config.out) as lock:
        stages = Stages(config.out)
        for module in PROGRAMS:
            work = partial(_work, config=config, lock=lock)
            cells = [one for one in grid.cells if one.module == module]
            stages.run_all([Stage(c.folder, c.name, c.identity, partial(work, one=c)) for c in cells], config.jobs)
        console.print("[bold]Scores[/bold]")
        scores = _scores(config, grid)
        _write(config, grid, scores)
    print_tables(scores, console)
    console.print(f"\n{config.out / 'table.md'}\n{config.out / 'scores.json'}")
    return scores


def _work(folder: Path, *, one: Cell, config: ExperimentConfig, lock: int) -> None:
    shared = {"accelerate": config.accelerate, "pass_fds": (lock,), "jobs": config.jobs}
    launch(one.module, *one.arguments, f"out={folder}", **shared)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # what a training would have gone on from


@contextmanager
def _only_run(out: Path) -> Iterator[int]:
    """Holds `out`/.lock, whose number the programs inherit: they may outlive this process where that is killed.

    Raises ValueError where another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another run, or a program of it, is at work there; wait for it") from None
        yield lock.fileno()


def _scores(config: ExperimentConfig, grid: Plan) -> dict[str, Any]:
    test, tree = TestSet.read(config.test, config.tasks, config.limit), load_label_tree()
    said = {
        name: {seed: read_predictions(config.out / made.folder / "predictions.jsonl") for seed, made in cells.items()}
        for name, cells in grid.answers.items()
    }
    asked = read_questions(config.train / "questions.jsonl") if "vqa" in config.tasks else []
    scores = score_experiment(said, test, asked, tree)
    sources = {source: _open(source, config, grid, test) for source in set(grid.sources.values())}
    scores["curve"] = curve(scores, grid.sources, sources, config.jitter, test, tree)
    trained = {f"{name}, seed {seed}": config.out / made.folder for (name, seed), made in grid.bridges.items()}
    scores["bridges"] = {name: _bridge_facts(folder) for name, folder in trained.items()}
    hashes = {name: {seed: _hashes(rows[0]) for seed, rows in seeds.items() if rows} for name, seeds in said.items()}
    return scores | {"hashes": hashes, "tables": tables(scores)}


def _hashes(row: Prediction) -> dict[str, str | None]:
    return {"model": row.model_hash, "detector": row.detector_hash}


def _open(source: str, config: ExperimentConfig, grid: Plan, test: TestSet) -> RegionSource:
    """What the programs of the cells read."""
    predicted = config.jitter if source.startswith("jittered:") else "predicted"
    kinds = {"predicted": predicted, "annotated": "annotated"}
    tokens = {kind: read_table(grid.tokens[f"test-{taken}"].path) for kind, taken in kinds.items()}
    return open_source(source, tokens, test.patients_of_images, seed=config.seeds[0])


def _bridge_facts(folder: Path) -> dict[str, Any]:
    """What a training cost, and the length of its rows in tokens: routes are compared at like lengths, or not."""
    record = json.loads((folder / "run.json").read_text())
    seconds = json.loads((folder / ".complete.json").read_text())["seconds"]
    tokens = record["tokens_attended"] or {}
    length = {"tokens": tokens.get("mean"), "longest": tokens.get("max")}
    return {"seconds": seconds, "samples": record["samples"], **length, "left_out": record["left_out"]}


def _write(config: ExperimentConfig, grid: Plan, scores: dict[str, Any]) -> None:
    draw_curve(scores["curve"], config.out)
    write_atomic(config.out / "table.md", markdown(scores["tables"], f"# {config.out.name}"))
    write_atomic(config.out / "scores.json", json.dumps(plain(scores), indent=1, allow_nan=False) + "\n")
    save_run_info(config, config.out, seeds=config.seeds, cells={one.folder: one.module for one in grid.cells})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file, such as configs/experiment/brain.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        run(load_config(ExperimentConfig, options.config, options.overrides))
    except (BaseModelError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a program of a cell failed
        sys.exit(f"downstream.experiment: {error}")


if __name__ == "__main__":
    main()
