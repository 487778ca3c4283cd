"""Questions, reports and predictions, and the JSON Lines files that hold them (one record a line, UTF-8)."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from configs import write_atomic

ANSWER_TYPES = ("open", "closed")
NEEDS = ("boxes", "feature")
TASKS = ("vqa", "report")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class VQASample:
    """One question about one image.

    `image` is the path of the image, or its id in the region store beside the file (then it equals `image_id`).
    `needs` says what answers it, beyond the picture: "boxes" (boxes and labels suffice) or "feature" (they do not).
    `options`: what it can be answered with (a list, or letter → text). `images`: ids of all images that it is about,
    where there are several; `image_id` is the first.
    """

    sample_id: str
    image_id: str
    patient_id: str
    image: str
    modality: str
    question: str
    answer: str
    answer_type: str
    question_type: str
    needs: str
    options: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.options.values() if isinstance(self.options, dict) else self.options or ()
        object.__setattr__(self, "options", tuple(map(str, given)))
        object.__setattr__(self, "images", tuple(self.images or ()))
        if not self.question.strip():
            raise ValueError(f"question of sample {self.sample_id} is empty")
        _one_of("answer_type", self.answer_type, ANSWER_TYPES)
        _one_of("needs", self.needs, NEEDS)


@dataclass(frozen=True)
class ReportSample:
    """One study and its report; `images` are image ids. An absent section is None, never ""."""

    study_id: str
    patient_id: str
    images: tuple[str, ...]
    modality: str
    indication: str | None
    findings: str | None
    impression: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        for name in ("indication", "findings", "impression"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} of study {self.study_id} is empty text; absent is None")


@dataclass(frozen=True)
class Prediction:
    """What a model said about one sample.

    `evidence` is `RegionSet.to_dict()` of the regions in the prompt, in prompt order (boxes xyxy in [0, 1]), so that
    region id K (`[rK]` in a report) is its K-th region. `sentences` (reports only): `[{"text", "region_ids",
    "dropped"}]`, where `dropped` counts citations of regions that are not there.
    """

    sample_id: str
    task: str
    prediction: str
    evidence: dict | None
    sentences: list[dict] | None
    detector_hash: str | None
    model_hash: str | None

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)


def _read(path: str | Path, record):
    known = {f.name for f in fields(record)}
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append(record(**{k: v for k, v in row.items() if k in known}))
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a {record.__name__}: {error}") from None
    return rows


def read_questions(path: str | Path) -> list[VQASample]:
    """Read `questions.jsonl`. Raises ValueError naming file and line; further keys of a line are ignored."""
    return _read(path, VQASample)


def read_reports(path: str | Path) -> list[ReportSample]:
    """Read `reports.jsonl`. Raises ValueError naming file and line; further keys of a line are ignored."""
    return _read(path, ReportSample)


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read `predictions.jsonl`. Raises ValueError naming file and line; further keys of a line are ignored."""
    return _read(path, Prediction)


def to_row(sample: VQASample | ReportSample | Prediction) -> dict[str, Any]:
    """What its line in a file holds: all fields but empty `options` and `images`."""
    return {name: value for name, value in asdict(sample).items() if value != ()}


def write_samples(path: str | Path, samples: Iterable[VQASample | ReportSample | Prediction]) -> None:
    """Write samples or predictions, one JSON object a line; the file appears whole or not at all."""
    lines = [json.dumps(to_row(sample), ensure_ascii=False) for sample in samples]
    write_atomic(Path(path), "".join(line + "\n" for line in lines))
