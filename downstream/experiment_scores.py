"""What an experiment measured: answers and reports of each system, the differences, the seeds, and the curve."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from downstream.predict import read_samples
from downstream.prompts import report_text
from downstream.samples import Prediction, ReportSample, VQASample
from downstream.sources import RegionSource
from eval.citation_scores import cited_region_scores
from eval.dose import dose_response
from eval.findings import compare_findings, finding_scores
from eval.grounding import grounding_scores, judged
from eval.priors import answer_prior, text_only_baseline
from eval.statistics import holm
from eval.text import text_scores
from eval.types import Score
from eval.vqa import compare, vqa_accuracy
from eval.vqa_slices import rows_by
from grounding.labels import LabelTree
from grounding.store import open_store
from grounding.types import NOT_FOUND_LEVEL, RegionSet

# System → seed → what it said; the first seed is the main one.
Said = Mapping[str, Mapping[int, Sequence[Prediction]]]
SLICES = ("modality", "question_type", "needs")
NEEDS = ("feature", "boxes")


@dataclass(frozen=True)
class TestSet:
    """`questions`: rows for eval.vqa. `reports`: study → reference text, where there is one. `patients`, and
    `study_images`: study → patient, and image ids. Of all images that are asked about, `patients_of_images`, `regions`
    (what is annotated) and `labelled` (the labels that are annotated exhaustively)."""

    __test__ = False  # its name looks to pytest like that of a test

    questions: list[dict[str, Any]]
    reports: dict[str, str]
    patients: dict[str, str]
    study_images: dict[str, tuple[str, ...]]
    patients_of_images: dict[str, str]
    regions: dict[str, RegionSet]
    labelled: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path, tasks: Sequence[str], limit: int | None) -> "TestSet":
        """The samples that `downstream.predict` answers with these settings."""
        samples = read_samples(folder, tasks, limit)
        reports = [sample for sample in samples if isinstance(sample, ReportSample)]
        asked = {image: sample.patient_id for sample in samples for image in _images(sample)}
        store = open_store(folder / "store")
        known = set(store.image_ids)
        records = [store.by_id(image) for image in asked if image in known]
        return cls(
            questions=[dataclasses.asdict(sample) for sample in samples if isinstance(sample, VQASample)],
            reports={report.study_id: text for report in reports if (text := report_text(report))},
            patients={report.study_id: report.patient_id for report in reports},
            study_images={report.study_id: report.images for report in reports},
            patients_of_images=asked,
            regions={record.image_id: record.regions for record in records},
            labelled={record.image_id: record.labelled for record in records},
        )


def _images(sample: VQASample | ReportSample) -> tuple[str, ...]:
    if isinstance(sample, ReportSample):
        return sample.images
    return getattr(sample, "images", ()) or (sample.image_id,)


def score_experiment(said: Said, test: TestSet, train_questions: Sequence[VQASample], tree: LabelTree) -> dict:
    """{"vqa", "report": system → scores, "vqa_tests", "report_tests": differences, "seeds", "baselines"}; a task that
    was not asked has empty parts. `train_questions`: what answering by the question's text alone learns from."""
    first = {name: next(iter(seeds.values())) for name, seeds in said.items()}
    pairs = pairs_of(list(first))
    answers = {name: texts_of(rows, "vqa") for name, rows in first.items()}
    written = {name: texts_of(rows, "report") for name, rows in first.items()}
    asked, reported = bool(test.questions), bool(test.reports)
    return {
        "vqa": {name: vqa_accuracy(texts, test.questions) for name, texts in answers.items() if asked},
        "vqa_tests": _with_holm([_compare_answers(answers, *pair, test) for pair in pairs if asked]),
        "report": {name: _report(rows, test, tree) for name, rows in first.items() if reported},
        "report_tests": [_compare_reports(written, a, b, test, tree) for a, b, part in pairs if reported and not part],
        "seeds": _seeds(said, pairs, test, tree),
        "baselines": _baselines(train_questions, test.questions) if asked else {},
    }


def texts_of(rows: Sequence[Prediction], task: str) -> dict[str, str]:
    """sample_id → text, without citations."""
    return {row.sample_id: _uncited(row) for row in rows if row.task == task}


def _uncited(row: Prediction) -> str:
    return row.prediction if row.sentences is None else " ".join(sentence["text"] for sentence in row.sentences)


