"""Calibration on held-out images: when a score counts as found, how likely a phrase is there, what a known image is."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from grounding.boxes import pairwise_iou
from grounding.detect import Grounder
from grounding.images import read_image
from grounding.labels import LabelTree, load_label_tree
from grounding.model import MedGLIP, MedGLIPConfig
from grounding.types import GroundingSample, RegionSet


@torch.no_grad()
def calibrate(model: MedGLIP, samples: Sequence[GroundingSample]) -> tuple[MedGLIPConfig, torch.Tensor]:
    """Thresholds a label (best F1), Platt scaling of presence and the familiarity limit, on held-out ``samples``.

    Returns the new configuration, and the trunk summaries (images, C) that familiarity is measured against.
    """
    grounder = Grounder(model, load_label_tree(), "")
    rows: dict[str, list[tuple[float, bool]]] = {label: [] for label in model.config.vocabulary}
    missed = dict.fromkeys(rows, 0)
    logits, present, pooled = [], [], []
    for sample in samples:
        pixels = read_image(sample.image).pixels
        out, (box,) = grounder._forward([pixels], [text for text, _ in grounder.vocabulary()], None)
        candidates = grounder._decode(out, 0, grounder.vocabulary(), box).candidates
        _score_candidates(candidates, sample, grounder.tree, rows, missed)
        for v, label in enumerate(model.config.vocabulary):
            truth = any(label == x or label in grounder.tree.broader(x) for x in sample.regions.labels)
            if truth or label in sample.labelled:
                logits.append(float(out.presence[0, v]))
                present.append(truth)
        pooled.append(F.normalize(out.pooled[0], dim=0))
    familiar = torch.stack(pooled).detach()
    likeness = familiar @ familiar.T - 2 * torch.eye(len(familiar))
    limit = 1 - 2 * (1 - float(likeness.max(1).values.min())) if len(familiar) > 1 else 0.0
    config = dataclasses.replace(
        model.config,
        thresholds={label: _best_threshold(rows[label], missed[label]) for label in rows},
        presence=_platt(np.array(logits), np.array(present, float)),
        familiarity=round(limit, 4),
    )
    return config, familiar


def _score_candidates(
    candidates: RegionSet, sample: GroundingSample, tree: LabelTree, rows: dict, missed: dict
) -> None:
    """Adds (score, right) of each candidate of a known label, and counts the truths that none of them hits."""
    truth = torch.from_numpy(sample.regions.boxes)
    for label, entries in rows.items():
        own = [k for k, x in enumerate(sample.regions.labels) if x == label or label in tree.broader(x)]
        mine = [k for k, x in enumerate(candidates.labels) if x == label]
        if not own and label not in sample.labelled:
            continue
        overlap = pairwise_iou(torch.from_numpy(candidates.boxes[mine]), truth[own])
        taken: set[int] = set()
        for row, k in enumerate(mine):
            free = [j for j in range(len(own)) if j not in taken and overlap[row, j] >= 0.5]
            taken.update(free[:1])
            entries.append((float(candidates.scores[k]), bool(free)))
        missed[label] += len(own) - len(taken)


def _best_threshold(entries: list[tuple[float, bool]], missed: int) -> float:
    """The score with the best F1; 0.3 where the held-out images show no true box to choose by."""
    entries = sorted(entries, reverse=True)
    right = np.cumsum([hit for _, hit in entries])
    if not len(right) or right[-1] == 0:
        return 0.3
    f1 = 2 * right / (np.arange(1, len(right) + 1) + right[-1] + missed)
    return round(entries[int(f1.argmax())][0], 4)


def _platt(logits: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """Slope and offset of Platt scaling (Platt, 1999) by a few Newton steps; (1, 0) where only one class was seen."""
    if not 0 < present.mean() < 1:
        return 1.0, 0.0
    x, w = np.stack([logits, np.ones_like(logits)], 1), np.array([1.0, 0.0])
    for _ in range(25):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + 1e-3 * np.eye(2)
        w = w - np.linalg.solve(hessian, x.T @ (p - present) + 1e-3 * (w - [1, 0]))
    return round(float(w[0]), 5), round(float(w[1]), 5)
