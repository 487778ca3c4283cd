"""`medglip score vqa|report|grounding`: predictions and references → scores.json, tables, and a page to look into.

medglip score vqa --predictions predictions.jsonl --references questions.jsonl --out scores.json
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from configs import CONFIG_DIR, write_atomic
from eval.checks import MEANING, check_regions, check_samples, scores_by_training
from eval.fingerprint import read_picture
from eval.protocols import DEFAULTS, PROTOCOLS, Given, Results
from eval.records import read_prediction_rows, read_questions, read_region_files, read_reports, read_training
from eval.statistics import RESAMPLES, SEED
from eval.table import as_markdown, as_rich, protocol_rows, score_rows
from eval.types import Score, ScoreError, plain
from eval.vqa_slices import SLICES, rows_by

__all__ = ["PROTOCOLS", "ScoreError", "run_score", "score_files"]

SCHEMA = 2
PACKAGES = ("med-glip", "numpy", "scipy", "pycocoevalcap", "faster-coco-eval", "rapidfuzz")
NOTICE = "Research use only; not a medical device."


def score_files(
    task: str,
    predictions: str | Path | None,
    references: str | Path,
    protocols: Sequence[str] = (),
    out: str | Path | None = None,
    train: str | Path | None = None,
    model_python: str | Path | None = None,
    heatmaps: str | Path | None = None,
    entails: str | None = None,
) -> Results:
    """Scores a file of predictions and writes `out` (JSON, whole or not at all).

    task: "vqa", "report" or "grounding". protocols: names out of PROTOCOLS[task]; none means DEFAULTS. train: the
    training set, in the form of the references, to look for what the test set shares with it.
    model_python: interpreter of an environment with the packages of metrics with weights (eval/report_models.py).
    heatmaps: of grounding, a file of eval/heatmap_files.py, beside the predictions or in their place.
    entails: of reports, "MODULE:FUNCTION" of what decides in radfact: (hypothesis, [evidence sentences]) → bool.
    A missing prediction counts as wrong; missing, extra, empty and repeated samples are listed under "checks".
    Returns what is written, with Scores as objects: {"schema", "task", "files", "checks", "clusters": {sample_id:
    number of its patient}, "slices": {name: {value: sample_ids}}, "baselines", "protocols": {name: ...}, "seed",
    "resamples", "versions"}. Raises ScoreError naming file, row and remedy.
    """
    given_files = {"predictions": predictions, "heatmaps": heatmaps, "references": references, "training": train}
    files = {name: path for name, path in given_files.items() if path is not None}
    chosen = _chosen(task, protocols, files)
    training = None if train is None else read_training(train)
    checks, clusters, given = _INPUTS[task](files, training)
    if isinstance(given, Given) and model_python is not None:
        given = replace(given, model_python=str(model_python))
    if isinstance(given, Given) and entails is not None:
        given = replace(given, entails=_load_function(entails))
    scores = {name: PROTOCOLS[task][name](given) for name in chosen}
    if isinstance(given, Given) and training is not None:
        _split_by_training(scores, checks, given.rows)
    numbers = {cluster: k for k, cluster in enumerate(sorted(set(clusters.values())))}
    results: Results = {
        "schema": SCHEMA,
        "task": task,
        "files": {name: _fingerprint(path) for name, path in files.items()},
        "checks": checks,
        "clusters": {key: numbers[cluster] for key, cluster in sorted(clusters.items())},
        "slices": _slices(given.rows) if task == "vqa" else {},
        "baselines": _baselines(given) if task == "vqa" else {},
        "protocols": scores,
        "seed": SEED,
        "resamples": RESAMPLES,
        "versions": {name: _version(name) for name in PACKAGES} | {"label tree": _label_tree()},
    }
    if out is not None:
        _write(Path(out), to_json(results), "--out")
    return results


def run_score(args: Namespace, read_image: Callable[[str], Any] = read_picture) -> int:
    """The command: args has task, predictions, references, protocol (list or None), out, and where they are wanted
    train, model_python, heatmaps, entails, markdown, html and images. read_image: how the page's images are decoded
    (see `eval.page.write_page`). Returns 0."""
    markdown, page = (getattr(args, name, None) for name in ("markdown", "html"))
    more = {name: getattr(args, name, None) for name in ("train", "model_python", "heatmaps", "entails")}
    results = score_files(args.task, args.predictions, args.references, args.protocol or (), args.out, **more)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, columns, rows in tables(results):
        console.print(as_rich(title, columns, rows))
    for line in check_lines(results["checks"]):
        console.print(escape(line))
    if markdown:
        _write(Path(markdown), to_markdown(results), "--markdown")
    if page:
        from eval.page import write_page

        write_page(page, results, args.predictions, args.references, getattr(args, "images", None), read_image)
    for path in filter(None, (args.out, markdown, page)):
        console.print(f"written: {escape(str(path))}")
    return 0


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): VQA protocols side by side; those of the other tasks one after another, never mixed."""
    task, protocols = results["task"], results["protocols"]
    if task == "vqa":
        columns = protocols | {
            f"{name} (strict)": _as_protocol(scores) for name, scores in results["baselines"].items()
        }
        title = "vqa, protocols side by side; what is right without the image stands beside them"
        return [(title, *protocol_rows(columns)), ("vqa, without the image", *score_rows(results["baselines"], True))]
    return [(f"{task}, protocol {name}{_tokens(scores)}", *score_rows(scores)) for name, scores in protocols.items()]


def _as_protocol(baseline: Mapping[str, Score]) -> dict[str, Score]:
    """A baseline's scores under the names that protocols have."""
    overall = baseline.get("overall", baseline.get("by_answer_type"))
    return {"overall": overall, **{kind: baseline[kind] for kind in ("closed", "open")}} if overall else {}


