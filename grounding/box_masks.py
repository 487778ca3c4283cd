"""Boxes to masks with a SAM-family model of transformers: SAM, SAM-HQ or SAM 2, from a folder or the hub.

Images are prepared here: the image processor of SAM 2 asks for torchvision. All published checkpoints normalise with
the ImageNet statistics; SAM and SAM-HQ fit the longer side and pad at the bottom right, SAM 2 stretches to a square.

Dimension key: N regions, S side of the network input, h w size of a predicted mask.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from grounding.detect import check_pixels
from grounding.images import MEAN, STD
from grounding.masks import encode_inside
from grounding.model import CheckpointError
from grounding.types import RegionSet

FAMILIES = ("sam", "sam_hq", "sam2", "sam2_video")
BOXES_AT_ONCE = 32


@dataclass
class Segmenter:
    """A SAM-family model; ``pads``: it keeps the aspect ratio."""

    model: Any
    size: int
    pads: bool


def load_sam(path: Path | str, device: str | None = None) -> Segmenter:
    """``device``: by default the first accelerator, if there is one. Raises CheckpointError."""
    from transformers import AutoConfig, Sam2Model, SamHQModel, SamModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        family = AutoConfig.from_pretrained(str(path)).model_type
        if family not in FAMILIES:
            raise CheckpointError(f"{path}: a {family} model; known for masks: {', '.join(FAMILIES)}")
        kind: Any = {"sam": SamModel, "sam_hq": SamHQModel}.get(family, Sam2Model)
        model = kind.from_pretrained(str(path)).eval()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a SAM model ({str(error).splitlines()[0]})") from error
    chosen = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    size = model.config.prompt_encoder_config.image_size
    return Segmenter(model.to(chosen), size if isinstance(size, int) else size[0], family in ("sam", "sam_hq"))


@torch.no_grad()
def add_masks(regions: RegionSet, image: np.ndarray, sam: Segmenter) -> RegionSet:
    """``regions`` with a mask each, in the place of any they had: what the model sees inside the box, cut off at the
    box. ``image``: uint8 (H, W) or (H, W, 3), that of the regions. Raises ValueError where the sizes differ."""
    check_pixels(image, 0)
    height, width = image.shape[:2]
    if (height, width) != tuple(regions.image_size):
        raise ValueError(f"the regions are of an image of {regions.image_size}, this one is {(height, width)}")
    if not len(regions):
        return dataclasses.replace(regions, masks=None)
    pixels, content = _pixel_values(image, sam)
    seen = _embedded(sam, pixels[None].to(sam.model.device))
    scale = torch.tensor([content[1], content[0], content[1], content[0]])
    boxes = torch.from_numpy(regions.boxes)
    masks: list[dict | None] = []
    for some in boxes.split(BOXES_AT_ONCE):
        prompts = (some * scale)[None].to(sam.model.device)
        out = sam.model(**seen, input_boxes=prompts, multimask_output=False)
        for logits, box in zip(out.pred_masks[0, :, 0].float().cpu(), some, strict=True):
            masks.append(_inside(logits, box.tolist(), (height, width), content, sam.size))
    return dataclasses.replace(regions, masks=masks)


def _embedded(sam: Segmenter, pixels: torch.Tensor) -> dict[str, Any]:
    """The image, encoded once for all its boxes."""
    embeddings = sam.model.get_image_embeddings(pixels)
    if sam.model.config.model_type == "sam_hq":
        return {"image_embeddings": embeddings[0], "intermediate_embeddings": embeddings[1]}
    return {"image_embeddings": embeddings}


def _pixel_values(image: np.ndarray, sam: Segmenter) -> tuple[torch.Tensor, tuple[int, int]]:
    """(3, S, S) float32, and the (height, width) of it that the image fills, at the top left."""
    height, width = image.shape[:2]
    scale = sam.size / max(height, width)
    content = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))) if sam.pads else (sam.size,) * 2
    picture = Image.fromarray(image).convert("RGB").resize(content[::-1], Image.Resampling.BILINEAR)
    values = (np.asarray(picture, np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    canvas = torch.zeros(3, sam.size, sam.size)
    canvas[:, : content[0], : content[1]] = torch.from_numpy(values).permute(2, 0, 1)
    return canvas, content


def _inside(
    logits: torch.Tensor, box: list[float], size: tuple[int, int], content: tuple[int, int], side: int
) -> dict[str, Any]:
    """COCO RLE at (H, W) of where (h, w) logits are positive, at the pixels whose centres lie in the box. Only these
    are looked at: an image may have millions."""
    rows, columns = _centres(box[1], box[3], size[0]), _centres(box[0], box[2], size[1])
    if not rows or not columns:
        return encode_inside(np.zeros((0, 0), bool), 0, 0, size)
    # The image fills `content` of the `side` x `side` input, of which the logits are a smaller picture.
    y = (torch.tensor(rows) + 0.5) / size[0] * content[0] / side * 2 - 1
    x = (torch.tensor(columns) + 0.5) / size[1] * content[1] / side * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    values = F.grid_sample(logits[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    return encode_inside((values > 0).numpy(), rows.start, columns.start, size)


def _centres(low: float, high: float, side: int) -> range:
    """The pixels whose centres lie between two edges in [0, 1]."""
    return range(math.ceil(low * side - 0.5), math.floor(high * side - 0.5) + 1)
