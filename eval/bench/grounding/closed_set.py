"""A plain closed-set detector: feature pyramid, FCOS heads, ATSS assignment, one output a class, no text.

FCOS: Tian et al., ICCV 2019 (with its later habits: GIoU, centreness on the box branch, normalised distances). ATSS:
Zhang et al., CVPR 2020. Dimension key: B images, N regions, L locations, C classes. Boxes are xyxy in [0, 1].
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from eval.bench.grounding.data import Batch
from eval.bench.grounding.detection import Found, focal, suppressed
from eval.bench.grounding.trunk import build_trunk
from grounding.boxes import area, generalised_iou, pairwise_iou

STRIDES = (8, 16, 32, 64, 128)
ANCHOR = 8  # ATSS compares regions with one square of 8 strides a location
NEAREST = 9
WIDTH = 128


def locations(size: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Centres (L, 2) and strides (L,) in [0, 1] of the input, and how many of them each level has."""
    centres, strides, counts = [], [], []
    for stride in STRIDES:
        n = -(-size // stride)
        steps = (torch.arange(n) + 0.5) * stride / size
        centres.append(torch.cartesian_prod(steps, steps).flip(1))  # rows first
        strides.append(torch.full((n * n,), stride / size))
        counts.append(n * n)
    return torch.cat(centres), torch.cat(strides), counts


def assigned(boxes: torch.Tensor, centres: torch.Tensor, strides: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(N, 4) → (L,) region that each location answers for, -1 for background; of several the smallest."""
    owner = torch.full((len(centres),), -1)
    if not len(boxes):
        return owner
    half = ANCHOR / 2 * strides[:, None]
    iou = pairwise_iou(boxes, torch.cat([centres - half, centres + half], 1))
    distance = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centres)
    candidate = torch.zeros_like(iou, dtype=torch.bool)
    offset = 0
    for level in distance.split(list(counts), 1):
        near = level.topk(min(NEAREST, level.shape[1]), 1, largest=False).indices
        candidate.scatter_(1, near + offset, True)
        offset += level.shape[1]
    for k in range(len(boxes)):
        values = iou[k, candidate[k]]
        candidate[k] &= iou[k] >= values.mean() + values.std()
    candidate &= (reach(boxes, centres) > 0).all(-1)
    for k in area(boxes).argsort(descending=True).tolist():  # the smallest is written last
        owner[candidate[k]] = k
    return owner


def reach(boxes: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(N, 4), (L, 2) → (N, L, 4) distances from each centre to left, top, right and bottom; below 0 outside."""
    return torch.cat([centres[None] - boxes[:, None, :2], boxes[:, None, 2:] - centres[None]], -1)


def centreness(distances: torch.Tensor) -> torch.Tensor:
    """(..., 4) distances to the sides, inside → (...) in [0, 1]."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    return (across * torch.minimum(top, bottom) / torch.maximum(top, bottom)).clamp(min=0).sqrt()


class ClosedSet(nn.Module):
    """AdamW at the rates that MedGLIP uses, since it shares trunk, pyramid and losses with it."""

    batch_size, rate, trunk_rate, decay, clip = 8, 1e-3, 3e-4, 0.02, 5.0

    def __init__(self, trunk: str, size: int, vocabulary: Mapping[str, str]):
        super().__init__()
        self.trunk, self.size = build_trunk(trunk, size), size
        self.lateral = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in self.trunk.channels[2:])
        self.smooth = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.extra = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1) for _ in range(2))
        self.class_tower, self.box_tower = _tower(), _tower()
        self.classes = nn.Conv2d(WIDTH, len(vocabulary), 3, padding=1)
        self.boxes, self.centre = nn.Conv2d(WIDTH, 4, 3, padding=1), nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.constant_(self.classes.bias, -4.6)  # the focal prior of 0.01

    def slow_parameters(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

    def pyramid(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Maps at STRIDES."""
        maps = self.trunk(pixel_values)[2:]
        levels = [self.lateral[2](maps[2])]
        for k in (1, 0):
            above = F.interpolate(levels[0], size=maps[k].shape[-2:], mode="nearest")
            levels.insert(0, self.lateral[k](maps[k]) + above)
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        for extra in self.extra:
            levels.append(extra(F.relu(levels[-1])))
        return levels

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class logits (B, L, C), distances to the sides (B, L, 4) in [0, 1], centreness logits (B, L)."""
        classes, distances, centre = [], [], []
        for k, level in enumerate(self.pyramid(pixel_values)):
            boxes = self.box_tower(level)
            classes.append(self.classes(self.class_tower(level)).flatten(2))
            strides = F.softplus(self.boxes(boxes) * self.scales[k]).flatten(2)
            distances.append(strides * STRIDES[k] / self.size)
            centre.append(self.centre(boxes).flatten(2))
        return (*(torch.cat(x, 2).transpose(1, 2) for x in (classes, distances)), torch.cat(centre, 2)[:, 0])

    def loss(self, batch: Batch) -> torch.Tensor:
        logits, distances, centre = self(batch.pixel_values)
        centres, strides, counts = locations(self.size)
        target = torch.zeros_like(logits)
        parts = []
        for k, (boxes, kinds) in enumerate(zip(batch.boxes, batch.classes, strict=True)):
            owner = assigned(boxes, centres, strides, counts)
            place = (owner >= 0).nonzero()[:, 0]
            target[k, place, kinds[owner[place]]] = 1
            truth = boxes[owner[place]]
            weight = centreness(torch.cat([centres[place] - truth[:, :2], truth[:, 2:] - centres[place]], 1))
            giou = generalised_iou(decoded(distances[k, place], centres[place]), truth)
            wrong = F.binary_cross_entropy_with_logits(centre[k, place], weight, reduction="sum")
            parts.append(torch.stack([((1 - giou) * weight).sum(), weight.sum(), wrong]))
        overlap, weights, wrong = torch.stack(parts).sum(0)
        positives = target.sum().clamp(min=1)
        return focal(logits, target).sum() / positives + 2 * overlap / weights.clamp(min=1) + wrong / positives

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Found]:
        logits, distances, centre = self(batch.pixel_values)
        centres, _, _ = locations(self.size)
        scores = (logits.sigmoid() * centre.sigmoid()[..., None]).sqrt()
        boxes = decoded(distances, centres)
        return [suppressed(b, s, 0.05, 0.6) for b, s in zip(boxes, scores, strict=True)]


def decoded(distances: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(..., 4) distances to left, top, right, bottom and (..., 2) centres → xyxy, clipped to [0, 1]."""
    corners = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)
    return corners.clamp(0, 1)


def _tower() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)
