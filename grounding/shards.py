"""Predictions on their way to disk: blocks of images that processes write by themselves, merged in the store's order.

A block is one safetensors file, complete or not there, so that a run which was killed goes on where it was, with any
number of processes. Merging reads block after block: of all images only labels and queries are held at once, which the
header of a region-token file wants together.

Dimension key: B images, N regions, D E widths as in `grounding.types`.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from configs import write_atomic
from grounding.store import Store
from grounding.types import GroundingSample, RegionError, RegionSet, RegionTokens, stack_region_tokens

BATCHES = 4  # of a block
HEADER = 100_000_000  # bytes of a safetensors header at most
# Eight-byte numbers first: each tensor then starts at a multiple of its item size.
TOKEN_TENSORS = {
    "levels": "I64",
    "features": "F32",
    "boxes": "F32",
    "scores": "F32",
    "label_vectors": "F32",
    "vocabulary": "F32",
    "valid": "BOOL",
}
ITEM_SIZE = {"I64": 8, "F32": 4, "BOOL": 1}


@dataclass
class Row:
    """One image: ``digest`` is the SHA-256 of its file."""

    sample: GroundingSample
    candidates: RegionSet
    found: RegionSet
    tokens: RegionTokens
    digest: str


@dataclass(frozen=True)
class Blocks:
    """The blocks of one run. ``key`` tells what their content depends on, and is a part of the folder's name: blocks of
    other settings are never taken for these."""

    out: Path
    key: str
    images: int
    batch_size: int

    @property
    def folder(self) -> Path:
        return self.out / f"blocks-{self.key}"

    @property
    def ranges(self) -> list[range]:
        """The images of each block."""
        size = self.batch_size * BATCHES
        return [range(start, min(start + size, self.images)) for start in range(0, self.images, size)]

    def path(self, number: int) -> Path:
        return self.folder / f"{number // 1000:04d}" / f"{number:07d}.safetensors"

    def pending(self) -> list[int]:
        """The numbers of the blocks that are not there yet."""
        return [number for number in range(len(self.ranges)) if not self.path(number).exists()]

    def read(self) -> Iterator["Block"]:
        """In the store's order."""
        return (Block(self.path(number)) for number in range(len(self.ranges)))

    def remove(self) -> None:
        """These blocks, and those that a run with other settings left here."""
        for folder in self.out.glob("blocks-*"):
            shutil.rmtree(folder, ignore_errors=True)


def write_block(path: Path, rows: Sequence[Row]) -> None:
    tokens = stack_region_tokens([row.tokens for row in rows])
    sets = [row.candidates for row in rows]
    tensors = {name: getattr(tokens, name).contiguous() for name in RegionTokens.TENSORS}
    tensors["candidate_boxes"] = torch.from_numpy(np.concatenate([s.boxes for s in sets]))
    if all(s.scores is not None for s in sets):
        tensors["candidate_scores"] = torch.from_numpy(np.concatenate([s.scores for s in sets]))
    text = {
        "image_ids": [row.sample.image_id for row in rows],
        "labels": tokens.labels,
        "queries": tokens.queries,
        "digests": [row.digest for row in rows],
        "lines": [json.dumps({"image_id": row.sample.image_id, **row.found.to_dict()}) for row in rows],
        "candidates": [
            {"labels": s.labels, "masks": s.masks, "image_size": list(s.image_size), "queries": s.queries} for s in sets
        ],
    }
    write_atomic(path, save(tensors, {key: json.dumps(value) for key, value in text.items()}))


