"""Regions against phrases: InfoNCE both ways over the images of all processes, with negatives that are sure.

InfoNCE: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; both ways as in CLIP
(Radford et al., ICML 2021); several positives, each against the negatives alone, as in Khosla et al., "Supervised
Contrastive Learning", NeurIPS 2020, eq. 2, without the other positives below the line.

Dimension key: B images, N regions of an image (padded), K background boxes of an image, R regions of all images of all
processes, V phrases, M modalities. Boxes are xyxy in [0, 1] of the square model input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from grounding.boxes import pairwise_iou
from grounding.data import PhraseTarget, broader
from grounding.labels import LabelTree
from grounding.losses import Targets
from grounding.model import MODALITIES

APART = 0.3  # IoU with what a phrase names below which a box is not that
FAR = -1e4  # a logit that counts for nothing; infinity has no gradient


@dataclass
class Pairs:
    """What is true of regions and phrases: the phrase names the region (``positive``), surely does not (``negative``),
    is a sibling of one that does, and therefore a hard negative (``hard``); each (B, N, V) bool. Where both are False
    nobody knows, or there is no region."""

    positive: torch.Tensor
    negative: torch.Tensor
    hard: torch.Tensor


def foreign(targets: Sequence[PhraseTarget], tree: LabelTree) -> torch.Tensor:
    """(M, V) bool: by the label tree the phrase never occurs in that modality: absent, whoever labels what."""
    known = [set(tree.modalities(x.label)) if x.label in tree.nodes else set(MODALITIES) for x in targets]
    return torch.tensor([[modality not in where for where in known] for modality in MODALITIES])


def siblings(targets: Sequence[PhraseTarget], tree: LabelTree) -> torch.Tensor:
    """(V, V) bool: parts of one whole, findings of one place, one finding in two such parts, values of an attribute."""
    rows = [[_siblings(a, b, tree) for b in targets] for a in targets]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(targets), len(targets))


def _siblings(a: PhraseTarget, b: PhraseTarget, tree: LabelTree) -> bool:
    if a.attribute and b.attribute:
        return a.label == b.label and a.attribute[0] == b.attribute[0] and a.attribute != b.attribute
    known = a.label in tree.nodes and b.label in tree.nodes
    if a.attribute or b.attribute or not known or a.label == b.label:
        return False
    if a.label in broader(b.label, tree) or b.label in broader(a.label, tree):
        return False
    one, two = tree.parent(a.label), tree.parent(b.label)
    finding = tree.nodes[a.label].finding
    if (finding is None) != (tree.nodes[b.label].finding is None) or one is None or two is None:
        return False
    same_finding = finding is not None and finding == tree.nodes[b.label].finding
    return one == two or (same_finding and tree.parent(one) == tree.parent(two) is not None)


def background_boxes(images: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(B, K, 4) random boxes, sides of 10 to 90 % of the image."""
    sides = 0.1 + 0.8 * torch.rand(images, count, 2, generator=generator)
    corner = torch.rand(images, count, 2, generator=generator) * (1 - sides)
    return torch.cat([corner, corner + sides], -1)


def pairs(targets: Targets, background: torch.Tensor, never: torch.Tensor, siblings: torch.Tensor) -> Pairs:
    """What is true of the regions of ``targets`` and then of the ``background`` boxes (B, K, 4); see `foreign` for
    ``never`` (M, V), `siblings` for (V, V).

    A phrase is a negative where the image's source labels it exhaustively, where its label does not occur in the
    modality, and where another of a group is named of which a region has at most one (left lung, right lung). A phrase
    that another source labels, and that might be there, is none.
    """
    positive = targets.positive & targets.valid[..., None]
    absent = targets.known | never[targets.modality]
    negative = (absent[:, None] | _excluded(positive, targets.siblings)) & targets.valid[..., None] & ~positive
    hard = negative & (positive.float() @ siblings.float() > 0)
    elsewhere = torch.stack([_elsewhere(*row) for row in zip(background, targets.boxes, positive, strict=True)])
    none = torch.zeros_like(elsewhere)
    return Pairs(
        torch.cat([positive, none], 1),
        torch.cat([negative, elsewhere & absent[:, None]], 1),
        torch.cat([hard, none], 1),
    )


def _excluded(positive: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, N, V): another phrase of its group names the region."""
    excluded = torch.zeros_like(positive)
    for group in groups:
        excluded[..., group] |= positive[..., group].any(-1, keepdim=True)
    return excluded & ~positive


def _elsewhere(background: torch.Tensor, boxes: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """(K, 4), (N, 4), (N, V) → (K, V): the box is none of the regions that the phrase names."""
    near = pairwise_iou(background, boxes) >= APART
    return near.float() @ positive.float() == 0


def info_nce(logits: torch.Tensor, truth: Pairs, hardness: float) -> dict[str, torch.Tensor]:
    """Both ways: each region against phrases, each phrase against regions. ``logits`` and ``truth`` (R, V); a hard
    negative counts as ``hardness`` others. 0 where a batch has nothing to contrast."""
    weighted = (logits + truth.hard * math.log(hardness)).masked_fill(~truth.negative, FAR)
    return {
        "region_to_phrase": _one_way(logits, weighted, truth.positive, truth.negative),
        "phrase_to_region": _one_way(logits.T, weighted.T, truth.positive.T, truth.negative.T),
    }


def _one_way(
    logits: torch.Tensor, weighted: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
) -> torch.Tensor:
    """Mean over rows, and in a row over its positives p, of -log(exp(l_p) / (exp(l_p) + Σ over negatives of exp))."""
    each = F.softplus(weighted.logsumexp(1, keepdim=True) - logits) * positive
    counts = positive.any(1) & negative.any(1)
    rows = each.sum(1) / positive.sum(1).clamp(min=1)
    return (rows * counts).sum() / counts.sum().clamp(min=1)


def of_all_processes(accelerator: Accelerator, logits: torch.Tensor, truth: Pairs) -> tuple[torch.Tensor, Pairs]:
    """(B, N, V) of this process → (R, V) of all.

    Gathered without gradient, the process's own rows put back with theirs. Every process then has the same loss, and
    its gradient by its own rows alone; their sum is that of the whole batch. Processes are averaged afterwards, so
    multiply the loss by their number.
    """
    logits = logits.float()
    if accelerator.num_processes > 1:
        columns = (logits, truth.positive.float(), truth.negative.float(), truth.hard.float())
        own = accelerator.pad_across_processes(torch.cat(columns, -1), dim=1)
        parts = list(accelerator.gather(own.detach()).chunk(accelerator.num_processes))
        parts[accelerator.process_index] = own
        logits, *masks = torch.cat(parts).chunk(4, -1)
        truth = Pairs(*(mask > 0.5 for mask in masks))
    return logits.flatten(0, 1), Pairs(*(x.flatten(0, 1) for x in (truth.positive, truth.negative, truth.hard)))
