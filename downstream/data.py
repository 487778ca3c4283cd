"""What a bridge is trained on, batch by batch, and how samples and images are read for it and for prediction."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bridges.budget import Dropped, warn_dropped
from bridges.routes import labels_in
from downstream.base import Base
from downstream.brain_qa import describe, lesions_of
from downstream.citations import cite, cite_answer, found_slots
from downstream.controls import BlankImages
from downstream.packing import pack
from downstream.prompts import (
    LIST_QUESTION,
    REPORT_QUESTION,
    Batch,
    Prompt,
    build_prompt,
    collate,
    report_text,
    tokens_of,
)
from downstream.region_qa import LOOKS_FILE, read_looks
from downstream.samples import ReportSample, VQASample, read_questions, read_reports
from downstream.sources import RegionSource, TokenTable, open_source
from grounding.boxes import pairwise_iou
from grounding.images import read_image
from grounding.labels import LabelTree
from grounding.store import Store, StoreError, open_store
from grounding.types import GroundingSample, RegionTokens

log = logging.getLogger(__name__)

Sample = VQASample | ReportSample
AnswerOf = Callable[[RegionTokens], str]  # what an answer says may depend on the regions of its prompt: it cites them
LISTED = 8  # regions of an alignment answer at most: the findings come first


def question_of(sample: Sample) -> str:
    return sample.question if isinstance(sample, VQASample) else REPORT_QUESTION


def answer_of(sample: Sample) -> str:
    return sample.answer if isinstance(sample, VQASample) else str(report_text(sample))


def image_of(sample: Sample) -> str:
    """The id of the image that is looked at: a study's first."""
    return images_of(sample)[0]


def images_of(sample: Sample) -> tuple[str, ...]:
    """The ids of all images that a sample is about, in their order: most questions' one, a study's all."""
    return sample.images or (sample.image_id,) if isinstance(sample, VQASample) else sample.images


def images_in(store: Store | BlankImages, sample: Sample) -> tuple[str, ...]:
    """Of several images of a sample those that `store` has; a single one in any case. Raises ValueError where none of
    them is there."""
    ids = images_of(sample)
    there = ids if len(ids) == 1 else tuple(image_id for image_id in ids if _has(store, image_id))
    if not there:
        name = sample.study_id if isinstance(sample, ReportSample) else sample.sample_id
        what = "study" if isinstance(sample, ReportSample) else "question"
        raise ValueError(f"{what} {name!r}: none of its {len(ids)} images is in the store; add them, or take it out")
    return there


def _has(store: Store | BlankImages, image_id: str) -> bool:
    try:
        store.by_id(image_id)
    except StoreError:
        return False
    return True


def pixels_of(record: GroundingSample) -> np.ndarray:
    """The image as it is, uint8 (H, W) or (H, W, 3); the model's processor makes of it what the model reads."""
    return read_image(record.image).pixels


def extent_mm(record: GroundingSample) -> tuple[float, float] | None:
    """(height, width) of the whole image in mm, None where its pixel spacing is not known."""
    if record.spacing is None:
        return None
    (height, width), (row, column) = record.regions.image_size, record.spacing
    return height * row, width * column


class DataConfig(Protocol):
    """The fields of the training configuration that the data depend on."""

    data: Path
    route: str
    k: int
    batch_size: int
    pack: int
    names: bool
    presence: bool
    cite_answers: bool
    source: str
    seed: int
    max_answer: int
    annotated_share: float
    region_dropout: float
    feature_dropout: float
    limit: int | None
    align_steps: int


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sample indices for one epoch, in random order; samples of one batch have about the same length.

    Sorted within windows of 16 batches: padding to the longest report would else double the cost of every question.
    The last samples of an epoch that fill no batch are left out; another epoch has others.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    while len(order) < batch_size:
        order += order
    window = 16 * batch_size
    order = [i for w in range(0, len(order), window) for i in sorted(order[w : w + window], key=lambda i: lengths[i])]
    batches = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
    rng.shuffle(batches)
    return batches


