"""Region tokens → rows of a language model's input.

Dimension key: B images, N regions, D feature width, E label-vector width, W width of the language model.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from grounding.types import NOT_FOUND_LEVEL, RegionTokens

BOX_OCTAVES = 6
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


class RegionProjector(nn.Module):
    """An MLP over all that is known of a region; each kind of evidence has its own input map, and they are added."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        self.feature = nn.Sequential(nn.LayerNorm(config.feature_dim), nn.Linear(config.feature_dim, config.hidden))
        self.label = nn.Sequential(nn.LayerNorm(config.label_dim), nn.Linear(config.label_dim, config.hidden))
        self.box = nn.Linear(BOX_CODE + 1, config.hidden)
        self.level = nn.Embedding(NOT_FOUND_LEVEL + 1, config.hidden)
        self.slot = nn.Embedding(config.slots, config.hidden)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, 2 * config.hidden),
            nn.GELU(),
            nn.Linear(2 * config.hidden, config.width),
        )
        self.out = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, regions: RegionTokens) -> torch.Tensor:
        """(B, N) regions → (B, N, W); rows of invalid regions are zero, and give every parameter a zero gradient.

        Raises ValueError where the regions' widths, or their number, are not those the projector was made for.
        """
        self._check(regions)
        geometry = torch.cat([box_code(regions.boxes), regions.scores[..., None]], -1)
        slots = torch.arange(regions.valid.shape[1], device=regions.valid.device)
        hidden = self.feature(regions.features) + self.label(regions.label_vectors) + self.box(geometry)
        hidden = hidden + self.level(regions.levels) + self.slot(slots)
        rows = self.out(self.mlp(hidden)) * self.config.scale
        return rows * regions.valid[..., None]

    def _check(self, regions: RegionTokens) -> None:
        n, d, e = regions.valid.shape[1], regions.features.shape[-1], regions.label_vectors.shape[-1]
        if (d, e) != (self.config.feature_dim, self.config.label_dim):
            wanted = (self.config.feature_dim, self.config.label_dim)
            raise ValueError(f"region tokens have feature and label widths {(d, e)}, this bridge needs {wanted}")
        if n > self.config.slots:
            raise ValueError(f"{n} regions a prompt, this bridge has {self.config.slots} slots")


def box_code(boxes: torch.Tensor) -> torch.Tensor:
    """(…, 4) xyxy in [0, 1] → (…, BOX_CODE): centre, width and height, and their sines and cosines.

    Frequencies π·2^i as in Mildenhall et al., NeRF, ECCV 2020, eq. 4.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    cxcywh = torch.cat([(low + high) / 2, high - low], -1)
    frequencies = math.pi * 2.0 ** torch.arange(BOX_OCTAVES, device=boxes.device)
    angles = (cxcywh[..., None] * frequencies).flatten(-2)
    return torch.cat([cxcywh, angles.sin(), angles.cos()], -1)
