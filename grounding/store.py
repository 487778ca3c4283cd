"""The region store: Arrow shards of images with their regions, memory-mapped.

    store.json             schema version, counts, and the tables that the integers in the shards point into
    data-00000.arrow ...   Arrow IPC streams; `datasets.load_from_disk` reads the folder, too
    CARD.md                the data card
    skipped.jsonl          what a build left out, and why

Labels, original texts and `labelled` are integers in the shards: at 5.3 million regions a word a region would be the
larger part of the store. Dimension key: M regions of a block of rows, N regions of one image.
"""

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs import write_atomic
from eval.fingerprint import T, fingerprint
from grounding.images import read_image
from grounding.types import GroundingSample, RegionSet

SCHEMA_VERSION = 2
BLOCK_ROWS, BLOCK_BYTES = 10_000, 64_000_000  # a record batch is written when either is reached
SHARD_BLOCKS = 8
TAKEN_ROWS = 256  # with the images in them, a few hundred rows fit in memory

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("study_id", pa.string()),
        ("frame", pa.int32()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("modality", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),  # as datasets.Image keeps it
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("spacing", pa.list_(pa.float32())),
        ("labelled", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("labels", pa.list_(pa.int32())),
        ("texts", pa.list_(pa.int32())),
        ("masks", pa.list_(pa.string())),
        ("attributes", pa.list_(pa.string())),
        ("pixels", pa.binary()),
        ("thumbnail", pa.binary()),
    ]
)
COLUMNS = SCHEMA.names
WORDS = {"labels": pa.list_(pa.string()), "texts": pa.list_(pa.string()), "labelled": pa.list_(pa.string())}
WORDS_SCHEMA = pa.schema([(field.name, WORDS.get(field.name, field.type)) for field in SCHEMA])


class StoreError(ValueError):
    """A region store that cannot be read or written; the message names the folder and the remedy."""


class Metadata(NamedTuple):
    """What is known of an image without its pixels. boxes: (N, 4) float32, a view of the file; labels: (N,) int32,
    which `Store.labels` spells out."""

    image_id: str
    patient_id: str
    source: str
    modality: str
    image_size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray


class Table(dict[str, int]):
    """Words → integers, in the order of their first use."""

    def __missing__(self, word: str) -> int:
        self[word] = len(self)
        return self[word]


