"""Fine-tune a zero-shot detector of transformers on a region store: ``grounding.train detector=FOLDER …``.

Every family is trained with the set loss of Grounding DINO (DETR's matching, focal loss on phrases, L1 and GIoU on
boxes) by transformers' own matcher and criterion, on every decoder layer and on the encoder's proposals. An image is
read with the phrases that name its regions and with those that its source labels exhaustively and that name none;
of a phrase that is not labelled exhaustively only the regions are learned, never its absence elsewhere.

The checkpoint is an ordinary folder of transformers (model, image processor, tokenizer) with `medglip.json` beside it.

Dimension key: B images, Q object queries, C columns of the logits (tokens or phrases), N regions, V phrases.
"""

import dataclasses
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configs import save_run_info, write_atomic
from grounding.boxes import cxcywh
from grounding.calibrate import _best_threshold, _platt, _score_candidates
from grounding.chunks import Columns
from grounding.curves import TrainingLog, draw_curves
from grounding.data import PhraseTarget, broader, most_boxes, phrase_targets, vocabulary
from grounding.images import read_image
from grounding.labels import LabelTree, load_label_tree
from grounding.mixture import Mixture
from grounding.model import CheckpointError, MedGLIPConfig
from grounding.store import Store
from grounding.training_state import Average, computes_in_bf16, learning_rate, resume_step, save_state
from grounding.types import GroundingSample
from grounding.zero_shot import SETTINGS, ZeroShotGrounder, load_zero_shot, settings_text
from grounding.zero_shot_families import Detector, Level, chunk, forward, load_detector, pixel_inputs, text_inputs

if TYPE_CHECKING:
    from grounding.train import TrainConfig

PHRASES = 40  # an image at most, of those that name nothing
COSTS = {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}  # Grounding DINO's, of matching
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # Grounding DINO's
TRUNKS = ("backbone", "text_backbone", "vision_backbone", "language_backbone", "vision_model", "text_model")


@dataclass
class Example:
    """One image and what is true of it: ``phrases``, ``positive`` (N, V) bool: the phrase names the region, ``known``
    (V,) bool: its source labels the phrase exhaustively, ``boxes`` (N, 4) xyxy in [0, 1] of the image."""

    sample: GroundingSample
    phrases: list[str]
    positive: torch.Tensor
    known: torch.Tensor
    boxes: torch.Tensor


def build_example(
    sample: GroundingSample, targets: Sequence[PhraseTarget], tree: LabelTree, detector: Detector, seed: str
) -> Example:
    """The phrases that name a region, and others that its source labels, in random order, as many as one pass reads;
    each is said in one of its ways."""
    random_ = random.Random(seed)
    named = [{label, *broader(label, tree)} for label in sample.regions.labels]
    there = set().union(*named)
    present = [t for t in targets if t.label in there]
    absent = [t for t in targets if t.label in sample.labelled and t.label not in there]
    chosen = [*random_.sample(present, len(present)), *random_.sample(absent, min(PHRASES, len(absent)))]
    chosen = chosen or [random_.choice(targets)]  # a model reads something; it counts for nothing
    said = [t.names[0] if random_.random() < 0.6 else random_.choice(t.names) for t in chosen]
    kept = chunk(detector, said)[0]  # as many as fit, those that are there first
    random_.shuffle(kept)
    chosen, said = [chosen[k] for k in kept], [said[k] for k in kept]
    return Example(
        sample,
        said,
        torch.tensor([[t.label in names for t in chosen] for names in named]).reshape(len(named), len(chosen)),
        torch.tensor([t.label in sample.labelled for t in chosen], dtype=torch.bool),
        torch.from_numpy(sample.regions.boxes),
    )


@dataclass
class Truth:
    """Of one image, in the network input: ``boxes_cxcywh`` (N, 4), ``maps`` (N, C) float: the columns that name each
    region, ``negative`` (C,) bool: the columns that must be silent on every other query."""

    boxes_cxcywh: torch.Tensor
    maps: torch.Tensor
    negative: torch.Tensor


