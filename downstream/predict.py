"""Answer questions and write reports with a trained bridge, greedily.

    python -m downstream.predict --config configs/downstream/predict.yaml checkpoint=runs/tokens/checkpoint \
        data=data/test predicted=runs/regions/region_tokens.safetensors source=predicted out=runs/answers

With `accelerate launch` each process answers its share of the samples. The result, predictions.jsonl, has the order of
the samples, whatever the number of processes, and appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from bridges.region_vlm import CheckpointError, RegionVLM, checkpoint_hash, read_checkpoint
from bridges.routes import labels_in
from configs import load_config, save_run_info
from downstream.base import Base, BaseModelError
from downstream.citations import found_slots, split_report
from downstream.data import Sample, extent_mm, image_of, pixels_of, question_of
from downstream.embedded import load_base
from downstream.prompts import Prompt, build_prompt, collate
from downstream.samples import Prediction, ReportSample, VQASample, read_questions, read_reports, write_samples
from downstream.sources import FEATURES, RegionSource, open_source, read_table
from grounding.labels import LabelTree, load_label_tree
from grounding.store import Store, open_store
from grounding.train import setup
from grounding.types import RegionSet, RegionTokens

LONGEST_ANSWER = 32  # tokens of an answer to a question; a report may have the checkpoint's `max_answer`
TASKS = ("vqa", "report")


@dataclass(frozen=True)
class PredictConfig:
    """`data` holds store/, questions.jsonl (task vqa) and reports.jsonl (task report). `features`: full or zero.
    `predicted` and `annotated` are region-token files; a source needs its own. `limit`: so many samples a task."""

    checkpoint: Path
    data: Path
    out: Path
    predicted: Path | None = None
    annotated: Path | None = None
    tasks: tuple[str, ...] = TASKS
    source: str = "predicted"
    features: str = "full"
    batch_size: int = 32
    seed: int = 0
    limit: int | None = None

    def __post_init__(self):
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={','.join(self.tasks)}; known: {', '.join(TASKS)}")
        if self.features not in FEATURES:
            raise ValueError(f"features={self.features!r}; known: {', '.join(FEATURES)}")


@dataclass(frozen=True)
class Answerer:
    """A loaded checkpoint, ready to answer; `hash` is of its tensors."""

    vlm: RegionVLM
    base: Base
    tree: LabelTree
    route: str
    k: int
    max_answer: int
    hash: str
    names: bool = False

    def prompt(
        self,
        question: str,
        source: RegionSource,
        image_id: str,
        extent: tuple[float, float] | None,
        modality: str | None = None,
        images: Sequence[np.ndarray] = (),
    ) -> Prompt:
        """The prompt for a question about an image, with the regions that `source` has for it."""
        slots = source.slots(image_id, labels_in(question, self.tree, modality), self.tree, self.k)
        return build_prompt(self.base, question, slots, self.route, self.tree, extent, images=images, names=self.names)

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, pixel_values: torch.Tensor | None = None
    ) -> list[str]:
        """B prompts → B texts. `pixel_values` (B, 3, S, S): for prompts of the embedded model without their images."""
        device = next(self.vlm.projector.parameters()).device
        batch = collate(prompts, self.base.tokenizer.pad_token_id).to(device)
        if pixel_values is not None:
            batch.inputs["pixel_values"] = pixel_values.to(device)
        tokens = self.vlm.generate(batch.slots, max_new_tokens, **batch.inputs)
        return [text.strip() for text in self.base.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@dataclass(frozen=True)
class Answer:
    """`text` and the `slots` of the prompt (a batch of one) that it may cite."""

    text: str
    slots: RegionTokens


def load_answerer(checkpoint: str | Path) -> Answerer:
    """Load a checkpoint of `downstream.train` with its base model.

    Raises CheckpointError or BaseModelError where one of them cannot be used.
    """
    config, settings = read_checkpoint(checkpoint)
    base = load_base(config.base, config.four_bit)
    vlm = RegionVLM.load(checkpoint, base.model, base.fingerprint)
    if config.region_token_id != base.region_token_id:
        raise CheckpointError(
            f"{checkpoint}: trained with region token {config.region_token_id}, but base model {config.base!r} has "
            f"{base.region_token!r} at {base.region_token_id}; take the tokenizer that it was trained with"
        )
    parts = {name: settings[name] for name in ("route", "k", "max_answer")}
    parts["names"] = settings.get("names", False)  # checkpoints written before there was a choice have none
    return Answerer(vlm, base, load_label_tree(), hash=checkpoint_hash(checkpoint), **parts)


def answer(
    answerer: Answerer,
    image: np.ndarray | torch.Tensor,
    source: RegionSource,
    image_id: str,
    question: str,
    extent: tuple[float, float] | None = None,
    modality: str | None = None,
) -> Answer:
    """One question, or `prompts.REPORT_QUESTION`, about one image, uint8 (H, W) or (H, W, 3); for the embedded model
    also what `to_pixel_values` makes of it, a tensor (3, S, S). Raises ValueError for an empty question."""
    pixel_values = image[None] if isinstance(image, torch.Tensor) else None
    images = [] if isinstance(image, torch.Tensor) else [image]
    prompt = answerer.prompt(question, source, image_id, extent, modality, images)
    return Answer(answerer.generate([prompt], answerer.max_answer, pixel_values)[0], prompt.slots)


def predict(
    answerer: Answerer,
    store: Store,
    samples: Sequence[Sample],
    source: RegionSource,
    batch_size: int = 32,
    describe: str | None = None,
) -> list[Prediction]:
    """A Prediction a sample, in the order of `samples`. `describe` names the progress bar; None shows none."""
    answerer.vlm.eval()
    results: dict[int, Prediction] = {}
    bar = tqdm(total=len(samples), desc=describe, disable=describe is None, mininterval=2)
    for indices in _batches(samples, batch_size):
        records = [store.by_id(image_of(samples[i])) for i in indices]
        prompts = [
            answerer.prompt(
                question_of(samples[i]),
                source,
                record.image_id,
                extent_mm(record),
                record.modality or None,
                [pixels_of(record)],
            )
            for i, record in zip(indices, records, strict=True)
        ]
        is_report = isinstance(samples[indices[0]], ReportSample)
        texts = answerer.generate(prompts, answerer.max_answer if is_report else LONGEST_ANSWER)
        for i, record, prompt, text in zip(indices, records, prompts, texts, strict=True):
            size = record.regions.image_size
            results[i] = _prediction(samples[i], text, prompt.slots, size, source.table.detector, answerer.hash)
        bar.update(len(indices))
    bar.close()
    return [results[i] for i in range(len(samples))]


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Questions and reports apart, each by length: a batch runs until its longest answer ends."""
    for kind in (VQASample, ReportSample):
        indices = [i for i, sample in enumerate(samples) if isinstance(sample, kind)]
        indices.sort(key=lambda i: len(question_of(samples[i])))
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def _prediction(
    sample: Sample, text: str, slots: RegionTokens, image_size: tuple[int, int], detector: str | None, model: str
) -> Prediction:
    evidence = evidence_of(slots, image_size).to_dict()
    if isinstance(sample, VQASample):
        return Prediction(sample.sample_id, "vqa", text, evidence, None, detector, model)
    text, sentences = split_report(text, slots)
    return Prediction(sample.study_id, "report", text, evidence, sentences, detector, model)


