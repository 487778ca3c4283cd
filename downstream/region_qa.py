"""Questions and grounded reports from any region store, by rule: exact answers, and none that its text gives away.

    build_region_qa(Path("store/train"), Path("qa/train"), seed=0, per_image=4)
    build_region_qa(Path("store/val"), Path("qa/val"), seed=0, per_image=4, train=Path("qa/train"))

A folder that it writes is what `downstream.train data=` reads. What a region looks like is measured from its pixels and
its mask and judged by thresholds; a second part of the same data is judged by those of the first, hence `train`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from configs import write_atomic
from downstream.region_qa_balance import Asked, Boxed, baselines, choose
from downstream.region_qa_card import card, counts_by
from downstream.region_qa_looks import Measures, Thresholds, measure, thresholds_of
from downstream.region_qa_questions import Subject, areas_of, box_of, candidates, extents_of, is_finding, nameable
from downstream.region_qa_report import ONE_BY_ONE, region_text, report_of, where_of
from downstream.samples import read_questions, write_samples
from grounding.images import read_image
from grounding.labels import LabelTree, load_label_tree
from grounding.store import Store, open_store
from grounding.types import GroundingSample

THRESHOLDS, LOOKS_FILE = "thresholds.json", "looks.jsonl"


@dataclass(frozen=True)
class Measured:
    """An annotated image (without its pixels) and what was measured of its regions, by their index."""

    sample: GroundingSample
    measures: Mapping[int, Measures]


def build_region_qa(store: Path, out: Path, seed: int, per_image: int, train: Path | None = None) -> dict[str, Any]:
    """Writes `out`: questions.jsonl, reports.jsonl, looks.jsonl, thresholds.json, CARD.md and store, a link.

    per_image: questions an image on the average, at most. train: a folder that this function wrote for the training
    part: its thresholds are used, and the text-only baseline learns from its questions.
    Returns, and prints a line of: {"images", "questions", "reports", "candidates", "feature_share", "by" (modality →
    kind → questions), "scores" (name → `Score.to_dict`), "notes" (what could not be asked, and why)}.

    Raises:
        ValueError: an empty store, `per_image` below one, a `train` folder without its files, or another `out/store`.
    """
    store, out, opened, tree = Path(store), Path(out), open_store(Path(store)), load_label_tree()
    if not len(opened):
        raise ValueError(f"{store}: the store holds no images; build one that does with medglip data build")
    if per_image < 1:
        raise ValueError(f"per_image is {per_image}; give one question an image at least")
    thresholds, learnt = _read_train(train, tree) if train else (None, None)
    images = [_measured(sample) for sample in opened]
    thresholds = _thresholds(images, tree) if thresholds is None else thresholds
    possible = [
        candidate
        for image in images
        for candidate in candidates(image.sample, _subjects(image, tree), thresholds, tree)
    ]
    asked = choose(possible, per_image * len(opened), np.random.default_rng(seed))
    found = _summary(opened, possible, asked, images)
    found["scores"] = {name: s.to_dict(per_sample=False) for name, s in baselines(asked, learnt, seed).items()}
    out.mkdir(parents=True, exist_ok=True)
    _link(store, out / "store")
    found["reports"] = _write(out, asked, images, thresholds, tree)
    write_atomic(out / "CARD.md", card(opened, found, asked, train is not None))
    print(_line(out, found))
    return found


def read_looks(path: Path) -> dict[str, list[str]]:
    """looks.jsonl: image_id → for each annotated region "upper left, 30 mm, round, sharp margin"; "" for a structure.

    Raises ValueError naming the file and line that cannot be read.
    """
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["image_id"]] = [str(text) for text in row["looks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not the looks of an image ({error!r}); build it again") from None
    return found


def _read_train(train: Path, tree: LabelTree) -> tuple[Thresholds, list[Boxed]]:
    """The thresholds of a folder, and its questions with the boxes of what they are about."""
    try:
        thresholds = json.loads((Path(train) / THRESHOLDS).read_text(encoding="utf-8"))
        questions, store = read_questions(Path(train) / "questions.jsonl"), open_store(Path(train) / "store")
    except (OSError, ValueError) as error:
        raise ValueError(f"{train}: not what medglip data regionqa wrote for the training part ({error})") from None
    regions = {question.image_id: store.by_id(question.image_id).regions for question in questions}
    whole = (0.0, 0.0, 1.0, 1.0)
    return thresholds, [(q, box_of(q.question, regions[q.image_id], tree) or whole) for q in questions]


def _measured(sample: GroundingSample) -> Measured:
    """The largest regions of each label that have masks, as many as a report has a sentence for."""
    regions, areas = sample.regions, areas_of(sample.regions)
    if regions.masks is None:
        return Measured(replace(sample, image=""), {})
    rows: list[int] = []
    for label in dict.fromkeys(regions.labels):
        of_label = [k for k, other in enumerate(regions.labels) if other == label]
        rows += sorted(of_label, key=lambda k: -areas[k])[:ONE_BY_ONE]
    pixels = read_image(sample.image).pixels
    masks = {k: regions.masks[k] for k in rows if regions.masks[k] is not None}
    measures = {k: measure(pixels, rle.decode(mask).astype(bool)) for k, mask in masks.items()}
    return Measured(replace(sample, image=""), measures)


def _subjects(image: Measured, tree: LabelTree) -> list[Subject]:
    regions, areas = image.sample.regions, areas_of(image.sample.regions)
    return [
        Subject(k, regions.labels[k], name, areas[k], is_alone, image.measures.get(k, {}))
        for k, name, is_alone in nameable(regions, tree)
    ]


def _thresholds(images: Sequence[Measured], tree: LabelTree) -> Thresholds:
    """Of the looks, and of "mm", the longer side; of each label and of all findings."""
    rows = []
    for image in images:
        in_mm = extents_of(image.sample)[1]
        for k, label in enumerate(image.sample.regions.labels):
            sizes = {} if in_mm is None else {"mm": float(in_mm[k])}
            for name in {label, ""} if is_finding(label, tree) else {label}:
                rows.append((image.sample.modality, name, sizes | image.measures.get(k, {})))
    return thresholds_of(rows)


def _link(store: Path, link: Path) -> None:
    """`link` leads to the store, by a relative path, so that both can be moved together."""
    if link.resolve() == store.resolve():
        return
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link}: another store is there; give an empty folder, or the one that holds this store")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(store.resolve(), link.parent.resolve()), target_is_directory=True)


def _write(
    out: Path, asked: Sequence[Asked], images: Sequence[Measured], thresholds: Thresholds, tree: LabelTree
) -> int:
    """Number of reports."""
    reports = [report_of(image.sample, image.measures, thresholds, tree) for image in images]
    reports = [report for report in reports if report.findings]
    looks = [_looks(image, thresholds, tree) for image in images]
    write_samples(out / "questions.jsonl", [one.sample for one in asked])
    write_samples(out / "reports.jsonl", reports)
    write_atomic(out / LOOKS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in looks))
    write_atomic(out / THRESHOLDS, json.dumps(thresholds, indent=1) + "\n")
    return len(reports)


def _looks(image: Measured, thresholds: Thresholds, tree: LabelTree) -> dict[str, Any]:
    regions = image.sample.regions

    def text(k: int) -> str:
        looks = region_text(image.sample, k, image.measures.get(k, {}), thresholds, tree)
        return ", ".join([where_of(regions.boxes[k]), *looks])

    said = [text(k) if is_finding(label, tree) else "" for k, label in enumerate(regions.labels)]
    return {"image_id": image.sample.image_id, "looks": said}


def _summary(store: Store, possible: Sequence, asked: Sequence[Asked], images: Sequence[Measured]) -> dict[str, Any]:
    looks = sum(one.sample.needs == "feature" for one in asked)
    notes = []
    if not any(image.measures for image in images):
        notes.append("No region has a mask: nothing is asked about brightness, texture, margin or shape.")
    elif not looks:
        notes.append("Too few regions with masks: no question about looks could be balanced.")
    if not asked:
        notes.append("No question could be balanced: wherever one could be asked, its answer was always the same.")
    dropped = {(c.kind, c.sample.modality) for c in possible} - {
        (one.sample.question_type, one.sample.modality) for one in asked
    }
    notes += [f"{kind}, {modality}: possible, but not balanced, so not asked." for kind, modality in sorted(dropped)]
    return {
        "images": len(store),
        "questions": len(asked),
        "candidates": len(possible),
        "feature_share": looks / len(asked) if asked else 0.0,
        "by": counts_by(asked),
        "notes": notes,
    }


def _line(out: Path, found: Mapping[str, Any]) -> str:
    scores = found["scores"]
    text, chance = scores["text_only"], scores["chance"]

    def shown(score: Mapping[str, Any]) -> str:
        if score["value"] is None:
            return f"undefined ({score['reason']})"
        interval = "" if score["ci95"] is None else " [{:.3f}, {:.3f}]".format(*score["ci95"])
        return f"{score['value']:.3f}{interval}"

    return (
        f"{out}: {found['questions']:,} questions, {found['reports']:,} reports on {found['images']:,} images; "
        f"{found['feature_share']:.0%} not answerable from boxes and labels; from the text alone {shown(text)}, "
        f"chance {shown(chance)}"
    )
