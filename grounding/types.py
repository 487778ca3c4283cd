"""The types that the four packages share, and their files.

Dimension key: B images, N regions, D feature width, E label-vector width, H W image height and width in pixels.
Boxes are ``xyxy``, float32, normalised to [0, 1] of the image as the user gave it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import write_atomic

if TYPE_CHECKING:  # torch takes seconds and 200 MB, which who only reads a store or converts a dataset need not pay
    import torch

NOT_FOUND_LEVEL = 3  # RegionTokens.levels: 0, 1, 2 are pyramid levels, small to large


class RegionError(ValueError):
    """Regions that break the contract; the message says which and why."""


@dataclass(frozen=True)
class RegionSet:
    """The regions of one image, column by column.

    boxes: (N, 4) float32 xyxy in [0, 1]. labels: N label-tree ids or free phrases. scores: (N,) float32 in [0, 1],
    None for annotations. masks: N COCO RLE ``{"size": [H, W], "counts": str}``, None for a region that has only a box;
    None for the whole where no region has one. image_size: (H, W). queries: what was looked for,
    ``[{"phrase", "label", "presence"}]``, so that "not found" is data.
    attributes: N dicts such as ``{"margin": "sharp"}``, or None. texts: N names as the source wrote them, or None.
    Raises RegionError where lengths differ, a box is not finite, inverted or outside the image, or a mask is no RLE.
    """

    boxes: np.ndarray
    labels: list[str]
    image_size: tuple[int, int]
    scores: np.ndarray | None = None
    masks: list[dict | None] | None = None
    queries: list[dict] = field(default_factory=list)
    attributes: list[dict[str, str]] | None = None
    texts: list[str] | None = None

    def __post_init__(self):
        boxes = np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4)
        object.__setattr__(self, "boxes", boxes)
        if self.scores is not None:
            object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float32).reshape(-1))
        for name in ("labels", "scores", "masks", "attributes", "texts"):
            column = getattr(self, name)
            if column is not None and len(column) != len(boxes):
                raise RegionError(f"{len(boxes)} boxes but {len(column)} {name}")
        self._check_masks()
        if not np.isfinite(boxes).all():
            raise RegionError(f"box {int(np.argmin(np.isfinite(boxes).all(1)))} is not finite")
        wrong = (boxes.min(1, initial=0) < 0) | (boxes.max(1, initial=0) > 1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
        if wrong.any():
            k = int(np.argmax(wrong))
            raise RegionError(f"box {k} {boxes[k].tolist()} is inverted or outside [0, 1]")

    def _check_masks(self) -> None:
        for k, mask in enumerate(self.masks or ()):
            if mask is not None and not (isinstance(mask, Mapping) and "size" in mask and "counts" in mask):
                raise RegionError(f"mask {k} is {str(mask)[:60]}, not a COCO RLE with size and counts")
        if self.masks and all(mask is None for mask in self.masks):
            object.__setattr__(self, "masks", None)

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def full_masks(self) -> list[dict] | None:
        """`masks`, where every region has one; None where one has only a box."""
        masks = [mask for mask in self.masks or () if mask is not None]
        return None if self.masks is None or len(masks) < len(self) else masks

    def select(self, indices: Sequence[int]) -> RegionSet:
        """The regions at ``indices``, in that order."""
        rows = list(indices)

        def take(column: list | None) -> list | None:
            return None if column is None else [column[i] for i in rows]

        return replace(
            self,
            boxes=self.boxes[rows],
            labels=[self.labels[i] for i in rows],
            scores=None if self.scores is None else self.scores[rows],
            masks=take(self.masks),
            attributes=take(self.attributes),
            texts=take(self.texts),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON: ``{"image_size", "regions", "queries"}``; a region has box and label, and score, mask, attributes and
        text where there are any."""
        regions: list[dict[str, Any]] = [
            {"box": [round(float(v), 6) for v in box], "label": label}
            for box, label in zip(self.boxes, self.labels, strict=True)
        ]
        for k, region in enumerate(regions):
            if self.scores is not None:
                region["score"] = round(float(self.scores[k]), 6)
            if self.masks is not None and self.masks[k] is not None:
                region["mask"] = self.masks[k]
            if self.attributes is not None:
                region["attributes"] = self.attributes[k]
            if self.texts is not None:
                region["text"] = self.texts[k]
        return {"image_size": list(self.image_size), "regions": regions, "queries": self.queries}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RegionSet:
        """Reads ``to_dict``'s form. Raises RegionError where a key is missing or a region breaks the contract."""
        try:
            regions = row["regions"]
            boxes = np.array([region["box"] for region in regions], dtype=np.float32).reshape(-1, 4)
            labels = [str(region["label"]) for region in regions]
            height, width = row["image_size"]
        except (KeyError, TypeError, ValueError) as error:
            raise RegionError(f'needs "image_size" and "regions" with "box" and "label": {error!r}') from error

        def column(key: str) -> list | None:
            return [region[key] for region in regions] if regions and all(key in r for r in regions) else None

        scores = column("score")
        return cls(
            boxes=boxes,
            labels=labels,
            image_size=(int(height), int(width)),
            scores=None if scores is None else np.array(scores, dtype=np.float32),
            masks=[region.get("mask") for region in regions] or None,
            queries=list(row.get("queries", [])),
            attributes=column("attributes"),
            texts=column("text"),
        )

    def to_coco(self, image_id: int, category_ids: Mapping[str, int]) -> list[dict]:
        """COCO results (with ``score``) or annotations (without): ``bbox`` is xywh in pixels, ids are the caller's."""
        height, width = self.image_size
        rows = []
        for k, (x1, y1, x2, y2) in enumerate(self.boxes * np.array([width, height, width, height], np.float32)):
            row = {
                "image_id": image_id,
                "category_id": category_ids[self.labels[k]],
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            }
            if self.scores is not None:
                row["score"] = float(self.scores[k])
            if self.masks is not None and self.masks[k] is not None:
                row["segmentation"] = self.masks[k]
            rows.append(row)
        return rows

    @classmethod
    def from_coco(cls, rows: Sequence[Mapping], categories: Mapping[int, str], image_size: tuple[int, int]):
        """The inverse of ``to_coco``; ``categories`` maps category id to label. Boxes are clipped to the image."""
        height, width = image_size
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float32).reshape(-1, 4)
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1) / np.array([width, height] * 2, np.float32)
        scores = [row["score"] for row in rows if "score" in row]
        shapes = [row.get("segmentation") for row in rows]
        return cls(
            boxes=boxes.clip(0, 1),
            labels=[categories[row["category_id"]] for row in rows],
            image_size=image_size,
            scores=np.array(scores, np.float32) if rows and len(scores) == len(rows) else None,
            masks=[shape if isinstance(shape, dict) else None for shape in shapes] or None,
        )

    def to_detections(self):
        """``supervision.Detections`` (boxes in pixels; the mask of a region without one is empty, where others have
        one); needs the optional package supervision."""
        import supervision
        from pycocotools import mask as rle

        height, width = self.image_size
        nothing = np.zeros(self.image_size, bool)
        masks = [nothing if m is None else rle.decode(m).astype(bool) for m in self.masks or ()]
        return supervision.Detections(
            xyxy=self.boxes * np.array([width, height] * 2, np.float32),
            confidence=self.scores,
            mask=np.stack(masks) if masks else None,
            data={"class_name": np.array(self.labels, dtype=object)},
        )


