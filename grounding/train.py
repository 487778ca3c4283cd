"""Train MedGLIP on a region store.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m grounding.train \
        --config configs/grounding/brain.yaml store=data/train/store out=runs/grounder

Setup → data → model → loop → calibration → save. The same command runs on DDP, DeepSpeed ZeRO-2/3 and two nodes with
another configs/accelerate file, and resumes from the last complete checkpoint in ``out`` to the same losses. See
docs/training.md.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info, write_atomic
from grounding.accumulate import accumulated, in_float32
from grounding.audit import check_forbidden
from grounding.calibrate import calibrate
from grounding.curves import TrainingLog, draw_curves
from grounding.data import Batches, Collator, PhraseTarget, Stores, check_mapped, most_boxes, phrase_targets, vocabulary
from grounding.fine_tune import keep_thresholds, start_from, widened, write_forgetting
from grounding.labels import LabelTree, load_label_tree
from grounding.losses import losses, total
from grounding.mixture import Mixture
from grounding.model import MODALITIES, CheckpointError, MedGLIPConfig, build_model, load_checkpoint, save_checkpoint
from grounding.model_card import write_model_card
from grounding.store import Store, StoreError, open_store
from grounding.text import PhraseEncoder
from grounding.training_state import (
    PRECISIONS,
    Average,
    computes_in_bf16,
    cut_log,
    learning_rate,
    lost_a_process,
    others_wait,
    resume_step,
    save_state,
    setup,
)

__all__ = ["TrainConfig", "cut_log", "fit", "learning_rate", "main", "resume_step", "save_state", "setup"]

PATIENCE = 45  # seconds until a process that does not answer counts as dead, so that all have stopped within a minute


@dataclass(frozen=True)
class TrainConfig:
    """``batch_size`` is a process's, in memory at once; a step takes ``accumulation`` of them and gives the gradient of
    all together. The last ``calibration`` images of each store are held out, to calibrate scores and judge forgetting.
    Sources are mixed with ``temperature`` (`grounding.mixture`). ``forbid``: stores that must have nothing in common
    with this one. ``workers``: processes that read images ahead. ``trunk``, ``text_encoder``, ``fusion``, ``adapters``,
    ``mask_head``: `MedGLIPConfig`; ``pretrained``: the trunk's own weights. ``hierarchy``, ``partial_negatives``,
    ``scales``, ``augment``, ``tiles``: `grounding.data.Collator`. ``free_phrases``: labels that the tree does not know
    are meant.

    ``ema``: decay of the running mean of the weights that is saved, 0 for the last weights. ``precision``: fp32, bf16
    (products in bfloat16; weights and losses stay float32), or auto, which takes bf16 where an accelerator has it.
    ``checkpointing``: less memory for more time. ``init``: folder of the checkpoint to start from. ``replay``: stores
    of what that one knew, ``replay_share`` of every batch; without them it is forgotten. ``forgetting``: a store to
    judge that on (default: what is held out of ``replay``). ``detector``: a zero-shot detector of transformers (folder
    or hub id) to fine-tune in the place of MedGLIP.
    """

    store: Path
    out: Path
    steps: int = 800
    batch_size: int = 16
    accumulation: int = 1
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
    hierarchy: bool = True
    partial_negatives: bool = True
    image_size: int = 192
    scales: tuple[int, ...] = ()
    width: int = 128
    augment: bool = False
    tiles: int = 1
    ema: float = 0.0
    precision: str = "auto"
    checkpointing: bool = False
    calibration: int = 96
    temperature: float = 2.0
    forbid: tuple[Path, ...] = ()
    free_phrases: bool = False
    init: Path | None = None
    replay: tuple[Path, ...] = ()
    replay_share: float = 0.3
    forgetting: Path | None = None
    detector: str | None = None
    workers: int = 0
    save_every: int = 0
    resume: bool = True
    tensorboard: bool = False

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.image_size, self.calibration, self.accumulation, self.tiles) < 1:
            raise ValueError("steps, batch_size, accumulation, image_size, calibration and tiles must be positive")
        if any(size < 32 or size % 32 for size in (self.image_size, *self.scales)):
            raise ValueError("image_size and scales: each must be a multiple of 32")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; known: {', '.join(PRECISIONS)}")
        if not 0 <= self.ema < 1 or not 0 < self.replay_share < 1:
            raise ValueError("ema must be in [0, 1), replay_share in (0, 1)")
        if (self.replay or self.forgetting) and self.init is None:
            raise ValueError("replay and forgetting go with init=FOLDER, the checkpoint that knew the old sources")


@dataclass(frozen=True)
class Data:
    """The new store and then the old ones; ``rows`` of them are trained on in the order of ``mixture``, ``held_out``
    are not, of which ``old`` are of the old stores."""

    stores: list[Store]
    rows: list[int]
    held_out: list[int]
    old: list[int]
    mixture: Mixture
    targets: list[PhraseTarget]

    @property
    def images(self) -> Stores:
        return Stores(self.stores)


def load_data(config: TrainConfig, store: Store, tree: LabelTree) -> Data:
    """Raises StoreError where a replay store is none, or a source has no label that the tree knows."""
    stores = [store, *map(open_store, config.replay)]
    rows: list[list[int]] = []
    held_out, start = [], 0
    for one in stores:
        if not config.free_phrases:
            check_mapped(one, tree)
        trained = max(1, len(one) - config.calibration)
        rows.append(list(range(start, start + trained)))
        held_out.append(list(range(start + max(0, len(one) - config.calibration), start + len(one))))
        start += len(one)
    sources = [one.column("source")[: len(own)] for one, own in zip(stores, rows, strict=True)]
    old = [source for some in sources[1:] for source in some]
    return Data(
        stores,
        [k for own in rows for k in own],
        [k for own in held_out for k in own],
        [k for own in held_out[1:] for k in own],
        Mixture(sources[0], config.temperature, config.seed, old, config.replay_share),
        phrase_targets(Stores(stores), tree),
    )


def describe_model(config: TrainConfig, data: Data, tree: LabelTree, text_width: int) -> MedGLIPConfig:
    """What the checkpoint will be able to find: what the data show, and what ``init`` could."""
    labels = vocabulary(data.targets, tree)
    new = MedGLIPConfig(
        trunk=config.trunk,
        image_size=config.image_size,
        text_encoder=config.text_encoder,
        text_width=text_width,
        width=config.width,
        fusion=config.fusion,
        adapters=config.adapters,
        mask_head=config.mask_head,
        vocabulary=labels,
        phrases=tuple(target.names[0] for target in data.targets),
        modalities=tuple(sorted({x for store in data.stores for x in store.column("modality")})),
        most_boxes=most_boxes(data.stores, labels, tree),
    )
    return new if config.init is None else widened(new, load_checkpoint(config.init).config, tree)


def optimizer_of(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": rest, "lr": config.lr}, {"params": trunk, "lr": config.trunk_lr}]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def fit(accelerator: Accelerator, config: TrainConfig, data: Data) -> tuple[MedGLIPConfig, dict]:
    """The loop. Returns the model's configuration and, on the main process, its state."""
    tree = load_label_tree()
    encoder = PhraseEncoder(config.text_encoder)
    # Every process by itself, before any waits for another: the first time this may take longer than PATIENCE.
    names = encoder.encode([name for target in data.targets for name in target.names])
    model = build_model(
        describe_model(config, data, tree, names.vectors.shape[1]), config.seed, pretrained=config.pretrained
    )
    model_config = model.config
    if config.init is not None:
        start_from(model, config.init, tree)
    if config.checkpointing:
        model.gradient_checkpointing(True)
    model, optimizer = accelerator.prepare(model, optimizer_of(model, config))
    model.train()
    average = Average(model, config.ema) if config.ema else None
    start = resume_step(accelerator, config.out, average) if config.resume else 0
    loader = _loader(accelerator, config, data, tree, start)
    main = accelerator.is_main_process
    log = TrainingLog(config.out, start, config.tensorboard) if main else None
    bar = tqdm(total=config.steps, initial=start, desc="grounding", disable=not main, mininterval=2)
    began = time.perf_counter()
    for step, batch in zip(range(start, config.steps), loader, strict=True):
        for group, rate in zip(optimizer.param_groups, (config.lr, config.trunk_lr), strict=True):
            group["lr"] = rate * learning_rate(step, config.steps, config.warmup)
        optimizer.zero_grad()
        loss, parts = backward(accelerator, model, encoder, config, step, batch)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if average:
            average.update(step)
        mean = accelerator.reduce(loss, "mean").item()
        if log:
            row = {"step": step, "loss": mean, **{name: round(part.item(), 5) for name, part in parts.items()}}
            row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - began, 3)}
            log.add(row)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
            began = time.perf_counter()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1, average)
            if log:
                draw_curves(log.path, config.out / "curves.png")
    bar.close()
    if average:
        average.put_in_place()
    if log:
        log.close()
        draw_curves(log.path, config.out / "curves.png")
    return model_config, accelerator.get_state_dict(model)


