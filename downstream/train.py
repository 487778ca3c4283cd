"""Train a bridge: questions and reports about a region store, with the regions given by one route.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m downstream.train \
        --config configs/downstream/brain.yaml route=tokens data=data/train out=runs/tokens

Setup → model → data → loop → save → model card. The same command runs on DDP and DeepSpeed ZeRO-2/3 with another
configs/accelerate file. Which sample is seen when, and with which regions, depends on seed and step alone: it is
the same for each route, and after a resume. With `val` the checkpoint is the best one, judged by what it generates.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.integrations import unset_hf_deepspeed_config

from bridges.projector import ProjectorConfig
from bridges.region_vlm import LORA_KINDS, LORA_TARGETS, BridgeConfig, RegionVLM, embedding_scale
from bridges.routes import ROUTES
from configs import load_config, save_run_info
from downstream.answerer import Answerer
from downstream.base import Base, BaseModelError
from downstream.bridge_card import write_bridge_card
from downstream.controls import BlankImages
from downstream.data import TrainingData
from downstream.embedded import load_base
from downstream.prompts import IGNORED, Batch
from downstream.sources import TokenTable, check_source, read_table
from downstream.validation import METRICS, Validation, open_validation
from grounding.audit import check_forbidden
from grounding.curves import TrainingLog, draw_curves
from grounding.labels import LabelTree, load_label_tree
from grounding.store import Store, open_store
from grounding.training_state import (
    PRECISIONS,
    computes_in_bf16,
    learning_rate,
    resume_step,
    save_state,
    setup,
)
from grounding.types import RegionTokens

SAVED = ("route", "k", "names", "presence", "cite_answers", "max_answer")  # what a checkpoint has to be asked with


@dataclass(frozen=True)
class TrainConfig:
    """`data` holds store/, questions.jsonl and reports.jsonl; `predicted` and `annotated` are its region-token files.

    A sample gets its annotated regions with probability `annotated_share`, else those of `source` (the predicted ones,
    or what takes their place: `downstream.sources.open_source`); none at all with `region_dropout`; their features are
    zeroed with `feature_dropout`, so that both controls are familiar at the test. Of `steps`, the first `align_steps`
    train lists of regions (see `TrainingData`), the others questions and reports; in the first `projector_steps` the
    two projectors learn alone, with LoRA at rest. `batch_size` is a process's, in rows;
    a row holds up to `pack` questions and reports of one image. `accumulation`: batches of a step in each process; one
    process with two of them learns what two processes do. `names`: regions stand in a prompt with their names,
    `presence`: what was not found with its probability (see `downstream.prompts`). `cite_answers`: answers cite
    regions, as reports do. `blank_image`: every image is grey (control). `limit`: that many questions and reports at
    most. `forbid`: region stores that must have nothing in common with data/store.

    `lr` is LoRA's, `bridge_lr` that of the two projectors. `precision`: fp32, bf16 (products in bfloat16; all weights
    stay float32), or auto, which takes bf16 where the hardware is faster at it. `base`: "embedded", or a folder or hub
    id of an image-text-to-text model of transformers. `lora_kind`, `lora_targets` (names of linear layers) and
    `four_bit` (QLoRA): see `BridgeConfig`. `checkpointing`: activations are computed again in the backward pass, for
    less memory.

    `val`: a folder like `data`, with region tokens in `val_predicted` (or in `predicted`, if that has its images, too).
    Every `eval_every` steps and at the end, `metric` is taken of what is generated for `val_samples` of its samples
    with predicted regions; the checkpoint is the best one then. After `patience` evaluations without a better one (0:
    never) the training stops.
    """

    data: Path
    predicted: Path
    annotated: Path
    out: Path
    base: str = "embedded"
    route: str = "tokens"
    source: str = "predicted"
    k: int = 8
    steps: int = 400
    align_steps: int = 130
    projector_steps: int = 0
    batch_size: int = 8
    pack: int = 1
    accumulation: int = 1
    names: bool = False
    presence: bool = False
    cite_answers: bool = False
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
    blank_image: bool = False
    precision: str = "auto"
    save_every: int = 0
    resume: bool = True
    limit: int | None = None
    forbid: tuple[Path, ...] = ()
    val: Path | None = None
    val_predicted: Path | None = None
    val_samples: int = 200
    eval_every: int = 50
    patience: int = 0
    metric: str = "accuracy"

    def __post_init__(self):
        if self.route not in ROUTES:
            raise ValueError(f"route={self.route!r}; known: {', '.join(ROUTES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.lora_kind not in LORA_KINDS:
            raise ValueError(f"lora_kind={self.lora_kind!r}; known: {', '.join(LORA_KINDS)}")
        check_source(self.source)
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r}; known: {', '.join(METRICS)}")
        positive = ("steps", "batch_size", "pack", "accumulation", "k", "max_answer", "val_samples", "eval_every")
        if any(getattr(self, name) < 1 for name in positive) or self.patience < 0:
            raise ValueError(f"{', '.join(positive)} must be positive, patience not negative")
        if not 0 <= self.projector_steps <= self.steps:
            raise ValueError(f"projector_steps={self.projector_steps}: give 0 to steps={self.steps}")
        if self.val is None and (self.val_predicted or self.patience):
            raise ValueError("val_predicted and patience go with val=FOLDER, the samples to judge by")


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


def optimizer_of(vlm: RegionVLM, config: TrainConfig) -> torch.optim.Optimizer:
    """LoRA and the two projectors, each with its own learning rate (`rates`)."""
    lora = [p for name, p in vlm.named_parameters() if "lora_" in name]
    bridge = [p for name, p in vlm.named_parameters() if p.requires_grad and "lora_" not in name]
    groups = [{"params": lora, "lr": config.lr}, {"params": bridge, "lr": config.bridge_lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)


def rates(config: TrainConfig, step: int) -> tuple[float, float]:
    """Learning rates of LoRA and of the projectors. At rest LoRA stays in the graph: DDP and ZeRO want the same
    gradients in every step."""
    part = learning_rate(step, config.steps, config.warmup)
    return config.lr * part if step >= config.projector_steps else 0.0, config.bridge_lr * part


def backward(
    accelerator: Accelerator, model: torch.nn.Module, config: TrainConfig, data: TrainingData, step: int
) -> tuple[torch.Tensor, list[int]]:
    """Leaves the gradient of a step in the parameters. This process's loss, and how many tokens each row has."""
    world, rank, parts = accelerator.num_processes, accelerator.process_index, config.accumulation
    bf16 = computes_in_bf16(accelerator, config.precision, cpu=True)
    losses, lengths = [], list[int]()
    for k in range(parts):
        batch = data.batch(step, world * parts, world * k + rank)
        lengths += (batch.inputs["input_ids"] != data.base.tokenizer.pad_token_id).sum(1).tolist()
        accelerator.sync_gradients = k == parts - 1
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                loss = step_loss(model, batch.to(accelerator.device))
            accelerator.backward(loss / parts)
        losses.append(loss.detach())
    return torch.stack(losses).mean(), lengths


