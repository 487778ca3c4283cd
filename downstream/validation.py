"""Judging a bridge while it is trained, by what it generates for samples that it is not trained on.

All processes answer the same number of samples of one kind, so the same number of batches: under ZeRO-3 each forward
pass gathers the weights from all processes, and one that had stopped would leave the others waiting for ever.
"""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from configs import ConfigError
from downstream.answerer import Answerer
from downstream.controls import BlankImages
from downstream.data import images_in
from downstream.predict import predict, read_samples
from downstream.prompts import report_text
from downstream.samples import Prediction, ReportSample, VQASample
from downstream.sources import RegionSource, TokenTable, open_source, read_table
from eval.findings import finding_scores
from eval.text import text_scores
from eval.types import Score
from eval.vqa import vqa_accuracy
from grounding.store import Store
from grounding.training_state import cut_log

# Metric → the task whose samples it is of; more is better in all of them.
METRICS = {
    **dict.fromkeys(("accuracy", "closed", "open"), "vqa"),
    **dict.fromkeys(("finding-F1", "BLEU-4", "ROUGE-L", "CIDEr"), "report"),
}
LOG = "val_log.jsonl"


class ValidationConfig(Protocol):
    """The fields of the training configuration that an evaluation depends on."""

    val: Path | None
    val_predicted: Path | None
    predicted: Path
    val_samples: int
    batch_size: int
    patience: int
    metric: str
    seed: int
    out: Path


class Validation:
    """A fixed draw of the samples in `config.val`, and what was scored on them so far: `rows`, those of val_log.jsonl,
    the same in every process. `start`: the step that training goes on with; later rows are dropped, since they are
    made again. Raises ConfigError where `val` has no sample for the metric, RegionError where one has no regions."""

    def __init__(self, config: ValidationConfig, store: Store | BlankImages, start: int):
        assert config.val is not None
        self.config, self.store, self.log = config, store, config.out / LOG
        self.samples = drawn(config.val, METRICS[config.metric], config.val_samples, config.seed)
        self.source = _source(config, store, self.samples)
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short
        # Without the best weights nothing that was scored is of use.
        self.rows = [row for row in rows if row["step"] < start] if (config.out / "checkpoint").exists() else []

    @property
    def best(self) -> dict | None:
        return best_of(self.rows)

    @property
    def is_over(self) -> bool:
        return is_over(self.rows, self.config.patience)

    def judge(self, accelerator: Accelerator, answerer: Answerer, step: int) -> bool:
        """Answers the samples, scores them and adds a row; whether it is the best so far. The model is left in
        evaluation mode. Every process has to call this at the same step."""
        began = time.perf_counter()
        with in_step(accelerator):
            said = self._said(accelerator, answerer)
        # Scored once: a metric may need minutes, or a program that another machine has not.
        result = [score(self.config.metric, said, self.samples)] if accelerator.is_main_process else [None]
        value: Score = broadcast_object_list(result)[0]
        row = {"step": step, "metric": value.name, "version": value.version, "value": value.value, "n": value.n}
        self.rows.append(row | {"ci95": value.ci95, "seconds": round(time.perf_counter() - began, 1)})
        if accelerator.is_main_process:
            with self.log.open("a") as log:
                log.write(json.dumps(self.rows[-1]) + "\n")
        return self.best is self.rows[-1]

    def _said(self, accelerator: Accelerator, answerer: Answerer) -> dict[str, Prediction]:
        world, rank = accelerator.num_processes, accelerator.process_index
        share = -(-len(self.samples) // world)  # the first ones are answered twice where they do not come out even
        mine = [self.samples[(rank + world * i) % len(self.samples)] for i in range(share)]
        rows = gather_object(predict(answerer, self.store, mine, self.source, self.config.batch_size))
        return {row.sample_id: row for row in rows}


def best_of(rows: Sequence[dict]) -> dict | None:
    """The row with the highest value, the first of equals; None without rows. Undefined is below everything."""
    return max(rows, key=lambda row: float("-inf") if row["value"] is None else row["value"], default=None)


def is_over(rows: Sequence[dict], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better; never with 0."""
    best = best_of(rows)
    return best is not None and 0 < patience <= len(rows) - 1 - rows.index(best)


def open_validation(
    accelerator: Accelerator, config: ValidationConfig, store: Store | BlankImages, start: int
) -> Validation:
    """The same in every process; the main one cuts the log to what is kept. See `Validation` for what is raised."""
    validation = Validation(config, store, start)
    accelerator.wait_for_everyone()  # nobody cuts before everybody has read
    if accelerator.is_main_process:
        cut_log(validation.log, start if validation.rows else 0)
    return validation


def drawn(folder: Path, task: str, count: int, seed: int) -> list[VQASample | ReportSample]:
    """`count` samples of a task at most, at random, the same for the same seed, in the order of the file."""
    samples = [s for s in read_samples(folder, (task,)) if isinstance(s, VQASample) or report_text(s)]
    if not samples:
        name = "questions.jsonl" if task == "vqa" else "reports.jsonl"
        raise ConfigError(f"{folder / name}: holds no sample to judge by; choose another metric or val")
    places = random.Random(f"{seed}/validation").sample(range(len(samples)), min(count, len(samples)))
    return [samples[place] for place in sorted(places)]


def score(metric: str, said: Mapping[str, Prediction], samples: Sequence[VQASample | ReportSample]) -> Score:
    """`metric` (of METRICS) of what was said about `samples`. Texts are compared word by word, without citations."""
    texts = {key: _uncited(row) for key, row in said.items()}
    if METRICS[metric] == "vqa":
        accuracy = vqa_accuracy(texts, [asdict(sample) for sample in samples])
        return accuracy["overall" if metric == "accuracy" else metric]
    reports = [sample for sample in samples if isinstance(sample, ReportSample)]
    references = {report.study_id: str(report_text(report)) for report in reports}
    patients = {report.study_id: report.patient_id for report in reports}
    if metric == "finding-F1":
        return finding_scores(texts, references, patients)["finding"]["f1"]
    many = {key: [text] for key, text in references.items()}
    return text_scores(texts, many, patients, tokenizer="words", meteor=False)[metric]


@contextmanager
def in_step(accelerator: Accelerator) -> Iterator[None]:
    """Within, `generate` of transformers goes on in every process until all of them have finished, as ZeRO-3 needs;
    outside it knows nothing of DeepSpeed (see `downstream.train.fit`)."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        set_hf_deepspeed_config(plugin.hf_ds_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def _source(
    config: ValidationConfig, store: Store | BlankImages, samples: Sequence[VQASample | ReportSample]
) -> RegionSource:
    table: TokenTable = read_table(config.val_predicted or config.predicted)
    for sample in samples:
        for image_id in images_in(store, sample):
            table.row(image_id)
    return open_source("predicted", {"predicted": table}, {})


def _uncited(row: Prediction) -> str:
    return row.prediction if row.sentences is None else " ".join(sentence["text"] for sentence in row.sentences)
