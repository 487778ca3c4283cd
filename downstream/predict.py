"""Answer questions and write reports with a trained bridge.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m downstream.predict \
        checkpoint=runs/tokens/checkpoint data=data/test predicted=runs/regions/region_tokens.safetensors \
        source=predicted out=runs/answers

Each process answers batches of its own, and a run that was killed goes on where it was. The result, predictions.jsonl,
has the order of the samples, is the same whatever the number of processes, and appears whole or not at all.
"""

import argparse
import hashlib
import json
import logging
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from bridges.budget import Dropped, warn_dropped
from configs import load_config, save_run_info
from downstream.answer_parts import AnswerParts
from downstream.answerer import Answerer, Said, evidence_of, load_answerer
from downstream.base import BaseModelError
from downstream.citations import split_answer, split_report
from downstream.controls import BlankImages
from downstream.data import Sample, extent_mm, images_in, images_of, pixels_of, question_of
from downstream.decoding import Decoding, options_of
from downstream.prompts import REPORT_QUESTION, Prompt
from downstream.samples import Prediction, ReportSample, VQASample, read_questions, read_reports
from downstream.sources import FEATURES, RegionSource, open_source, read_table
from grounding.store import Store, open_store
from grounding.training_state import setup
from grounding.types import RegionTokens

log = logging.getLogger(__name__)

TASKS = ("vqa", "report")


@dataclass(frozen=True)
class PredictConfig:
    """`data` holds store/, questions.jsonl (task vqa) and reports.jsonl (task report). `features`: full or zero.
    `predicted` and `annotated` are region-token files; a source needs its own. `limit`: so many samples a task.
    `beams`, `temperature`, `top_p`, `closed`, `sections`: see `Decoding`; what is sampled depends on `seed` and
    `batch_size`. `blank_image`: every image is grey (control)."""

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
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    closed: bool = False
    sections: tuple[str, ...] = ()
    blank_image: bool = False

    def __post_init__(self):
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={','.join(self.tasks)}; known: {', '.join(TASKS)}")
        if self.features not in FEATURES:
            raise ValueError(f"features={self.features!r}; known: {', '.join(FEATURES)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; it must be positive")
        _ = self.decoding  # checks the rest

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.beams, self.temperature, self.top_p, self.closed, self.sections, self.seed)


@dataclass(frozen=True)
class ChosenAnswer(Prediction):
    """A prediction that is one of several options; `options`: the probability of each, of sum 1."""

    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """`text`, the `slots` that it may cite (a batch of one), and of a chosen answer the probability of each option."""

    text: str
    slots: RegionTokens
    options: dict[str, float] | None = None


def answer(
    answerer: Answerer,
    image: np.ndarray | torch.Tensor,
    source: RegionSource,
    image_id: str,
    question: str,
    extent: tuple[float, float] | None = None,
    modality: str | None = None,
    options: Sequence[str] = (),
) -> Answer:
    """One question, or `prompts.REPORT_QUESTION`, about one image, uint8 (H, W) or (H, W, 3); for the embedded model
    also what `to_pixel_values` makes of it, a tensor (3, S, S). `options`: the answer is the likeliest of these.

    Raises ValueError for an empty question.
    """
    images = [] if isinstance(image, torch.Tensor) else [image]
    prompt = answerer.prompt(question, source, image_id, extent, modality, images)
    if isinstance(image, torch.Tensor):
        prompt = replace(prompt, images={"pixel_values": image[None]})
    warn_dropped(prompt.dropped, 1)
    if question == REPORT_QUESTION:
        return Answer(answerer.reports([prompt])[0], prompt.regions)
    text, chosen = answerer.answers([prompt], [options], answerer.max_answer)[0]
    return Answer(text, prompt.regions, chosen)


