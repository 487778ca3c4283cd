"""Train MedGLIP on a region store.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m grounding.train \
        --config configs/grounding/brain.yaml store=data/train/store out=runs/grounder

Setup → data → model → loop → calibration → save. The same command runs on DDP and DeepSpeed ZeRO-2/3 with another
configs/accelerate file, and resumes from the last complete checkpoint in ``out`` to the same losses.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info, write_atomic
from grounding.audit import check_forbidden
from grounding.calibrate import calibrate
from grounding.data import Collator, phrase_targets, vocabulary
from grounding.labels import load_label_tree
from grounding.losses import losses, total
from grounding.mixture import Mixture
from grounding.model import CheckpointError, MedGLIPConfig, build_model, load_checkpoint, save_checkpoint
from grounding.store import Store, StoreError, open_store
from grounding.text import PhraseEncoder


@dataclass(frozen=True)
class TrainConfig:
    """``batch_size`` is a process's. The last ``calibration`` images of the store are held out to calibrate scores.
    Sources are mixed with ``temperature`` (`grounding.mixture`). ``forbid``: stores that must have nothing in common
    with this one. ``workers``: processes that read images ahead."""

    store: Path
    out: Path
    steps: int = 800
    batch_size: int = 16
    lr: float = 1e-3
    trunk_lr: float = 3e-4
    weight_decay: float = 0.02
    warmup: int = 40
    clip: float = 5.0
    seed: int = 0
    trunk: str = "embedded"
    image_size: int = 192
    width: int = 128
    calibration: int = 96
    temperature: float = 2.0
    forbid: tuple[Path, ...] = ()
    workers: int = 0
    save_every: int = 0
    resume: bool = True

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.image_size, self.calibration) < 1 or self.image_size % 32:
            raise ValueError("steps, batch_size and calibration must be positive, image_size a multiple of 32")


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def setup(batch_size: int, seed: int) -> Accelerator:
    """Raises ConfigError where the processes did not join: separate copies would train in silence."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    alone = not torch.accelerator.is_available()
    # Without these two accelerate leaves CPU processes apart: DeepSpeed needs gloo, DDP has to be told "cpu".
    gloo = [InitProcessGroupKwargs(backend="gloo")] if alone and world > 1 else []
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    try:
        accelerator = Accelerator(cpu=alone and not deepspeed, kwargs_handlers=gloo)
    except ValueError as error:
        raise ConfigError(f"{world} processes were launched but cannot join: {error}") from error
    apart = world > 1 and accelerator.distributed_type == DistributedType.NO
    if accelerator.num_processes != world or apart:
        raise ConfigError(
            f"{world} processes were launched but did not join; check the --config_file of accelerate launch"
        )
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    set_seed(seed)
    return accelerator


def save_state(accelerator: Accelerator, out: Path, step: int) -> None:
    """``out``/checkpoints/step-N, complete or not there; the one before it is then removed."""
    folder = out / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f".partial-{step}")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
    accelerator.wait_for_everyone()


