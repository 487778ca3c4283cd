"""What each part of MedGLIP is worth: a row for each part left out or changed, same data, budget and seeds.

    python -m eval.bench.ablation --store TRAIN --val VAL --out runs/ablation [--minutes 6 | --steps N] [--seeds 0 1]

Trains every row with grounding.train (the last one with grounding.pretrain first, within the same budget), predicts VAL
with grounding.predict, and prints one table; ablation.json and ablation.md stay in --out. About 6 minutes a row and
seed, and what prediction takes. Run it again to go on: finished rows are kept, unfinished ones resume.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs import CONFIG_DIR, write_atomic
from eval.bench.grounding.children import BenchError, run
from eval.bench.grounding.report import machine
from eval.coco import RESAMPLES, average_precision, bootstrap_precision, coco_rows
from eval.grounding import class_of, grounding_scores, judged, levels_of
from eval.records import read_region_files
from eval.statistics import SEED, cluster_sums, mean_of
from eval.table import as_markdown
from eval.types import ScoreError
from grounding.labels import load_label_tree

ROWS: dict[str, tuple[str, ...]] = {
    "full": (),
    "fusion: none": ("fusion=none",),
    "fusion: two-way": ("fusion=two_way",),
    "no modality prompts and adapters": ("adapters=false",),
    "no hierarchy loss": ("hierarchy=false",),
    "no partial negatives": ("partial_negatives=false",),
    "no mask head": ("mask_head=false",),
    "random trunk": ("pretrained=false",),
    "stage one first": (),
}
STAGE_ONE = "stage one first"
STAGE_ONE_SHARE = 1 / 3  # of the budget
STAGE_ONE_KEYS = (
    *("trunk", "pretrained", "text_encoder", "image_size", "width", "fusion", "adapters", "mask_head", "scales"),
    *("augment", "batch_size", "lr", "trunk_lr", "temperature", "warmup", "workers", "precision", "checkpointing"),
)
PROBE_STEPS, PROBE_SKIPPED = 12, 4  # the first steps also pay for what is set up once
COLUMNS = (
    ("all", "AP50"),
    ("all", "acc@0.5"),
    ("all", "dice"),
    ("organ", "AP50"),
    ("organ", "acc@0.5"),
    ("lesion", "AP50"),
    ("lesion", "acc@0.5"),
    ("all", "path"),
)


@dataclass(frozen=True)
class Measured:
    """A score and what it is in each resample of the patients, (R,); ``value`` None where it is undefined."""

    value: float | None
    resampled: np.ndarray


UNDEFINED = Measured(None, np.full(RESAMPLES, np.nan))
Measures = dict[tuple[str, str], Measured]


class Bench:
    """The settings of a comparison, and its folder. Raises BenchError where ``out`` holds another one."""

    def __init__(self, settings: dict[str, Any], out: Path):
        self.settings, self.out = settings, out
        lasting = {key: value for key, value in settings.items() if key != "seeds"}  # more of them may be added
        wanted, file = json.dumps(lasting, indent=1, sort_keys=True), out / "settings.json"
        if file.exists() and file.read_text() != wanted:
            raise BenchError(f"{out}: made with other settings, see {file}; choose another --out, or remove it")
        write_atomic(file, wanted)

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Trains and predicts what is not complete yet; steps and seconds of training."""
        place = self.out / f"{name.replace(': ', '-').replace(' ', '-')}-{seed}"
        if not (place / "row.json").exists():
            print(f"{name}, seed {seed}: see {place}", flush=True)
            parts = self._stages(name, place, seed)
            self._run("grounding.predict", place / "predict.log", self._prediction(place))
            logs = [_read(place / part / "train_log.jsonl") for part in parts]
            seconds = sum(row["seconds"] for log in logs for row in log)
            write_atomic(place / "row.json", json.dumps({"steps": sum(map(len, logs)), "seconds": round(seconds, 1)}))
        return {**json.loads((place / "row.json").read_text()), "place": place}

    def _stages(self, name: str, place: Path, seed: int) -> list[str]:
        """Trains; the folders of the stages in ``place``."""
        settings = [*ROWS[name]]
        if name != STAGE_ONE:
            self._stage("grounding.train", place, "grounder", settings, seed, 1.0)
            return ["grounder"]
        self._stage("grounding.pretrain", place, "stage-one", settings, seed, STAGE_ONE_SHARE)
        settings.append(f"init={place / 'stage-one'}")
        self._stage("grounding.train", place, "grounder", settings, seed, 1 - STAGE_ONE_SHARE)
        return ["stage-one", "grounder"]

    def _stage(self, module: str, place: Path, part: str, settings: Sequence[str], seed: int, share: float) -> None:
        if (place / part / "run.json").exists():  # written at the end
            return
        steps = self._steps(module, place, part, settings, seed, share)
        more = [*settings, f"out={place / part}", f"steps={steps}", f"seed={seed}", f"save_every={max(1, steps // 4)}"]
        self._run(module, place / f"{part}.log", [*self._given(module), *more])

    def _steps(self, module: str, place: Path, part: str, settings: Sequence[str], seed: int, share: float) -> int:
        """Given, or as many as fit into the minutes: the cosine needs their number beforehand."""
        if self.settings["steps"]:
            return max(1, round(self.settings["steps"] * share))
        file = place / f"{part}-probe.json"
        if not file.exists():
            out = place / f"{part}-probe"
            more = [*settings, f"out={out}", f"steps={PROBE_STEPS}", f"seed={seed}"]
            more += ["calibration=2"] if module == "grounding.train" else []
            self._run(module, place / f"{part}-probe.log", [*self._given(module), *more])
            step = statistics.median(row["seconds"] for row in _read(out / "train_log.jsonl")[PROBE_SKIPPED:])
            write_atomic(file, json.dumps({"step_s": step}))
        step = json.loads(file.read_text())["step_s"]
        return max(1, round(self.settings["minutes"] * 60 * share / step))

    def _given(self, module: str) -> list[str]:
        """The store and the configuration, as overrides that this program understands."""
        values = {**self.settings["config"], "store": self.settings["store"], "forbid": f"[{self.settings['val']}]"}
        if module == "grounding.pretrain":
            values = {k: v for k, v in values.items() if k in (*STAGE_ONE_KEYS, "store", "forbid")}
        return [f"{key}={_as_text(value)}" for key, value in values.items()]

    def _prediction(self, place: Path) -> list[str]:
        return [
            f"checkpoint={place / 'grounder'}",
            f"store={self.settings['val']}",
            f"out={place / 'regions'}",
            "batch_size=8",
        ]

    def _run(self, module: str, log: Path, arguments: Sequence[str]) -> None:
        run(["-m", module, *arguments], log, self.settings["threads"])


