"""`medglip score vqa|report|grounding`: predictions and references → scores.json and a table.

medglip score vqa --predictions predictions.jsonl --references questions.jsonl --out scores.json
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from configs import write_atomic
from eval.findings import finding_scores
from eval.grounding import grounding_scores
from eval.records import (
    RegionFiles,
    check_ids,
    read_predictions,
    read_questions,
    read_region_files,
    read_reports,
)
from eval.statistics import RESAMPLES, SEED
from eval.table import score_table
from eval.text import text_scores
from eval.types import ScoreError, plain
from eval.vqa import cluster_of, vqa_accuracy

__all__ = ["PROTOCOLS", "ScoreError", "run_score", "score_files"]

PACKAGES = ("med-glip", "numpy", "scipy", "pycocoevalcap", "faster-coco-eval", "rapidfuzz")


def _text(predictions: Mapping[str, str], rows: Sequence[Mapping]) -> dict[str, Any]:
    return text_scores(predictions, {row["sample_id"]: row["references"] for row in rows}, _patients(rows))


def _findings(predictions: Mapping[str, str], rows: Sequence[Mapping]) -> dict[str, Any]:
    return finding_scores(predictions, {row["sample_id"]: row["references"][0] for row in rows}, _patients(rows))


def _coco(regions: RegionFiles) -> dict[str, Any]:
    return grounding_scores(regions.predictions, regions.references, regions.patients, coco=regions.coco)


PROTOCOLS: dict[str, dict[str, Callable[..., dict[str, Any]]]] = {
    "vqa": {"strict": vqa_accuracy},
    "report": {"text": _text, "findings": _findings},
    "grounding": {"coco": _coco},
}


def score_files(
    task: str,
    predictions: str | Path,
    references: str | Path,
    protocols: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Scores a file of predictions and writes `out` (JSON, whole or not at all).

    task: "vqa", "report" or "grounding". protocols: names out of PROTOCOLS[task]; none means all.
    A missing prediction counts as wrong; missing, extra and empty ids are listed in the answer under "checks".
    Returns what is written, with Scores as objects: {"task", "files", "checks", "protocols": {name: ...}, "seed",
    "resamples", "versions"}. Raises ScoreError naming file, row and remedy.
    """
    chosen = _chosen(task, protocols)
    checks, arguments = _INPUTS[task](predictions, references)
    results: dict[str, Any] = {
        "task": task,
        "files": {
            name: _fingerprint(path) for name, path in (("predictions", predictions), ("references", references))
        },
        "checks": checks,
        "protocols": {name: PROTOCOLS[task][name](*arguments) for name in chosen},
        "seed": SEED,
        "resamples": RESAMPLES,
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if out is not None:
        _write(Path(out), results)
    return results


def run_score(args: Namespace) -> int:
    """The command: args has task, predictions, references, protocol (list or None) and out (or None). Returns 0."""
    results = score_files(args.task, args.predictions, args.references, args.protocol or (), args.out)
    console = Console()
    for name, scores in results["protocols"].items():
        tokens = f", tokens {scores['tokenizer']}" if "tokenizer" in scores else ""
        console.print(score_table(f"{args.task}, protocol {name}{tokens}", scores))
    for name, ids in results["checks"].items():
        if ids:
            shown = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
            console.print(f"{len(ids)} {name}: {escape(shown)}")
    if args.out:
        console.print(f"written: {escape(str(args.out))}")
    return 0


def _chosen(task: str, protocols: Sequence[str]) -> list[str]:
    if task not in PROTOCOLS:
        raise ScoreError(f"unknown task {task!r}; choose one of {', '.join(PROTOCOLS)}")
    unknown = [name for name in protocols if name not in PROTOCOLS[task]]
    if unknown:
        raise ScoreError(f"unknown protocol {unknown[0]!r} for {task}; choose from {', '.join(PROTOCOLS[task])}")
    return list(dict.fromkeys(protocols)) or list(PROTOCOLS[task])


def _vqa_input(predictions: str | Path, references: str | Path) -> tuple[dict[str, list[str]], tuple]:
    return _text_input(predictions, read_questions(references))


def _report_input(predictions: str | Path, references: str | Path) -> tuple[dict[str, list[str]], tuple]:
    return _text_input(predictions, read_reports(references))


def _text_input(predictions: str | Path, rows: Sequence[Mapping]) -> tuple[dict[str, list[str]], tuple]:
    said = read_predictions(predictions)
    checks = check_ids(said, [row["sample_id"] for row in rows], predictions)
    checks["empty"] = sorted(key for key, text in said.items() if not text.strip())
    return checks, (said, rows)


def _region_input(predictions: str | Path, references: str | Path) -> tuple[dict[str, list[str]], tuple]:
    regions = read_region_files(predictions, references)
    checks = check_ids(regions.predictions, list(regions.references), predictions)
    checks["empty"] = sorted(key for key, found in regions.predictions.items() if not len(found))
    return checks, (regions,)


_INPUTS: dict[str, Callable[..., tuple[dict[str, list[str]], tuple]]] = {
    "vqa": _vqa_input,
    "report": _report_input,
    "grounding": _region_input,
}


def _patients(rows: Sequence[Mapping]) -> dict[str, str]:
    return {row["sample_id"]: cluster_of(row) for row in rows}


def _fingerprint(path: str | Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(out: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(plain(dict(results)), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomic(out, text + "\n")
    except OSError as error:
        raise ScoreError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
