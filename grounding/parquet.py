"""Parquet, for region stores that travel: export, import and streaming, on a local folder, s3:// or hf://.

Files hold words where a store's shards hold integers, so each stands alone. `fsspec` opens the URLs; s3:// and hf://
need its drivers (`pip install s3fs`, `huggingface_hub`).
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grounding.store import (
    SCHEMA_VERSION,
    WORDS_SCHEMA,
    Store,
    StoreError,
    StoreWriter,
    open_store,
    replace_folder,
    to_sample,
)
from grounding.types import GroundingSample

ROW_GROUP = 1000
VERSION_KEY = b"medglip_schema_version"


def export_parquet(store: Store, url: str) -> int:
    """Writes the store as `url`/data-00000.parquet ... and CARD.md; the number of files."""
    filesystem, folder = fsspec.url_to_fs(url)
    filesystem.makedirs(folder, exist_ok=True)
    schema = WORDS_SCHEMA.with_metadata({VERSION_KEY: str(SCHEMA_VERSION)})
    number = 0
    for number, block in enumerate(store.spelled_out(), 1):
        with filesystem.open(f"{folder}/data-{number - 1:05d}.parquet", "wb") as file:
            pq.write_table(pa.Table.from_batches([block]).cast(schema), file, row_group_size=ROW_GROUP)
    with filesystem.open(f"{folder}/CARD.md", "w") as file:
        file.write(store.card)
    with filesystem.open(f"{folder}/sources.json", "w") as file:
        json.dump(store.sources, file)
    return number


def parquet_files(url: str) -> list[str]:
    """URLs of the Parquet files of a folder. Raises StoreError where there are none."""
    filesystem, folder = fsspec.url_to_fs(url)
    files = [filesystem.unstrip_protocol(path) for path in sorted(filesystem.glob(f"{folder}/*.parquet"))]
    if not files:
        raise StoreError(f"{url}: no Parquet file; write some with medglip data export")
    return files


def import_parquet(url: str, out: Path) -> Store:
    """The store `out` from what `export_parquet` wrote. Raises StoreError where a file is another's."""
    partial = out.with_name(f".{out.name}.part-{os.getpid()}")
    filesystem, folder = fsspec.url_to_fs(url)
    files = parquet_files(url)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        writer = StoreWriter(partial)
        for path in files:
            with fsspec.open(path, "rb") as file:
                for row in _rows(file, path):
                    writer.add(to_sample(row), row["pixels"], row["thumbnail"])
        writer.close({"sources": json.loads(filesystem.cat_file(f"{folder}/sources.json"))})
        writer.describe(filesystem.cat_file(f"{folder}/CARD.md").decode())
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(out)


def _rows(file, path: str) -> Iterator[dict]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise StoreError(f"{path}: not a Parquet file ({error})") from error
    if (parquet.schema_arrow.metadata or {}).get(VERSION_KEY) != str(SCHEMA_VERSION).encode():
        raise StoreError(f"{path}: not a region store of schema {SCHEMA_VERSION}; export it again")
    for batch in parquet.iter_batches(ROW_GROUP):
        yield from batch.to_pylist()


class Stream:
    """Samples of Parquet files as they come, without a store.

    Row groups are drawn in a seeded order, dealt out to the ranks, and shuffled `mix` at a time, so that only those are
    in memory. `position` counts the samples given out in this epoch; set it (and `epoch`) to go on where another
    process stopped: what follows is the same. (A shuffle buffer of datasets is lost when a stream is resumed.)
    """

    def __init__(self, url: str, seed: int = 0, rank: int = 0, world: int = 1, mix: int = 4):
        self.seed, self.rank, self.world, self.mix = seed, rank, world, mix
        self.epoch = self.position = 0
        self._groups = []
        for path in parquet_files(url):
            with fsspec.open(path, "rb") as file:
                meta = pq.read_metadata(file)
            self._groups += [(path, k, meta.row_group(k).num_rows) for k in range(meta.num_row_groups)]

    def __iter__(self) -> Iterator[GroundingSample]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self._groups))[self.rank :: self.world]
        passed = 0
        for start in range(0, len(order), self.mix):
            groups = [self._groups[k] for k in order[start : start + self.mix]]
            rows = sum(count for _, _, count in groups)
            if passed + rows > self.position:
                yield from self._mixed(groups, start, self.position - passed)
            passed += rows
        self.epoch, self.position = self.epoch + 1, 0

    def _mixed(self, groups: list[tuple[str, int, int]], start: int, done: int) -> Iterator[GroundingSample]:
        table = pa.concat_tables([_row_group(path, k) for path, k, _ in groups])
        order = np.random.default_rng([self.seed, self.epoch, start]).permutation(len(table))
        for k in order[done:].tolist():
            self.position += 1
            yield to_sample(table.slice(k, 1).to_pylist()[0])


def _row_group(path: str, number: int) -> pa.Table:
    with fsspec.open(path, "rb") as file:
        return pq.ParquetFile(file).read_row_group(number)