def fit(accelerator: Accelerator, config: TrainConfig) -> None:
    """Model, data, loop, save. Raises BaseModelError for a loss that is not finite."""
    # Else transformers splits the model over the processes while it is built. It is needed whole here (its fingerprint,
    # the scale of its embeddings); ZeRO-3 splits it in `prepare`.
    unset_hf_deepspeed_config()
    with accelerator.main_process_first():
        base = load_base(config.base, config.four_bit)
    tables = {"predicted": read_table(config.predicted), "annotated": read_table(config.annotated)}
    tree = load_label_tree()
    data = load_data(config, base, tree, tables)
    told = "annotated" if tables["annotated"].tokens.valid.any() else "predicted"  # question sets have no annotations
    vlm = build_vlm(config, base, tree, tables[told])
    model, optimizer = accelerator.prepare(vlm, optimizer_of(vlm, config))
    model.train()
    start = resume_step(accelerator, config.out, trained_only=True) if config.resume else 0
    validation = None
    if config.val is not None:
        validation = open_validation(accelerator, config, _images(config, open_store(config.val / "store")), start)
    log = TrainingLog(config.out, start, tensorboard=False) if accelerator.is_main_process else None
    answerer = Answerer(vlm, base, tree, hash="", **{name: getattr(config, name) for name in SAVED})
    lengths: list[int] = []
    quiet, title = not accelerator.is_main_process, f"route {config.route}"
    bar = tqdm(total=config.steps, initial=start, desc=title, disable=quiet, mininterval=2)
    for step in range(start, config.steps):
        if validation and validation.is_over:
            break
        began = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates(config, step), strict=True):
            group["lr"] = rate
        loss, rows = backward(accelerator, model, config, data, step)
        lengths += rows
        mean = accelerator.reduce(loss, "mean").item()
        if not math.isfinite(mean):  # in all processes: one that stopped alone would leave the others waiting
            raise BaseModelError(f"step {step}: the loss is {mean}; lower lr")
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if log:
            rate = optimizer.param_groups[0]["lr"]
            log.add({"step": step, "loss": mean, "lr": rate, "seconds": round(time.perf_counter() - began, 3)})
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
        if validation and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            if validation.judge(accelerator, answerer, step):
                save(accelerator, config, model, vlm, step + 1)
            model.train()
        if config.save_every and (step + 1) % config.save_every == 0:
            save_state(accelerator, config.out, step + 1, trained_only=True)
    bar.close()
    if validation is None or validation.best is None:
        save(accelerator, config, model, vlm, config.steps)
    if log:
        draw_curves(log.path, config.out / "curves.png")
        finish(accelerator, config, data, tables, validation, lengths)
    accelerator.wait_for_everyone()