def _as_text(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def measure(folder: Path) -> Measures:
    """Scores of one prediction for all labels, for organs and for lesions apart. A prediction counts only where its
    label is annotated (`eval.grounding.judged`). Path: of the lesions found, the share on the right structure."""
    tree = load_label_tree()
    files = read_region_files(folder / "coco_results.json", folder / "coco_truth.json")
    said = judged(files.predictions, files.references, files.labelled, tree)
    patients = {key: files.patients.get(key, key) for key in files.references}
    scores = grounding_scores(said, files.references, patients, tree)
    rows = coco_rows(files.references, said, lambda label: class_of(label, tree))
    values = average_precision(*rows)
    drawn = bootstrap_precision(*rows, {k: patients[key] for k, key in enumerate(sorted(files.references), 1)}) or {}
    found: Measures = {("all", "path"): _mean(scores["path"].per_sample or [], patients)}
    for level, wanted in (("all", None), ("organ", "structure"), ("lesion", "finding")):
        names = [name for name in values if wanted is None or wanted in levels_of(name, tree)]
        found[level, "AP50"] = _precision([values[x] for x in names], [drawn[x] for x in names if x in drawn])
        for metric in ("acc@0.5", "dice"):
            column = scores["overall"][metric].per_sample or []
            found[level, metric] = _mean([row for row in column if row["class"] in names], patients)
    if all(regions.masks is None for regions in said.values()):
        found |= {key: UNDEFINED for key in found if key[1] == "dice"}  # what it never draws is not drawn badly
    return found


def _precision(values: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> Measured:
    """Mean AP50 over classes; in a resample, over those that it holds."""
    if not values:
        return UNDEFINED
    by_class = np.stack([column[:, 0] for column in drawn]) if drawn else np.full((1, RESAMPLES), np.nan)
    there = ~np.isnan(by_class)
    means = np.where(there, by_class, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)
    return Measured(float(np.mean([value[0] for value in values])), means)


def _mean(rows: Sequence[Mapping[str, Any]], patients: Mapping[str, str]) -> Measured:
    """Mean of per-sample values, every patient of the set drawn, also one without a value: all rows of the table then
    have the same resamples."""
    kept = [row for row in rows if row["value"] is not None]
    if not kept:
        return UNDEFINED
    every = sorted(set(patients.values()))
    statistics_ = [[row["value"], 1.0] for row in kept] + [[0.0, 0.0]] * len(every)
    sums = cluster_sums(np.array(statistics_), [patients[row["sample_id"]] for row in kept] + every)
    count = len(every)
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return Measured(float(np.mean([row["value"] for row in kept])), mean_of(draws @ sums))


def over_seeds(each: Sequence[Measures]) -> Measures:
    """The mean over seeds, resample by resample: the patients drawn are the same."""
    result = {}
    for key in each[0]:
        values = [one[key].value for one in each]
        known = [value for value in values if value is not None]
        whole = float(np.mean(known)) if len(known) == len(values) else None
        result[key] = Measured(whole, np.mean([one[key].resampled for one in each], 0))
    return result


def summary(row: Measures, full: Measures) -> dict[str, dict[str, Any]]:
    """Column → value, interval, difference to the full model with the interval of paired resamples."""
    result = {}
    for level, metric in COLUMNS:
        own, base = row[level, metric], full[level, metric]
        both = own.value is not None and base.value is not None
        result[f"{metric}, {level}"] = {
            "value": own.value,
            "ci95": _interval(own.resampled),
            "difference": own.value - base.value if both else None,  # type: ignore[operator]
            "difference_ci95": _interval(own.resampled - base.resampled) if both else None,
        }
    return result


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Two Markdown tables: what each row reaches, and its difference to the full model."""
    names = [f"{metric}, {level}" for level, metric in COLUMNS]
    reached = [
        [name, *(_cell(row["scores"][x]["value"], row["scores"][x]["ci95"]) for x in names), f"{row['steps']:,.0f}"]
        for name, row in rows.items()
    ]
    apart = [
        [name, *(_cell(row["scores"][x]["difference"], row["scores"][x]["difference_ci95"], "+") for x in names)]
        for name, row in rows.items()
        if name != "full"
    ]
    first = as_markdown("Parts of MedGLIP", ["row", *names, "steps"], reached)
    return "\n".join([first, as_markdown("Difference to full", ["row", *names], apart)])


def _cell(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    ends = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{ends}"


def compare(names: Sequence[str], bench: Bench) -> str:
    """Runs the rows, scores them and writes ablation.json and ablation.md after each; the tables."""
    rows: dict[str, dict[str, Any]] = {}
    full: Measures = {}
    text = ""
    for name in names:
        runs = [bench.row(name, seed) for seed in bench.settings["seeds"]]
        measured = over_seeds([measure(one["place"] / "regions") for one in runs])
        full = full or measured
        cost = {key: float(np.mean([one[key] for one in runs])) for key in ("steps", "seconds")}
        rows[name] = {**cost, "scores": summary(measured, full)}
        text = f"{table(rows)}\n{notes(bench.settings)}"
        result = {"settings": bench.settings, "machine": machine(), "rows": rows}
        write_atomic(bench.out / "ablation.json", json.dumps(result, indent=1) + "\n")
        write_atomic(bench.out / "ablation.md", text)
    return text


def notes(settings: Mapping[str, Any]) -> str:
    host = machine()
    budget = f"{settings['steps']} steps" if settings["steps"] else f"{settings['minutes']:g} minutes"
    seeds = ", ".join(map(str, settings["seeds"]))
    return "\n".join(
        [
            f"- {budget} of training each, {settings['threads']} threads at most, mean over seeds {seeds}; stage one "
            "takes a third of its row's budget.",
            f"- {host['processor']}, {host['cores']} cores, {host['memory_gb']} GB; torch {host['torch']}.",
            f"- Intervals: 95 %, {RESAMPLES} bootstrap resamples of patients, the same for all rows, so that "
            "differences are paired; what another seed changes is not in them.",
            "- AP50 is a mean over classes; organ: structures, lesion: findings of the label tree. A prediction counts "
            "only where its label is annotated.",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="region store to train on")
    parser.add_argument("--val", type=Path, required=True, help="region store of other patients")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=6, help="of training, a row and seed")
    budget.add_argument("--steps", type=int, default=0, help="so many steps in the place of minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="full is added")
    parser.add_argument("--config", type=Path, default=CONFIG_DIR / "grounding" / "real.yaml")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the configuration")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        config = yaml.safe_load(options.config.read_text()) or {}
        config |= dict(item.split("=", 1) for item in options.set)
        config = {k: v for k, v in config.items() if k not in ("store", "out", "forbid", "steps", "seed", "save_every")}
        given = {key: getattr(options, key) for key in ("minutes", "steps", "seeds", "threads")}
        given |= {"store": str(options.store.resolve()), "val": str(options.val.resolve()), "config": config}
        print(compare([x for x in ROWS if x == "full" or x in options.only], Bench(given, options.out.resolve())))
    except (BenchError, ScoreError, OSError, ValueError) as error:
        sys.exit(f"eval.bench.ablation: {error}")


if __name__ == "__main__":
    main()
