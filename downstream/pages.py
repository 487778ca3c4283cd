"""Where the demo's results meet the eye: tables in the terminal, the gallery, and the page of one report."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from downstream.gallery import Case, write_gallery
from downstream.prompts import report_text
from downstream.samples import Prediction, read_predictions, read_questions, read_reports
from downstream.scores import System
from eval.vqa import judge
from grounding.images import MedicalImage
from grounding.store import Store, open_store
from grounding.types import RegionSet, read_regions

CASES = 24


def print_tables(scores: dict[str, Any], console: Console) -> None:
    """The tables of scores.json, without the detailed ones."""
    for table in (table for table in scores["tables"] if not table["detail"]):
        shown = Table(title=table["title"], title_justify="left", caption=table["note"], caption_justify="left")
        for k, column in enumerate(table["columns"]):
            shown.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
        for row in table["rows"]:
            shown.add_row(*(cell_text(cell) for cell in row))
        console.print(shown)


def cell_text(cell: Any) -> str:
    if cell is None:
        return "undefined"
    if isinstance(cell, list | tuple):
        return f"{cell[0]:.3f}..{cell[1]:.3f}"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def write_demo_page(
    path: Path, scores: dict[str, Any], test: Path, regions: Path, answers: Path, systems: Sequence[System]
) -> None:
    """The gallery: the first images that have both questions and a report, right and wrong alike."""
    store = open_store(test / "store")
    said = {system.name: read_predictions(answers / system.folder / "predictions.jsonl") for system in systems}
    by_id = {name: {row.sample_id: row for row in rows} for name, rows in said.items()}
    questions, reports = read_questions(test / "questions.jsonl"), read_reports(test / "reports.jsonl")
    found = read_regions(regions / "test-predicted" / "regions.jsonl")
    cases = []
    for report in reports[:CASES]:
        image_id = report.images[0]
        asked = [question for question in questions if question.image_id == image_id]
        cases.append(
            Case(
                image_id,
                _png(store, image_id),
                found[image_id],
                store.by_id(image_id).regions,
                [_question(question, by_id) for question in asked],
                _report(report, by_id),
            )
        )
    notes = [
        "Images: slices of MRI templates (averages of many people) with generated lesions; questions and reports "
        "follow from the annotations by rule. Nothing here is a patient.",
        f"The {len(cases)} cases are the first of the test set's random order, not chosen by result.",
    ]
    write_gallery(path, scores, cases, notes)


def _png(store: Store, image_id: str) -> bytes:
    image = store.by_id(image_id).image
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _question(question, by_id: dict[str, dict[str, Prediction]]) -> dict[str, Any]:
    answers = {}
    for name, rows in by_id.items():
        row = rows[question.sample_id]
        right, _ = judge(row.prediction, [question.answer], modality=question.modality)
        answers[name] = {"text": row.prediction, "right": right, "evidence": _evidence(row)}
    shown = {key: getattr(question, key) for key in ("question", "question_type", "needs")}
    return {**shown, "reference": question.answer, "answers": answers}


def _report(report, by_id: dict[str, dict[str, Prediction]]) -> dict[str, Any]:
    systems = {}
    for name, rows in by_id.items():
        row = rows[report.study_id]
        systems[name] = {"sentences": row.sentences, "evidence": _evidence(row), "text": row.prediction}
    return {"reference": report_text(report) or "", "systems": systems}


def _evidence(row: Prediction) -> RegionSet | None:
    return None if row.evidence is None else RegionSet.from_dict(row.evidence)


def write_report_page(path: Path, report: dict[str, Any], image: MedicalImage) -> None:
    """One report of the user's own image, each sentence linked to its regions."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(image.pixels)).save(stream, "PNG")
    evidence = RegionSet.from_dict(report["evidence"])
    nothing = evidence.select([])
    said = {"sentences": report["sentences"], "evidence": evidence, "text": report["report"]}
    case = Case(
        Path(report["image"]).name,
        stream.getvalue(),
        evidence,
        nothing,
        [],
        {"reference": "", "systems": {"report": said}},
    )
    facts = {key: report[key] for key in ("image", "route", "detector", "model")}
    write_gallery(path, {"tables": [], "run": facts}, [case], [report["notice"]])
