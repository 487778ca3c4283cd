"""How well a checkpoint of stage one does on sources that it was not trained on: by region–phrase likeness alone.

    python -m grounding.left_out checkpoint=runs/stage-one store=data/val/store sources=kvasir-seg out=left_out.json

The dense head is untrained then, so nothing proposes boxes. Given an annotated box, which phrase is likest; and given a
phrase, which of a fixed grid of boxes. Beside each score stands what drawing at random gives, and for boxes the best
that any choice from the grid could give. Dimension key: N regions, G grid boxes, V phrases. Boxes are xyxy in [0, 1].
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configs import ConfigError, load_config, write_atomic
from eval.grounding import class_of, grounding_scores, pairwise_iou
from eval.statistics import mean_score
from eval.types import Score, plain
from grounding.data import broader
from grounding.images import read_image, to_pixel_values
from grounding.labels import LabelTree, load_label_tree
from grounding.model import MODALITIES, CheckpointError, MedGLIP, load_checkpoint
from grounding.store import Store, StoreError, open_store
from grounding.text import PhraseBatch, PhraseEncoder
from grounding.types import GroundingSample, RegionSet

VERSION = "1"
SIDES, ASPECTS = (0.12, 0.18, 0.27, 0.4, 0.6, 0.9), (0.5, 1.0, 2.0)  # of the image; width over height
OVERLAP = 3  # a grid box moves by a third of its side


class Part:
    """Some rows of a store, as `grounding.data.phrase_targets` and the mixture look at it."""

    def __init__(self, store: Store, rows: Sequence[int]):
        self.store, self.rows = store, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list:
        values = self.store.column(name)
        return [values[k] for k in self.rows]

    def labels_with_attributes(self) -> tuple[set[str], set[tuple[str, str, str]]]:
        """As `Store.labels_with_attributes`, of these rows alone."""
        if len(self.rows) == len(self.store):
            return self.store.labels_with_attributes()
        labels: set[str] = set()
        values: set[tuple[str, str, str]] = set()
        for k in self.rows:
            regions = self.store[k].regions
            labels.update(regions.labels)
            for label, row in zip(regions.labels, regions.attributes or [{}] * len(regions), strict=True):
                values.update((label, name, value) for name, value in row.items())
        return labels, values


def grid_boxes() -> np.ndarray:
    """(G, 4) float32: squares and upright and lying boxes of SIDES, over the whole image."""
    boxes = []
    for side in SIDES:
        for aspect in ASPECTS:
            width, height = min(1, side * aspect**0.5), min(1, side / aspect**0.5)
            columns, rows = (np.linspace(0, 1 - x, max(1, round((1 - x) / x * OVERLAP) + 1)) for x in (width, height))
            x, y = (one.reshape(-1) for one in np.meshgrid(columns, rows))
            boxes.append(np.stack([x, y, x + width, y + height], 1))
    return np.concatenate(boxes).clip(0, 1).astype(np.float32)


@dataclass
class _Judge:
    """A checkpoint and the phrases that it chooses from, one a label."""

    model: MedGLIP
    labels: list[str]
    phrases: PhraseBatch
    tree: LabelTree

    @torch.no_grad()
    def logits(self, sample: GroundingSample, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) in the image → (N, V) region–phrase logits."""
        config = self.model.config
        pixels, place = to_pixel_values(read_image(sample.image).pixels, config.image_size)
        modality = None  # of one that it never met it has no prompts
        if sample.modality in config.modalities:
            modality = F.one_hot(torch.tensor([MODALITIES.index(sample.modality)]), len(MODALITIES)).float()
        given = place.apply(torch.from_numpy(boxes))[None]
        out = self.model(pixels[None], self.phrases, modality, given)
        assert out.regions is not None
        return out.regions.logits[0].numpy()

    def names(self, label: str) -> np.ndarray:
        """(V,) bool: the phrases that are right for a region of that label."""
        right = {label, *broader(label, self.tree)}
        return np.array([x in right for x in self.labels])


def left_out_scores(checkpoint: Path, store: Store, sources: Sequence[str]) -> dict[str, Any]:
    """Source → what the head of this file speaks of, JSON-ready: `phrase` (out of all labels of the store) and
    `own phrase` (out of the source's; None where it has but one) for annotated boxes, `acc@0.5` and `pointing` for grid
    boxes, each {"score", "chance"}, acc@0.5 also "best"; images and regions. Intervals are over patients."""
    tree = load_label_tree()
    model = load_checkpoint(checkpoint)
    used, _ = store.labels_with_attributes()
    labels = sorted({x for label in used for x in (label, *broader(label, tree))})
    names = [tree.phrase(x) if x in tree.nodes else x for x in labels]
    judge = _Judge(model, labels, PhraseEncoder(model.config.text_encoder).encode(names), tree)
    rows = store.column("source")
    return {source: _scores(judge, [store[k] for k, name in enumerate(rows) if name == source]) for source in sources}