class Block:
    """What ``write_block`` wrote; each part is read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path

    def text(self, name: str) -> list:
        with safe_open(str(self.path), framework="pt") as file:
            return json.loads(file.metadata()[name])

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(name)

    def candidates(self) -> list[RegionSet]:
        """To the last digit as they were."""
        with safe_open(str(self.path), framework="pt") as file:
            scored = "candidate_scores" in file.keys()  # noqa: SIM118 (a file, not a dict)
        boxes = self.tensor("candidate_boxes").numpy()
        scores = self.tensor("candidate_scores").numpy() if scored else None
        sets, start = [], 0
        for row in self.text("candidates"):
            rows = slice(start, start := start + len(row["labels"]))
            size = (row["image_size"][0], row["image_size"][1])
            some = None if scores is None else scores[rows]
            sets.append(RegionSet(boxes[rows], row["labels"], size, some, row["masks"], row["queries"]))
        return sets


def merge(blocks: Blocks, store: Store, meta: dict[str, Any], vocabulary: dict[str, torch.Tensor]) -> None:
    """regions.jsonl, region_tokens.safetensors, coco_results.json and coco_truth.json in ``blocks.out``."""
    lines = (line + "\n" for block in blocks.read() for line in block.text("lines"))
    _stream(blocks.out / "regions.jsonl", (line.encode() for line in lines))
    tokens = _token_file(blocks, meta, vocabulary)
    _stream(blocks.out / "region_tokens.safetensors", tokens)
    _write_coco(blocks, store)


def _stream(path: Path, parts: Iterable[bytes]) -> None:
    """As ``write_atomic``, for what does not fit into memory."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _token_file(blocks: Blocks, meta: dict, vocabulary: dict[str, torch.Tensor]) -> Iterator[bytes]:
    """The bytes of ``save_region_tokens``' file, block by block
    (format: https://huggingface.co/docs/safetensors/index#format)."""
    width = max(block.tensor("valid").shape[1] for block in blocks.read())
    text: dict[str, Any] = {"image_ids": [], "labels": [], "queries": [], "meta": meta, "vocabulary": list(vocabulary)}
    for block in blocks.read():
        text["image_ids"] += block.text("image_ids")
        text["labels"] += [row + [""] * (width - len(row)) for row in block.text("labels")]
        text["queries"] += block.text("queries")
    table = torch.stack(list(vocabulary.values()))
    first = next(blocks.read())
    shapes = {name: (blocks.images, width, *first.tensor(name).shape[2:]) for name in RegionTokens.TENSORS}
    yield _header({name: shapes.get(name, tuple(table.shape)) for name in TOKEN_TENSORS}, text, blocks.out)
    for name in TOKEN_TENSORS:
        if name == "vocabulary":
            yield table.contiguous().numpy().tobytes()
            continue
        for block in blocks.read():
            rows = block.tensor(name)
            more = rows.new_zeros(len(rows), width - rows.shape[1], *rows.shape[2:])
            yield torch.cat([rows, more], 1).numpy().tobytes()


def _header(shapes: dict[str, tuple[int, ...]], text: dict[str, Any], out: Path) -> bytes:
    header: dict[str, Any] = {"__metadata__": {key: json.dumps(value) for key, value in text.items()}}
    start = 0
    for name, shape in shapes.items():
        end = start + int(np.prod(shape)) * ITEM_SIZE[TOKEN_TENSORS[name]]
        header[name] = {"dtype": TOKEN_TENSORS[name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    coded = json.dumps(header).encode()
    if len(coded) > HEADER:
        raise RegionError(
            f"{out}: labels and queries of {len(text['image_ids']):,} images take {len(coded) // 2**20} MB, and a "
            f"region-token file holds {HEADER // 2**20} MB of them; predict parts of the store (medglip data split)"
        )
    coded += b" " * (-len(coded) % 8)
    return len(coded).to_bytes(8, "little") + coded


def _write_coco(blocks: Blocks, store: Store) -> None:
    """coco_results.json and coco_truth.json; ids count from 1, since id 0 counts as "no match" in COCO evaluation."""
    labels = {label for block in blocks.read() for row in block.text("candidates") for label in row["labels"]}
    labels |= {label for sample in store for label in sample.regions.labels}
    categories = {label: k for k, label in enumerate(sorted(labels), 1)}
    every = (regions for block in blocks.read() for regions in block.candidates())
    results = (row for number, found in enumerate(every, 1) for row in found.to_coco(number, categories))
    _stream(blocks.out / "coco_results.json", chain([b"["], _listed(results), [b"]"]))
    truth = [
        (b'{"images": [', _listed(_about(number, sample) for number, sample in enumerate(store, 1))),
        (b'], "annotations": [', _listed(_annotations(store, categories))),
        (b'], "categories": [', _listed({"id": k, "name": label} for label, k in categories.items())),
    ]
    parts = chain.from_iterable(chain([start], rows) for start, rows in truth)
    _stream(blocks.out / "coco_truth.json", chain(parts, [b"]}"]))


def _listed(rows: Iterable[dict]) -> Iterator[bytes]:
    for k, row in enumerate(rows):
        yield (", " if k else "").encode() + json.dumps(row).encode()


def _about(number: int, sample: GroundingSample) -> dict:
    height, width = sample.regions.image_size
    about = {"patient_id": sample.patient_id, "source": sample.source, "labelled": list(sample.labelled)}
    return {"id": number, "file_name": sample.image_id, "height": height, "width": width, **about}


def _annotations(store: Store, categories: dict[str, int]) -> Iterator[dict]:
    count = 0
    for number, sample in enumerate(store, 1):
        for annotation in sample.regions.to_coco(number, categories):
            count += 1
            area = annotation["bbox"][2] * annotation["bbox"][3]
            yield annotation | {"id": count, "area": area, "iscrowd": 0}