def check_lines(checks: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each kind of odd sample: how many, what it means, and the first ids."""
    lines = []
    for name, ids in checks.items():
        if ids:
            shown = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
            lines.append(f"{len(ids)} {name} ({MEANING[name]}): {shown}")
    return lines


def to_json(results: Results) -> str:
    """The form of scores.json: indented, but one line a sample: a column of 100,000 stays readable and is quick."""
    return _layout(plain(results), "") + "\n"


def to_markdown(results: Results) -> str:
    """All tables and checks in Markdown, with the fingerprints of the files."""
    parts = [f"# Scores: {results['task']}", "", NOTICE, ""]
    parts += [as_markdown(*table) for table in tables(results)]
    parts += [f"- {line}" for line in check_lines(results["checks"])] or ["- Checks: nothing odd."]
    parts += [f"- {name}: `{file['path']}`, sha256 `{file['sha256'][:16]}`" for name, file in results["files"].items()]
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items() if found)
    parts += [f"- Intervals: 95 %, {results['resamples']} bootstrap resamples of patients, seed {results['seed']}."]
    return "\n".join([*parts, f"- {versions}", ""])


def _layout(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        rows = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_layout(v, inner)}" for key, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
        return "[\n" + ",\n".join(inner + encode(row) for row in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _chosen(task: str, protocols: Sequence[str], files: Mapping[str, Any]) -> list[str]:
    """The protocols; raises ScoreError where one is not known, or the files are not those that it needs."""
    if task not in PROTOCOLS:
        raise ScoreError(f"unknown task {task!r}; choose one of {', '.join(PROTOCOLS)}")
    unknown = [name for name in protocols if name not in PROTOCOLS[task]]
    if unknown:
        raise ScoreError(f"unknown protocol {unknown[0]!r} for {task}; choose from {', '.join(PROTOCOLS[task])}")
    if "training" in files and task == "grounding":
        raise ScoreError("--train is for vqa and report; `medglip data audit` compares region stores")
    if "heatmaps" in files and task != "grounding":
        raise ScoreError("--heatmaps is for grounding")
    needs = {name: "heatmaps" if name == "heatmaps" else "predictions" for name in PROTOCOLS[task]}
    for name in protocols:
        if needs[name] not in files:
            raise ScoreError(f"protocol {name} needs --{needs[name]}")
    usual = [*DEFAULTS[task], *(name for name in needs if name == "heatmaps")]
    chosen = list(dict.fromkeys(protocols)) or [name for name in usual if needs[name] in files]
    if not chosen:
        raise ScoreError("nothing to score; give --predictions" + (" or --heatmaps" if task == "grounding" else ""))
    return chosen


Files = Mapping[str, str | Path]
Checked = tuple[dict[str, list[str]], dict[str, str], Any]  # checks, clusters, what a protocol is called with


def _vqa_input(files: Files, training: Sequence[Mapping] | None) -> Checked:
    return _text_input(files["predictions"], read_questions(files["references"]), training)


def _report_input(files: Files, training: Sequence[Mapping] | None) -> Checked:
    return _text_input(files["predictions"], read_reports(files["references"]), training)


def _text_input(predictions: str | Path, rows: Sequence[Mapping], training: Sequence[Mapping] | None) -> Checked:
    lines = read_prediction_rows(predictions)
    given = Given({key: row["prediction"] for key, row in lines.items()}, rows, lines, training)
    return check_samples(given.said, rows, predictions, training), given.patients, given


def _region_input(files: Files, training: Sequence[Mapping] | None) -> Checked:
    regions = read_region_files(files.get("predictions"), files["references"], files.get("heatmaps"))
    clusters = {key: regions.patients.get(key, key) for key in regions.references}
    return check_regions(regions, files.get("predictions"), files.get("heatmaps")), clusters, regions


_INPUTS: dict[str, Callable[..., Checked]] = {
    "vqa": _vqa_input,
    "report": _report_input,
    "grounding": _region_input,
}


def _split_by_training(scores: Results, checks: Mapping[str, Sequence[str]], rows: Sequence[Mapping]) -> None:
    for results in scores.values():
        overall = results.get("overall")
        if isinstance(overall, Score) and overall.per_sample:
            results["by_training"] = scores_by_training(overall, checks, rows)


def _load_function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScoreError(f"--entails {name}: {error}; write MODULE:FUNCTION, the module on PYTHONPATH") from None


def _slices(rows: Sequence[Mapping]) -> dict[str, dict[str, list[str]]]:
    slices = {name: rows_by(rows, name) for name in SLICES}
    return {
        name: {value: [rows[k]["sample_id"] for k in places] for value, places in found.items()}
        for name, found in slices.items()
        if found
    }


def _baselines(given: Given) -> Results:
    """What is right without looking at the image: the commonest answer, and what like questions were answered."""
    from eval.priors import answer_prior, text_only_baseline

    baselines: Results = {"answer prior": answer_prior(given.rows, given.training)}
    if given.training is not None:
        baselines["text only"] = text_only_baseline(given.training, given.rows)
    return baselines


def _tokens(scores: Mapping[str, Any]) -> str:
    return f", tokens {scores['tokenizer']}" if "tokenizer" in scores else ""


def _fingerprint(path: str | Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _label_tree() -> str:
    """Names and places are read with it, so that another tree may give other scores."""
    return hashlib.sha256((CONFIG_DIR / "labels.yaml").read_bytes()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(out: Path, text: str, option: str) -> None:
    try:
        write_atomic(out, text)
    except OSError as error:
        raise ScoreError(f"{out}: cannot be written ({error.strerror}); choose another {option}") from None