def _scores(judge: _Judge, samples: list[GroundingSample]) -> dict[str, Any]:
    samples = [sample for sample in samples if len(sample.regions)]
    grid = grid_boxes()
    own = np.array([bool(sum(judge.names(x)[k] for x in _labels(samples))) for k in range(len(judge.labels))])
    chosen: list[tuple[bool, float, bool, float, str]] = []
    tops, drawn = {}, []
    for sample in tqdm(samples, desc="left out", mininterval=2):
        regions = sample.regions
        logits = judge.logits(sample, np.concatenate([regions.boxes, grid]))
        for label, row in zip(regions.labels, logits, strict=False):
            right = judge.names(label)
            best, best_own = row.argmax(), np.where(own, row, -np.inf).argmax()
            chance = (right.mean(), right[own].mean())
            chosen.append((right[best], chance[0], right[best_own], chance[1], sample.patient_id))
        tops[sample.image_id] = _top_boxes(judge, regions, grid, logits[len(regions) :])
        drawn += [(*row, sample.patient_id) for row in _by_chance(regions, grid, judge.tree)]
    truth = {sample.image_id: sample.regions for sample in samples}
    patients = {sample.image_id: sample.patient_id for sample in samples}
    found = grounding_scores(tops, truth, patients, judge.tree)["overall"]
    return {
        "images": len(samples),
        "regions": len(chosen),
        "phrases": len(judge.labels),
        "phrase": _entry("phrase", chosen, 0),
        "own phrase": _entry("own phrase", chosen, 2) if len(set(_labels(samples))) > 1 else None,
        "acc@0.5": {
            "score": plain(found["acc@0.5"], per_sample=False),
            "chance": float(np.mean([row[0] for row in drawn])),
            "best": float(np.mean([row[1] for row in drawn])),
        },
        "pointing": {
            "score": plain(found["pointing"], per_sample=False),
            "chance": float(np.mean([row[2] for row in drawn])),
        },
    }


def _labels(samples: Sequence[GroundingSample]) -> list[str]:
    return sorted({label for sample in samples for label in sample.regions.labels})


def _entry(name: str, rows: list[tuple], column: int) -> dict[str, Any]:
    score: Score = mean_score(name, VERSION, [float(row[column]) for row in rows], [row[-1] for row in rows])
    return {"score": plain(score, per_sample=False), "chance": float(np.mean([row[column + 1] for row in rows]))}


def _top_boxes(judge: _Judge, regions: RegionSet, grid: np.ndarray, logits: np.ndarray) -> RegionSet:
    """The likest grid box of each label of the image."""
    labels = sorted(set(regions.labels))
    columns = [judge.labels.index(label) for label in labels]
    best = logits[:, columns].argmax(0)
    scores = 1 / (1 + np.exp(-logits[best, columns].clip(-30, 30)))
    return RegionSet(grid[best], labels, regions.image_size, scores)


def _by_chance(regions: RegionSet, grid: np.ndarray, tree: LabelTree) -> list[tuple[float, float, float]]:
    """Of each class of the image: the share of grid boxes that hit, whether any does, the share that point into it."""
    classes = [class_of(label, tree) for label in regions.labels]
    centres, rows = (grid[:, :2] + grid[:, 2:]) / 2, []
    for name in sorted(set(classes)):
        truth = regions.boxes[[k for k, other in enumerate(classes) if other == name]]
        hits = pairwise_iou(grid, truth).max(1) >= 0.5
        inside = (truth[None, :, :2] <= centres[:, None]) & (centres[:, None] <= truth[None, :, 2:])
        rows.append((float(hits.mean()), float(hits.any()), float(inside.all(-1).any(1).mean())))
    return rows


@dataclass(frozen=True)
class LeftOutConfig:
    """``sources``: of ``store``; none means all. ``out``: a JSON file."""

    checkpoint: Path
    store: Path
    sources: tuple[str, ...] = ()
    out: Path | None = None


def report(config: LeftOutConfig) -> dict[str, Any]:
    """Scores, prints and writes. Raises StoreError for a source that is not there."""
    store = open_store(config.store)
    known = sorted(set(store.column("source")))
    if unknown := sorted(set(config.sources) - set(known)):
        raise StoreError(f"{config.store}: no source {unknown[0]!r}; it has: {', '.join(known)}")
    scores = left_out_scores(config.checkpoint, store, config.sources or known)
    for source, row in scores.items():
        print(f"{source}: {row['images']} images, {row['regions']} regions, {row['phrases']} phrases")
        for name in ("phrase", "own phrase", "acc@0.5", "pointing"):
            if row[name]:
                best = f", best possible {row[name]['best']:.3f}" if "best" in row[name] else ""
                print(f"  {name}: {Score(**row[name]['score'])} (chance {row[name]['chance']:.3f}{best})")
    if config.out:
        write_atomic(config.out, json.dumps(scores, indent=1))
    return scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        report(load_config(LeftOutConfig, options.config, options.overrides))
    except (ConfigError, StoreError, CheckpointError, OSError) as error:
        sys.exit(f"grounding.left_out: {error}")


if __name__ == "__main__":
    main()
