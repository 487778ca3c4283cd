"""Stage one: region–phrase contrastive pre-training of MedGLIP on a region store.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m grounding.pretrain \
        --config configs/grounding/pretrain.yaml store=data/train/store out=runs/stage-one

The features of annotated boxes, moved a little, are drawn to the phrases that name them, broader ones too, and away
from all others (`grounding.contrast`). Negatives come from all images of all processes. The memory of phrase vectors is
the whole vocabulary, projected anew at every step: a few hundred phrases cost next to nothing, and none is stale. What
finds boxes by itself (the dense head, fusion, masks, presence) is left as it was; `grounding.train init=FOLDER` trains
it. Runs and resumes like grounding.train.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info, write_atomic
from grounding.accumulate import in_float32
from grounding.audit import check_forbidden
from grounding.contrast import background_boxes, foreign, info_nce, of_all_processes, pairs, siblings
from grounding.curves import TrainingLog, draw_curves
from grounding.data import Batches, Collator, PhraseTarget, check_mapped, phrase_targets, vocabulary
from grounding.labels import LabelTree, load_label_tree
from grounding.left_out import Part, left_out_scores
from grounding.mixture import Mixture
from grounding.model import MODALITIES, CheckpointError, MedGLIP, MedGLIPConfig, build_model, save_checkpoint
from grounding.store import Store, StoreError, open_store
from grounding.text import PhraseEncoder
from grounding.training_state import (
    PRECISIONS,
    computes_in_bf16,
    learning_rate,
    lost_a_process,
    others_wait,
    resume_step,
    save_state,
    setup,
)

PATIENCE = 45  # seconds until a process that does not answer counts as dead
MODALITY_WEIGHT = 0.1  # as in stage two
# What region features and phrase vectors do not pass through; ``bias`` is the same for both sides of every comparison.
STAGE_TWO = (
    *("head.", "fusion.", "prototype.", "presence.", "region_edges.", "bias"),
    *("smooth.1.", "smooth.2.", "adapters.1.", "adapters.2."),
)
TEMPERATURE_RATE = 10  # times lr: the scale starts at 10, and should change by the share that other weights do


@dataclass(frozen=True)
class PretrainConfig:
    """``leave_out``: sources of the store that are neither trained on nor lend a phrase; afterwards left_out.json says
    how well the checkpoint does on them (`grounding.left_out`). ``background``: random boxes an image, negatives of
    what they do not show. ``hardness``: so many other negatives does a sibling count for. The rest is as in
    `grounding.train.TrainConfig`; what says what the model is has to be the same in stage two: ``trunk``,
    ``text_encoder``, ``fusion``, ``adapters``, ``mask_head``, ``width``.
    """

    store: Path
    out: Path
    leave_out: tuple[str, ...] = ()
    steps: int = 800
    batch_size: int = 16
    lr: float = 1e-3
    trunk_lr: float = 3e-4
    weight_decay: float = 0.02
    warmup: int = 40
    clip: float = 5.0
    seed: int = 0
    trunk: str = "embedded"
    pretrained: bool = True
    text_encoder: str = "embedded"
    fusion: str = "phrase"
    adapters: bool = True
    mask_head: bool = True
    image_size: int = 192
    scales: tuple[int, ...] = ()
    width: int = 128
    augment: bool = False
    background: int = 8
    hardness: float = 4.0
    temperature: float = 2.0
    forbid: tuple[Path, ...] = ()
    free_phrases: bool = False
    precision: str = "auto"
    checkpointing: bool = False
    workers: int = 0
    save_every: int = 0
    resume: bool = True
    tensorboard: bool = False

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.image_size) < 1 or self.background < 0 or self.hardness < 1:
            raise ValueError("steps, batch_size and image_size must be positive, background 0, hardness 1 or more")
        if any(size < 32 or size % 32 for size in (self.image_size, *self.scales)):
            raise ValueError("image_size and scales must be multiples of 32")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; known: {', '.join(PRECISIONS)}")


def trained_part(config: PretrainConfig, store: Store, tree: LabelTree) -> Part:
    """The images of the sources that are not left out. Raises StoreError where a source to leave out is not there, or
    nothing is left."""
    if not config.free_phrases:
        check_mapped(store, tree)
    sources = store.column("source")
    if unknown := sorted(set(config.leave_out) - set(sources)):
        known = ", ".join(sorted(set(sources)))
        raise StoreError(f"{store.folder}: no source {unknown[0]!r} to leave out; it has: {known}")
    part = Part(store, [k for k, source in enumerate(sources) if source not in config.leave_out])
    if not len(part):
        raise StoreError(f"{store.folder}: no image is left; leave fewer sources out")
    return part


def describe_model(config: PretrainConfig, part: Part, targets: list[PhraseTarget], tree: LabelTree, text_width: int):
    """The MedGLIPConfig of what stage two will go on from."""
    return MedGLIPConfig(
        trunk=config.trunk,
        image_size=config.image_size,
        text_encoder=config.text_encoder,
        text_width=text_width,
        width=config.width,
        fusion=config.fusion,
        adapters=config.adapters,
        mask_head=config.mask_head,
        vocabulary=vocabulary(targets, tree),
        phrases=tuple(target.names[0] for target in targets),
        modalities=tuple(sorted(set(part.column("modality")))),
    )


def freeze_stage_two(model: MedGLIP) -> None:
    """Leaves only what gets a gradient here: processes wait for the gradient of everything that can be trained."""
    for name, parameter in model.named_parameters():
        if name.startswith(STAGE_TWO):
            parameter.requires_grad_(False)


def optimizer_of(model: MedGLIP, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW; the temperature (1 / ``scale``) does not decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trunk = [p for name, p in trained.items() if name.startswith("trunk.")]
    rest = [p for name, p in trained.items() if not name.startswith("trunk.") and name != "scale"]
    groups = [
        {"params": rest, "lr": config.lr},
        {"params": trunk, "lr": config.trunk_lr},
        {"params": [model.scale], "lr": TEMPERATURE_RATE * config.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


class Contrast:
    """The loss of a batch, which needs the vocabulary's tables."""

    def __init__(self, config: PretrainConfig, targets: list[PhraseTarget], tree: LabelTree):
        self.config, self.encoder = config, PhraseEncoder(config.text_encoder)
        self.never, self.siblings = foreign(targets, tree), siblings(targets, tree)
        self.text_width = self.encoder.encode([x for t in targets for x in t.names]).vectors.shape[1]

    def __call__(
        self, accelerator: Accelerator, model: torch.nn.Module, step: int, batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss to go backward from, its parts). The parts of the contrast are the same on every process."""
        names, pixels, texts, targets = batch
        device = accelerator.device
        targets, phrases = targets.to(device), self.encoder.encode(texts)
        drawn = random.Random(f"{self.config.seed}/{step}/{accelerator.process_index}/background").getrandbits(40)
        generator = torch.Generator().manual_seed(drawn)
        background = background_boxes(len(pixels), self.config.background, generator).to(device)
        one_hot = F.one_hot(targets.modality, len(MODALITIES)).float()
        known = one_hot if step % 4 else None  # as in stage two
        bf16 = computes_in_bf16(accelerator, self.config.precision)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = in_float32(model(pixels.to(device), phrases, known, torch.cat([targets.jittered, background], 1)))
        truth = pairs(targets, background, self.never.to(device), self.siblings.to(device))
        parts = info_nce(*of_all_processes(accelerator, out.regions.logits, truth), self.config.hardness)
        parts["modality"] = F.cross_entropy(out.modality, targets.modality)
        contrast = parts["region_to_phrase"] + parts["phrase_to_region"]
        if not all(torch.isfinite(part) for part in parts.values()):
            _stop(self.config.out, step, names, parts)
        return contrast * accelerator.num_processes + MODALITY_WEIGHT * parts["modality"], parts


def _stop(out: Path, step: int, names: list[str], parts: dict[str, torch.Tensor]) -> None:
    """``out``/bad_batch.json, and a CheckpointError that names the batch."""
    wrong = [name for name, part in parts.items() if not torch.isfinite(part)]
    write_atomic(out / "bad_batch.json", json.dumps({"step": step, "parts": wrong, "images": names}, indent=1))
    some = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    raise CheckpointError(
        f"step {step}: the loss is not finite ({', '.join(wrong)}); images: {some} (all in "
        f"{out / 'bad_batch.json'}); lower lr, or look at them"
    )


def fit(accelerator: Accelerator, config: PretrainConfig, part: Part) -> tuple[MedGLIPConfig, dict]:
    """The loop. Returns the model's configuration and, on the main process, its state."""
    tree = load_label_tree()
    targets = phrase_targets(part, tree)  # type: ignore[arg-type]  # it asks for labels and attributes alone
    contrast = Contrast(config, targets, tree)
    model = build_model(
        describe_model(config, part, targets, tree, contrast.text_width), config.seed, pretrained=config.pretrained
    )
    model_config = model.config
    freeze_stage_two(model)
    if config.checkpointing:
        model.gradient_checkpointing(True)
    model, optimizer = accelerator.prepare(model, optimizer_of(model, config))
    model.train()
    start = resume_step(accelerator, config.out) if config.resume else 0
    loader = _loader(accelerator, config, part, targets, tree, start)
    log = TrainingLog(config.out, start, config.tensorboard) if accelerator.is_main_process else None
    bar = tqdm(total=config.steps, initial=start, desc="stage one", disable=log is None, mininterval=2)
    rates = (config.lr, config.trunk_lr, TEMPERATURE_RATE * config.lr)
    began = time.perf_counter()
    for step, batch in zip(range(start, config.steps), loader, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, config.steps, config.warmup)
        optimizer.zero_grad()
        loss, parts = contrast(accelerator, model, step, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if log:
            row = {name: round(part.item(), 5) for name, part in parts.items()}
            whole = row["region_to_phrase"] + row["phrase_to_region"] + MODALITY_WEIGHT * row["modality"]
            seconds = round(time.perf_counter() - began, 3)
            log.add({"step": step, "loss": whole, **row, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds})
            bar.set_postfix(loss=f"{whole:.3f}", refresh=False)
            bar.update()
            began = time.perf_counter()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1)
    bar.close()
    if log:
        log.close()
        draw_curves(log.path, config.out / "curves.png")
    return model_config, accelerator.get_state_dict(model)


