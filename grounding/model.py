"""MedGLIP: a dense, one-stage grounding model whose phrases do not see each other.

Dimension key: B images, V phrases, E text-encoder width, D model width, L pyramid locations, P prototypes, M
modalities, N regions, R region-feature width, h w map size. Boxes are xyxy in [0, 1] of the square model input.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from configs import write_atomic
from grounding.backbones import CheckpointError, Trunk, build_trunk, checkpoint_blocks, empty_trunk, read_config
from grounding.fusion import ModalityAdapter, PhraseFusion, TwoWayFusion, mlp
from grounding.text import PhraseBatch

FORMAT_VERSION = 1
MODALITIES = ("xray", "ct", "mri", "ultrasound", "fundus", "endoscopy", "dermoscopy", "microscopy")
STRIDES = (8, 16, 32)
FUSIONS = ("phrase", "none", "two_way")
ROI_GRID = 7
ROI_MARGIN = 0.25  # of the box's size, on each side: "brighter than its surroundings" needs the surroundings


@dataclass(frozen=True)
class MedGLIPConfig:
    """What a checkpoint is. ``trunk``: "embedded" (EfficientNet-Lite0), "tiny" (a small random one, for tests), or a
    folder or hub id, whose own configuration is then ``trunk_config`` (set by `build_model`), so that the checkpoint
    loads without it.

    ``fusion``: "phrase" (each phrase looks at the image by itself), "none" (phrases meet the image in the scores only)
    or "two_way" (the image looks at the phrases too, so a phrase's score depends on which others are asked with it).
    Without ``adapters`` the model knows no modality but for the head that predicts it; without ``mask_head`` no masks.

    ``vocabulary``: the label ids it was trained to find; ``modalities``: those it was trained on. ``thresholds``
    (label id → score) and ``presence`` (slope, offset of Platt scaling) are set by calibration; ``most_boxes`` (label
    id → boxes a phrase at most) by the training data. Raises CheckpointError for an unknown fusion.
    """

    trunk: str = "embedded"
    trunk_config: dict[str, Any] | None = None
    image_size: int = 192
    text_encoder: str = "embedded"
    text_width: int = 384
    width: int = 128
    region_width: int = 192
    prototypes: int = 24
    prompt_tokens: int = 4
    fusion: str = "phrase"
    adapters: bool = True
    mask_head: bool = True
    vocabulary: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()  # every phrase it was trained on, said in the first of its ways
    modalities: tuple[str, ...] = ("mri",)
    most_boxes: dict[str, int] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    presence: tuple[float, float] = (1.0, 0.0)
    presence_offsets: dict[str, float] = field(default_factory=dict)  # label id → added to that, by calibration
    familiarity: float = 0.0  # smallest similarity to the training images at which an image counts as a known kind
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.fusion not in FUSIONS:
            raise CheckpointError(f"unknown fusion {self.fusion!r}; known: {', '.join(FUSIONS)}")


@dataclass
class MedGLIPOutput:
    """``logits`` (B, L, V) region–phrase alignment, ``boxes`` (B, L, 4), ``quality`` (B, L) logit of the box's IoU,
    ``coefficients`` (B, L, P) and ``prototypes`` (B, P, h, w), None without mask head: mask logit = coefficients ·
    prototypes, ``presence`` (B, V) logit of "is it there", ``modality`` (B, M) logits, ``pooled`` (B, C) trunk summary,
    ``detail`` (B, D/2 + C, h, w) and ``coarse`` (B, D, h/2, w/2) maps and ``prompted`` (B, V, D) phrases, from which
    ``MedGLIP.read_regions`` reads any box; ``regions`` is its answer for the boxes passed to forward, else None.
    Maps and ``prompted`` are made without a look at the other phrases, whatever the fusion."""

    logits: torch.Tensor
    boxes: torch.Tensor
    quality: torch.Tensor
    coefficients: torch.Tensor | None
    prototypes: torch.Tensor | None
    presence: torch.Tensor
    modality: torch.Tensor
    pooled: torch.Tensor
    detail: torch.Tensor
    coarse: torch.Tensor
    prompted: torch.Tensor
    regions: "RegionOutput | None" = None


@dataclass
class RegionOutput:
    """Of N given boxes: ``features`` (B, N, R), alignment ``logits`` with the phrases (B, N, V), and the boxes moved to
    the edges that their inside shows (B, N, 4)."""

    features: torch.Tensor
    logits: torch.Tensor
    boxes: torch.Tensor


def location_grid(image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres (L, 2) as x, y in [0, 1] and strides (L,) in [0, 1] of the pyramid locations, level by level."""
    centres, strides = [], []
    for stride in STRIDES:
        n = -(-image_size // stride)
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        centres.append((torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride / image_size)
        strides.append(torch.full((n * n,), stride / image_size))
    return torch.cat(centres), torch.cat(strides)


def position_code(points: torch.Tensor, width: int) -> torch.Tensor:
    """(..., 2) in [0, 1] → (..., width) sines and cosines of x and y (Vaswani et al., 2017, in two dimensions)."""
    frequency = torch.pi * 2.0 ** torch.arange(width // 4, device=points.device) / 2
    angle = points[..., None] * frequency.clamp(max=64 * torch.pi)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class DenseHead(nn.Module):
    """Two 3×3 convolutions shared by the levels, then embedding, box, quality and mask coefficients a location."""

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.sizes = [width, 4, 1, prototypes]
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        self.tower = nn.Sequential(*layers)
        self.out = nn.Conv2d(width, sum(self.sizes), 1)

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = [self.out(self.tower(level)).flatten(2).transpose(1, 2) for level in levels]
        return list(torch.cat(rows, 1).split(self.sizes, -1))


class RegionEncoder(nn.Module):
    """The feature of any box, wherever it came from: a grid of samples of the detail map inside the box and a margin
    around it, and of the coarse map's mean."""

    def __init__(self, detail: int, coarse: int, width: int):
        super().__init__()
        self.net = mlp(detail * ROI_GRID**2 + coarse + 4, 2 * width, width)

    def forward(self, detail: torch.Tensor, coarse: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w), (B, D, h, w), (B, N, 4) → (B, N, R)."""
        sizes = boxes[..., 2:] - boxes[..., :2]
        corner = boxes[..., :2] - ROI_MARGIN * sizes
        steps = (torch.arange(ROI_GRID, device=boxes.device) + 0.5) / ROI_GRID * (1 + 2 * ROI_MARGIN)
        x = corner[..., :1] + steps * sizes[..., :1]
        y = corner[..., 1:] + steps * sizes[..., 1:]
        n = ROI_GRID
        points = torch.stack(
            [x[..., None, :].expand(*x.shape[:2], n, n), y[..., :, None].expand(*y.shape[:2], n, n)], -1
        )
        grid = (points.flatten(2, 3) * 2 - 1).float()  # (B, N, grid², 2)
        inside = F.grid_sample(detail.float(), grid, align_corners=False, padding_mode="border")
        context = F.grid_sample(coarse.float(), grid, align_corners=False, padding_mode="border").mean(-1)
        rows = [inside.permute(0, 2, 1, 3).flatten(2), context.transpose(1, 2), boxes]
        return self.net(torch.cat(rows, -1).to(detail.dtype))


class MedGLIP(nn.Module):
    """Image + phrases → boxes, masks, scores, presence and region features in one pass. See DESIGN in README."""

    def __init__(self, config: MedGLIPConfig, trunk: Trunk):
        super().__init__()
        self.config, self.trunk = config, trunk
        d, channels = config.width, trunk.channels
        prototypes = config.prototypes if config.mask_head else 0
        self.lateral = nn.ModuleList(nn.Conv2d(c, d, 1) for c in channels[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1) for _ in STRIDES)
        self.position = nn.Linear(d, d)
        if config.adapters:
            self.adapters = nn.ModuleList(ModalityAdapter(d) for _ in STRIDES)
            self.prompts = nn.Embedding(len(MODALITIES), config.prompt_tokens * d)
        self.modality_head = nn.Linear(channels[-1], len(MODALITIES))
        self.text = mlp(config.text_width, 2 * d, d)
        self.side = nn.Embedding(3, d)
        if config.fusion != "none":
            self.fusion = PhraseFusion(d) if config.fusion == "phrase" else TwoWayFusion(d)
        self.head = DenseHead(d, prototypes)
        self.fine_lateral, self.fine_top = nn.Conv2d(channels[0], d // 2, 1), nn.Conv2d(d, d // 2, 1)
        self.fine = nn.Sequential(nn.Conv2d(d // 2, d // 2, 3, padding=1), nn.GroupNorm(8, d // 2), nn.GELU())
        if config.mask_head:
            self.prototype = nn.Conv2d(d // 2, prototypes, 1)
        self.regions = RegionEncoder(d // 2 + channels[0], d, config.region_width)
        self.region_align = nn.Linear(config.region_width, d)
        self.region_edges = nn.Linear(config.region_width, 4)  # shifts of the edges, in sides of the box
        self.presence = mlp(d + 1, d, 1)
        nn.init.zeros_(self.region_edges.weight)
        nn.init.zeros_(self.region_edges.bias)
        self.scale = nn.Parameter(torch.tensor([10.0, 10.0]))
        self.bias = nn.Parameter(torch.tensor([-4.6, -2.0]))  # the focal prior of 0.01 (Lin et al., 2017) for dense
        self.register_buffer(
            "familiar", torch.zeros(0, channels[-1])
        )  # trunk summaries of training images, unit length

    def gradient_checkpointing(self, on: bool = True) -> None:
        """The trunk's blocks are computed again in the backward pass: less memory, the same gradients, more time."""
        checkpoint_blocks(self.trunk, on)

    def pyramid(self, pixel_values: torch.Tensor, modality: torch.Tensor | None):
        """Levels (B, D, h, w) at strides 8, 16, 32, the fine map (B, D/2, h, w) at stride 4, the same with the trunk's
        own map there (edges and grey values), trunk summary (B, C), modality logits (B, M), prompts (B, T, D) or None.
        ``modality``: (B, M) weights, None where it is not known."""
        maps = self.trunk.feature_maps(pixel_values)
        pooled = maps[-1].mean((2, 3))
        modality_logits = self.modality_head(pooled)
        prompts = self._prompts(modality_logits.softmax(-1) if modality is None else modality)
        levels: list[torch.Tensor] = []
        for k in (2, 1, 0):
            x = self.lateral[k](maps[k + 1])
            if levels:
                x = x + F.interpolate(levels[0], size=x.shape[-2:], mode="nearest")
            levels.insert(0, x)
        centres, _ = location_grid(pixel_values.shape[-1])
        where = self.position(position_code(centres.to(pooled.device), self.config.width).to(pixel_values.dtype))
        start, out = 0, []
        for k, (level, smooth) in enumerate(zip(levels, self.smooth, strict=True)):
            h, w = level.shape[-2:]
            code = where[start : start + h * w].T.reshape(1, -1, h, w)
            start += h * w
            x = smooth(F.gelu(level)) + code
            out.append(x if prompts is None else self.adapters[k](x, prompts))
        up = F.interpolate(self.fine_top(out[0]), size=maps[0].shape[-2:], mode="nearest")
        fine = self.fine(F.gelu(self.fine_lateral(maps[0]) + up))
        return out, fine, torch.cat([fine, maps[0]], 1), pooled, modality_logits, prompts

    def _prompts(self, weights: torch.Tensor) -> torch.Tensor | None:
        """(B, M) → (B, T, D)."""
        if not self.config.adapters:
            return None
        every = self.prompts(torch.arange(len(MODALITIES), device=weights.device))
        return (weights.to(every.dtype) @ every).reshape(len(weights), self.config.prompt_tokens, -1)

    def encode_phrases(self, phrases: PhraseBatch) -> torch.Tensor:
        """(V, D): text vector and side, before modality prompt and fusion. Also the label vectors of region tokens."""
        own = self.side.weight
        return self.text(phrases.vectors.to(own)) + self.side(phrases.sides.to(own.device) + 1)

    def _fuse(self, prompted: torch.Tensor, levels: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Phrases (B, V, D) after a look at the image, and the levels for the dense head."""
        if self.config.fusion == "none":
            return prompted, levels
        flat = [level.flatten(2).transpose(1, 2) for level in levels]
        if self.config.fusion == "phrase":
            return self.fusion(prompted, torch.cat(flat[1:], 1)), levels
        fused, image = self.fusion(prompted, torch.cat(flat, 1))
        rows = image.split([x.shape[1] for x in flat], 1)
        return fused, [x.transpose(1, 2).reshape(level.shape) for x, level in zip(rows, levels, strict=True)]

    def forward(
        self,
        pixel_values: torch.Tensor,
        phrases: PhraseBatch,
        modality: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
    ) -> MedGLIPOutput:
        """pixel_values (B, 3, S, S), S any multiple of 32; modality (B, M) weights or None; region_boxes (B, N, 4) or
        None. Raises ValueError for images of another shape."""
        height, size = pixel_values.shape[-2:]
        if height != size or size % 32:
            raise ValueError(f"images of {height} x {size}: give squares whose side is a multiple of 32")
        pixel_values = pixel_values.to(self.position.weight.dtype)  # bfloat16 where the whole model is
        levels, fine, detail, pooled, modality_logits, prompts = self.pyramid(pixel_values, modality)
        prompted = self.encode_phrases(phrases)[None].expand(len(pooled), -1, -1)
        if prompts is not None:
            prompted = prompted + prompts.mean(1, keepdim=True)
        fused, seen = self._fuse(prompted, levels)
        unit = F.normalize(fused, dim=-1)
        embedding, distances, quality, coefficients = self.head(seen)
        logits = self.scale[0] * (F.normalize(embedding, dim=-1) @ unit.transpose(1, 2)) + self.bias[0]
        strongest = logits.amax(1)[..., None]
        out = MedGLIPOutput(
            logits=logits,
            boxes=self._boxes(distances, size),
            quality=quality[..., 0],
            coefficients=coefficients.tanh() if self.config.mask_head else None,
            prototypes=self.prototype(fine) if self.config.mask_head else None,
            presence=self.presence(torch.cat([fused, strongest], -1))[..., 0],
            modality=modality_logits,
            pooled=pooled,
            detail=detail,
            coarse=levels[0],
            prompted=prompted,
        )
        if region_boxes is not None:
            out.regions = self.read_regions(out, region_boxes)
        return out

    def read_regions(self, out: MedGLIPOutput, boxes: torch.Tensor) -> RegionOutput:
        """boxes (B, N, 4), wherever they come from."""
        features = self.regions(out.detail, out.coarse, boxes)
        aligned = F.normalize(self.region_align(features), dim=-1)
        logits = self.scale[1] * (aligned @ F.normalize(out.prompted, dim=-1).transpose(1, 2)) + self.bias[1]
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        moved = (boxes + self.region_edges(features) * sides).clamp(0, 1)
        low, high = moved[..., :2], moved[..., 2:]  # an untrained head may move an edge past the other
        return RegionOutput(features, logits, torch.cat([torch.minimum(low, high), torch.maximum(low, high)], -1))

    @staticmethod
    def _boxes(distances: torch.Tensor, image_size: int) -> torch.Tensor:
        """Distances to left, top, right, bottom in strides (FCOS, Tian et al., 2019) → xyxy, clipped to the image."""
        centres, strides = location_grid(image_size)
        centres, strides = centres.to(distances.device), strides.to(distances.device)
        reach = F.softplus(distances.float()) * 2 * strides[:, None]
        return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1).clamp(0, 1)


def build_model(config: MedGLIPConfig, seed: int, pretrained: bool = True) -> MedGLIP:
    """A fresh model with its trunk's weights and the trunk up to stride 4 frozen; not ``pretrained``: with a random
    trunk ("tiny" always is) that is trained as a whole. Its ``config`` is ``config`` with the trunk's own one in it.

    Raises CheckpointError for a trunk that cannot be used.
    """
    torch.manual_seed(seed)
    config = _with_trunk_config(config)
    trunk = build_trunk(config.trunk, config.image_size, pretrained, config.trunk_config)
    return MedGLIP(config, trunk)


def _with_trunk_config(config: MedGLIPConfig) -> MedGLIPConfig:
    known = config.trunk_config is not None
    return config if known else dataclasses.replace(config, trunk_config=read_config(config.trunk))


def save_checkpoint(folder: Path, config: MedGLIPConfig, state: dict[str, torch.Tensor]) -> None:
    """``folder``/model.safetensors, then config.json: a folder without config.json is not a complete checkpoint."""
    row = dataclasses.asdict(_with_trunk_config(config))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomic(Path(folder) / "model.safetensors", save(tensors))
    write_atomic(Path(folder) / "config.json", json.dumps(row, indent=1))


def load_checkpoint(folder: Path) -> MedGLIP:
    """Raises CheckpointError where ``folder`` is not a grounding checkpoint, or one of another format version."""
    folder = Path(folder)
    try:
        row = json.loads((folder / "config.json").read_text())
        version = row["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no grounding checkpoint there; train one with grounding.train") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint of format {version}, this program reads {FORMAT_VERSION}; train again"
        )
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    config = MedGLIPConfig(**row)
    model = MedGLIP(config, empty_trunk(config.trunk, config.image_size, config.trunk_config))
    state = load_file(str(folder / "model.safetensors"))
    model.familiar = state["familiar"].float()
    model.load_state_dict(state)
    return model.eval()


def checkpoint_hash(folder: Path) -> str:
    """16 hexadecimal digits of the SHA-256 of the weights and the configuration."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    digest.update((Path(folder) / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]
