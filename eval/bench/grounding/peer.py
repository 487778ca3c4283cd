"""Trains one peer for some minutes, or lets a trained one predict; `eval.bench.grounding` starts it as a process.

python -m eval.bench.grounding.peer train   fcos --data runs/bench-grounding/data --out DIR --minutes 15
python -m eval.bench.grounding.peer predict fcos --data runs/bench-grounding/data --out DIR [--images few]
"""

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm import tqdm

from configs import write_atomic
from eval.bench.grounding.data import Example, collate, draw, read_examples
from eval.bench.grounding.detection import coco_results

PEERS = {  # module and class: a peer does not wait for the import of another
    "grounding-dino": ("query_detectors", "GroundingDino"),
    "rt-detr": ("query_detectors", "RTDetr"),
    "fcos": ("closed_set", "ClosedSet"),
    "u-net": ("unet", "UNet"),
}
WARM_UP = 0.03  # of the time
PREDICT_BATCH = 8


def build(name: str, trunk: str, size: int, vocabulary: Mapping[str, str], seed: int) -> nn.Module:
    """A fresh peer. A peer is a module with `loss(batch)`, `detect(batch)`, `slow_parameters()` (those that were
    trained before) and its settings: batch_size, rate, trunk_rate, decay, clip. vocabulary: label → phrase."""
    module, kind = PEERS[name]
    torch.manual_seed(seed)
    return getattr(importlib.import_module(f"eval.bench.grounding.{module}"), kind)(trunk, size, vocabulary)


def train(
    peer: nn.Module, examples: Sequence[Example], classes: Mapping[str, int], size: int, seconds: float, seed: int
) -> list[dict]:
    """Steps until the time is up; a row a step: {"step", "loss", "seconds"}. The rate warms up, then falls as a cosine
    of the time that is spent. Raises ValueError where the loss is not finite."""
    slow = {id(p) for p in peer.slow_parameters()}
    groups = [[p for p in peer.parameters() if p.requires_grad and (id(p) in slow) == is_slow] for is_slow in (0, 1)]
    rates = (peer.rate, peer.trunk_rate)
    optimizer = torch.optim.AdamW(
        [{"params": g, "lr": r} for g, r in zip(groups, rates, strict=True)], weight_decay=peer.decay
    )
    peer.train()
    log: list[dict] = []
    bar = tqdm(total=round(seconds), desc="training", unit="s", mininterval=2)
    began = last = time.perf_counter()
    for step, rows in enumerate(draw(examples, peer.batch_size, seed)):
        share = (last - began) / seconds
        if share >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(share)
        loss = peer.loss(collate(rows, classes, size))
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; images: {', '.join(e.image_id for e in rows)}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group], peer.clip)
        optimizer.step()
        now = time.perf_counter()
        log.append({"step": step, "loss": round(loss.item(), 5), "seconds": round(now - last, 4)})
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update(min(round(now - began), bar.total) - bar.n)
        last = now
    bar.close()
    return log


def schedule(share: float) -> float:
    """Share of the time → share of the rate: linear warm-up, then a cosine to 2 %."""
    if share < WARM_UP:
        return 0.02 + 0.98 * share / WARM_UP
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def predict(peer: nn.Module, examples: Sequence[Example], classes: Mapping[str, int], size: int) -> list[dict]:
    """COCO results; image k has id k + 1."""
    peer.eval()
    rows: list[dict] = []
    for start in tqdm(range(0, len(examples), PREDICT_BATCH), desc="prediction", mininterval=2):
        batch = collate(examples[start : start + PREDICT_BATCH], classes, size)
        for k, (found, frame) in enumerate(zip(peer.detect(batch), batch.frames, strict=True), start + 1):
            rows += coco_results(found, frame, k)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "predict"))
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--data", type=Path, required=True, help="what eval.bench.grounding prepared")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--images", default="val", help="the part of the data to predict on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    about = json.loads((options.data / "about.json").read_text())
    classes = {label: k for k, label in enumerate(about["vocabulary"])}
    peer = build(options.name, about["trunk"], about["image_size"], about["vocabulary"], options.seed)
    try:
        if options.what == "train":
            examples = read_examples(options.data / "train.parquet")
            log = train(peer, examples, classes, about["image_size"], options.minutes * 60, options.seed)
            write_atomic(options.out / "train_log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            partial = options.out / ".model.safetensors"
            save_model(peer, str(partial))
            os.replace(partial, options.out / "model.safetensors")
        else:
            load_model(peer, str(options.out / "model.safetensors"))
            rows = predict(
                peer, read_examples(options.data / f"{options.images}.parquet"), classes, about["image_size"]
            )
            write_atomic(options.out / f"{options.images}_results.json", json.dumps(rows))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.bench.grounding.peer: {options.name}: {error}")


if __name__ == "__main__":
    main()