def described(record: GroundingSample, looks: Mapping[str, Sequence[str]] | None) -> dict[int, str]:
    """Index of an annotated finding → its size and looks: of `looks` (image_id → a text a region, as `read_looks` gives
    them), and without it from the masks and attributes of the regions themselves, where they have both."""
    regions = record.regions
    if looks is not None:
        return {k: text for k, text in enumerate(looks.get(record.image_id, ())) if text}
    if regions.masks is None or regions.attributes is None or None in regions.masks:
        return {}  # a box alone says nothing of size and looks
    return {lesion.index: describe(lesion) for lesion in lesions_of(regions, record.spacing)}


def list_regions(
    slots: RegionTokens,
    record: GroundingSample,
    tree: LabelTree,
    looks: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """The parts of the answer to `LIST_QUESTION`: the first regions of a prompt by name, in order; of a finding that is
    annotated (IoU at least 0.5), its size and looks as well. looks: see `described`."""
    texts = described(record, looks)
    truth = torch.from_numpy(record.regions.boxes[list(texts)])
    said = []
    for k in found_slots(slots)[:LISTED]:
        label = slots.labels[0][k]
        name = tree.phrase(label) if label in tree.nodes else label
        overlap = pairwise_iou(slots.boxes[0][[k]], truth)[0]
        is_finding = label not in tree.nodes or tree.is_finding(label)
        if is_finding and len(truth) and overlap.max() >= 0.5:
            name += f", {list(texts.values())[int(overlap.argmax())]}"
        said.append(name)
    return said


@dataclass(frozen=True)
class _Study:
    """What prompts about the same images share: regions that were picked for the labels `named`."""

    records: list[GroundingSample]
    pixels: list[np.ndarray]
    slots: RegionTokens
    image_of_slot: list[int]
    named: frozenset[str]


class TrainingData:
    """Questions and reports of one folder with their images and regions; `batch(number)` is the number-th of all.

    The first `align_steps` batches of a process name the regions of a prompt instead: an answer to a question holds a
    word or two, and a bridge would learn from thousands of them what it learns from some hundred lists. With `pack` > 1
    a row holds that many questions and reports of one image at most, and in the first `align_steps` its list as well.
    A report is about all images of its study. Counted so far: what was left out of prompts that were too long for the
    model (`dropped`), and the regions found that had no slot among K (`beyond_budget`).
    Answers of more than `max_answer` tokens are left out, with a warning; a list ends before it is so long, and an
    answer that its citations would make so long has none.
    Raises ValueError for a folder without samples or with none short enough, or a study without images.
    """

    def __init__(self, config: DataConfig, base: Base, tree: LabelTree, tables: Mapping[str, TokenTable]):
        self.config, self.base, self.tree = config, base, tree
        self.store: Store | BlankImages = open_store(config.data / "store")
        looks = config.data / LOOKS_FILE  # beside questions that were made from regions
        self.looks = read_looks(looks) if looks.exists() else None
        reports = [report for report in read_reports(config.data / "reports.jsonl") if report_text(report)]
        questions = read_questions(config.data / "questions.jsonl")
        self.samples = self._short_enough([*questions[: config.limit], *reports[: config.limit]])
        self.lengths = [len(question_of(sample)) + len(answer_of(sample)) for sample in self.samples]
        self._epoch, self._plan = -1, []
        self.images = [images_in(self.store, sample) for sample in self.samples]
        self.of_image: dict[tuple[str, ...], list[Sample]] = {}
        for sample, ids in zip(self.samples, self.images, strict=True):
            self.of_image.setdefault(ids, []).append(sample)
        self._warn_missing()
        self.sources = {"annotated": RegionSource(tables["annotated"]), "predicted": self._open_source(tables)}
        self.dropped, self.beyond_budget = Dropped(), 0

    def _short_enough(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those whose answers have at most `max_answer` tokens."""
        if not samples:
            raise ValueError(f"{self.config.data}: questions.jsonl and reports.jsonl hold no sample to train on")
        most, lengths = self.config.max_answer, [len(tokens_of(self.base, answer_of(sample))) for sample in samples]
        kept = [sample for sample, length in zip(samples, lengths, strict=True) if length <= most]
        if len(kept) < len(samples):
            told = f"{len(samples) - len(kept)} of {len(samples)} answers have more than max_answer={most} tokens"
            if not kept:
                raise ValueError(f"{self.config.data}: {told}; max_answer={max(lengths)} keeps them")
            log.warning("%s, the longest %d: left out", told, max(lengths))
        return kept

    def _fits(self, answer: str) -> bool:
        return len(tokens_of(self.base, answer)) <= self.config.max_answer

    def _warn_missing(self) -> None:
        missing = [len(images_of(s)) - len(ids) for s, ids in zip(self.samples, self.images, strict=True)]
        if any(missing):
            studies = sum(n > 0 for n in missing)
            log.warning("%d images of %d studies are not in the store; trained without them", sum(missing), studies)

    def _open_source(self, tables: Mapping[str, TokenTable]) -> RegionSource:
        store = open_store(self.config.data / "store")
        patients = {}
        if self.config.source == "shuffled":  # lists are about any image of the store
            patients = dict(zip(store.image_ids, store.column("patient_id"), strict=True))
        return open_source(self.config.source, tables, patients, seed=self.config.seed)

    def batch(self, step: int, world: int = 1, rank: int = 0) -> Batch:
        """Prompts with images and answers, of one process at a step."""
        number, align = step * world + rank, self.config.align_steps * world
        if self.config.pack > 1:
            return pack(self._packs(number, number < align), self.base.tokenizer.pad_token_id)
        prompts = self._lists(number) if number < align else self._examples(number - align)
        return collate(list(prompts), self.base.tokenizer.pad_token_id)

    def _packs(self, number: int, listed: bool) -> list[list[Prompt]]:
        rng = random.Random(f"{self.config.seed}/packs/{number}")
        images = rng.choices(list(self.of_image), k=self.config.batch_size)
        return [self._pack(ids, rng, listed) for ids in images]

    def _pack(self, ids: tuple[str, ...], rng: random.Random, listed: bool) -> list[Prompt]:
        """Prompts about one image, or one study, with one set of slots: half of them at most for what the questions
        name, so that those of other questions and of reports are as at the test."""
        config, records = self.config, [self.store.by_id(image_id) for image_id in ids]
        source, mine, named = self._source(rng), list[Sample](), frozenset[str]()
        for sample in rng.sample(self.of_image[ids], len(self.of_image[ids])):
            wanted = named | labels_in(question_of(sample), self.tree, records[0].modality or None)
            if len(mine) < config.pack and (not mine or len(wanted) <= config.k // 2):
                mine, named = [*mine, sample], wanted
        study = self._study(records, source, named)
        asked = [self._asked(sample, study) for sample in mine]
        if listed and len(records) == 1:
            asked.append(self._list(study))
        return self._prompts(study, asked)

    def _source(self, rng: random.Random) -> RegionSource:
        draws = [rng.random() for _ in range(3)]  # always three, so that each route and rate sees the same samples
        source = self.sources["annotated" if draws[0] < self.config.annotated_share else "predicted"]
        features = "zero" if draws[2] < self.config.feature_dropout else "full"
        return replace(source, is_empty=source.is_empty or draws[1] < self.config.region_dropout, features=features)

    def _study(self, records: list[GroundingSample], source: RegionSource, named: frozenset[str]) -> _Study:
        ids = [record.image_id for record in records]
        slots, image_of_slot = source.study_slots(ids, named, self.tree, self.config.k)
        self.beyond_budget += source.beyond_budget(ids, self.config.k)
        return _Study(records, [pixels_of(record) for record in records], slots, image_of_slot, named)

    def _asked(self, sample: Sample, study: _Study) -> tuple[str, AnswerOf]:
        return question_of(sample), lambda slots: self._answer(sample, slots, study.records[0].modality or None)

    def _list(self, study: _Study) -> tuple[str, AnswerOf]:
        return LIST_QUESTION, lambda slots: self._listed(slots, study)

    def _listed(self, slots: RegionTokens, study: _Study) -> str:
        said = list_regions(slots, study.records[0], self.tree, self.looks)
        while said and not self._fits("; ".join(said)):
            said.pop()
        return "; ".join(said) or "none"

    def _answer(self, sample: Sample, slots: RegionTokens, modality: str | None) -> str:
        """What is to be said; with a route that tells of regions, citing those in `slots`."""
        answer = cited = answer_of(sample)
        if self.config.route == "none":
            return answer
        if isinstance(sample, ReportSample) and sample.findings:
            cited = answer.replace(sample.findings, cite(sample.findings, slots, self.tree), 1)
        if isinstance(sample, VQASample) and self.config.cite_answers:
            cited = cite_answer(answer, sample.question, slots, self.tree, modality)
        return cited if self._fits(cited) else answer

    def _lists(self, number: int) -> Iterator[Prompt]:
        config, rng = self.config, random.Random(f"{self.config.seed}/lists/{number}")
        for image_id in rng.choices(self.store.image_ids, k=config.batch_size):
            source = self.sources["annotated" if rng.random() < config.annotated_share else "predicted"]
            study = self._study([self.store.by_id(image_id)], source, frozenset())
            yield from self._prompts(study, [self._list(study)])

    def _examples(self, number: int) -> Iterator[Prompt]:
        per_epoch = len(self._plan) or len(plan_epoch(self.lengths, self.config.batch_size, self.config.seed, 0))
        epoch, place = divmod(number, per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._plan = plan_epoch(self.lengths, self.config.batch_size, self.config.seed, epoch)
        rng = random.Random(f"{self.config.seed}/regions/{number}")
        for i in self._plan[place]:
            yield from self._example(self.samples[i], self.images[i], rng)

    def _example(self, sample: Sample, ids: tuple[str, ...], rng: random.Random) -> list[Prompt]:
        source, records = self._source(rng), [self.store.by_id(image_id) for image_id in ids]
        study = self._study(records, source, labels_in(question_of(sample), self.tree, records[0].modality or None))
        return self._prompts(study, [self._asked(sample, study)])

    def _prompts(self, study: _Study, asked: Sequence[tuple[str, AnswerOf]]) -> list[Prompt]:
        """Prompts with the same regions, and answers that cite these: where one is too long for all regions of the
        study, each has only those that it has room for."""
        prompts = [self._prompt(question, study, answer(study.slots)) for question, answer in asked]
        self._count(prompts)
        fewest = max(prompts, key=lambda prompt: prompt.dropped.regions)
        if not fewest.dropped.regions:
            return prompts
        study = replace(study, slots=fewest.regions, image_of_slot=fewest.image_of_slot)
        return [self._prompt(question, study, answer(study.slots)) for question, answer in asked]

    def _count(self, prompts: Sequence[Prompt]) -> None:
        dropped = sum((prompt.dropped for prompt in prompts), Dropped())
        if dropped and not self.dropped:
            warn_dropped(dropped, len(prompts))  # once: all are counted
        self.dropped += dropped

    def _prompt(self, question: str, study: _Study, answer: str) -> Prompt:
        config, extents = self.config, [extent_mm(record) for record in study.records]
        return build_prompt(
            self.base,
            question,
            study.slots,
            config.route,
            self.tree,
            extents if len(extents) > 1 else extents[0],
            answer,
            config.max_answer,
            study.pixels,
            config.names,
            named=study.named,
            presence=config.presence,
            image_of_slot=study.image_of_slot,
        )
