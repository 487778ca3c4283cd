"""What answers and reports rest on, sentence by sentence, and how much less probable they are without it.

    python -m downstream.evidence predictions=runs/answers/predictions.jsonl data=data/test out=runs/evidence \
        checkpoint=runs/tokens/checkpoint predicted=runs/regions/region_tokens.safetensors source=predicted

OUT/evidence.jsonl has a line a sentence or answer (see `downstream.ledger`); with a checkpoint also its confidence with
and without the regions (see `downstream.causal`). OUT/scores.json has citations against the annotated regions of the
store, and whether what is cited matters. Without a checkpoint no model is loaded. With `accelerate launch` each process
scores its share; the files have the order of the predictions and appear whole or not at all.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from bridges.routes import labels_in
from configs import load_config, save_run_info, write_atomic
from downstream.answerer import Answerer, load_answerer
from downstream.base import BaseModelError
from downstream.causal import Fixed, Masked, Said, Scores, drops_of, score
from downstream.citations import found_slots, marked, sentence_of_characters, split_sentences, with_masks
from downstream.data import Sample, extent_mm, image_of, images_in, images_of, pixels_of, question_of
from downstream.ledger import Row, answer_with_support, sentences_with_support
from downstream.predict import TASKS, read_samples
from downstream.prompts import Prompt
from downstream.samples import Prediction, ReportSample, VQASample, read_predictions
from downstream.sources import FEATURES, RegionSource, open_source, read_table
from eval.citation_scores import cited_region_scores, drop_scores
from eval.entailment import Kinds
from eval.types import Score, plain
from grounding.labels import LabelTree, load_label_tree
from grounding.store import Store, open_store
from grounding.training_state import setup
from grounding.types import RegionSet, RegionTokens, read_regions

AT_ONCE = 8  # samples whose images are held together


@dataclass(frozen=True)
class EvidenceConfig:
    """`predictions`: of `downstream.predict`, about samples of `data`. `checkpoint`: the one that made them; then
    `source`, `features`, `predicted` and `annotated` as they were given to it. `regions`: a regions.jsonl with the
    masks of the regions. `limit`: so many predictions a task."""

    predictions: Path
    data: Path
    out: Path
    checkpoint: Path | None = None
    predicted: Path | None = None
    annotated: Path | None = None
    regions: Path | None = None
    tasks: tuple[str, ...] = TASKS
    source: str = "predicted"
    features: str = "full"
    batch_size: int = 16
    seed: int = 0
    limit: int | None = None

    def __post_init__(self):
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={','.join(self.tasks)}; known: {', '.join(TASKS)}")
        if self.features not in FEATURES:
            raise ValueError(f"features={self.features!r}; known: {', '.join(FEATURES)}")


@dataclass(frozen=True)
class Case:
    """A prediction, the sample that it is about, and its lines of the ledger."""

    prediction: Prediction
    sample: Sample
    lines: list[Row]


def read_cases(config: EvidenceConfig, source: RegionSource | None, tree: LabelTree) -> list[Case]:
    """The predictions of the file with their lines, as far as these follow from text and labels alone.

    Raises ValueError for a prediction about a sample that `data` does not have.
    """
    samples = {_id(sample): sample for sample in read_samples(config.data, config.tasks)}
    masks = {} if config.regions is None else read_regions(config.regions)
    kinds, taken, cases = Kinds(tree), Counter[str](), []
    for row in read_predictions(config.predictions):
        if row.task not in config.tasks or (config.limit is not None and taken[row.task] >= config.limit):
            continue
        if row.sample_id not in samples:
            raise ValueError(f"{config.predictions}: sample {row.sample_id} is not in {config.data}; give its data")
        taken[row.task] += 1
        sample = samples[row.sample_id]
        evidence = _with_masks(row.evidence or {"regions": []}, masks.get(image_of(sample)))
        queries = _queries(sample, source, evidence)
        cases.append(Case(row, sample, _lines(row, sample, evidence, queries, tree, kinds)))
    return cases


def _id(sample: Sample) -> str:
    return sample.sample_id if isinstance(sample, VQASample) else sample.study_id


def _with_masks(evidence: Mapping[str, Any], found: RegionSet | None) -> Mapping[str, Any]:
    return evidence if found is None else with_masks(RegionSet.from_dict(evidence), found).to_dict()


def _queries(sample: Sample, source: RegionSource | None, evidence: Mapping[str, Any]) -> list[dict]:
    """What was looked for in the images, and how probably it is there: all of the region-token file, where there is
    one, else what stands with the prediction."""
    rows = list(evidence.get("queries", ()))
    if source is not None:
        known = [image_id for image_id in images_of(sample) if image_id in source.table.rows]
        rows += [query for image_id in known for query in source.regions(image_id).queries[0]]
    known_rows = sorted((row for row in rows if row.get("label")), key=lambda row: row.get("presence") or 0.0)
    return list({row["label"]: row for row in known_rows}.values())


def _lines(
    row: Prediction,
    sample: Sample,
    evidence: Mapping[str, Any],
    queries: Sequence[Mapping],
    tree: LabelTree,
    kinds: Kinds,
) -> list[Row]:
    if isinstance(sample, VQASample):
        asked = labels_in(sample.question, tree, sample.modality or None)
        asked_for = [q for q in queries if q["label"] in asked and tree.is_finding(q["label"])]
        modality = sample.modality or None
        parts = (sample.question, row.prediction, row.sentences, evidence, asked_for, tree, modality)
        lines = [answer_with_support(*parts)]
    else:
        real = range(len(evidence["regions"]))
        sentences = split_sentences(row.prediction, real) if row.sentences is None else row.sentences
        lines = sentences_with_support(sentences, evidence, queries, tree, kinds)
    provenance = {"detector": row.detector_hash, "model": row.model_hash}
    return [{"sample_id": row.sample_id, "task": row.task, **line, **provenance} for line in lines]


def add_causal(answerer: Answerer, store: Store, source: RegionSource, cases: Sequence[Case], batch_size: int) -> None:
    """Adds to each line of the cases "confidence", "confidence_without" and "confidence_with_only" what it rests on
    (None where that is nothing), "confidence_without_regions", "drop" (nats, of what it rests on) and "drops" (a row a
    region of the prompt). A line without words keeps none.

    Raises ValueError where the prediction is of another model, or of other regions than `source` gives.
    """
    said = [_said(answerer, store, source, case) for case in cases]
    for case, one, scores in zip(cases, said, score(answerer, said, batch_size), strict=True):
        for part, line in enumerate(_scored(case)):
            line |= _causal(scores, part, one, answerer.tree)


def _scored(case: Case) -> list[Row]:
    return [line for line in case.lines if line["text"].strip() or case.prediction.task == "vqa"]


def _said(answerer: Answerer, store: Store, source: RegionSource, case: Case) -> Said:
    row, make = case.prediction, _prompt_maker(answerer, store, case.sample)
    if row.model_hash != answerer.hash:
        raise ValueError(
            f"sample {row.sample_id} was answered by model {row.model_hash}, the checkpoint is {answerer.hash}; "
            "give the checkpoint that answered"
        )
    whole = make(source)
    _check_evidence(row, whole.regions)
    rests_on = [Masked(line["rests_on"]) for line in _scored(case)]
    is_report, text = isinstance(case.sample, ReportSample), row.prediction
    if is_report and max(sentence_of_characters(text), default=-1) + 1 != len(rests_on):
        raise ValueError(f"sample {row.sample_id}: its sentences are not those of its text; predict it again")
    if not is_report and row.sentences:  # as it was generated, with its citations
        text = " ".join(marked(sentence["text"], sentence["region_ids"]) for sentence in row.sentences)
    return Said(whole.regions, lambda slots: make(Fixed(slots, whole.image_of_slot)), text, is_report, rests_on)


def _prompt_maker(answerer: Answerer, store: Store, sample: Sample) -> Callable[[RegionSource | Fixed], Prompt]:
    """Source of regions → the prompt of a sample, without answer, as `predict` makes it."""
    ids = images_in(store, sample)
    records = [store.by_id(image_id) for image_id in ids]
    pixels = [pixels_of(record) for record in records]
    extents = [extent_mm(record) for record in records]
    question, modality = question_of(sample), records[0].modality or None

    def make(source: RegionSource | Fixed) -> Prompt:
        several = len(ids) > 1
        image_id, extent = (list(ids), extents) if several else (ids[0], extents[0])
        return answerer.prompt(question, source, image_id, extent, modality, pixels)

    return make


def _check_evidence(row: Prediction, slots: RegionTokens) -> None:
    told = (row.evidence or {"regions": []})["regions"]
    found = found_slots(slots)
    same = len(told) == len(found) and all(
        region["label"] == slots.labels[0][k] and np.allclose(region["box"], slots.boxes[0, k].tolist(), atol=1e-4)
        for region, k in zip(told, found, strict=True)
    )
    if not same:
        raise ValueError(
            f"sample {row.sample_id}: the prediction had {len(told)} regions, and this source gives {len(found)}, or "
            "others; give source, predicted, annotated, features and seed as they were at the prediction"
        )


def _causal(scores: Scores, part: int, said: Said, tree: LabelTree) -> Row:
    rests_on, drops = said.rests_on[part], drops_of(scores, part, said.slots, tree)
    return {
        "confidence": scores.confidence(part),
        "confidence_without": scores.confidence(part, rests_on) if rests_on else None,
        "confidence_with_only": scores.confidence(part, said.valid - rests_on) if rests_on else None,
        "confidence_without_regions": scores.confidence(part, said.valid),
        "drop": scores.drop(part, rests_on) if rests_on else None,
        "drops": drops,
    }


def summarise(cases: Sequence[Case], store: Store, tree: LabelTree) -> dict[str, Any]:
    """{"support": task → kind of support → lines, "citations": against the annotated findings of the reports' images,
    "causal": of the lines with scores}. Reports of several images are left out of "citations": a box there does not
    tell its image to the score; they are counted."""
    lines = [line for case in cases for line in case.lines]
    patients = {case.prediction.sample_id: case.sample.patient_id for case in cases}
    reports = [case for case in cases if isinstance(case.sample, ReportSample)]
    single = [case for case in reports if len(images_of(case.sample)) == 1]
    annotated = {case.prediction.sample_id: store.by_id(image_of(case.sample)).regions for case in single}
    predictions = {case.prediction.sample_id: asdict(case.prediction) for case in single}
    citations = cited_region_scores(predictions, annotated, patients, tree)
    citations["counts"]["reports of several images, left out"] = len(reports) - len(single)
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    causal = {task: drop_scores([line for line in lines if line["task"] == task], patients) for task in tasks}
    return {
        "support": {task: dict(Counter(x["support"] for x in lines if x["task"] == task)) for task in tasks},
        "citations": citations if single else None,
        "causal": causal if any("drops" in line for line in lines) else None,
    }


def shown(scores: Mapping[str, Any]) -> list[str]:
    """The summary in lines of text."""
    lines = [
        f"{task}: " + ", ".join(f"{n} {kind}" for kind, n in row.items()) for task, row in scores["support"].items()
    ]
    tables = {"citations": scores["citations"] or {}}
    tables |= {f"{task}, nats": rows for task, rows in (scores["causal"] or {}).items()}
    return lines + [
        f"{title}, {name}: {value} (n = {value.n})"
        for title, rows in tables.items()
        for name, value in rows.items()
        if isinstance(value, Score)
    ]


def open_regions(config: EvidenceConfig, patients: Mapping[str, str]) -> RegionSource | None:
    """The source of regions that the predictions had; None where no file of regions is given."""
    paths = {"predicted": config.predicted, "annotated": config.annotated}
    tables = {name: read_table(path) for name, path in paths.items() if path is not None}
    if not tables and not config.source.startswith("file:"):
        return None
    return open_source(config.source, tables, patients, config.features, config.seed)


def run(accelerator: Accelerator, config: EvidenceConfig) -> None:
    """Read, score this process's share, gather, write."""
    store, tree = open_store(config.data / "store"), load_label_tree()
    samples = read_samples(config.data, config.tasks)
    source = open_regions(config, {i: sample.patient_id for sample in samples for i in images_of(sample)})
    cases = read_cases(config, source, tree)
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = cases[rank::world]
    if config.checkpoint is not None:
        if source is None:
            raise ValueError(f"checkpoint={config.checkpoint} needs the regions of the prompts; give predicted=PATH")
        with accelerator.main_process_first():
            answerer = load_answerer(config.checkpoint)
        answerer.vlm.to(accelerator.device).eval()
        for start in tqdm(range(0, len(mine), AT_ONCE), desc="evidence", disable=not accelerator.is_main_process):
            add_causal(answerer, store, source, mine[start : start + AT_ONCE], config.batch_size)
    gathered = gather_object([(rank + world * i, case) for i, case in enumerate(mine)])
    if accelerator.is_main_process:
        ordered = [case for _, case in sorted(gathered, key=lambda row: row[0])]
        write(config, ordered, summarise(ordered, store, tree))


def write(config: EvidenceConfig, cases: Sequence[Case], scores: Mapping[str, Any]) -> None:
    """OUT/evidence.jsonl, scores.json, config.yaml and run.json."""
    lines = [json.dumps(line, ensure_ascii=False) for case in cases for line in case.lines]
    write_atomic(config.out / "evidence.jsonl", "".join(line + "\n" for line in lines))
    write_atomic(config.out / "scores.json", json.dumps(plain(scores), indent=1) + "\n")
    save_run_info(config, config.out, predictions=len(cases), lines=len(lines))
    print("\n".join(shown(scores)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; every key may also be given as key=value")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(EvidenceConfig, options.config, options.overrides)
        accelerator = setup(config.batch_size, config.seed)
        run(accelerator, config)
        accelerator.end_training()
    except (BaseModelError, ValueError, OSError) as error:  # ours are ValueErrors: configuration, store, checkpoint
        sys.exit(f"downstream.evidence: {error}")


if __name__ == "__main__":
    main()