def resume_step(accelerator: Accelerator, out: Path) -> int:
    """Loads the last complete checkpoint; the step to go on with, 0 where there is none."""
    steps = [int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").glob("step-*")]
    if not steps:
        return 0
    accelerator.load_state(str(out / "checkpoints" / f"step-{max(steps)}"))
    return max(steps)


def cut_log(path: Path, start: int) -> None:
    """Keeps the rows before step ``start``: later ones belong to steps that are done again."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() and start else []
    write_atomic(path, "".join(row for row in rows if json.loads(row)["step"] < start))


@dataclass(frozen=True)
class Batches(Dataset):
    """Step → (image ids, pixel_values, phrase texts, Targets) of this process."""

    store: Store
    collate: Collator
    mixture: Mixture
    batch_size: int
    world: int
    rank: int

    def __getitem__(self, step: int):
        indices = self.mixture.indices(step, self.batch_size, self.world, self.rank)
        samples = [self.store[k] for k in indices]
        return [sample.image_id for sample in samples], *self.collate(samples, step)


def _same(batch):
    return batch


def fit(accelerator: Accelerator, config: TrainConfig, store: Store) -> tuple[MedGLIPConfig, dict]:
    """The loop. Returns the model's configuration and, on the main process, its state."""
    tree = load_label_tree()
    targets = phrase_targets(store, tree)
    modalities = tuple(sorted(set(store.column("modality"))))
    model_config = MedGLIPConfig(
        trunk=config.trunk,
        image_size=config.image_size,
        width=config.width,
        vocabulary=vocabulary(targets, tree),
        phrases=tuple(target.names[0] for target in targets),
        modalities=modalities,
    )
    encoder = PhraseEncoder(model_config.text_encoder)
    with accelerator.main_process_first():
        encoder.encode([name for target in targets for name in target.names])
    collate = Collator(targets, tree, config.image_size, config.seed)
    model = build_model(model_config, config.seed)
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": rest, "lr": config.lr}, {"params": trunk, "lr": config.trunk_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    sources = store.column("source")[: max(1, len(store) - config.calibration)]
    mixture = Mixture(sources, config.temperature, config.seed)
    ranks = (accelerator.num_processes, accelerator.process_index)
    start = resume_step(accelerator, config.out) if config.resume else 0
    batches = Batches(store, collate, mixture, config.batch_size, *ranks)
    loader = DataLoader(batches, None, sampler=range(start, config.steps), num_workers=config.workers, collate_fn=_same)
    bar = tqdm(
        total=config.steps, initial=start, desc="grounding", disable=not accelerator.is_main_process, mininterval=2
    )
    log_path = config.out / "train_log.jsonl"
    if accelerator.is_main_process:
        cut_log(log_path, start)
    began = time.perf_counter()
    for step, (names, pixels, texts, truth) in zip(range(start, config.steps), loader, strict=True):
        for group, rate in zip(optimizer.param_groups, (config.lr, config.trunk_lr), strict=True):
            group["lr"] = rate * learning_rate(step, config.steps, config.warmup)
        truth = truth.to(accelerator.device)
        one_hot = torch.nn.functional.one_hot(truth.modality, 8).float()
        known = one_hot if step % 4 else None  # every fourth step the model has to work out the modality itself
        out = model(pixels.to(accelerator.device), encoder.encode(texts), known, truth.jittered)
        parts = losses(out, truth, config.image_size)
        loss = total(parts)
        if not torch.isfinite(loss):
            raise CheckpointError(
                f"step {step}: the loss is {loss.item()}; images: {', '.join(names)}; lower lr, or look at them"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        if accelerator.is_main_process:
            row = {"step": step, "loss": mean, **{name: round(part.item(), 5) for name, part in parts.items()}}
            row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - began, 3)}
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
            began = time.perf_counter()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1)
    bar.close()
    return model_config, accelerator.get_state_dict(model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        store = open_store(config.store)
        check_forbidden(config.store, config.forbid)
        accelerator = setup(config.batch_size, config.seed)
        config.out.mkdir(parents=True, exist_ok=True)
        model_config, state = fit(accelerator, config, store)
        if accelerator.is_main_process:
            save_checkpoint(config.out, model_config, state)
            held_out = [store[k] for k in range(max(0, len(store) - config.calibration), len(store))]
            calibrated, familiar = calibrate(load_checkpoint(config.out), held_out)
            save_checkpoint(config.out, calibrated, state | {"familiar": familiar})
            save_run_info(config, config.out, processes=accelerator.num_processes, phrases=len(model_config.phrases))
        accelerator.wait_for_everyone()
        accelerator.end_training()
    except (ConfigError, StoreError, CheckpointError, OSError) as error:
        sys.exit(f"grounding.train: {error}")


if __name__ == "__main__":
    main()