def build_truth(example: Example, columns: Columns, used: torch.Tensor, share: torch.Tensor) -> Truth:
    """``used`` (C,) bool: the columns of this image, those of no phrase (full stops) among them; ``share`` (2,): see
    `grounding.zero_shot_families`. Regions that no phrase names are left out."""
    own = torch.zeros(len(columns), len(used))
    for v, tokens in enumerate(columns):
        own[v, list(tokens)] = 1
    named = example.positive.any(1)
    boxes = example.boxes[named] * share.cpu().repeat(2)
    maps = (example.positive[named].float() @ own).clamp(max=1)
    negative = used.cpu() & (own[~example.known].sum(0) == 0)
    return Truth(*(x.to(share.device) for x in (cxcywh(boxes), maps, negative)))


def columns_in_use(text: dict[str, torch.Tensor], columns: Sequence[Columns], width: int) -> torch.Tensor:
    """(B, C) bool: the tokens of each image's text, or the columns of its phrases."""
    used = torch.zeros(len(columns), width, dtype=torch.bool)
    if "asked" not in text:
        used[:, : text["attention_mask"].shape[1]] = text["attention_mask"].bool().cpu()
    for k, own in enumerate(columns):
        used[k, [c for tokens in own for c in tokens]] = True
    return used


def set_loss(levels: Sequence[Level], truths: Sequence[Truth], config: Any, count: float) -> dict[str, torch.Tensor]:
    """The parts of the loss, summed over levels; ``count``: regions of the batch, averaged over the processes.

    transformers' criterion is called image by image: in a batch it would look up the phrases of later images in the
    wrong rows wherever images have different numbers of them.
    """
    from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss

    matcher = GroundingDinoHungarianMatcher(**{name: getattr(config, name, cost) for name, cost in COSTS.items()})
    criterion = GroundingDinoImageLoss(matcher, getattr(config, "focal_alpha", 0.25), ["labels", "boxes"])
    parts = dict.fromkeys(WEIGHTS, levels[0].logits.new_zeros(()))
    for level in levels:
        for k, truth in enumerate(truths):
            outputs, targets, matched = _one(level, k, truth, matcher)
            found = criterion.loss_labels(outputs, targets, matched, count)
            found |= criterion.loss_boxes(outputs, targets, matched, count)
            parts = {name: part + found[name] for name, part in parts.items()}
    return parts


def _one(level: Level, k: int, truth: Truth, matcher: Any) -> tuple[dict, list[dict], list]:
    """Outputs and targets of one image as the criterion takes them, every region a class of its own."""
    logits = level.logits[k : k + 1]
    outputs = {"logits": logits, "pred_boxes": level.boxes_cxcywh[k : k + 1], "label_maps": (truth.maps,)}
    classes = torch.arange(len(truth.maps), device=logits.device)
    targets = [{"class_labels": classes, "boxes": truth.boxes_cxcywh}]
    matched = matcher(outputs, targets)
    queries, regions = matched[0]
    counts = truth.negative.expand(logits.shape[1], -1).clone()
    counts[queries] |= truth.maps[regions] > 0
    outputs["text_mask"] = counts[None]
    return outputs, targets, matched


class DetectorLoss(nn.Module):
    """The model with its loss, so that DDP sees one forward pass whose answer holds nothing but the loss."""

    def __init__(self, model: Any, bf16: bool):
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, pixels: dict, text: dict, examples: Sequence[Example], columns: Sequence[Columns], share, count):
        with torch.autocast(share.device.type, torch.bfloat16, enabled=self.bf16):
            levels, _ = forward(self.model, pixels, text)
        levels = [Level(level.logits.float(), level.boxes_cxcywh.float()) for level in levels]
        used = columns_in_use(text, columns, levels[0].logits.shape[-1])
        truths = [build_truth(*row) for row in zip(examples, columns, used, share, strict=True)]
        return set_loss(levels, truths, self.model.config, count)