@dataclass(frozen=True)
class GroundingSample:
    """One annotated image. ``labelled``: the label ids that its source annotates exhaustively; only those can be
    negatives. ``image``: a path, or the bytes of an image file. ``spacing``: mm a pixel (row, column), None unknown.
    ``study_id``: what was taken in one go (study, volume or video sequence), None unknown; ``frame``: place within it,
    so that neighbouring slices and frames can be told. ``licence``: of the image and its regions, "" unknown."""

    image_id: str
    patient_id: str
    source: str
    modality: str
    image: str | bytes
    regions: RegionSet
    labelled: tuple[str, ...]
    spacing: tuple[float, float] | None = None
    study_id: str | None = None
    frame: int | None = None
    licence: str = ""


@dataclass
class RegionTokens:
    """What the bridge reads: ``features`` (B, N, D), ``boxes`` (B, N, 4), ``scores`` (B, N), ``label_vectors``
    (B, N, E) float32; ``levels`` (B, N) int64 (0-2 pyramid level, 3 = looked for and not found: box and feature are
    zero, the score is the presence probability); ``valid`` (B, N) bool, True = real; labels and queries are lists."""

    features: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor
    labels: list[list[str]]
    label_vectors: torch.Tensor
    levels: torch.Tensor
    valid: torch.Tensor
    queries: list[list[dict]]

    TENSORS = ("features", "boxes", "scores", "label_vectors", "levels", "valid")

    def __post_init__(self):
        b, n = self.valid.shape
        for name in self.TENSORS:
            if getattr(self, name).shape[:2] != (b, n):
                raise RegionError(f"RegionTokens.{name} is {tuple(getattr(self, name).shape)}, not ({b}, {n}, ...)")
        if len(self.labels) != b or any(len(row) != n for row in self.labels):
            raise RegionError(f"RegionTokens.labels must be {b} lists of {n} strings")

    def __len__(self) -> int:
        return len(self.valid)

    def rows(self, indices: Sequence[int]) -> RegionTokens:
        """The images at ``indices``, in that order."""
        rows = list(indices)
        return RegionTokens(
            **{name: getattr(self, name)[rows] for name in self.TENSORS},
            labels=[self.labels[i] for i in rows],
            queries=[self.queries[i] for i in rows],
        )