class StoreWriter:
    """Writes a store row by row into `folder`, which must not exist yet; it is one after `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.labels, self.texts, self.labelled = Table(), Table(), Table()
        self.images = self.regions = 0
        self._rows: list[dict] = []
        self._blocks_held: list[pa.RecordBatch] = []
        self._bytes = self._blocks = 0
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._files: list[str] = []

    def add(self, sample: GroundingSample, pixels: bytes | None = None, thumbnail: bytes | None = None) -> None:
        """`pixels`, `thumbnail`: the image's fingerprint (`eval.fingerprint`), for the audit."""
        regions, n = sample.regions, len(sample.regions)
        embedded = sample.image if isinstance(sample.image, bytes) else None
        row = {name: getattr(sample, name, None) for name in COLUMNS}
        row["image"] = {"bytes": embedded, "path": None if embedded is not None else str(sample.image)}
        row["height"], row["width"] = regions.image_size
        row["labelled"] = self.labelled["\n".join(sample.labelled)]
        row["boxes"] = regions.boxes
        row["labels"] = [self.labels[label] for label in regions.labels]
        row["texts"] = [self.texts[text] for text in regions.texts or ()] if regions.texts is not None else None
        row["masks"] = None if regions.masks is None else [None if m is None else m["counts"] for m in regions.masks]
        if regions.attributes is not None:
            row["attributes"] = [json.dumps(values) for values in regions.attributes]
        row["pixels"], row["thumbnail"] = pixels, thumbnail
        self._rows.append(row)
        self._bytes += len(embedded or b"") + sum(len(counts or "") for counts in row["masks"] or ())
        self.images, self.regions = self.images + 1, self.regions + n
        if len(self._rows) >= BLOCK_ROWS or self._bytes >= BLOCK_BYTES:
            self._flush()

    def add_block(self, block: pa.RecordBatch) -> None:
        """Rows in this store's own form, such as another store's after `remapped`; small blocks are joined."""
        self._flush()
        self.images, self.regions = self.images + len(block), self.regions + len(block.column("labels").flatten())
        self._blocks_held.append(block)
        held = self._blocks_held
        if sum(map(len, held)) >= BLOCK_ROWS or sum(held_block.nbytes for held_block in held) >= BLOCK_BYTES:
            self._flush_blocks()

    def _flush_blocks(self) -> None:
        if self._blocks_held:
            for block in pa.Table.from_batches(self._blocks_held).combine_chunks().to_batches():
                self._write(block)
            self._blocks_held = []

    def _flush(self) -> None:
        if self._rows:
            columns = [_boxes_array(self._rows) if name == "boxes" else self._column(name) for name in COLUMNS]
            self._write(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            self._rows, self._bytes = [], 0

    def _column(self, name: str) -> pa.Array:
        return pa.array([row[name] for row in self._rows], type=SCHEMA.field(name).type)

    def _write(self, block: pa.RecordBatch) -> None:
        if self._stream is None:
            self._files.append(f"data-{len(self._files):05d}.arrow")
            self._stream = pa.ipc.new_stream(str(self.folder / self._files[-1]), SCHEMA)
        self._stream.write_batch(block)
        self._blocks += 1
        if self._blocks % SHARD_BLOCKS == 0:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self, more: dict | None = None) -> None:
        """Writes what is left, and store.json with the entries of `more`."""
        self._flush()
        self._flush_blocks()
        if not self._files:
            self._write(pa.RecordBatch.from_pylist([], schema=SCHEMA))
        self._end_shard()
        labelled = [row.split("\n") if row else [] for row in self.labelled]
        about = {"schema_version": SCHEMA_VERSION, "images": self.images, "regions": self.regions}
        about |= {"shards": self._files, "labels": list(self.labels), "texts": list(self.texts), "labelled": labelled}
        write_atomic(self.folder / "store.json", json.dumps(about | (more or {})))

    def describe(self, card: str) -> None:
        """After `close`: the data card, and what `datasets` wants to find."""
        write_atomic(self.folder / "CARD.md", card)
        _describe_to_datasets(self.folder, self._files)


def _boxes_array(rows: list[dict]) -> pa.Array:
    offsets = np.cumsum([0, *(len(row["boxes"]) for row in rows)], dtype=np.int32)
    values = np.concatenate([row["boxes"] for row in rows]).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.FixedSizeListArray.from_arrays(pa.array(values), 4))


def _describe_to_datasets(folder: Path, files: list[str]) -> None:
    """The two files by which `datasets.load_from_disk` knows a folder of shards."""
    import datasets

    features = datasets.Features.from_arrow_schema(SCHEMA)
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    # `datasets` caches what it makes of a store under this name: two stores must not share it.
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": token_hex(8), "_split": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_atomic(folder / "state.json", json.dumps(state))


def write_store(samples: Iterable[GroundingSample], out: Path, card: str) -> None:
    """Writes `samples` and a data card to the folder `out`, complete or not at all; replaces an older store."""
    out = Path(out)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        writer = StoreWriter(part)
        for sample in samples:
            mark = fingerprint(read_image(sample.image).pixels)
            writer.add(sample, mark.pixels, mark.thumbnail.tobytes())
        writer.close()
        writer.describe(card)
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, out: Path) -> None:
    """`part` becomes `out`. What was there is moved aside first: no moment leaves half of either."""
    older = out.with_name(f".{out.name}.old")
    shutil.rmtree(older, ignore_errors=True)  # of a process that was killed before its end
    if out.exists():
        out.rename(older)
    part.rename(out)
    shutil.rmtree(older, ignore_errors=True)