def pairs_of(names: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """The differences that a claim about regions rests on: (a, b, the `needs` of the questions that count; None: all).

    Of each route: its regions against none at all, the wrong ones and the right ones; features against zeros; and
    tokens against the other routes."""
    routes = [name.removesuffix("/predicted") for name in names if name.endswith("/predicted")]
    pairs: list[tuple[str, str, str | None]] = []
    for route in routes:
        main, files = f"{route}/predicted", [name for name in names if name.startswith(f"{route}/file:")]
        pairs += [(main, b, None) for b in ("none", *(f"{route}/{wrong}" for wrong in ("shuffled", "random", "empty")))]
        pairs += [(right, main, None) for right in (f"{route}/annotated", *files) if not right.endswith(" zero")]
        pairs += [(f"{route}/{k}", f"{route}/{k} zero", part) for k in ("predicted", "annotated") for part in NEEDS]
    pairs += [("tokens/predicted", f"{route}/predicted", None) for route in routes if route != "tokens"]
    pairs += [("none", "none, blank image", None), ("none", "text only", None)]
    return [pair for pair in pairs if pair[0] in names and pair[1] in names]


def _compare_answers(answers: Mapping[str, Mapping], a: str, b: str, needs: str | None, test: TestSet) -> dict:
    """One difference in accuracy, on all questions or those of `needs`; on all also by modality and kind."""
    rows = [row for row in test.questions if needs in (None, row["needs"])]
    found: dict[str, Any] = {"a": a, "b": b, "questions": needs or "all", **_compared(answers[a], answers[b], rows)}
    for name in SLICES if needs is None else ():
        parts = rows_by(rows, name)
        found[f"by_{name}"] = {
            part: _compared(answers[a], answers[b], [rows[k] for k in places]) for part, places in parts.items()
        }
    return found


def _compared(a: Mapping[str, str], b: Mapping[str, str], rows: Sequence[Mapping]) -> dict[str, Any]:
    test = compare(a, b, rows)
    return {"only_a": test.pop("b"), "only_b": test.pop("c"), **test}


def _with_holm(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With p adjusted for looking at all of these differences; slices are not counted."""
    return [test | {"p_holm": p} for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True)]


def _report(rows: Sequence[Prediction], test: TestSet, tree: LabelTree) -> dict[str, Any]:
    texts = texts_of(rows, "report")
    references = {key: [text] for key, text in test.reports.items()}
    lines = {row.sample_id: dataclasses.asdict(row) for row in rows if row.task == "report"}
    annotated = {  # of a study of several images it is not known which one a region was cited in
        study: test.regions[images[0]]
        for study, images in test.study_images.items()
        if study in test.reports and len(images) == 1 and images[0] in test.regions
    }
    return {
        "findings": finding_scores(texts, test.reports, test.patients, tree),
        "text": text_scores(texts, references, test.patients, meteor=False),
        "citations": cited_region_scores(lines, annotated, test.patients, tree),
    }


def _compare_reports(written: Mapping[str, Mapping], a: str, b: str, test: TestSet, tree: LabelTree) -> dict[str, Any]:
    found = compare_findings(written[a], written[b], test.reports, test.patients, tree)
    return {"a": a, "b": b, "questions": "reports", "a_f1": found.pop("a"), "b_f1": found.pop("b"), **found}


def _seeds(said: Said, pairs: Sequence[tuple[str, str, str | None]], test: TestSet, tree: LabelTree) -> dict:
    """{"accuracy", "finding F1": {system, or "a - b" → {"values": seed → value, "mean", "sd", "min", "max"}}} of what
    has several seeds. The spread is that of training: the test samples are the same."""
    many = {name: seeds for name, seeds in said.items() if len(seeds) > 1}

    def accuracy(rows: Sequence[Prediction]) -> float | None:
        return vqa_accuracy(texts_of(rows, "vqa"), test.questions)["overall"].value

    def f1(rows: Sequence[Prediction]) -> float | None:
        return finding_scores(texts_of(rows, "report"), test.reports, test.patients, tree)["finding"]["f1"].value

    measures: dict[str, Callable] = {"accuracy": accuracy} if test.questions else {}
    measures |= {"finding F1": f1} if test.reports else {}
    found: dict[str, dict] = {}
    for name, measure in measures.items():
        values = {system: {seed: measure(rows) for seed, rows in seeds.items()} for system, seeds in many.items()}
        for a, b in ((a, b) for a, b, part in pairs if part is None and a in many and b in many):
            values[f"{a} - {b}"] = {seed: _minus(values[a][seed], values[b].get(seed)) for seed in values[a]}
        found[name] = {system: _spread(by_seed) for system, by_seed in values.items()}
    return found


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _spread(values: Mapping[int, float | None]) -> dict[str, Any]:
    known = [value for value in values.values() if value is not None]
    if len(known) < 2:
        return {"values": dict(values), "mean": None, "sd": None, "min": None, "max": None}
    spread = {"mean": fmean(known), "sd": stdev(known), "min": min(known), "max": max(known)}
    return {"values": dict(values)} | spread


def _baselines(train: Sequence[VQASample], questions: Sequence[Mapping]) -> dict[str, dict[str, Score]]:
    """What is right without any model: by the text of the question, and by the commonest answers of training."""
    rows = [dataclasses.asdict(sample) for sample in train]
    return {
        "nearest training questions": text_only_baseline(rows, questions),
        "commonest training answer": answer_prior(questions, rows),
    }


def curve(
    scores: Mapping[str, Any],
    systems: Mapping[str, str],
    sources: Mapping[str, RegionSource],
    jitter: str,
    test: TestSet,
    tree: LabelTree,
) -> dict[str, Any]:
    """Grounding quality against the quality of answers.

    systems: system → its source; sources: source → as `open_source` makes it. Returns {"points": [{"system", "route",
    "source", "AP50", "accuracy", "finding F1"}] of the systems whose features are kept, by rising AP50; "response":
    route → `dose_response` of accuracy to AP50, over the regions `jitter` and what moves them; "jitter"}.
    """
    quality = {source: grounding_quality(regions, test, tree) for source, regions in sources.items()}
    points: list[dict[str, Any]] = [
        {
            "system": name,
            "route": name.partition("/")[0],
            "source": source,
            "AP50": quality[source],
            "accuracy": scores["vqa"][name]["overall"] if scores["vqa"] else None,
            "finding F1": scores["report"][name]["findings"]["finding"]["f1"] if scores["report"] else None,
        }
        for name, source in systems.items()
        if not name.endswith(" zero")
    ]
    points.sort(key=lambda point: (point["AP50"].value is not None, point["AP50"].value or 0.0))
    doses: dict[str, list[dict]] = {}
    for point in points:
        if (point["source"] == jitter or point["source"].startswith("jittered:")) and point["AP50"].value is not None:
            doses.setdefault(point["route"], []).append(point)
    response = {route: _response(rows, test) for route, rows in doses.items() if scores["vqa"] and len(rows) > 1}
    return {"points": points, "jitter": jitter, "response": response}


def _response(points: Sequence[Mapping], test: TestSet) -> dict[str, Any]:
    columns = [{row["sample_id"]: row["value"] for row in point["accuracy"].per_sample} for point in points]
    judgeable = [row for row in test.questions if columns[0][str(row["sample_id"])] is not None]
    values = np.array([[column[str(row["sample_id"])] for column in columns] for row in judgeable], float)
    clusters = [row["patient_id"] for row in judgeable]
    return dose_response([point["AP50"].value for point in points], values.reshape(-1, len(points)), clusters)


def grounding_quality(source: RegionSource, test: TestSet, tree: LabelTree) -> Score:
    """AP50 of all regions that a source has for the test images, before any are chosen for a prompt. What an image's
    data set does not annotate is not judged. Undefined without annotated regions."""
    if not any(map(len, test.regions.values())):
        return Score("AP50", "1", None, 0, reason="no annotated regions")
    said = {image: _region_set(source, image, regions.image_size) for image, regions in test.regions.items()}
    known = judged(said, test.regions, test.labelled, tree)
    return grounding_scores(known, test.regions, test.patients_of_images, tree)["overall"]["AP50"]


def _region_set(source: RegionSource, image_id: str, image_size: tuple[int, int]) -> RegionSet:
    tokens = source.regions(image_id)
    rows = np.flatnonzero((tokens.valid[0] & (tokens.levels[0] != NOT_FOUND_LEVEL)).numpy())
    labels = [tokens.labels[0][k] for k in rows]
    return RegionSet(tokens.boxes[0].numpy()[rows], labels, image_size, tokens.scores[0].numpy()[rows])
