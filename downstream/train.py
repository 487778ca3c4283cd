"""Train a bridge: questions and reports about a region store, with the regions given by one route.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m downstream.train \
        --config configs/downstream/brain.yaml route=tokens data=data/train out=runs/tokens

Setup → model → data → loop → save. The same command runs on DDP and DeepSpeed ZeRO-2/3 with another configs/accelerate
file. Which sample is seen when, and with which regions, depends on the seed and the step alone: it is the same for each
route, and after a resume.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.integrations import unset_hf_deepspeed_config

from bridges.projector import ProjectorConfig
from bridges.region_vlm import LORA_KINDS, LORA_TARGETS, BridgeConfig, RegionVLM, embedding_scale
from bridges.routes import ROUTES
from configs import load_config, save_run_info
from downstream.base import Base, BaseModelError
from downstream.data import TrainingData
from downstream.embedded import load_base
from downstream.prompts import IGNORED, Batch
from downstream.sources import TokenTable, read_table
from grounding.audit import check_forbidden
from grounding.labels import LabelTree, load_label_tree
from grounding.train import cut_log, learning_rate, setup
from grounding.types import RegionTokens

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """`data` holds store/, questions.jsonl and reports.jsonl; `predicted` and `annotated` are its region-token files.

    A sample gets its annotated regions with probability `annotated_share`, else the predicted ones; none at all with
    `region_dropout`; their features are zeroed with `feature_dropout`, so that both controls are familiar at the test.
    Of `steps`, the first `align_steps` train lists of regions (see `TrainingData`), the others questions and reports.
    `batch_size` is a process's, in rows; a row holds up to `pack` questions and reports of one image. `names`: regions
    stand in a prompt with their names (see `downstream.prompts`). `limit`: that many questions and
    reports at most. `forbid`: region stores that must have nothing in common with data/store. `lr` is LoRA's,
    `bridge_lr` that of the two projectors. `precision`: fp32,
    bf16 (products in bfloat16; all weights stay float32), or auto, which takes bf16 where the hardware is faster at it.
    `base`: "embedded", or a folder or hub id of an image-text-to-text model of transformers. `lora_kind`,
    `lora_targets` (names of linear layers) and `four_bit` (QLoRA): see `BridgeConfig`. `checkpointing`: activations are
    computed again in the backward pass, for less memory.
    """

    data: Path
    predicted: Path
    annotated: Path
    out: Path
    base: str = "embedded"
    route: str = "tokens"
    k: int = 8
    steps: int = 400
    align_steps: int = 130
    batch_size: int = 8
    pack: int = 1
    names: bool = False
    lr: float = 1e-3
    bridge_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 30
    clip: float = 1.0
    seed: int = 0
    lora_r: int = 16
    lora_layers: int | None = None
    lora_kind: str = "lora"
    lora_targets: tuple[str, ...] = LORA_TARGETS
    four_bit: bool = False
    checkpointing: bool = False
    max_answer: int = 160
    annotated_share: float = 0.5
    region_dropout: float = 0.1
    feature_dropout: float = 0.15
    precision: str = "auto"
    save_every: int = 0
    resume: bool = True
    limit: int | None = None
    forbid: tuple[Path, ...] = ()

    def __post_init__(self):
        if self.route not in ROUTES:
            raise ValueError(f"route={self.route!r}; known: {', '.join(ROUTES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.lora_kind not in LORA_KINDS:
            raise ValueError(f"lora_kind={self.lora_kind!r}; known: {', '.join(LORA_KINDS)}")
        if min(self.steps, self.batch_size, self.pack, self.k, self.max_answer) < 1:
            raise ValueError("steps, batch_size, pack, k and max_answer must be positive")


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
    """logits (B, A, V) and labels (B, A) → mean over samples of the mean over each one's answer tokens. A sample is a
    row, or of a packed row the labels with one value of `part` (B, A).

    A sample counts as one whatever its length, so that two batches of 4 weigh the same as one of 8.
    """
    counted = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    own = torch.stack([row, torch.zeros_like(row) if part is None else part], -1)[counted]
    _, sample, length = own.unique(dim=0, return_inverse=True, return_counts=True)
    return (losses * (1 / length)[sample]).sum() / len(length)


def step_loss(vlm: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Loss of one batch. Only the positions that predict an answer token go through the output layer, to save time."""
    out = vlm(batch.slots, **batch.inputs, logits_to_keep=batch.keep, use_cache=False)
    return answer_loss(out.logits, batch.labels, batch.part)


def _leave_out_frozen(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
    """The base model is half a gigabyte and never changes. (DeepSpeed saves by itself; there `weights` is empty.)"""
    for model, state in zip(models, weights, strict=False):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in state.keys() - trained:
            del state[name]


def save_state(accelerator: Accelerator, out: Path, step: int) -> None:
    """`out`/checkpoints/step-N, complete or not there; the one before it is then removed."""
    folder = out / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f".partial-{step}")
    frozen = {} if accelerator.state.deepspeed_plugin is None else {"exclude_frozen_parameters": True}
    accelerator.save_state(str(partial), **frozen)
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
    loose = "strict" if accelerator.state.deepspeed_plugin is None else "load_module_strict"
    accelerator.load_state(str(out / "checkpoints" / f"step-{max(steps)}"), **{loose: False})
    return max(steps)


