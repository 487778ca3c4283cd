"""MedGLIP and four peers, trained and run side by side: same images, same split by patient, same trunk, same minutes.

    python -m eval.bench.grounding --data DATA --out runs/bench-grounding [--minutes 15] [--only fcos u-net]

Builds a region store of DATA (configs/data/real.yaml), splits it by patient, trains each contestant for so many minutes
on two threads, lets it predict on the validation images, and prints one set of tables; results.json and results.md
stay in --out. About 18 minutes a contestant. Run it again to go on: what is complete is kept.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from configs import CONFIG_DIR, write_atomic
from eval.bench.grounding.children import BenchError, Child, run
from eval.bench.grounding.data import coco_truth, read_examples
from eval.bench.grounding.medglip import prediction_of, train_medglip, translated
from eval.bench.grounding.peer import PEERS
from eval.bench.grounding.report import groups, machine, notes, tables
from eval.bench.grounding.scores import mean_over, score
from eval.grounding import METRICS
from eval.types import ScoreError, plain
from grounding.labels import load_label_tree

CONTESTANTS = ("medglip", *PEERS)
# Runs a program's main several times in one process, and keeps the seconds of all but the first: what an image costs is
# the difference between many and few, without what it costs to start.
PREDICT = """
import importlib, json, sys, time
program, seconds = importlib.import_module(sys.argv[1]), []
for arguments in json.loads(sys.argv[3]):
    began = time.perf_counter()
    program.main(arguments)
    seconds.append(time.perf_counter() - began)
json.dump(seconds[1:], open(sys.argv[2], "w"))
"""
PARTS = ("train", "val", "few")  # few: some of val, so that the cost of an image can be told from that of starting up


def prepare(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """`out`/data with stores and Parquet of PARTS, truth.json, and about.json; the last is written when all is there.
    Raises BenchError where `out` holds another comparison's data."""
    data = out / "data"
    keys = ("data", "data_config", "seed", "trunk", "image_size")
    if (data / "about.json").exists():
        about = json.loads((data / "about.json").read_text())
        differs = [key for key in keys if about[key] != settings[key]]
        if differs:
            raise BenchError(f"{out}: made with another {', '.join(differs)}; choose another --out, or remove it")
        return about
    print(f"data: {settings['data']} → {data}", flush=True)
    log, seed = out / "data.log", ["--seed", str(settings["seed"])]
    build = ["build", "--config", settings["data_config"], f"root={settings['data']}", f"out={data / 'store'}"]
    for arguments in (
        build,
        ["split", str(data / "store"), "--share", "train=0.8", "--share", "val=0.2", "--out", str(data), *seed],
        ["split", str(data / "val"), "--share", "few=0.25", "--share", "rest=0.75", "--out", str(data), *seed],
        *(["export", str(data / name), str(data / f"{name}.parquet")] for name in PARTS),
    ):
        run(["-m", "downstream.cli", "data", *arguments], log, settings["threads"])
    return _describe(settings, data, keys)