@dataclass(frozen=True)
class Examples(Dataset):
    """Step → the examples of this process."""

    store: Store
    targets: Sequence[PhraseTarget]
    tree: LabelTree
    detector: Detector
    mixture: Mixture
    config: "TrainConfig"
    world: int
    rank: int

    def __getitem__(self, step: int) -> list[Example]:
        size = self.config.batch_size * self.config.accumulation
        indices = self.mixture.indices(step, size, self.world, self.rank)
        seed = f"{self.config.seed}/{step}"
        return [
            build_example(self.store[k], self.targets, self.tree, self.detector, f"{seed}/{place}")
            for place, k in enumerate(indices)
        ]


def _same(batch):
    return batch


def fit_detector(accelerator: Accelerator, config: "TrainConfig", store: Store) -> None:
    """Fine-tunes ``config.detector`` and writes the checkpoint to ``config.out``; resumes as `grounding.train` does.
    Of the configuration, what describes a MedGLIP (trunk, width, image size, fusion …) is not used.

    Raises CheckpointError where the detector cannot be read, or the loss is not finite.
    """
    detector, tree = load_detector(str(config.detector)), load_label_tree()
    targets = [target for target in phrase_targets(store, tree) if target.attribute is None]
    if config.checkpointing:
        detector.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(_groups(detector.model, config), weight_decay=config.weight_decay)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    loss = DetectorLoss(detector.model, computes_in_bf16(accelerator, config.precision))
    model, optimizer = accelerator.prepare(loss, optimizer)
    average = Average(model, config.ema) if config.ema else None
    start = resume_step(accelerator, config.out, average) if config.resume else 0
    loader = _loader(accelerator, config, store, targets, tree, detector, start)
    detector.model.train()
    _loop(accelerator, config, model, optimizer, detector, loader, start, average)
    detector.model.eval()
    if accelerator.is_main_process:
        if average:
            average.put_in_place()
        finish_detector(config, detector, store, targets, tree, accelerator.num_processes)
    accelerator.wait_for_everyone()


def _loader(accelerator: Accelerator, config: "TrainConfig", store: Store, targets, tree, detector, start: int):
    mixture = Mixture(store.column("source")[: _trained(config, store)], config.temperature, config.seed)
    ranks = (accelerator.num_processes, accelerator.process_index)
    return DataLoader(
        Examples(store, targets, tree, detector, mixture, config, *ranks),
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        collate_fn=_same,
        generator=torch.Generator(),  # a resumed run then draws the same dropout
    )


def _trained(config: "TrainConfig", store: Store) -> int:
    """Images trained on; the last ``calibration`` are held out."""
    return max(1, len(store) - config.calibration)


def _loop(accelerator: Accelerator, config: "TrainConfig", model, optimizer, detector, loader, start: int, average):
    main, rates = accelerator.is_main_process, (config.lr, config.trunk_lr)
    log = TrainingLog(config.out, start, config.tensorboard) if main else None
    bar = tqdm(total=config.steps, initial=start, desc="detector", disable=not main, mininterval=2)
    began = time.perf_counter()
    for step, batch in enumerate(loader, start):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, config.steps, config.warmup)
        optimizer.zero_grad()
        parts = _backward(accelerator, config, model, detector, step, batch)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if average:
            average.update(step)
        mean = accelerator.reduce(weighted(parts), "mean").item()
        if log:
            row = {"step": step, "loss": mean, **{name: round(part.item(), 5) for name, part in parts.items()}}
            row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - began, 3)}
            log.add(row)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
        began = time.perf_counter()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1, average)
    bar.close()
    if log:
        log.close()
        draw_curves(log.path, config.out / "curves.png")