def predict(
    answerer: Answerer,
    store: Store | BlankImages,
    samples: Sequence[Sample],
    source: RegionSource,
    batch_size: int = 32,
    describe: str | None = None,
) -> list[Prediction]:
    """A Prediction a sample, in the order of `samples`. `describe` names the progress bar; None shows none."""
    answerer.vlm.eval()
    results: dict[int, Prediction] = {}
    dropped = Dropped()
    with tqdm(total=len(samples), desc=describe, disable=describe is None, mininterval=2) as bar:
        for indices in plan_batches(samples, batch_size):
            said = answer_batch(answerer, store, [samples[i] for i in indices], source)
            results |= dict(zip(indices, said.predictions, strict=True))
            dropped += said.dropped
            bar.update(len(indices))
    warn_dropped(dropped, len(samples))
    return [results[i] for i in range(len(samples))]


def plan_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices of questions and of reports apart, each by number of images and length: a batch runs until its longest
    answer ends."""
    batches = []
    for kind in (VQASample, ReportSample):
        indices = [i for i, sample in enumerate(samples) if isinstance(sample, kind)]
        indices.sort(key=lambda i: (len(images_of(samples[i])), len(question_of(samples[i]))))
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches


@dataclass(frozen=True)
class AnsweredBatch:
    """Predictions of one batch; what was left out of prompts that were too long, found regions without a slot, and
    images of studies that the store lacks."""

    predictions: list[Prediction]
    dropped: Dropped
    beyond_budget: int
    missing_images: int

    @property
    def counts(self) -> dict[str, int]:
        return {**asdict(self.dropped), "beyond_budget": self.beyond_budget, "missing_images": self.missing_images}


def answer_batch(
    answerer: Answerer, store: Store | BlankImages, samples: Sequence[Sample], source: RegionSource
) -> AnsweredBatch:
    """Answers questions, or writes reports, not both. Images of a study that the store lacks are left out."""
    ids = [images_in(store, sample) for sample in samples]
    prompts = [_prompt(answerer, store, *row, source) for row in zip(samples, ids, strict=True)]
    sampled = answerer.decoding.temperature > 0
    with torch.random.fork_rng(enabled=sampled):
        if sampled:  # the same for a batch, whenever and by whichever process it is answered
            torch.manual_seed(zlib.crc32(f"{answerer.decoding.seed} {samples}".encode()))
        said = _say(answerer, samples, prompts)
    predictions = []
    for sample, words, prompt, row in zip(samples, said, prompts, ids, strict=True):
        size = store.by_id(row[0]).regions.image_size
        evidence = evidence_of(prompt.regions, size, prompt.image_of_slot, row)
        predictions.append(_prediction(sample, words, prompt.regions, evidence.to_dict(), source, answerer))
    beyond = sum(source.beyond_budget(row, answerer.k) for row in ids)
    missing = sum(len(images_of(sample)) - len(row) for sample, row in zip(samples, ids, strict=True))
    return AnsweredBatch(predictions, sum((prompt.dropped for prompt in prompts), Dropped()), beyond, missing)


def _prompt(
    answerer: Answerer, store: Store | BlankImages, sample: Sample, ids: Sequence[str], source: RegionSource
) -> Prompt:
    records = [store.by_id(image_id) for image_id in ids]
    images, extents = [pixels_of(record) for record in records], [extent_mm(record) for record in records]
    modality, question = records[0].modality or None, question_of(sample)
    if len(ids) == 1:
        return answerer.prompt(question, source, ids[0], extents[0], modality, images)
    return answerer.prompt(question, source, ids, extents, modality, images)


def _say(answerer: Answerer, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[Said]:
    if isinstance(samples[0], ReportSample):
        return [(text, None) for text in answerer.reports(prompts)]
    return answerer.answers(prompts, [_options(sample) if answerer.decoding.closed else () for sample in samples])


def _options(sample: Sample) -> tuple[str, ...]:
    if isinstance(sample, ReportSample) or sample.answer_type != "closed":
        return ()
    return options_of(sample.question, sample.options)


def _prediction(
    sample: Sample, words: Said, slots: RegionTokens, evidence: dict, source: RegionSource, answerer: Answerer
) -> Prediction:
    (text, options), sentences = words, None
    hashes = source.table.detector, answerer.hash
    if isinstance(sample, ReportSample):
        text, sentences = split_report(text, slots)
        return Prediction(sample.study_id, "report", text, evidence, sentences, *hashes)
    if answerer.cite_answers:
        text, sentences = split_answer(text, slots)
    said = (sample.sample_id, "vqa", text, evidence, sentences, *hashes)
    return Prediction(*said) if options is None else ChosenAnswer(*said, options)


def read_samples(data: Path, tasks: Sequence[str], limit: int | None = None) -> list[Sample]:
    """The samples of a data folder, questions first."""
    questions = read_questions(data / "questions.jsonl")[:limit] if "vqa" in tasks else []
    reports = read_reports(data / "reports.jsonl")[:limit] if "report" in tasks else []
    return [*questions, *reports]


def run(accelerator: Accelerator, config: PredictConfig) -> None:
    """Answer this process's batches; the main process puts all together."""
    store = open_store(config.data / "store")
    samples = read_samples(config.data, config.tasks, config.limit)
    patients = {image_id: sample.patient_id for sample in samples for image_id in images_of(sample)}
    paths = {"predicted": config.predicted, "annotated": config.annotated}
    tables = {name: read_table(path) for name, path in paths.items() if path is not None}
    source = open_source(config.source, tables, patients, config.features, config.seed)
    with accelerator.main_process_first():
        answerer = replace(load_answerer(config.checkpoint), decoding=config.decoding)
    answerer.vlm.to(accelerator.device)
    batches = plan_batches(samples, config.batch_size)
    parts = AnswerParts(config.out, _key(config, answerer, store, samples))
    pending = _pending(accelerator, parts, len(batches))
    quiet, title = not accelerator.is_main_process, f"{answerer.route}/{config.source[:9]}"
    images = BlankImages(store) if config.blank_image else store
    with tqdm(total=len(pending), desc=title, unit="batch", disable=quiet, mininterval=2) as bar:
        for number in pending[accelerator.process_index :: accelerator.num_processes]:
            said = answer_batch(answerer, images, [samples[i] for i in batches[number]], source)
            parts.add(accelerator.process_index, number, said.predictions, said.counts)
            bar.update(accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(config, answerer, source, parts, batches)
    accelerator.wait_for_everyone()


def _pending(accelerator: Accelerator, parts: AnswerParts, batches: int) -> list[int]:
    """Numbers of the batches that no earlier run with these settings answered."""
    if accelerator.is_main_process:
        parts.mend()
    accelerator.wait_for_everyone()
    done = parts.done()
    if done and accelerator.is_main_process:
        print(f"{len(done)} of {batches} batches were answered before this run")
    accelerator.wait_for_everyone()  # nobody writes before everybody has read
    return [number for number in range(batches) if number not in done]


def _finish(
    config: PredictConfig, answerer: Answerer, source: RegionSource, parts: AnswerParts, batches: list[list[int]]
) -> None:
    """predictions.jsonl and run.json."""
    rows, counts = parts.merge(batches)
    beyond, missing = counts.pop("beyond_budget", 0), counts.pop("missing_images", 0)
    warn_dropped(Dropped(**counts), len(rows))
    if missing:
        log.warning("%d images of studies are not in the store; reports were written without them", missing)
    save_run_info(
        config,
        config.out,
        model=answerer.hash,
        detector=source.table.detector,
        samples=len(rows),
        citations_dropped=sum(sentence["dropped"] for row in rows for sentence in row["sentences"] or []),
        too_long=counts,
        regions_beyond_budget=beyond,
        missing_images=missing,
    )
    parts.remove()


def _key(config: PredictConfig, answerer: Answerer, store: Store, samples: Sequence[Sample]) -> str:
    """16 hex digits of all that the predictions depend on."""
    given = Path(config.source[5:]) if config.source.startswith("file:") else None
    files = [file for file in (config.predicted, config.annotated, given) if file is not None]
    about = [
        answerer.hash,
        answerer.base.fingerprint,
        "file" if given else config.source,
        [config.features, config.batch_size, config.blank_image, config.seed],
        asdict(config.decoding),
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        [(file.name, file.stat().st_size) for file in sorted(store.folder.glob("*.arrow"))],
        [asdict(sample) for sample in samples],
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


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
