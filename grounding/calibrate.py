"""Calibration on held-out images: when a score counts as found, how likely a phrase is there, what a known image is."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from grounding.boxes import pairwise_iou
from grounding.data import broader
from grounding.detect import Grounder
from grounding.images import read_image
from grounding.labels import LabelTree, load_label_tree
from grounding.model import MedGLIP, MedGLIPConfig
from grounding.types import GroundingSample, RegionSet

# Of label offsets. On eleven real sources (120 images to fit, 218 to judge, 253 and 469 phrases that are labelled): log
# loss 0.209 with 3, 0.212 with 1, 0.222 with 0.3, 0.212 without offsets; ECE 0.036, 0.055, 0.045, 0.040.
SHRINKAGE = 3.0


@torch.no_grad()
def calibrate(model: MedGLIP, samples: Sequence[GroundingSample]) -> tuple[MedGLIPConfig, torch.Tensor]:
    """Thresholds a label (best F1), Platt scaling of presence and the familiarity limit, on held-out ``samples``; for a
    checkpoint of several modalities also an offset of presence for each label, drawn towards 0.

    Returns the new configuration, and the trunk summaries (images, C) that familiarity is measured against.
    """
    grounder = Grounder(model, load_label_tree(), "")
    rows: dict[str, list[tuple[float, bool]]] = {label: [] for label in model.config.vocabulary}
    missed = dict.fromkeys(rows, 0)
    logits, present, places, pooled = [], [], [], []
    for sample in samples:
        pixels = read_image(sample.image).pixels
        out, _, (candidates,) = grounder._candidates([pixels], grounder._every([]), None)
        _score_candidates(candidates, sample, grounder.tree, rows, missed)
        for v, label in enumerate(model.config.vocabulary):
            truth = any(label == x or label in broader(x, grounder.tree) for x in sample.regions.labels)
            if truth or label in sample.labelled:
                logits.append(float(out.presence[0, v]))
                present.append(truth)
                places.append(v)
        pooled.append(F.normalize(out.pooled[0], dim=0))
    familiar = torch.stack(pooled).detach()
    likeness = familiar @ familiar.T - 2 * torch.eye(len(familiar))
    limit = 1 - 2 * (1 - float(likeness.max(1).values.min())) if len(familiar) > 1 else 0.0
    several = len(model.config.modalities) > 1
    scaling = _platt(np.array(logits), np.array(present, float), np.array(places) if several else None)
    config = dataclasses.replace(
        model.config,
        thresholds={label: _best_threshold(rows[label], missed[label]) for label in rows},
        presence=(scaling[0], scaling[1]),
        presence_offsets={model.config.vocabulary[v]: offset for v, offset in enumerate(scaling[2:]) if offset},
        familiarity=round(limit, 4),
    )
    return config, familiar


def _score_candidates(
    candidates: RegionSet, sample: GroundingSample, tree: LabelTree, rows: dict, missed: dict
) -> None:
    """Adds (score, right) of each candidate of a known label, and counts the truths that none of them hits."""
    truth = torch.from_numpy(sample.regions.boxes)
    for label, entries in rows.items():
        own = [k for k, x in enumerate(sample.regions.labels) if x == label or label in broader(x, tree)]
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


def _platt(logits: np.ndarray, present: np.ndarray, labels: np.ndarray | None = None) -> tuple[float, ...]:
    """Slope and offset of Platt scaling (Platt, 1999) by a few Newton steps, and with ``labels`` (n,) an offset for
    each of 0..max; (1, 0) where only one class was seen. The offsets' prior has variance 1 / SHRINKAGE."""
    if not 0 < present.mean() < 1:
        return 1.0, 0.0
    x = np.stack([logits, np.ones_like(logits)], 1)
    strength = np.full(2, 1e-3)
    if labels is not None:
        x = np.concatenate([x, np.eye(labels.max() + 1)[labels]], 1)
        strength = np.r_[strength, np.full(labels.max() + 1, SHRINKAGE)]
    prior = np.eye(len(strength))[0]
    w = prior
    for _ in range(25):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + np.diag(strength)
        w = w - np.linalg.solve(hessian, x.T @ (p - present) + strength * (w - prior))
    return tuple(round(float(value), 5) for value in w)
