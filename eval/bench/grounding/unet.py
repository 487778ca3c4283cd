"""A U-Net with one output a class (Ronneberger et al., MICCAI 2015) on the shared trunk; its boxes are those of the
connected components. Dimension key: B images, C classes, S input size.
"""

from collections.abc import Mapping

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from eval.bench.grounding.data import Batch, class_maps
from eval.bench.grounding.detection import MOST, Found
from eval.bench.grounding.trunk import build_trunk

WIDTHS = (128, 96, 64, 48)  # of the decoder, at strides 16, 8, 4, 2
STRIDE = 2
LEAST_PIXELS = 9


class UNet(nn.Module):
    """Cross-entropy and Dice together, as nnU-Net trains (Isensee et al., Nature Methods 2021), with AdamW."""

    batch_size, rate, trunk_rate, decay, clip = 8, 1e-3, 3e-4, 0.02, 5.0

    def __init__(self, trunk: str, size: int, vocabulary: Mapping[str, str]):
        super().__init__()
        self.trunk = build_trunk(trunk, size)
        self.indices = {label: k for k, label in enumerate(vocabulary)}
        channels = self.trunk.channels[-1]
        blocks = []
        for skip, width in zip(reversed(self.trunk.channels[:-1]), WIDTHS, strict=True):
            blocks.append(_block(channels + skip, width))
            channels = width
        self.up = nn.ModuleList(blocks)
        self.out = nn.Conv2d(channels, len(vocabulary), 1)
        nn.init.constant_(self.out.bias, -4.6)

    def slow_parameters(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) → logits (B, C, S/2, S/2)."""
        *skips, x = self.trunk(pixel_values)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.out(x)

    def loss(self, batch: Batch) -> torch.Tensor:
        logits, target = self(batch.pixel_values), class_maps(batch, self.indices, STRIDE)
        wrong = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((0, 2, 3)).sum()
        there = target.amax((0, 2, 3)) > 0
        p, truth = logits.sigmoid()[:, there], target[:, there]
        dice = 1 - (2 * (p * truth).sum((0, 2, 3)) + 1) / (p.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1)
        return wrong + (dice.mean() if there.any() else 0)

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Found]:
        size = batch.pixel_values.shape[-1]
        logits = F.interpolate(self(batch.pixel_values), size=(size, size), mode="bilinear", align_corners=False)
        return [components(one) for one in logits.sigmoid().numpy()]


def components(probability: np.ndarray, threshold: float = 0.5) -> Found:
    """(C, S, S) → a region for each connected component of each class: its box, its mean probability, its mask."""
    size = probability.shape[-1]
    boxes, classes, scores, masks = [], [], [], []
    for kind, values in enumerate(probability):
        numbered, _ = ndimage.label(values > threshold)
        found = []
        for number, place in enumerate(ndimage.find_objects(numbered), 1):
            mask = numbered == number
            if mask[place].sum() >= LEAST_PIXELS:
                found.append((float(values[mask].mean()), place, mask))
        for score, (rows, columns), mask in sorted(found, key=lambda row: -row[0])[:MOST]:
            boxes.append([columns.start / size, rows.start / size, columns.stop / size, rows.stop / size])
            classes.append(kind)
            scores.append(score)
            masks.append(mask)
    return Found(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.long),
        torch.tensor(scores, dtype=torch.float32),
        np.stack(masks) if masks else np.zeros((0, size, size), bool),
    )


def _block(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers)
