"""Region tokens → rows of a language model's input.

Dimension key: B images, N regions, D feature width, E label-vector width, W width of the language model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from grounding.types import NOT_FOUND_LEVEL, RegionTokens

BOX_OCTAVES = 6
RIDGE = 1e-6
BOX_CODE = 4 * (1 + 2 * BOX_OCTAVES)


@dataclass(frozen=True)
class ProjectorConfig:
    """`scale`: root mean square of the language model's input embeddings, which the rows are brought to."""

    feature_dim: int
    label_dim: int
    width: int
    scale: float
    slots: int = 32
    hidden: int = 512


class Standardise(nn.Module):
    """(x - mean) / deviation by dimension, of the training regions. Features and label vectors share a large common
    part; what tells them apart is small beside it, and a fresh layer would hardly see it."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, rows: torch.Tensor) -> None:
        """rows (n, width)."""
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0, correction=0).clamp(min=1e-4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation


class RegionProjector(nn.Module):
    """An MLP over all that is known of a region, each kind of evidence with its own input map, beside a linear map from
    the label vector to what the language model makes of the label's words."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        self.feature = nn.Sequential(Standardise(config.feature_dim), nn.Linear(config.feature_dim, config.hidden))
        self.label = nn.Sequential(Standardise(config.label_dim), nn.Linear(config.label_dim, config.hidden))
        self.box = nn.Linear(BOX_CODE + 1, config.hidden)
        self.level = nn.Embedding(NOT_FOUND_LEVEL + 1, config.hidden)
        self.slot = nn.Embedding(config.slots, config.hidden)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, 2 * config.hidden),
            nn.GELU(),
            nn.Linear(2 * config.hidden, config.width),
        )
        self.words = nn.Linear(config.label_dim, config.width, bias=False)
        self.out = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, regions: RegionTokens) -> torch.Tensor:
        """(B, N) regions → (B, N, W); rows of invalid regions are zero, and give every parameter a zero gradient.

        Raises ValueError where the regions' widths, or their number, are not those the projector was made for, and for
        values that are not finite.
        """
        self._check(regions)
        geometry = torch.cat([box_code(regions.boxes), regions.scores[..., None]], -1)
        slots = torch.arange(regions.valid.shape[1], device=regions.valid.device)
        hidden = self.feature(regions.features) + self.label(regions.label_vectors) + self.box(geometry)
        hidden = hidden + self.level(regions.levels) + self.slot(slots)
        rows = self.out(self.words(regions.label_vectors) + self.mlp(hidden)) * self.config.scale
        return rows * regions.valid[..., None]

    @torch.no_grad()
    def fit(self, regions: RegionTokens, words: Mapping[str, torch.Tensor]) -> None:
        """Set from the training regions before training: what features and label vectors are measured by, and the map
        from label vectors to ``words``, label → mean input embedding (W) of its words. So a region is read as its
        label from the first step, and one with an unseen label as something near."""
        real = regions.valid & (regions.levels != NOT_FOUND_LEVEL)
        self.feature[0].fit(regions.features[real])
        self.label[0].fit(regions.label_vectors[regions.valid])
        places = {label: (b, n) for b, row in enumerate(regions.labels) for n, label in enumerate(row)}
        known = sorted(label for label in places if label in words)
        x = torch.stack([regions.label_vectors[places[label]] for label in known]).double()
        y = torch.stack([words[label] / words[label].pow(2).mean().sqrt() for label in known]).double()
        gram = x @ x.T + RIDGE * torch.eye(len(x), dtype=torch.float64)  # ridge regression in its dual form
        self.words.weight.copy_((x.T @ torch.linalg.solve(gram, y)).T)
        self.mlp[-1].weight.mul_(0.1)  # what an untrained layer makes of a region is noise beside its words
        self.mlp[-1].bias.zero_()

    def _check(self, regions: RegionTokens) -> None:
        n, d, e = regions.valid.shape[1], regions.features.shape[-1], regions.label_vectors.shape[-1]
        if (d, e) != (self.config.feature_dim, self.config.label_dim):
            wanted = (self.config.feature_dim, self.config.label_dim)
            raise ValueError(f"region tokens have feature and label widths {(d, e)}, this bridge needs {wanted}")
        if n > self.config.slots:
            raise ValueError(f"{n} regions a prompt, this bridge has {self.config.slots} slots")
        for name in ("features", "boxes", "scores", "label_vectors"):
            finite = getattr(regions, name).isfinite()
            if not finite.all():
                b, k = (~finite).nonzero()[0, :2].tolist()
                region = f"region {k} ({regions.labels[b][k] or 'no label'}) of prompt {b} in the batch"
                remedy = "make the region-token file again with grounding.predict"
                raise ValueError(f"{region}: its {name} hold NaN or infinity; {remedy}")


def box_code(boxes: torch.Tensor) -> torch.Tensor:
    """(…, 4) xyxy in [0, 1] → (…, BOX_CODE): centre, width and height, and their sines and cosines.

    Frequencies π·2^i as in Mildenhall et al., NeRF, ECCV 2020, eq. 4.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    cxcywh = torch.cat([(low + high) / 2, high - low], -1)
    frequencies = math.pi * 2.0 ** torch.arange(BOX_OCTAVES, device=boxes.device)
    angles = (cxcywh[..., None] * frequencies).flatten(-2)
    return torch.cat([cxcywh, angles.sin(), angles.cos()], -1)
