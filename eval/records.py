"""Reads what is scored: answers, questions, reports, training sets; and says which line is wrong."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.lines import Bad, keyed, read_lines, refuse
from eval.region_files import RegionFiles, read_region_files
from eval.types import ScoreError

__all__ = [
    "RegionFiles",
    "check_ids",
    "read_prediction_rows",
    "read_predictions",
    "read_questions",
    "read_region_files",
    "read_reports",
    "read_training",
]

_ANSWER_TYPES = ("open", "closed")


def read_predictions(path: str | Path) -> dict[str, str]:
    """`{"sample_id", "prediction"}` a line → sample_id → text; a number counts as its text, an empty text is kept.
    Raises ScoreError."""
    return {key: row["prediction"] for key, row in read_prediction_rows(path).items()}


def read_prediction_rows(path: str | Path) -> dict[str, dict]:
    """The same with all that a line holds: sample_id → row, `prediction` as text. Raises ScoreError."""
    rows: dict[str, dict] = {}
    bad: list[Bad] = []
    for key, number, row in keyed(path, "sample_id"):
        text = _text(row.get("prediction"), '"prediction"', "prediction" in row, number, bad, empty=True)
        rows[key] = {**row, "prediction": text}
    refuse(path, bad)
    return rows


def read_questions(path: str | Path) -> list[dict]:
    """VQA references, one dict a line; `answer` or `references`; `answer_type` open or closed. Raises ScoreError."""
    rows: list[dict] = []
    bad: list[Bad] = []
    for key, number, row in keyed(path, "sample_id"):
        answer_type = str(row.get("answer_type", "")).strip().lower()
        if answer_type not in _ANSWER_TYPES:
            bad.append((number, f'"answer_type" is {row.get("answer_type")!r}', "give open or closed"))
        references = _texts(row, "answer", number, bad)
        rows.append({**row, "sample_id": key, "answer_type": answer_type, "references": references})
    refuse(path, bad)
    return rows


def read_reports(path: str | Path) -> list[dict]:
    """Report references: `{"sample_id", "report" or "references", "patient_id"}` a line. Raises ScoreError.

    The project's own reports.jsonl is read as well: `study_id` is the sample, `findings` or else `impression` the
    report.
    """
    rows: list[dict] = []
    bad: list[Bad] = []
    for key, number, row in keyed(path, "sample_id", "study_id"):
        row = {"report": row.get("findings") or row.get("impression"), **row}
        rows.append({**row, "sample_id": key, "references": _texts(row, "report", number, bad)})
    refuse(path, bad)
    return rows


def read_training(path: str | Path) -> list[dict]:
    """Rows of a training set, in the form of the references; only compared with them, so nothing is required of a row
    but that it says something: an id, an image, a patient, a question or a text. Raises ScoreError."""
    rows: list[dict] = []
    bad: list[Bad] = []
    for number, row in read_lines(path):
        texts = [str(text) for text in row.get("references") or [row.get("answer") or row.get("report") or ""]]
        if not any(row.get(key) for key in ("sample_id", "study_id", "image_id", "image", "patient_id", "question")):
            bad.append((number, "nothing to compare", "give sample_id, image_id, patient_id or question"))
        rows.append({**row, "references": [text for text in texts if text.strip()]})
    refuse(path, bad)
    return rows


def check_ids(
    predictions: Sequence[str] | Mapping, references: Sequence[str], path: str | Path
) -> dict[str, list[str]]:
    """Sorted ids that are missing from the predictions, and extra ones. Raises ScoreError where none is shared."""
    said, truth = set(predictions), set(references)
    if not said & truth:
        raise ScoreError(
            f"{path}: none of its {len(said)} ids is among the references; is it the file of another split?"
        )
    return {"missing": sorted(truth - said), "extra": sorted(said - truth)}


def _text(value: object, name: str, given: bool, number: int, bad: list[Bad], empty: bool = False) -> str:
    """The text of a value, or "" and a line in `bad`."""
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
        shown = json.dumps(value)[:40] if given else "missing"
        bad.append((number, f"{name} is {shown}", 'give a text ("" for no answer)' if empty else "give a text"))
        return ""
    if not empty and not str(value).strip():
        remedy = "a reference needs a text; leave the sample out where there is none"
        bad.append((number, f"{name} is empty", remedy))
    return str(value)


def _texts(row: Mapping, key: str, number: int, bad: list[Bad]) -> list[str]:
    several = row.get("references")
    if several is None:
        return [_text(row.get(key), f'"{key}"', key in row, number, bad)]
    if not isinstance(several, list) or not several:
        bad.append((number, '"references" is not a list of texts', f'give a list, or one "{key}"'))
        return []
    return [_text(text, '"references"', True, number, bad) for text in several]