def weighted(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()


def _backward(accelerator: Accelerator, config: "TrainConfig", model, detector, step: int, batch: list[Example]):
    """Leaves the gradient in the parameters; the parts of the loss. The regions of the whole step divide it, so that
    batches in parts give the gradient of the whole."""
    regions = torch.tensor(float(sum(int(example.positive.any(1).sum()) for example in batch)))
    count = max(1.0, accelerator.reduce(regions.to(accelerator.device), "mean").item())
    sums = dict.fromkeys(WEIGHTS, torch.zeros((), device=accelerator.device))
    for first in range(0, len(batch), config.batch_size):
        some = batch[first : first + config.batch_size]
        pixels, share = pixel_inputs(detector, [read_image(example.sample.image).pixels for example in some])
        text = text_inputs(detector, [example.phrases for example in some])
        parts = model(pixels, text.tensors, some, text.columns, share, count)
        loss = weighted(parts)
        if not torch.isfinite(loss):
            names = ", ".join(example.sample.image_id for example in some)
            raise CheckpointError(f"step {step}: the loss is {loss.item()}; images: {names}; lower lr, or look at them")
        accelerator.backward(loss)
        sums = {name: total + parts[name].detach() for name, total in sums.items()}
    return sums


def _groups(model: nn.Module, config: "TrainConfig") -> list[dict]:
    """The rest at ``lr``, image and text towers at ``trunk_lr``."""
    named = [(set(name.split(".")), p) for name, p in model.named_parameters() if p.requires_grad]
    trunk = [p for names, p in named if not names.isdisjoint(TRUNKS)]
    rest = [p for names, p in named if names.isdisjoint(TRUNKS)]
    return [{"params": rest, "lr": config.lr}, {"params": trunk, "lr": config.trunk_lr}]


def finish_detector(
    config: "TrainConfig",
    detector: Detector,
    store: Store,
    targets: Sequence[PhraseTarget],
    tree: LabelTree,
    world: int,
) -> None:
    """The checkpoint, calibrated on the images that were held out."""
    labels = vocabulary(targets, tree)
    settings = MedGLIPConfig(
        vocabulary=labels,
        phrases=tuple(target.names[0] for target in targets),
        modalities=tuple(sorted(set(store.column("modality")))),
        most_boxes=most_boxes([store], labels, tree),
    )
    save_detector(config.out, detector, settings)
    held_out = [store[k] for k in range(_trained(config, store), len(store))]
    if held_out:
        settings = calibrated(load_zero_shot(config.out), held_out)
        write_atomic(config.out / SETTINGS, settings_text(settings))
    save_run_info(config, config.out, processes=world, phrases=len(targets))


def calibrated(grounder: ZeroShotGrounder, samples: Sequence[GroundingSample]) -> MedGLIPConfig:
    """Thresholds a label (best F1) and Platt scaling of presence, on held-out ``samples``, as for a MedGLIP."""
    rows: dict[str, list[tuple[float, bool]]] = {label: [] for label in grounder.config.vocabulary}
    missed, logits, present = dict.fromkeys(rows, 0), [], []
    for sample in samples:
        candidates = grounder.detect([read_image(sample.image).pixels])[0].candidates
        _score_candidates(candidates, sample, grounder.tree, rows, missed)
        there = {x for label in sample.regions.labels for x in (label, *broader(label, grounder.tree))}
        for query in candidates.queries:
            if query["label"] in there or query["label"] in sample.labelled:
                score = min(max(query["presence"], 1e-4), 1 - 1e-4)
                logits.append(math.log(score / (1 - score)))
                present.append(query["label"] in there)
    slope, offset = _platt(np.array(logits), np.array(present, float)) if logits else (1.0, 0.0)
    thresholds = {label: _best_threshold(rows[label], missed[label]) for label in rows if rows[label]}
    return dataclasses.replace(grounder.config, thresholds=thresholds, presence=(slope, offset))


def save_detector(out: Path, detector: Detector, settings: MedGLIPConfig) -> None:
    """A folder that transformers loads, with `medglip.json`; config.json, by which it counts as a checkpoint, last."""
    partial = out / ".partial-detector"
    shutil.rmtree(partial, ignore_errors=True)
    for part in (detector.tokenizer, detector.image_processor, detector.model):
        part.save_pretrained(partial)
    write_atomic(partial / SETTINGS, settings_text(settings))
    (out / "config.json").unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(out / file.name)
    partial.rmdir()
