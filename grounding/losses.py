"""Which location answers for which region, and what each head is told about it.

Dimension key: B images, N regions (padded), V phrases, L pyramid locations, h w prototype-map size.
"""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F

from grounding.boxes import area, generalised_iou, pairwise_iou
from grounding.model import STRIDES, MedGLIPOutput, RegionOutput, location_grid

MASKS_AN_IMAGE = 24  # mask losses look at so many positive locations, to bound memory
WEIGHTS = {
    "align": 1.0,
    "box": 2.0,
    "quality": 0.5,
    "mask": 1.0,
    "region": 1.0,
    "contrast": 0.4,
    "edges": 1.0,
    "presence": 0.5,
    "modality": 0.1,
    "tree": 0.2,
}


@dataclass
class Targets:
    """What is true of a batch. ``boxes`` (B, N, 4); ``valid`` (B, N) bool; ``positive`` (B, N, V) bool: the phrase
    names the region; ``known`` (B, V) bool: the source labels that phrase exhaustively, so its absence is a negative;
    ``masks`` (B, N, h, w) float in [0, 1] and ``has_mask`` (B, N) bool; ``modality`` (B,) int64; ``jittered``
    (B, N, 4): the boxes with noise, for the region encoder; ``narrower`` (pairs, 2): child and parent phrase, is-a;
    ``siblings``: groups of phrases of which at most one names a region, such as "bright lesion" and "dark lesion"."""

    boxes: torch.Tensor
    jittered: torch.Tensor
    valid: torch.Tensor
    positive: torch.Tensor
    known: torch.Tensor
    masks: torch.Tensor
    has_mask: torch.Tensor
    modality: torch.Tensor
    narrower: torch.Tensor
    siblings: list[list[int]]

    def to(self, device: torch.device) -> "Targets":
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Targets(**{name: c.to(device) if isinstance(c, torch.Tensor) else c for name, c in columns.items()})


