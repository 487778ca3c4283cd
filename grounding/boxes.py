"""Box arithmetic on tensors: ``xyxy`` unless a suffix says otherwise."""

import numpy as np
import torch


def area(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) xyxy → (...)."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Area of a ∩ b; (..., 4) and (..., 4) xyxy, broadcast, → (...)."""
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return size.clamp(min=0).prod(-1)


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(A, 4), (B, 4) xyxy → (A, B) intersection over union; 0 where both are empty."""
    both = intersection(a[:, None], b[None])
    return both / (area(a)[:, None] + area(b)[None] - both).clamp(min=1e-9)


def generalised_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Element-wise GIoU of (..., 4) xyxy boxes, in [-1, 1] (Rezatofighi et al., CVPR 2019, eq. 3)."""
    both = intersection(a, b)
    union = (area(a) + area(b) - both).clamp(min=1e-9)
    hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
    enclosing = area(hull).clamp(min=1e-9)
    return both / union - (enclosing - union) / enclosing


def cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) xyxy → centre x, centre y, width, height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def containment(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """(A, 4), (B, 4) xyxy → (A, B) share of each inner box that lies inside each outer box."""
    return intersection(inner[:, None], outer[None]) / area(inner)[:, None].clamp(min=1e-9)


def nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Greedy non-maximum suppression; indices kept, best score first. boxes (N, 4) xyxy, scores (N,)."""
    overlap = (pairwise_iou(boxes, boxes) > threshold).numpy()
    alive = np.ones(len(boxes), bool)
    kept: list[int] = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        if alive[k]:
            kept.append(k)
            alive &= ~overlap[k]
    return kept