class Block:
    """Numpy views of one record batch: rows are read by slicing, since making Arrow scalars costs far more."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(rows + 1,) int32: the regions of row k are offsets[k]:offsets[k + 1]."""
        return self.batch.column("boxes").offsets.to_numpy()

    @cached_property
    def boxes(self) -> np.ndarray:
        """(M, 4) float32 xyxy in [0, 1]."""
        return self.batch.column("boxes").values.values.to_numpy().reshape(-1, 4)

    @cached_property
    def labels(self) -> np.ndarray:
        """(M,) int32 into `Store.labels`."""
        return self.batch.column("labels").values.to_numpy()

    @cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.batch.column("height").to_numpy(), self.batch.column("width").to_numpy()

    @property
    def thumbnails(self) -> np.ndarray:
        """(rows, T, T) uint8 of `eval.fingerprint`, a view of the file, where every row has one."""
        column = self.batch.column("thumbnail")
        _, offsets, data = column.buffers()
        first = np.frombuffer(offsets, np.int32)[column.offset]
        return np.frombuffer(data, np.uint8, len(column) * T * T, first).reshape(-1, T, T)

    def text(self, name: str, row: int) -> str:
        offsets, data = self._strings[name]
        return str(data[offsets[row] : offsets[row + 1]], "utf-8")

    @cached_property
    def _strings(self) -> dict[str, tuple[memoryview, memoryview]]:
        columns = {name: self.batch.column(name).buffers() for name in ("image_id", "patient_id", "source", "modality")}
        return {name: (memoryview(b[1]).cast("i"), memoryview(b[2] or b"")) for name, b in columns.items()}


def _coded(size: tuple[int, int], counts: str | None) -> dict | None:
    return None if counts is None else {"size": list(size), "counts": counts}


def to_sample(row: dict) -> GroundingSample:
    """A row of the shards, with words in the place of integers."""
    size = (row["height"], row["width"])
    masks, attributes, image, spacing = (row[name] for name in ("masks", "attributes", "image", "spacing"))
    regions = RegionSet(
        boxes=np.array(row["boxes"], np.float32).reshape(-1, 4),
        labels=row["labels"],
        image_size=size,
        masks=None if masks is None else [_coded(size, counts) for counts in masks],
        attributes=None if attributes is None else [json.loads(values) for values in attributes],
        texts=row["texts"],
    )
    same = {
        name: row[name] for name in ("image_id", "patient_id", "study_id", "frame", "source", "licence", "modality")
    }
    return GroundingSample(
        **same,
        image=image["path"] if image["bytes"] is None else image["bytes"],
        regions=regions,
        labelled=tuple(row["labelled"]),
        spacing=None if spacing is None else tuple(spacing),
    )


