"""What the demo shows: one table each for grounding, questions and reports, and the tests between systems."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from downstream.prompts import report_text
from downstream.samples import read_predictions, read_questions, read_reports
from eval.findings import compare_findings, finding_scores
from eval.grounding import grounding_scores
from eval.text import text_scores
from eval.types import Score, plain
from eval.vqa import compare, vqa_accuracy
from grounding.boxes import pairwise_iou
from grounding.labels import LabelTree, load_label_tree
from grounding.store import open_store
from grounding.types import RegionSet, read_regions

if TYPE_CHECKING:
    from downstream.demo import DemoConfig

TEXT = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR")
LEVELS = {"finding": "lesions", "named region": "named regions", "depth 0": "whole brain"}


@dataclass(frozen=True)
class System:
    """A column of the experiment: a trained route, the source of its regions, and whether their features are kept."""

    route: str
    source: str | None = None
    features: str = "full"

    @classmethod
    def parse(cls, name: str) -> "System":
        """ "none", "tokens/predicted", "tokens/predicted/zero". Raises ValueError for anything else."""
        route, *rest = name.split("/")
        if len(rest) > 2 or (len(rest) == 2 and rest[1] != "zero"):
            raise ValueError(f"system {name!r}; write route, route/source or route/source/zero")
        return cls(route, rest[0] if rest else None, "zero" if len(rest) == 2 else "full")

    @property
    def name(self) -> str:
        parts = [self.route, *([self.source] if self.source else [])]
        return "/".join(parts) + (" zero" if self.features == "zero" else "")

    @property
    def folder(self) -> str:
        return self.name.replace("/", "-").replace(" ", "-")


# Which pairs the claim rests on: a, b, and the questions that count (None: all).
PAIRS = (
    ("tokens/predicted", "none", None),
    ("tokens/predicted", "tokens/shuffled", None),
    ("tokens/predicted", "tokens/empty", None),
    ("tokens/annotated", "tokens/predicted", None),
    ("tokens/predicted", "tokens/predicted zero", "feature"),
    ("tokens/predicted", "tokens/predicted zero", "boxes"),
    ("tokens/annotated", "tokens/annotated zero", "feature"),
    ("tokens/predicted", "text/predicted", None),
    ("text/predicted", "none", None),
    ("text/predicted", "text/shuffled", None),
)


def score_everything(
    test: Path, regions: Path, answers: Path, systems: Sequence[System], facts: dict[str, Any], config: "DemoConfig"
) -> dict[str, Any]:
    """scores.json of the demo: ``run`` (facts, settings), every score with interval and n, and ``tables`` to show."""
    said = {system.name: read_predictions(answers / system.folder / "predictions.jsonl") for system in systems}
    questions = [dataclasses.asdict(question) for question in read_questions(test / "questions.jsonl")]
    reports = read_reports(test / "reports.jsonl")
    grounding = _grounding(test, regions)
    vqa = {name: vqa_accuracy(_texts(rows, "vqa"), questions) for name, rows in said.items()}
    report = {name: _report(rows, reports) for name, rows in said.items()}
    tests = _compare_answers(said, questions)
    report_tests = _compare_reports(said, reports)
    hashes = {name: {"model": rows[0].model_hash, "detector": rows[0].detector_hash} for name, rows in said.items()}
    tables = [
        _grounding_table(grounding),
        vqa_table(vqa),
        _tests_table("Questions: differences in accuracy, paired (exact McNemar)", tests),
        report_table(report),
        _tests_table("Reports: differences in finding F1, paired (bootstrap over patients)", report_tests),
        _regions_table(grounding),
        _kinds_table(vqa),
        _text_table(report),
    ]
    return {
        "run": {**facts, "settings": dataclasses.asdict(config), "hashes": hashes},
        "grounding": plain(grounding, per_sample=False),
        "vqa": plain(vqa),
        "vqa_tests": tests,
        "report": plain(report),
        "report_tests": report_tests,
        "tables": tables,
    }


def _texts(rows: list, task: str) -> dict[str, str]:
    """sample_id → text, without citations."""
    return {row.sample_id: _uncited(row) for row in rows if row.task == task}


def _uncited(row) -> str:
    return row.prediction if row.sentences is None else " ".join(sentence["text"] for sentence in row.sentences)


def _grounding(test: Path, regions: Path) -> dict[str, Any]:
    store = open_store(test / "store")
    samples = [store[k] for k in range(len(store))]
    references = {sample.image_id: sample.regions for sample in samples}
    patients = {sample.image_id: sample.patient_id for sample in samples}
    found = read_regions(regions / "test-predicted" / "regions.jsonl")
    tree = load_label_tree()
    candidates = read_regions(regions / "test-candidates.jsonl")
    narrow = {image_id: _narrowest(rows, tree) for image_id, rows in candidates.items()}
    scores = grounding_scores(narrow, references, patients)
    # Candidates are unattached lesions with every score; whether a lesion hangs on the right place is asked of "found".
    return scores | {"path": grounding_scores(found, references, patients)["path"]}


def _narrowest(regions: RegionSet, tree: LabelTree) -> RegionSet:
    """Without an "insula" where a "left insula" that scores at least half as much covers the same place (IoU 0.6): the
    reference has one name a region, and the wider one, though true, would count as false."""
    boxes = torch.from_numpy(regions.boxes)
    overlap = pairwise_iou(boxes, boxes).numpy() > 0.6
    wider = [set(tree.broader(label)) for label in regions.labels]
    kept = []
    for i, label in enumerate(regions.labels):
        covered = any(
            label in wider[j] and regions.scores[j] >= regions.scores[i] / 2 for j in np.nonzero(overlap[i])[0]
        )
        if not covered:
            kept.append(i)
    return regions.select(kept)


def _report(rows: list, reports: list) -> dict[str, Any]:
    references = {report.study_id: report_text(report) or "" for report in reports}
    patients = {report.study_id: report.patient_id for report in reports}
    texts = _texts(rows, "report")
    metrics = text_scores(texts, {key: [text] for key, text in references.items()}, patients)
    return {"findings": finding_scores(texts, references, patients), "text": metrics}


def _compare_answers(said: dict[str, list], questions: list[dict]) -> list[dict[str, Any]]:
    tests = []
    for a, b, needs in PAIRS:
        if a in said and b in said:
            asked = [question for question in questions if needs in (None, question["needs"])]
            test = compare(_texts(said[a], "vqa"), _texts(said[b], "vqa"), asked)
            counts = {"only_a": test.pop("b"), "only_b": test.pop("c")}
            tests.append({"a": a, "b": b, "questions": needs or "all", **counts, **test})
    return tests


def _compare_reports(said: dict[str, list], reports: list) -> list[dict[str, Any]]:
    references = {report.study_id: report_text(report) or "" for report in reports}
    patients = {report.study_id: report.patient_id for report in reports}
    tests = []
    for a, b, needs in PAIRS:
        if needs is None and a in said and b in said:
            test = compare_findings(_texts(said[a], "report"), _texts(said[b], "report"), references, patients)
            ours = {"a_f1": test.pop("a"), "b_f1": test.pop("b")}
            tests.append({"a": a, "b": b, "questions": "reports", **ours, **test})
    return tests


def span(score: Score) -> list[float] | None:
    return None if score.ci95 is None else list(score.ci95)


def table(title: str, columns: list[str], rows: list[list], note: str = "", detail: bool = False) -> dict[str, Any]:
    """``detail``: stands in scores.json and the page, not in the terminal."""
    return {"title": title, "columns": columns, "rows": rows, "note": note, "detail": detail}


def _grounding_table(grounding: dict[str, Any]) -> dict[str, Any]:
    path = grounding["path"]
    note = f"n: (image, class) pairs. Lesions found that hang on the right structure and side: {path}, n = {path.n}."
    rows = {title: grounding["by_level"][level] for level, title in LEVELS.items() if level in grounding["by_level"]}
    return _grounding_rows("Grounding on the held-out template", rows, note)


def _regions_table(grounding: dict[str, Any]) -> dict[str, Any]:
    rows = {name.removeprefix("brain/"): scores for name, scores in grounding["by_label"].items()}
    return _grounding_rows("Grounding by region", rows, "", detail=True)


def _grounding_rows(title: str, scores: dict[str, dict[str, Score]], note: str, detail: bool = False) -> dict[str, Any]:
    metrics = ("AP", "AP50", "acc@0.5", "pointing", "dice")
    rows = [
        [name, row["acc@0.5"].n, *(row[metric].value for metric in metrics), span(row["AP50"])]
        for name, row in scores.items()
    ]
    return table(title, ["", "n", *metrics, "AP50 95 %"], rows, note, detail)


def vqa_table(vqa: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, scores in vqa.items():
        parts = [scores["closed"], scores["open"], scores["by_needs"].get("boxes"), scores["by_needs"].get("feature")]
        overall = scores["overall"]
        rows.append([name, overall.n, overall.value, span(overall), *(part and part.value for part in parts)])
    columns = ["system", "n", "accuracy", "95 %", "closed", "open", "boxes", "feature"]
    note = "zero: region features zeroed. boxes: boxes and labels suffice for the answer; feature: they do not."
    return table("Questions (accuracy, protocol strict)", columns, rows, note)


def _kinds_table(vqa: dict[str, Any]) -> dict[str, Any]:
    kinds = list(next(iter(vqa.values()))["by_question_type"])
    number = [next(iter(vqa.values()))["by_question_type"][kind].n for kind in kinds]
    rows = [[name, *(s["by_question_type"][kind].value for kind in kinds)] for name, s in vqa.items()]
    return table("Questions by kind", ["system", *kinds], [["n", *number], *rows], detail=True)


def _tests_table(title: str, tests: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for t in tests:
        counts = [t["only_a"], t["only_b"], f"{t['p']:.2g}"] if "p" in t else []
        rows.append([t["a"], t["b"], t["questions"], t["n"], t["difference"], t["ci95"], *counts])
    columns = ["a", "b", "on", "n", "a - b", "95 %", "only a right", "only b right", "p"]
    return table(title, columns[: len(rows[0])] if rows else columns, rows)


def report_table(report: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, scores in report.items():
        finding, presence = scores["findings"]["finding"], scores["findings"]["presence"]
        parts = [finding["precision"], finding["recall"], finding["f1"]]
        rows.append([name, presence.n, *(part.value for part in parts), span(finding["f1"]), presence.value])
    columns = ["system", "n", "precision", "recall", "F1", "F1 95 %", "normal or not"]
    return table("Reports (findings)", columns, rows, "A finding is right where presence, side and structure agree.")


def _text_table(report: dict[str, Any]) -> dict[str, Any]:
    texts = {name: scores["text"] for name, scores in report.items()}
    rows = [[name, *(text[metric].value for metric in TEXT)] for name, text in texts.items()]
    any_text = next(iter(texts.values()))
    reasons = [f"{metric}: {any_text[metric].reason}." for metric in TEXT if any_text[metric].reason]
    note = " ".join([f"Tokens: {any_text['tokenizer']}. Citations taken out.", *reasons])
    return table("Reports (text)", ["system", *TEXT], rows, note)