def computes_in_bf16(accelerator: Accelerator, precision: str) -> bool:
    """Whether the loop autocasts. Where accelerate was launched with a mixed precision of its own, that holds."""
    if accelerator.mixed_precision != "no" or precision == "fp32":
        return False
    # On a CPU without these instructions bfloat16 is emulated, and slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return precision == "bf16" or (fast if accelerator.device.type == "cpu" else torch.cuda.is_bf16_supported())


def build_vlm(config: TrainConfig, base: Base, tree: LabelTree, table: TokenTable) -> RegionVLM:
    """A fresh bridge on `base`, the same for the same seed."""
    torch.manual_seed(config.seed)
    projector = ProjectorConfig(
        feature_dim=table.tokens.features.shape[-1],
        label_dim=table.tokens.label_vectors.shape[-1],
        width=base.model.config.get_text_config().hidden_size,
        scale=embedding_scale(base.model),
        slots=max(32, config.k),
    )
    bridge = BridgeConfig(
        base.name,
        base.fingerprint,
        base.region_token_id,
        projector,
        config.lora_r,
        config.lora_layers,
        config.lora_kind,
        config.lora_targets,
        config.four_bit,
    )
    vlm = RegionVLM(base.model, bridge)
    if config.checkpointing:
        vlm.gradient_checkpointing()
    vlm.projector.fit(table.tokens, label_words(base, tree, table.tokens))
    return vlm


def label_words(base: Base, tree: LabelTree, tokens: RegionTokens) -> dict[str, torch.Tensor]:
    """Each label of `tokens` → the mean input embedding (W) of its words in the language model."""
    embeddings = base.model.get_input_embeddings().weight.detach()
    labels = {label for row in tokens.labels for label in row if label}
    phrases = {label: tree.phrase(label) if label in tree.nodes else label for label in labels}
    ids = {x: base.tokenizer(f" {phrase}", add_special_tokens=False)["input_ids"] for x, phrase in phrases.items()}
    return {label: embeddings[row].mean(0) for label, row in ids.items()}


def fit(accelerator: Accelerator, config: TrainConfig) -> None:
    """Model, data, loop, save."""
    # Else transformers splits the model over the processes while it is built. It is needed whole here (its fingerprint,
    # the scale of its embeddings); ZeRO-3 splits it in `prepare`.
    unset_hf_deepspeed_config()
    with accelerator.main_process_first():
        base = load_base(config.base, config.four_bit)
    tables = {"predicted": read_table(config.predicted), "annotated": read_table(config.annotated)}
    tree = load_label_tree()
    data = TrainingData(config, base, tree, tables)
    told = "annotated" if tables["annotated"].tokens.valid.any() else "predicted"  # question sets have no annotations
    vlm = build_vlm(config, base, tree, tables[told])
    lora = [p for name, p in vlm.named_parameters() if "lora_" in name]
    bridge = [p for name, p in vlm.named_parameters() if p.requires_grad and "lora_" not in name]
    rates = (config.lr, config.bridge_lr)
    groups = [{"params": p, "lr": rate} for p, rate in zip((lora, bridge), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(vlm, optimizer)
    model.train()
    bf16 = computes_in_bf16(accelerator, config.precision)
    start = resume_step(accelerator, config.out) if config.resume else 0
    if accelerator.is_main_process:
        cut_log(config.out / "train_log.jsonl", start)
    world, rank = accelerator.num_processes, accelerator.process_index
    lengths: list[int] = []
    quiet, title = not accelerator.is_main_process, f"route {config.route}"
    bar = tqdm(total=config.steps, initial=start, desc=title, disable=quiet, mininterval=2)
    for step in range(start, config.steps):
        began = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, config.steps, config.warmup)
        batch = data.batch(step, world, rank)
        lengths += (batch.inputs["input_ids"] != base.tokenizer.pad_token_id).sum(1).tolist()
        batch = batch.to(accelerator.device)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            loss = step_loss(model, batch)
        if not torch.isfinite(loss):
            raise BaseModelError(f"step {step}: the loss is {loss.item()}; lower lr")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([*lora, *bridge], config.clip)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        if accelerator.is_main_process:
            rate = optimizer.param_groups[0]["lr"]
            _log(config.out, {"step": step, "loss": mean, "lr": rate, "seconds": round(time.perf_counter() - began, 3)})
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1)
    bar.close()
    state = accelerator.get_state_dict(model)  # on every rank: ZeRO-3 gathers the parts
    if accelerator.is_main_process:
        settings = {name: getattr(config, name) for name in ("route", "k", "names", "max_answer", "steps")}
        vlm.save(config.out / "checkpoint", settings, state)
        tokens = {"mean": sum(lengths) / len(lengths), "max": max(lengths)} if lengths else None
        save_run_info(config, config.out, processes=world, bf16=bf16, samples=len(data.samples), tokens_attended=tokens)
    accelerator.wait_for_everyone()


def _log(out: Path, row: dict) -> None:
    with (out / "train_log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file, such as configs/downstream/brain.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        accelerator = setup(config.batch_size, config.seed)
        accelerator.register_save_state_pre_hook(_leave_out_frozen)
        check_forbidden(config.data / "store", config.forbid)
        config.out.mkdir(parents=True, exist_ok=True)
        fit(accelerator, config)
        accelerator.end_training()
    except (BaseModelError, ValueError, OSError) as error:  # ours are ValueErrors: configuration, store, regions, image
        sys.exit(f"downstream.train: {error}")


if __name__ == "__main__":
    main()