def evidence_of(slots: RegionTokens, image_size: tuple[int, int]) -> RegionSet:
    """The regions in a prompt, in its order: region K of the set is `[rK]`; with the presence of what was asked."""
    rows = found_slots(slots)  # they come first (see routes.pick), so that their numbers are kept
    return RegionSet(
        boxes=slots.boxes[0][rows].numpy(),
        labels=[slots.labels[0][i] for i in rows],
        scores=slots.scores[0][rows].numpy(),
        image_size=image_size,
        queries=slots.queries[0],
    )


def read_samples(data: Path, tasks: Sequence[str], limit: int | None = None) -> list[Sample]:
    """The samples of a data folder, questions first."""
    questions = read_questions(data / "questions.jsonl")[:limit] if "vqa" in tasks else []
    reports = read_reports(data / "reports.jsonl")[:limit] if "report" in tasks else []
    return [*questions, *reports]


def run(accelerator: Accelerator, config: PredictConfig) -> None:
    """Answer this process's share, gather, write."""
    store = open_store(config.data / "store")
    samples = read_samples(config.data, config.tasks, config.limit)
    patients = {image_of(sample): sample.patient_id for sample in samples}
    paths = {"predicted": config.predicted, "annotated": config.annotated}
    tables = {name: read_table(path) for name, path in paths.items() if path is not None}
    source = open_source(config.source, tables, patients, config.features, config.seed)
    with accelerator.main_process_first():
        answerer = load_answerer(config.checkpoint)
    answerer.vlm.to(accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    describe = f"{answerer.route}/{config.source}" if accelerator.is_main_process else None
    mine = predict(answerer, store, samples[rank::world], source, config.batch_size, describe)
    gathered = gather_object([(rank + world * i, prediction) for i, prediction in enumerate(mine)])
    if accelerator.is_main_process:
        rows = [prediction for _, prediction in sorted(gathered, key=lambda row: row[0])]
        write_samples(config.out / "predictions.jsonl", rows)
        dropped = sum(sentence["dropped"] for row in rows for sentence in row.sentences or [])
        hashes = {"model": answerer.hash, "detector": source.table.detector}
        save_run_info(config, config.out, **hashes, samples=len(rows), citations_dropped=dropped)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; every key may also be given as key=value")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(PredictConfig, options.config, options.overrides)
        accelerator = setup(config.batch_size, config.seed)
        run(accelerator, config)
        accelerator.end_training()
    except (BaseModelError, ValueError, OSError) as error:  # ours are ValueErrors: configuration, store, checkpoint
        sys.exit(f"downstream.predict: {error}")


if __name__ == "__main__":
    main()
