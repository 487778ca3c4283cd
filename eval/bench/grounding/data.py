"""The same images for every peer: Parquet of `medglip data export` → examples → batches, and COCO ground truth.

Dimension key: B images, N regions, S input size. Boxes are xyxy in [0, 1], of the image or (in a batch) of the input.
"""

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image, ImageOps

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every contestant is fed with
COLUMNS = ("image_id", "patient_id", "source", "image", "height", "width", "boxes", "labels", "masks", "labelled")


@dataclass(frozen=True)
class Example:
    """An annotated image. image: a path or a file's bytes; image_size: (H, W); boxes: (N, 4) float32 of the image;
    masks: N COCO RLE or None; labelled: what its source annotates exhaustively."""

    image_id: str
    patient_id: str
    source: str
    image: str | bytes
    image_size: tuple[int, int]
    boxes: np.ndarray
    labels: tuple[str, ...]
    masks: list[dict] | None
    labelled: tuple[str, ...]


@dataclass(frozen=True)
class Frame:
    """Where an (H, W) image lies in the (S, S) input: the largest centred fit that keeps its shape."""

    image_size: tuple[int, int]
    size: int

    @property
    def content(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels of the input."""
        scale = self.size / max(self.image_size)
        height, width = (max(1, round(side * scale)) for side in self.image_size)
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def apply(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) of the image → of the input."""
        top, left, height, width = (side / self.size for side in self.content)
        return np.asarray(boxes, np.float32) * np.float32([width, height] * 2) + np.float32([left, top] * 2)

    def invert(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) of the input → of the image, clipped to it."""
        top, left, height, width = (side / self.size for side in self.content)
        inside = (np.asarray(boxes, np.float32) - np.float32([left, top] * 2)) / np.float32([width, height] * 2)
        return inside.clip(0, 1)


@dataclass(frozen=True)
class Batch:
    """pixel_values (B, 3, S, S); boxes: B tensors (N, 4) of the input; classes: B tensors (N,) int64."""

    pixel_values: torch.Tensor
    boxes: list[torch.Tensor]
    classes: list[torch.Tensor]
    examples: Sequence[Example]
    frames: list[Frame]


def read_examples(folder: Path) -> list[Example]:
    """Every row of the Parquet files of a folder, in order."""
    files = sorted(folder.glob("*.parquet"))
    return [_example(row) for file in files for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist()]


def _example(row: Mapping) -> Example:
    size = (row["height"], row["width"])
    masks = None if row["masks"] is None else [{"size": list(size), "counts": counts} for counts in row["masks"]]
    return Example(
        image_id=row["image_id"],
        patient_id=row["patient_id"],
        source=row["source"],
        image=row["image"]["bytes"] or row["image"]["path"],
        image_size=size,
        boxes=np.asarray(row["boxes"], np.float32).reshape(-1, 4),
        labels=tuple(row["labels"]),
        masks=masks,
        labelled=tuple(row["labelled"] or ()),
    )


def collate(examples: Sequence[Example], classes: Mapping[str, int], size: int) -> Batch:
    """Regions of a label that is not in `classes` are left out (a label that only the validation images have)."""
    frames = [Frame(example.image_size, size) for example in examples]
    known = [[k for k, label in enumerate(example.labels) if label in classes] for example in examples]
    return Batch(
        torch.stack([_pixels(example, frame) for example, frame in zip(examples, frames, strict=True)]),
        [torch.from_numpy(f.apply(e.boxes[rows])) for e, f, rows in zip(examples, frames, known, strict=True)],
        [torch.tensor([classes[e.labels[k]] for k in rows]).long() for e, rows in zip(examples, known, strict=True)],
        examples,
        frames,
    )


def _pixels(example: Example, frame: Frame) -> torch.Tensor:
    top, left, height, width = frame.content
    canvas = np.zeros((frame.size, frame.size, 3), np.float32)
    opened = Image.open(io.BytesIO(example.image) if isinstance(example.image, bytes) else example.image)
    picture = ImageOps.exif_transpose(opened).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    canvas[top : top + height, left : left + width] = np.asarray(picture, np.float32) / 255
    return torch.from_numpy((canvas - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def class_maps(batch: Batch, classes: Mapping[str, int], stride: int) -> torch.Tensor:
    """(B, classes, S/stride, S/stride) coverage in [0, 1]: masks, or where a source has boxes alone the ellipse inside
    each box, which keeps neighbouring cells apart and has the same box."""
    size = batch.pixel_values.shape[-1] // stride
    maps = np.zeros((len(batch.examples), len(classes), size, size), np.float32)
    for image, example, frame in zip(maps, batch.examples, batch.frames, strict=True):
        for k, label in enumerate(example.labels):
            if label in classes:
                drawn = (
                    _mask(example.masks[k], frame, stride) if example.masks else _ellipse(example.boxes[k], frame, size)
                )
                np.maximum(image[classes[label]], drawn, out=image[classes[label]])
    return torch.from_numpy(maps)


def _mask(mask: dict, frame: Frame, stride: int) -> np.ndarray:
    top, left, height, width = frame.content
    canvas = np.zeros((frame.size, frame.size), np.float32)
    picture = Image.fromarray(rle.decode(mask).astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    canvas[top : top + height, left : left + width] = np.asarray(picture)
    size = frame.size // stride
    return canvas.reshape(size, stride, size, stride).mean((1, 3))


def _ellipse(box: np.ndarray, frame: Frame, size: int) -> np.ndarray:
    x1, y1, x2, y2 = frame.apply(box[None])[0] * size
    across = ((np.arange(size) + 0.5) - (x1 + x2) / 2) / max((x2 - x1) / 2, 0.5)
    down = ((np.arange(size) + 0.5) - (y1 + y2) / 2) / max((y2 - y1) / 2, 0.5)
    return (down[:, None] ** 2 + across[None] ** 2 <= 1).astype(np.float32)


def draw(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end. A source of n images is drawn with a chance that goes with √n, as MedGLIP's training does;
    within a source every image comes once before any comes again."""
    chance = random.Random(seed)
    sources: dict[str, list[Example]] = {}
    for example in examples:
        sources.setdefault(example.source, []).append(example)
    names = sorted(sources)
    weights = [len(sources[name]) ** 0.5 for name in names]
    waiting: dict[str, list[Example]] = {name: [] for name in names}
    while True:
        batch = []
        for name in chance.choices(names, weights, k=batch_size):
            if not waiting[name]:
                waiting[name] = chance.sample(sources[name], len(sources[name]))
            batch.append(waiting[name].pop())
        yield batch


def coco_truth(examples: Sequence[Example], labels: Sequence[str]) -> dict:
    """COCO ground truth; image k of `examples` has id k + 1, label k of `labels` category id k + 1."""
    numbers = {label: k for k, label in enumerate(labels, 1)}
    images, annotations = [], []
    for number, example in enumerate(examples, 1):
        height, width = example.image_size
        about = {"patient_id": example.patient_id, "source": example.source, "labelled": list(example.labelled)}
        images.append({"id": number, "file_name": example.image_id, "height": height, "width": width, **about})
        for k, label in enumerate(example.labels):
            mask = {"segmentation": example.masks[k]} if example.masks else {}
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": numbers[label], "iscrowd": 0, **mask}
            row["bbox"] = xywh(example.boxes[k], example.image_size)
            annotations.append({**row, "area": row["bbox"][2] * row["bbox"][3]})
    categories = [{"id": k, "name": label} for label, k in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def xywh(box: np.ndarray, image_size: tuple[int, int]) -> list[float]:
    """xyxy in [0, 1] → x, y, width, height in pixels."""
    height, width = image_size
    x1, y1, x2, y2 = (float(v) * side for v, side in zip(box, (width, height) * 2, strict=True))
    return [x1, y1, x2 - x1, y2 - y1]
