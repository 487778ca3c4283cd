"""``medglip data build | questions | regionqa | split | export | import | stats | card | audit``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

EXAMPLES = {
    "build": "medglip data build --source bccd:data/bccd --source 'coco:data/ct?modality=ct' --out store",
    "questions": "medglip data questions --source vqa-rad:data/vqa-rad --split image --out data/vqa-rad-qa",
    "regionqa": "medglip data regionqa store --out regionqa --per-image 8",
    "split": "medglip data split store --share train=0.8 --share val=0.2 --out splits",
    "export": "medglip data export store s3://bucket/store",
    "import": "medglip data import hf://datasets/me/store --out store",
    "stats": "medglip data stats store --plot stats.png",
    "card": "medglip data card store --out CARD.md",
    "audit": "medglip data audit train_store test_store --questions testset.json --images vqa_images",
}

QUESTION_LAYOUTS = (  # of downstream.question_build, whose import takes a second
    "vqa-rad, slake, path-vqa, vqa-med, pmc-vqa, omnimedvqa, csv, iu-xray, mimic-cxr, chexpert-plus, padchest-gr, jsonl"
)


def add_commands(commands: argparse._SubParsersAction, add: Callable) -> None:
    """``add(commands, name, summary, example)`` makes a parser."""
    build = add(commands, "build", "turn datasets in their own layouts into a region store", EXAMPLES["build"])
    build.add_argument("--source", action="append", metavar="CONVERTER:PATH[?option=value&…]")
    build.add_argument("--out", type=Path, metavar="STORE")
    build.add_argument("--config", type=Path, help="YAML file, such as configs/data/real.yaml")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="such as workers=4 embed=true max_bad=100")
    build.set_defaults(run=run_build)

    questions = add(commands, "questions", "turn question and report sets into training data", EXAMPLES["questions"])
    questions.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="LAYOUT:PATH[?option=value&…]",
        help=f"layouts: {QUESTION_LAYOUTS}; options: name, licence, and images, their folder",
    )
    questions.add_argument("--out", type=Path, required=True, metavar="DIR")
    questions.add_argument(
        "--split", metavar="SPLIT", help="train | val | test, published (each of these), or image (made, by patient)"
    )
    questions.add_argument("--share", action="append", metavar="NAME=SHARE", help="of --split image")
    questions.add_argument("--seed", type=int, default=0, help="of --split image")
    questions.add_argument("--workers", type=int, default=1, help="processes that read images")
    questions.add_argument("--embed", action="store_true", help="image files go into the store")
    questions.set_defaults(run=run_questions)

    regionqa = add(commands, "regionqa", "make questions and reports from a store's regions", EXAMPLES["regionqa"])
    regionqa.add_argument("store", type=Path, metavar="STORE")
    regionqa.add_argument("--out", type=Path, required=True, metavar="DIR")
    regionqa.add_argument(
        "--per-image", type=int, default=8, metavar="N", help="questions an image, on the average at most (8)"
    )
    regionqa.add_argument("--seed", type=int, default=0)
    regionqa.add_argument("--train", type=Path, metavar="DIR", help="what this wrote of the training part")
    regionqa.set_defaults(run=run_regionqa)

    split = add(commands, "split", "split a store by patient, volume or sequence", EXAMPLES["split"])
    split.add_argument("store", type=Path, metavar="STORE")
    split.add_argument("--share", action="append", required=True, metavar="NAME=SHARE")
    split.add_argument("--out", type=Path, required=True, help="folder in which STORE/NAME is written for each NAME")
    split.add_argument("--seed", type=int, default=0)
    split.set_defaults(run=run_split)

    export = add(commands, "export", "write a store as Parquet", EXAMPLES["export"])
    export.add_argument("store", type=Path, metavar="STORE")
    export.add_argument("url", metavar="URL", help="a folder, s3://… or hf://datasets/…")
    export.set_defaults(run=run_export)

    load = add(commands, "import", "make a store of Parquet files that export wrote", EXAMPLES["import"])
    load.add_argument("url", metavar="URL")
    load.add_argument("--out", type=Path, required=True, metavar="STORE")
    load.set_defaults(run=run_import)

    stats = add(commands, "stats", "count images, regions and patients of a region store", EXAMPLES["stats"])
    stats.add_argument("store", type=Path, metavar="STORE")
    stats.add_argument("--out", type=Path, help="the numbers as JSON")
    stats.add_argument("--plot", type=Path, help="a PNG")
    stats.set_defaults(run=run_stats)

    card = add(commands, "card", "write a data card in Markdown", EXAMPLES["card"])
    card.add_argument("store", type=Path, metavar="STORE")
    card.add_argument("--out", type=Path, help="default: print it")
    card.set_defaults(run=run_card)

    audit = add(commands, "audit", "find what is in two stores, or in a store and a question set", EXAMPLES["audit"])
    audit.add_argument("stores", type=Path, nargs="+", metavar="STORE")
    audit.add_argument("--questions", type=Path, nargs="*", default=[], help="JSON Lines, or VQA-RAD's json")
    audit.add_argument("--images", type=Path, help="folder of the questions' images")
    audit.add_argument("--out", type=Path, help="every leak as JSON")
    audit.set_defaults(run=run_audit)


def run_build(options: argparse.Namespace) -> None:
    from configs import load_config
    from grounding.build import BuildConfig, build

    given = [f"sources={json.dumps(options.source)}"] if options.source else []
    given += [f"out={options.out}"] if options.out else []
    config = load_config(BuildConfig, options.config, [*options.overrides, *given])
    report = build(config)
    _print_table(
        f"{config.out}",
        ["source", "records", "images", "left out"],
        [[s["name"], *(f"{s.get(key, 0):,}" for key in ("items", "images", "skipped"))] for s in report.sources],
    )
    _say_left_out(report.skipped, config.out)
    if report.unmapped:
        print(f"labels the tree does not know, kept as free phrases: {', '.join(sorted(report.unmapped)[:20])}")


def run_questions(options: argparse.Namespace) -> None:
    from configs import ConfigError
    from downstream.question_build import QuestionConfig, build_questions

    if options.share and options.split != "image":
        raise ConfigError("--share is for --split image, the one split that is made here")
    config = QuestionConfig(
        sources=tuple(options.source),
        out=options.out,
        split=options.split,
        shares=tuple(options.share or QuestionConfig.shares),
        seed=options.seed,
        workers=options.workers,
        embed=options.embed,
    )
    report = build_questions(config)
    names = ("questions", "reports", "images", "patients")
    _print_table(
        f"{config.out}",
        [f"split: {config.split or 'none'}", *names],
        [[part or "all", *(f"{count[name]:,}" for name in names)] for part, count in report.parts.items()],
    )
    _say_left_out(report.skipped, config.out)
    if report.shared:
        print(f"{report.shared:,} samples share a patient or image with a later one of the published parts;")
        print("--split published leaves them out, --split image makes a split of its own")
    if report.text_only:
        print(f"no image is on disk, so there is no store: {config.out} holds the text alone, to score against,")
        print("not to train on; put the images under the source, or name their folder with ?images=FOLDER")


def run_regionqa(options: argparse.Namespace) -> None:
    from configs import ConfigError
    from downstream.region_qa import build_region_qa

    if options.per_image < 1:
        raise ConfigError(f"--per-image {options.per_image}: give one or more")
    report = build_region_qa(options.store, options.out, options.seed, options.per_image, options.train)
    lines = [
        [modality, kind, f"{count:,}"] for modality, kinds in report["by"].items() for kind, count in kinds.items()
    ]
    _print_table(f"{options.out}", ["modality", "question", "count"], lines)


def _say_left_out(skipped: list[dict[str, str]], out: Path) -> None:
    for row in skipped[:5]:
        print(f"left out: {row['source']}: {row['key']}: {row['why']}")
    if len(skipped) > 5:
        print(f"… and {len(skipped) - 5:,} more; all are in {out / 'skipped.jsonl'}")


def run_split(options: argparse.Namespace) -> None:
    from configs import ConfigError
    from grounding.split import split_store
    from grounding.store import open_store

    try:
        shares = {name: float(share) for name, _, share in (text.partition("=") for text in options.share)}
    except ValueError:
        raise ConfigError(f"--share {' '.join(options.share)}: give NAME=SHARE, such as train=0.8") from None
    for name, store in split_store(open_store(options.store), shares, options.out, options.seed).items():
        patients = len(set(store.column("patient_id")))
        print(f"{options.out / name}: {len(store):,} images, {store.regions:,} regions, {patients:,} patients")


def run_export(options: argparse.Namespace) -> None:
    from grounding.parquet import export_parquet
    from grounding.store import open_store

    count = export_parquet(open_store(options.store), options.url)
    print(f"{options.url}: {count} files")


def run_import(options: argparse.Namespace) -> None:
    from grounding.parquet import import_parquet

    store = import_parquet(options.url, options.out)
    print(f"{options.out}: {len(store):,} images, {store.regions:,} regions")


def run_stats(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from configs import write_atomic
    from grounding.stats import cells, plot, statistics
    from grounding.store import open_store

    groups = statistics(open_store(options.store))
    for name, rows in groups.items():
        _print_table(f"by {name}", *cells(rows, name))
    if options.out:
        numbers = {name: [asdict(row) for row in rows] for name, rows in groups.items()}
        write_atomic(options.out, json.dumps(numbers, indent=1) + "\n")
    if options.plot:
        plot(groups, options.plot)


def run_card(options: argparse.Namespace) -> None:
    from configs import write_atomic
    from grounding.datacard import data_card
    from grounding.store import open_store, read_skipped

    store = open_store(options.store)
    card = data_card(store, store.sources, read_skipped(options.store)) if store.sources else store.card
    if options.out:
        write_atomic(options.out, card)
    else:
        print(card)


def run_audit(options: argparse.Namespace) -> None:
    from configs import write_atomic
    from grounding.audit import audit_files

    found = audit_files(options.stores, options.questions, options.images)
    print(found.text)
    if options.out:
        write_atomic(options.out, json.dumps(found.rows, indent=1) + "\n")
    if found.rows:
        images = len({(row["b"], row["id_b"]) for row in found.rows})
        raise ValueError(f"{images} images or questions leak; they are listed above")


def _print_table(title: str, head: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for k, name in enumerate(head):
        table.add_column(name, justify="right" if k else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