def assign(boxes: torch.Tensor, valid: torch.Tensor, image_size: int, candidates: int = 9) -> torch.Tensor:
    """(N, 4) regions of one image → (L,) index of each location's region, -1 for background.

    ATSS (Zhang et al., CVPR 2020): on every level the ``candidates`` locations nearest to a region's centre stand as
    squares of 4 strides; those whose IoU reaches mean + standard deviation, and that lie inside, are positive. Where
    several regions claim a location the smallest gets it (FCOS): a lesion lies inside a structure, and has few.
    """
    centres, strides = (x.to(boxes.device) for x in location_grid(image_size))
    owner = torch.full((len(centres),), -1, device=boxes.device)
    if not valid.any():
        return owner
    index = valid.nonzero()[:, 0]
    boxes = boxes[index]
    anchors = torch.cat([centres - 2 * strides[:, None], centres + 2 * strides[:, None]], -1)
    iou = pairwise_iou(boxes, anchors)
    distance = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centres)
    chosen = torch.zeros_like(iou, dtype=torch.bool)
    start = 0
    for stride in STRIDES:
        count = (-(-image_size // stride)) ** 2
        near = distance[:, start : start + count].topk(min(candidates, count), largest=False).indices + start
        chosen.scatter_(1, near, True)
        start += count
    near_iou = iou.masked_fill(~chosen, 0)
    number = chosen.sum(1, keepdim=True)
    mean = near_iou.sum(1, keepdim=True) / number
    deviation = (((near_iou - mean) ** 2 * chosen).sum(1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
    x, y = centres[None, :, 0], centres[None, :, 1]
    inside = (x > boxes[:, :1]) & (y > boxes[:, 1:2]) & (x < boxes[:, 2:3]) & (y < boxes[:, 3:])
    positive = chosen & inside & (iou >= mean + deviation)
    nearest = distance.argmin(1)  # a region that nothing suits still gets the nearest location
    positive[torch.arange(len(boxes)), nearest] |= ~positive.any(1)
    smallest = area(boxes)[:, None].expand_as(iou).masked_fill(~positive, torch.inf).min(0)
    claimed = positive.any(0)
    owner[claimed] = index[smallest.indices[claimed]]
    return owner


def focal(logits: torch.Tensor, target: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Element-wise focal loss (Lin et al., ICCV 2017, eq. 5); ``target`` is 0 or 1."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = logits.sigmoid()
    wrong = p * (1 - target) + (1 - p) * target
    return (alpha * target + (1 - alpha) * (1 - target)) * wrong**gamma * cross_entropy


def _balanced(logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over the known entries, positives and negatives each weighing a half."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    yes, no = known & (target > 0), known & (target == 0)
    return ((loss * yes).sum() / yes.sum().clamp(min=1) + (loss * no).sum() / no.sum().clamp(min=1)) / 2


def _tie(logits: torch.Tensor, narrower: torch.Tensor) -> torch.Tensor:
    """Child score ≤ parent score for (child, parent) phrase pairs; (..., V)."""
    if not len(narrower):
        return logits.sum() * 0
    return F.relu(logits[..., narrower[:, 0]].sigmoid() - logits[..., narrower[:, 1]].sigmoid()).mean()


def _contrast(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Softmax cross-entropy within each group of siblings, over the regions that one of them names; logits (B, N, V).

    Side, brightness or margin are few of all (region, phrase) pairs, and would drown in a sum over them.
    """
    losses = [logits.sum() * 0]
    for group in targets.siblings:
        truth = targets.positive[..., group]
        named = targets.valid & (truth.sum(-1) == 1)
        if named.any():
            answer = truth[named].float().argmax(-1)
            losses.append(F.cross_entropy(logits[..., group][named], answer, reduction="mean"))
    return torch.stack(losses).sum()


def _mask_loss(out: MedGLIPOutput, targets: Targets, image: torch.Tensor, location: torch.Tensor, region: torch.Tensor):
    """Binary cross-entropy inside the region's box, plus Dice (V-Net, Milletari et al., 2016), over positives."""
    keep = targets.has_mask[image, region]
    image, location, region = image[keep], location[keep], region[keep]
    if not len(image):
        return out.coefficients.sum() * 0 + out.prototypes.sum() * 0
    order = torch.linspace(0, len(image) - 1, min(len(image), MASKS_AN_IMAGE * len(out.logits))).long()
    image, location, region = image[order], location[order], region[order]
    logits = torch.einsum("kp,kphw->khw", out.coefficients[image, location], out.prototypes[image])
    truth, boxes = targets.masks[image, region], targets.boxes[image, region]
    h, w = truth.shape[-2:]
    y = (torch.arange(h, device=truth.device) + 0.5) / h
    x = (torch.arange(w, device=truth.device) + 0.5) / w
    rows = (y > boxes[:, 1:2]) & (y < boxes[:, 3:])
    columns = (x > boxes[:, :1]) & (x < boxes[:, 2:3])
    inside = (rows[:, :, None] & columns[:, None]).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * inside
    p = logits.sigmoid() * inside
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return (cross_entropy.sum((1, 2)) / inside.sum((1, 2)).clamp(min=1) + dice).mean()


def losses(out: MedGLIPOutput, targets: Targets, image_size: int, hierarchy: bool = True) -> dict[str, torch.Tensor]:
    """Every part by name, in float32 whatever the model computes in; the training loss is their sum weighted by
    ``WEIGHTS``. No part "mask" from a model without mask head, none "tree" without ``hierarchy``. A part that the batch
    says nothing about (no region, no phrase) is 0."""
    with torch.autocast(out.logits.device.type, enabled=False):
        return _losses(_in_float32(out), targets, image_size, hierarchy)


def _in_float32(out: Any) -> Any:
    """``out`` with its tensors in float32, its `RegionOutput` too."""
    changed = {}
    for one in fields(out):
        value = getattr(out, one.name)
        changed[one.name] = value.float() if isinstance(value, torch.Tensor) else value
        if isinstance(value, RegionOutput):
            changed[one.name] = _in_float32(value)
    return dataclasses.replace(out, **changed)


def _losses(out: MedGLIPOutput, targets: Targets, image_size: int, hierarchy: bool) -> dict[str, torch.Tensor]:
    owner = torch.stack([assign(b, v, image_size) for b, v in zip(targets.boxes, targets.valid, strict=True)])
    image, location = (owner >= 0).nonzero(as_tuple=True)
    region = owner[image, location]
    count = max(len(image), 1)
    aligned = torch.zeros_like(out.logits)
    aligned[image, location] = targets.positive[image, region].float()
    known = targets.known[:, None] | (aligned > 0)
    boxes, truth = out.boxes[image, location], targets.boxes[image, region]
    giou = generalised_iou(boxes, truth)
    present = (targets.positive & targets.valid[..., None]).any(1)
    region_known = (targets.known[:, None] | targets.positive) & targets.valid[..., None]
    parts = {
        "align": (focal(out.logits, aligned) * known).sum() / count,
        "box": (1 - giou).sum() / count,
        "quality": F.binary_cross_entropy_with_logits(
            out.quality[image, location], giou.detach().clamp(0, 1), reduction="sum"
        )
        / count,
    }
    if out.prototypes is not None:
        parts["mask"] = _mask_loss(out, targets, image, location, region)
    parts |= {
        "edges": _mean((1 - generalised_iou(out.regions.boxes, targets.boxes))[targets.valid]),
        "region": _balanced(out.regions.logits, targets.positive.float(), region_known),
        "contrast": _contrast(out.regions.logits, targets),
        "presence": _balanced(out.presence, present.float(), targets.known | present),
        "modality": F.cross_entropy(out.modality, targets.modality),
    }
    if hierarchy:
        parts["tree"] = _tie(out.logits, targets.narrower) * 10 + _tie(out.presence, targets.narrower)
    return parts


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean; of nothing, 0."""
    return values.mean() if len(values) else values.sum()


def total(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum."""
    return torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