def stack_region_tokens(tokens: Sequence[RegionTokens]) -> RegionTokens:
    """Batches along B; shorter rows are padded to the longest N with valid = False, zeros and empty labels."""
    import torch

    n = max(t.valid.shape[1] for t in tokens)

    def padded(name: str) -> torch.Tensor:
        tensors = [getattr(t, name) for t in tokens]
        return torch.cat([torch.cat([t, t.new_zeros(len(t), n - t.shape[1], *t.shape[2:])], 1) for t in tensors])

    return RegionTokens(
        **{name: padded(name) for name in RegionTokens.TENSORS},
        labels=[row + [""] * (n - len(row)) for t in tokens for row in t.labels],
        queries=[row for t in tokens for row in t.queries],
    )


def save_region_tokens(
    path: Path,
    image_ids: Sequence[str],
    tokens: RegionTokens,
    meta: Mapping[str, Any],
    vocabulary: Mapping[str, torch.Tensor],
) -> None:
    """One safetensors file. ``meta`` holds what the tokens depend on (checkpoint, phrase-list and settings hashes);
    ``vocabulary`` the label vector (E) of every label that could have been found."""
    import torch
    from safetensors.torch import save

    text = {"image_ids": list(image_ids), "labels": tokens.labels, "queries": tokens.queries, "meta": dict(meta)}
    text["vocabulary"] = list(vocabulary)
    tensors = {name: getattr(tokens, name).contiguous() for name in RegionTokens.TENSORS}
    tensors["vocabulary"] = torch.stack(list(vocabulary.values()))
    metadata = {key: json.dumps(value) for key, value in text.items()}
    write_atomic(Path(path), save(tensors, metadata))


def load_region_tokens(path: Path) -> tuple[list[str], RegionTokens, dict[str, Any], dict[str, torch.Tensor]]:
    """(image_ids, tokens, meta, vocabulary) of ``save_region_tokens``. Raises RegionError where the file is missing or
    another."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in RegionTokens.TENSORS}
            vocabulary = dict(zip(text["vocabulary"], file.get_tensor("vocabulary"), strict=True))
        tokens = RegionTokens(**tensors, labels=text["labels"], queries=text["queries"])
        return text["image_ids"], tokens, text["meta"], vocabulary
    except (OSError, SafetensorError, KeyError) as error:
        raise RegionError(f"{path}: not a region-token file ({error}); write one with grounding.predict") from error


def write_regions(path: Path, regions: Mapping[str, RegionSet]) -> None:
    """regions.jsonl: one line an image, ``{"image_id", **RegionSet.to_dict()}``; written atomically."""
    lines = [json.dumps({"image_id": image_id, **item.to_dict()}) for image_id, item in regions.items()]
    write_atomic(Path(path), "".join(line + "\n" for line in lines))


def read_regions(path: Path) -> dict[str, RegionSet]:
    """image_id → RegionSet of a regions.jsonl. Raises RegionError naming the file and line that cannot be read."""
    regions = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RegionError(f"{path}: cannot be read ({error}); give a regions.jsonl") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                regions[str(row["image_id"])] = RegionSet.from_dict(row)
            except (json.JSONDecodeError, KeyError, TypeError, RegionError) as error:
                raise RegionError(f"{path}:{number}: {error}") from error
    return regions
