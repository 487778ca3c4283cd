"""The region store: Arrow shards written and read through ``datasets``, memory-mapped, image files inside."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import datasets

from configs import write_atomic
from grounding.types import GroundingSample, RegionSet

SCHEMA_VERSION = 1


class StoreError(ValueError):
    """A region store that cannot be read or written; the message names the folder and the remedy."""


def _to_row(sample: GroundingSample) -> dict:
    image = sample.image if isinstance(sample.image, bytes) else Path(sample.image).read_bytes()
    row = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return row | {"image": image, "regions": json.dumps(sample.regions.to_dict()), "labelled": list(sample.labelled)}


def _from_row(row: dict) -> GroundingSample:
    regions = RegionSet.from_dict(json.loads(row["regions"]))
    spacing = None if row["spacing"] is None else tuple(row["spacing"])
    return GroundingSample(**{**row, "regions": regions, "labelled": tuple(row["labelled"]), "spacing": spacing})


FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("string"),
        "patient_id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "modality": datasets.Value("string"),
        "image": datasets.Value("binary"),
        "regions": datasets.Value("string"),
        "labelled": datasets.Sequence(datasets.Value("string")),
        "spacing": datasets.Sequence(datasets.Value("float32")),
    }
)


def write_store(samples: Iterable[GroundingSample], out: Path, card: str) -> None:
    """Writes ``samples`` and a data card to the folder ``out``, complete or not at all; replaces an older store."""
    out = Path(out)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    datasets.disable_progress_bars()
    try:
        rows = [_to_row(sample) for sample in samples]
        datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(str(part))
        write_atomic(part / "CARD.md", card)
        write_atomic(part / "store.json", json.dumps({"schema_version": SCHEMA_VERSION, "images": len(rows)}))
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Store:
    """A list of GroundingSamples on disk."""

    def __init__(self, rows: datasets.Dataset):
        self._rows = rows
        self.image_ids: list[str] = rows["image_id"][:]
        self._index = {image_id: k for k, image_id in enumerate(self.image_ids)}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> GroundingSample:
        return _from_row(self._rows[index])

    def by_id(self, image_id: str) -> GroundingSample:
        """Raises StoreError where no image has that id."""
        if image_id not in self._index:
            raise StoreError(f"image {image_id!r} is not in the store; it holds {len(self)} others")
        return self[self._index[image_id]]


def open_store(path: Path) -> Store:
    """Raises StoreError where ``path`` is not a region store, or one of another schema version."""
    try:
        schema = json.loads((Path(path) / "store.json").read_text())["schema_version"]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path}: not a region store ({error})") from error
    if schema != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: region store of schema {schema}, this program reads {SCHEMA_VERSION}; build it again"
        )
    return Store(datasets.load_from_disk(str(path)))