def _loader(accelerator: Accelerator, config: TrainConfig, data: Data, tree: LabelTree, start: int) -> DataLoader:
    """The batches of the steps from ``start`` on; a batch is a function of the step, whoever asks for it and when."""
    collate = Collator(
        data.targets,
        tree,
        config.image_size,
        config.seed,
        scales=config.scales,
        augmented=config.augment,
        tiles=config.tiles,
        hierarchy=config.hierarchy,
        partial_negatives=config.partial_negatives,
    )
    size, ranks = config.batch_size * config.accumulation, (accelerator.num_processes, accelerator.process_index)
    return DataLoader(
        Batches(data.images, data.rows, collate, data.mixture, size, *ranks),
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        collate_fn=_same,
        generator=torch.Generator(),  # else it draws from the one that dropout draws from, and a resumed run differs
    )


def _same(batch):
    return batch


def backward(
    accelerator: Accelerator, model: torch.nn.Module, encoder: PhraseEncoder, config: TrainConfig, step: int, batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Leaves the gradient in the parameters; the loss and its parts. Raises CheckpointError where it is not finite."""
    names, pixels, texts, truth = batch
    device = accelerator.device
    truth, phrases = truth.to(device), encoder.encode(texts)
    one_hot = torch.nn.functional.one_hot(truth.modality, len(MODALITIES)).float()
    known = one_hot if step % 4 else None  # every fourth step the model has to work out the modality itself
    bf16 = computes_in_bf16(accelerator, config.precision)
    parts: dict[str, torch.Tensor] = {}

    def forward(rows: slice):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(pixels[rows].to(device), phrases, None if known is None else known[rows], truth.jittered[rows])
        return in_float32(out)

    def loss_of(out) -> torch.Tensor:
        parts.update(losses(out, truth, pixels.shape[-1], hierarchy=config.hierarchy))
        loss = total(parts)
        if not torch.isfinite(loss):
            _stop(config.out, step, names, loss, parts)
        parts["total"] = loss
        return loss

    size = config.batch_size
    rows = [slice(k, k + size) for k in range(0, size * config.accumulation, size)]
    if len(rows) == 1:
        accelerator.backward(loss_of(forward(rows[0])))
    else:
        accumulated(accelerator, model, forward, loss_of, rows, seed=config.seed + step * config.accumulation)
    return parts.pop("total").detach(), parts


def _stop(out: Path, step: int, names: Sequence[str], loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    """``out``/bad_batch.json, and a CheckpointError that names the batch."""
    wrong = [name for name, part in parts.items() if not torch.isfinite(part)]
    row = {"step": step, "loss": str(loss.item()), "parts": wrong, "images": list(names)}
    write_atomic(out / "bad_batch.json", json.dumps(row, indent=1))
    some = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    raise CheckpointError(
        f"step {step}: the loss is {loss.item()} ({', '.join(wrong)}); images: {some} (all in "
        f"{out / 'bad_batch.json'}); lower lr, or look at them"
    )


def finish(config: TrainConfig, data: Data, model_config: MedGLIPConfig, state: dict, **run: object) -> None:
    """Checkpoint, calibration, what was forgotten, and the model card: the main process's work after training."""
    tree = load_label_tree()
    save_checkpoint(config.out, model_config, state)
    samples = [data.images[k] for k in data.held_out]
    calibrated, familiar = calibrate(load_checkpoint(config.out), samples)
    forgotten = None
    if config.init is not None:
        shown = {x for sample in samples for label in sample.regions.labels for x in _with_broader(label, tree)}
        calibrated = keep_thresholds(calibrated, load_checkpoint(config.init).config, shown)
    save_checkpoint(config.out, calibrated, state | {"familiar": familiar})
    save_run_info(config, config.out, **run, phrases=len(model_config.phrases))
    if config.init is not None and (config.forgetting or data.old):
        store = open_store(config.forgetting) if config.forgetting else data.images
        rows = list(range(len(store))) if config.forgetting else data.old
        forgotten = write_forgetting(config.out, config.init, store, rows)
    roles = {"Trained on": data.stores[0]} | {f"Replayed ({k})": x for k, x in enumerate(data.stores[1:], 1)}
    shown_settings = {key: value for key, value in dataclasses.asdict(config).items() if key in SETTINGS}
    write_model_card(config.out, calibrated, roles, shown_settings | run, tree, forgotten)


SETTINGS = (
    *("steps", "batch_size", "accumulation", "lr", "trunk_lr", "weight_decay", "ema", "augment", "tiles", "scales"),
    *("trunk", "pretrained", "text_encoder", "image_size", "width", "fusion", "adapters", "mask_head", "hierarchy"),
    *("partial_negatives", "replay_share", "calibration", "seed"),
)


def _with_broader(label: str, tree: LabelTree) -> list[str]:
    return [label, *(tree.broader(label) if label in tree.nodes else [])]


def train(config: TrainConfig) -> None:
    """Everything between the configuration and the checkpoint in ``config.out``."""
    store = open_store(config.store)
    check_forbidden(config.store, config.forbid)
    tree = load_label_tree()
    data = None if config.detector else load_data(config, store, tree)
    accelerator = setup(config.batch_size, config.seed, PATIENCE if data else None, clip=config.clip)
    config.out.mkdir(parents=True, exist_ok=True)
    if data is None:
        from grounding.zero_shot_train import fit_detector

        fit_detector(accelerator, config, store)
        accelerator.end_training()
        return
    model_config, state = fit(accelerator, config, data)
    with others_wait(accelerator):
        if accelerator.is_main_process:
            bf16 = computes_in_bf16(accelerator, config.precision)
            finish(config, data, model_config, state, processes=accelerator.num_processes, bf16=bf16)
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        train(load_config(TrainConfig, options.config, options.overrides))
    except (ConfigError, StoreError, CheckpointError, OSError) as error:
        sys.exit(f"grounding.train: {error}")
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        sys.exit(
            "grounding.train: another process has died, or did not answer for too long; see its output. The same "
            f"command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        )


if __name__ == "__main__":
    main()
