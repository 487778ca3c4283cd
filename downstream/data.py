"""What a bridge is trained on, batch by batch, and how samples and images are read for it and for prediction."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bridges.routes import labels_in
from downstream.base import Base
from downstream.brain_qa import describe, lesions_of
from downstream.citations import cite, found_slots
from downstream.packing import pack
from downstream.prompts import LIST_QUESTION, REPORT_QUESTION, Batch, Prompt, build_prompt, collate, report_text
from downstream.region_qa import LOOKS_FILE, read_looks
from downstream.samples import ReportSample, VQASample, read_questions, read_reports
from downstream.sources import RegionSource, TokenTable
from grounding.boxes import pairwise_iou
from grounding.images import read_image
from grounding.labels import LabelTree
from grounding.store import open_store
from grounding.types import GroundingSample, RegionTokens

Sample = VQASample | ReportSample
LISTED = 8  # regions of an alignment answer at most: the findings come first


def question_of(sample: Sample) -> str:
    return sample.question if isinstance(sample, VQASample) else REPORT_QUESTION


def answer_of(sample: Sample) -> str:
    return sample.answer if isinstance(sample, VQASample) else str(report_text(sample))


def image_of(sample: Sample) -> str:
    """The id of the image that is looked at: a study's first."""
    return sample.image_id if isinstance(sample, VQASample) else sample.images[0]


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
    them), and without it from the masks and attributes of the regions themselves."""
    if looks is not None:
        return {k: text for k, text in enumerate(looks.get(record.image_id, ())) if text}
    return {lesion.index: describe(lesion) for lesion in lesions_of(record.regions, record.spacing)}


def list_regions(
    slots: RegionTokens,
    record: GroundingSample,
    tree: LabelTree,
    looks: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The answer to `LIST_QUESTION`: the first regions of a prompt by name, in order; of a finding that is annotated
    (IoU at least 0.5), its size and looks as well. "none" without regions. looks: see `described`."""
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
    return "; ".join(said) or "none"


class TrainingData:
    """Questions and reports of one folder with their images and regions; `batch(number)` is the number-th of all.

    The first `align_steps` batches of a process name the regions of a prompt instead: an answer to a question holds a
    word or two, and a bridge would learn from thousands of them what it learns from some hundred lists. With `pack` > 1
    a row holds that many questions and reports of one image at most, and in the first `align_steps` its list as well.
    """

    def __init__(self, config: DataConfig, base: Base, tree: LabelTree, tables: Mapping[str, TokenTable]):
        self.config, self.base, self.tree, self.tables = config, base, tree, tables
        self.store = open_store(config.data / "store")
        looks = config.data / LOOKS_FILE  # beside questions that were made from regions
        self.looks = read_looks(looks) if looks.exists() else None
        reports = [report for report in read_reports(config.data / "reports.jsonl") if report_text(report)]
        self.samples: list[Sample] = [
            *read_questions(config.data / "questions.jsonl")[: config.limit],
            *reports[: config.limit],
        ]
        if not self.samples:
            raise ValueError(f"{config.data}: questions.jsonl and reports.jsonl hold no sample to train on")
        self.lengths = [len(question_of(sample)) + len(answer_of(sample)) for sample in self.samples]
        self._epoch, self._plan = -1, []
        self.of_image: dict[str, list[Sample]] = {}
        for sample in self.samples:
            self.of_image.setdefault(image_of(sample), []).append(sample)

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
        return [self._pack(image_id, rng, listed) for image_id in images]

    def _pack(self, image_id: str, rng: random.Random, listed: bool) -> list[Prompt]:
        """Prompts about one image with one set of slots: half of them at most for what the questions name, so that
        those of other questions and of reports are as at the test."""
        config, record = self.config, self.store.by_id(image_id)
        source, mine, named = self._source(rng), list[Sample](), frozenset[str]()
        for sample in rng.sample(self.of_image[image_id], len(self.of_image[image_id])):
            wanted = named | labels_in(question_of(sample), self.tree, record.modality or None)
            if len(mine) < config.pack and (not mine or len(wanted) <= config.k // 2):
                mine, named = [*mine, sample], wanted
        slots = source.slots(image_id, named, self.tree, config.k)
        asked = [(question_of(sample), self._answer(sample, slots)) for sample in mine]
        if listed:
            asked.append((LIST_QUESTION, list_regions(slots, record, self.tree, self.looks)))
        pixels = pixels_of(record)
        return [self._prompt(question, slots, record, answer, pixels) for question, answer in asked]

    def _source(self, rng: random.Random) -> RegionSource:
        draws = [rng.random() for _ in range(3)]  # always three, so that each route and rate sees the same samples
        kind = "annotated" if draws[0] < self.config.annotated_share else "predicted"
        features = "zero" if draws[2] < self.config.feature_dropout else "full"
        return RegionSource(self.tables[kind], is_empty=draws[1] < self.config.region_dropout, features=features)

    def _answer(self, sample: Sample, slots: RegionTokens) -> str:
        answer = answer_of(sample)
        if isinstance(sample, ReportSample) and self.config.route != "none" and sample.findings:
            answer = answer.replace(sample.findings, cite(sample.findings, slots, self.tree), 1)
        return answer

    def _lists(self, number: int) -> Iterator[Prompt]:
        config, rng = self.config, random.Random(f"{self.config.seed}/lists/{number}")
        for image_id in rng.choices(self.store.image_ids, k=config.batch_size):
            source = RegionSource(self.tables["annotated" if rng.random() < config.annotated_share else "predicted"])
            slots, record = source.slots(image_id, frozenset(), self.tree, config.k), self.store.by_id(image_id)
            answer = list_regions(slots, record, self.tree, self.looks)
            yield self._prompt(LIST_QUESTION, slots, record, answer)

    def _examples(self, number: int) -> Iterator[Prompt]:
        per_epoch = len(self._plan) or len(plan_epoch(self.lengths, self.config.batch_size, self.config.seed, 0))
        epoch, place = divmod(number, per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._plan = plan_epoch(self.lengths, self.config.batch_size, self.config.seed, epoch)
        rng = random.Random(f"{self.config.seed}/regions/{number}")
        samples = [self.samples[i] for i in self._plan[place]]
        yield from (self._example(sample, rng) for sample in samples)

    def _prompt(
        self, question: str, slots: RegionTokens, record: GroundingSample, answer: str, pixels: np.ndarray | None = None
    ) -> Prompt:
        route, longest = self.config.route, self.config.max_answer
        images = [pixels_of(record) if pixels is None else pixels]
        extent, names = extent_mm(record), self.config.names
        return build_prompt(self.base, question, slots, route, self.tree, extent, answer, longest, images, names)

    def _example(self, sample: Sample, rng: random.Random) -> Prompt:
        config, image_id, question = self.config, image_of(sample), question_of(sample)
        source, record = self._source(rng), self.store.by_id(image_id)
        slots = source.slots(image_id, labels_in(question, self.tree, record.modality or None), self.tree, config.k)
        return self._prompt(question, slots, record, self._answer(sample, slots))