def _describe(settings: dict[str, Any], data: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    examples = {name: read_examples(data / f"{name}.parquet") for name in PARTS}
    tree = load_label_tree()
    labels = sorted({label for example in examples["train"] for label in example.labels})
    unseen = sorted({label for example in examples["val"] for label in example.labels} - set(labels))
    write_atomic(data / "truth.json", json.dumps(coco_truth(examples["val"], [*labels, *unseen])))
    about = {key: settings[key] for key in keys}
    about["vocabulary"] = {label: tree.phrase(label) if label in tree.nodes else label for label in labels}
    about["counts"] = {n: (len(rows), len({row.patient_id for row in rows})) for n, rows in examples.items()}
    write_atomic(data / "about.json", json.dumps(about, indent=1))
    return about


def contest(name: str, settings: dict[str, Any], out: Path) -> dict[str, float]:
    """Trains and predicts; a stage that is complete is kept. What it cost."""
    place, data = out / name, out / "data"
    wanted = {key: settings[key] for key in ("minutes", "threads", "seed", "trunk", "image_size")}
    wanted |= {"medglip": settings["medglip"]} if name == "medglip" else {}
    if not (place / "settings.json").exists() or json.loads((place / "settings.json").read_text()) != wanted:
        shutil.rmtree(place, ignore_errors=True)
        write_atomic(place / "settings.json", json.dumps(wanted))
    if not (place / "train.json").exists():
        print(f"{name}: training, {settings['minutes']:g} minutes; see {place / 'train.log'}", flush=True)
        write_atomic(place / "train.json", json.dumps(_trained(name, place, data, settings)))
    if not (place / "predict.json").exists():
        print(f"{name}: prediction; see {place / 'predict.log'}", flush=True)
        write_atomic(place / "predict.json", json.dumps(_predicted(name, place, data, settings)))
    return json.loads((place / "train.json").read_text()) | json.loads((place / "predict.json").read_text())


def _trained(name: str, place: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    child = train_medglip(place, data, settings) if name == "medglip" else _train_peer(name, place, data, settings)
    log = [json.loads(line) for line in _train_log(name, place).read_text().splitlines()]
    return {"steps": len(log), "train_s": sum(row["seconds"] for row in log), "train_mb": child.peak_mb}


def _predicted(name: str, place: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    for unfinished in place.glob("regions-*"):  # the program would go on there, and its time would not count
        shutil.rmtree(unfinished)
    log = place / "predict.log"
    child = run(["-c", PREDICT, *_prediction(name, place, data, settings)], log, settings["threads"])
    if name == "medglip":
        results = translated(place / "regions-val", json.loads((data / "truth.json").read_text()))
        write_atomic(place / "val_results.json", json.dumps(results))
    few, val = json.loads((place / "seconds.json").read_text())
    counts = json.loads((data / "about.json").read_text())["counts"]
    images = max(counts["val"][0] - counts["few"][0], 1)
    return {"image_s": max(val - few, 0) / images, "predict_mb": child.peak_mb}


def _train_log(name: str, place: Path) -> Path:
    return place / "grounder" / "train_log.jsonl" if name == "medglip" else place / "train_log.jsonl"


def _train_peer(name: str, place: Path, data: Path, settings: dict[str, Any]) -> Child:
    command = ["-m", "eval.bench.grounding.peer", "train", name, "--data", str(data), "--out", str(place)]
    command += ["--minutes", str(settings["minutes"]), "--seed", str(settings["seed"])]
    return run(command, place / "train.log", settings["threads"])


def _prediction(name: str, place: Path, data: Path, settings: dict[str, Any]) -> list[str]:
    """Module, file for the seconds, and the arguments of three runs: to warm up, few images, all of them."""
    if name == "medglip":
        runs = [prediction_of(place, data / part, n) for n, part in (("warm", "few"), ("few", "few"), ("val", "val"))]
        return ["grounding.predict", str(place / "seconds.json"), json.dumps(runs)]
    command = ["predict", name, "--data", str(data), "--out", str(place), "--seed", str(settings["seed"]), "--images"]
    runs = [[*command, part] for part in ("few", "few", "val")]
    return ["eval.bench.grounding.peer", str(place / "seconds.json"), json.dumps(runs)]


def compare(names: list[str], settings: dict[str, Any], out: Path) -> str:
    """Runs the contestants, scores them and writes results.json and results.md; the tables."""
    about = prepare(settings, out)
    costs = {name: contest(name, settings, out) for name in names}
    scores = {name: score(out / name / "val_results.json", out / "data" / "truth.json") for name in names}
    text = f"{tables(scores, costs)}\n{notes(settings, about['counts'])}"
    results = {
        "settings": settings,
        "machine": machine(),
        "images": about["counts"],
        "contestants": {
            name: {
                "cost": costs[name],
                "sources": plain(found.sources, per_sample=False),
                "means": {
                    group: {m: plain(mean_over(found, sources, m), per_sample=False) for m in METRICS}
                    for group, sources in groups(scores).items()
                },
            }
            for name, found in scores.items()
        },
    }
    write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(out / "results.md", text)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, as data build takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-grounding"))
    parser.add_argument("--minutes", type=float, default=15, help="of training, each")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument(
        "--config", type=Path, default=CONFIG_DIR / "grounding" / "real.yaml", help="MedGLIP's settings"
    )
    parser.add_argument("--data-config", type=Path, default=CONFIG_DIR / "data" / "real.yaml", help="what DATA holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    given = {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in vars(options).items()}
    only, out = given.pop("only"), Path(given.pop("out"))
    names = [name for name in CONTESTANTS if name in only]
    try:
        chosen = yaml.safe_load(options.config.read_text())
        settings = {**given, "trunk": chosen.get("trunk", "embedded"), "image_size": chosen.get("image_size", 192)}
        settings["medglip"] = chosen
        print(compare(names, settings, out))
    except (BenchError, ScoreError, OSError) as error:
        sys.exit(f"eval.bench.grounding: {error}")


if __name__ == "__main__":
    main()