def load_data(config: TrainConfig, base: Base, tree: LabelTree, tables: dict[str, TokenTable]) -> TrainingData:
    """The samples of `config.data`; with `blank_image` without what their images show."""
    data = TrainingData(config, base, tree, tables)
    data.store = _images(config, data.store)
    return data


def _images(config: TrainConfig, store: Store) -> Store | BlankImages:
    return BlankImages(store) if config.blank_image else store


def save(accelerator: Accelerator, config: TrainConfig, model: torch.nn.Module, vlm: RegionVLM, steps: int) -> None:
    """`out`/checkpoint; every process has to call this, since under ZeRO-3 each has a part of the weights."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        settings = {name: getattr(config, name) for name in SAVED} | {"steps": steps}
        vlm.save(config.out / "checkpoint", settings, state)
    accelerator.wait_for_everyone()


def finish(
    accelerator: Accelerator,
    config: TrainConfig,
    data: TrainingData,
    tables: dict[str, TokenTable],
    validation: Validation | None,
    lengths: list[int],
) -> None:
    """run.json and the model card: the main process's work after training."""
    facts = {
        "processes": accelerator.num_processes,
        "bf16": computes_in_bf16(accelerator, config.precision, cpu=True),
        "samples": len(data.samples),
        "tokens_attended": {"mean": sum(lengths) / len(lengths), "max": max(lengths)} if lengths else None,
        "left_out": {**asdict(data.dropped), "beyond_budget": data.beyond_budget},
        "best": validation and validation.best,
    }
    save_run_info(config, config.out, **facts)
    detectors = {name: table.detector for name, table in tables.items()}
    write_bridge_card(config.out, asdict(config) | facts, data.samples, detectors, validation and validation.rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file, such as configs/downstream/brain.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        accelerator = setup(config.batch_size, config.seed, clip=config.clip)
        check_forbidden(config.data / "store", config.forbid)
        config.out.mkdir(parents=True, exist_ok=True)
        fit(accelerator, config)
        accelerator.end_training()
    except (BaseModelError, ValueError, OSError) as error:  # ours are ValueErrors: configuration, store, regions, image
        sys.exit(f"downstream.train: {error}")


if __name__ == "__main__":
    main()
