"""What every peer answers with, and how an answer becomes COCO results.

Dimension key: N regions, S input size. Boxes are xyxy in [0, 1] of the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.nn import functional as F

from eval.bench.grounding.data import Frame, xywh
from grounding.boxes import nms

MOST = 100  # detections an image and class, as many as COCO counts


@dataclass(frozen=True)
class Found:
    """boxes (N, 4), classes (N,) int64, scores (N,) in [0, 1]; masks (N, S, S) bool, or None."""

    boxes: torch.Tensor
    classes: torch.Tensor
    scores: torch.Tensor
    masks: np.ndarray | None = None


def suppressed(boxes: torch.Tensor, scores: torch.Tensor, floor: float, threshold: float, before: int = 1000) -> Found:
    """boxes (L, 4), scores (L, classes) → after non-maximum suppression within each class, of the best `before`."""
    location, kind = (scores > floor).nonzero(as_tuple=True)
    values = scores[location, kind]
    best = values.argsort(descending=True, stable=True)[:before]
    location, kind, values = location[best], kind[best], values[best]
    kept: list[int] = []
    for k in kind.unique().tolist():
        rows = (kind == k).nonzero()[:, 0]
        kept += rows[nms(boxes[location[rows]], values[rows], threshold)[:MOST]].tolist()
    return Found(boxes[location[kept]], kind[kept], values[kept])


def strongest(boxes: torch.Tensor, scores: torch.Tensor, most: int = 300) -> Found:
    """boxes (Q, 4), scores (Q, classes) → the best pairs of query and class, as DETR's heirs do it."""
    values, index = scores.flatten().topk(min(most, scores.numel()))
    return Found(boxes[index // scores.shape[1]], index % scores.shape[1], values)


def coco_results(found: Found, frame: Frame, image_id: int) -> Iterator[dict]:
    """COCO result rows; class k has category id k + 1. Boxes that lie in the padding are left out."""
    boxes = frame.invert(found.boxes.detach().numpy())
    for k, box in enumerate(boxes):
        if (box[2:] <= box[:2]).any():
            continue
        row = {"image_id": image_id, "category_id": int(found.classes[k]) + 1, "score": float(found.scores[k])}
        row["bbox"] = xywh(box, frame.image_size)
        if found.masks is not None:
            row["segmentation"] = _in_image(found.masks[k], frame)
        yield row


def _in_image(mask: np.ndarray, frame: Frame) -> dict:
    """(S, S) bool → COCO RLE of the image."""
    top, left, height, width = frame.content
    content = Image.fromarray(mask[top : top + height, left : left + width].astype(np.float32))
    full = np.asarray(content.resize(frame.image_size[::-1], Image.Resampling.BILINEAR)) > 0.5
    coded = rle.encode(np.asfortranarray(full.astype(np.uint8)))
    counts = coded["counts"]
    return {"size": list(frame.image_size), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def focal(logits: torch.Tensor, target: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss, element by element (Lin et al., ICCV 2017)."""
    p_wrong = torch.where(target > 0, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(target > 0, alpha, 1 - alpha) * p_wrong**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