def _loader(
    accelerator: Accelerator,
    config: PretrainConfig,
    part: Part,
    targets: list[PhraseTarget],
    tree: LabelTree,
    start: int,
) -> DataLoader:
    """The batches of the steps from ``start`` on; a batch is a function of the step."""
    collate = Collator(targets, tree, config.image_size, config.seed, scales=config.scales, augmented=config.augment)
    mixture = Mixture(part.column("source"), config.temperature, config.seed)
    ranks = (accelerator.num_processes, accelerator.process_index)
    return DataLoader(
        Batches(part.store, part.rows, collate, mixture, config.batch_size, *ranks),
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        collate_fn=_same,
        generator=torch.Generator(),  # else a resumed run draws other random numbers than one that was not killed
    )


def _same(batch):
    return batch


def pretrain(config: PretrainConfig) -> None:
    """Everything between the configuration and the checkpoint in ``config.out``."""
    store, tree = open_store(config.store), load_label_tree()
    check_forbidden(config.store, config.forbid)
    part = trained_part(config, store, tree)
    accelerator = setup(config.batch_size, config.seed, PATIENCE, clip=config.clip)
    config.out.mkdir(parents=True, exist_ok=True)
    model_config, state = fit(accelerator, config, part)
    with others_wait(accelerator):
        if accelerator.is_main_process:
            save_checkpoint(config.out, model_config, state)
            about = {"processes": accelerator.num_processes, "phrases": len(model_config.phrases)}
            save_run_info(config, config.out, stage="region–phrase contrast", images=len(part), **about)
            if config.leave_out:
                scores = left_out_scores(config.out, store, config.leave_out)
                write_atomic(config.out / "left_out.json", json.dumps(scores, indent=1))
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        pretrain(load_config(PretrainConfig, options.config, options.overrides))
    except (ConfigError, StoreError, CheckpointError, OSError) as error:
        sys.exit(f"grounding.pretrain: {error}")
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        sys.exit(
            "grounding.pretrain: another process has died, or did not answer for too long; see its output. The same "
            f"command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        )


if __name__ == "__main__":
    main()