class Store:
    """A list of GroundingSamples on disk. `labels`: the words of the integers in its shards. `sources`: what a build
    says of each source, [] where the store was not built from sources."""

    def __init__(self, folder: Path, about: dict):
        self.folder, self.regions = folder, about["regions"]
        self.sources: list[dict] = about.get("sources", [])
        self.labels: list[str] = about["labels"]
        self._texts, self._labelled = about["texts"], [tuple(row) for row in about["labelled"]]
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in about["shards"]]
        self.table = pa.concat_tables(tables)
        self.blocks = [Block(batch) for table in tables for batch in table.to_batches() if len(batch)]
        self._starts = np.cumsum([0, *map(len, self.blocks)]).tolist()

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[GroundingSample]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, index: int) -> GroundingSample:
        block, k = self._locate(index)
        row = block.batch.slice(k, 1).to_pylist()[0]
        row["labels"] = [self.labels[label] for label in row["labels"]]
        row["texts"] = None if row["texts"] is None else [self._texts[text] for text in row["texts"]]
        row["labelled"] = self._labelled[row["labelled"]]
        return to_sample(row)

    def metadata(self, index: int) -> Metadata:
        """The quick part of a row: no image, no masks, labels as integers."""
        block, k = self._locate(index)
        first, last = block.offsets[k], block.offsets[k + 1]
        heights, widths = block.sizes
        return Metadata(
            block.text("image_id", k),
            block.text("patient_id", k),
            block.text("source", k),
            block.text("modality", k),
            (int(heights[k]), int(widths[k])),
            block.boxes[first:last],
            block.labels[first:last],
        )

    def _locate(self, index: int) -> tuple[Block, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        at = bisect_right(self._starts, index) - 1
        return self.blocks[at], index - self._starts[at]

    @property
    def card(self) -> str:
        return (self.folder / "CARD.md").read_text(encoding="utf-8")

    def column(self, name: str) -> list:
        """All values of a column of strings or numbers."""
        return self.table.column(name).to_pylist()

    def labels_with_attributes(self) -> tuple[set[str], set[tuple[str, str, str]]]:
        """The labels that occur, and each (label, attribute, value)."""
        used = np.unique(np.concatenate([block.labels for block in self.blocks] or [np.zeros(0, np.int32)]))
        seen: set[tuple[int, str]] = set()
        for block in self.blocks:
            column = block.batch.column("attributes")
            if column.null_count < len(column):
                labels = np.repeat(np.array(column.is_valid()), np.diff(block.offsets))
                seen |= set(zip(block.labels[labels].tolist(), column.flatten().to_pylist(), strict=True))
        values = {(self.labels[label], *item) for label, text in seen for item in json.loads(text).items()}
        return {self.labels[label] for label in used}, values

    @cached_property
    def image_ids(self) -> list[str]:
        return self.column("image_id")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {image_id: k for k, image_id in enumerate(self.image_ids)}

    def by_id(self, image_id: str) -> GroundingSample:
        """Raises StoreError where no image has that id."""
        if image_id not in self._index:
            raise StoreError(f"image {image_id!r} is not in the store; it holds {len(self)} others")
        return self[self._index[image_id]]

    def remapped(self, writer: StoreWriter, rows: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """The blocks, or those `rows` in their order, with this store's integers replaced by those of `writer`, which
        takes up new words."""
        words = {"labels": self.labels, "texts": self._texts, "labelled": ["\n".join(row) for row in self._labelled]}
        tables = {name: [getattr(writer, name)[word] for word in words[name]] for name in words}
        blocks = self.blocks if rows is None else self._taken(rows)
        return (self._replaced(block, tables, SCHEMA) for block in blocks)

    def _taken(self, rows: Sequence[int]) -> Iterator[Block]:
        for start in range(0, len(rows), TAKEN_ROWS):
            table = self.table.take(rows[start : start + TAKEN_ROWS]).combine_chunks()
            yield from map(Block, table.to_batches())

    def spelled_out(self) -> Iterator[pa.RecordBatch]:
        """The blocks with words in the place of integers, in WORDS_SCHEMA."""
        tables = {"labels": self.labels, "texts": self._texts, "labelled": self._labelled}
        return (self._replaced(block, tables, WORDS_SCHEMA) for block in self.blocks)

    def _replaced(self, block: Block, tables: dict[str, list], schema: pa.Schema) -> pa.RecordBatch:
        """Integers k of the three columns that have a table → tables[column][k]."""
        columns = {name: block.batch.column(name) for name in COLUMNS}
        one = schema.field("labelled").type
        columns["labelled"] = pa.array(tables["labelled"], one).take(columns["labelled"])
        for name in ("labels", "texts"):
            column, new = columns[name], pa.array(tables[name], schema.field(name).type.value_type)
            values = new.take(column.values)
            columns[name] = pa.ListArray.from_arrays(column.offsets, values, mask=column.is_null())
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def open_store(path: Path) -> Store:
    """Raises StoreError where `path` is not a region store, or one of another schema version."""
    path = Path(path)
    try:
        about = json.loads((path / "store.json").read_text())
        schema = about["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a region store ({error}); build one with medglip data build") from error
    if schema != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: region store of schema {schema}, this program reads {SCHEMA_VERSION}; build it again"
        )
    try:
        return Store(path, about)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"{path}: a shard cannot be read ({error}); build the store again") from error


def read_skipped(path: Path) -> list[dict[str, str]]:
    """What the build of the store at `path` left out: source, key, why."""
    file = Path(path) / "skipped.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
