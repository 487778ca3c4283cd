"""Where the regions of a prompt come from: one region-token file a kind, and what the control sources make of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bridges.routes import SOURCES, empty, features_zero, pick, shuffled
from grounding.labels import LabelTree
from grounding.types import RegionError, RegionTokens, load_region_tokens

FEATURES = ("full", "zero")


@dataclass(frozen=True)
class TokenTable:
    """Region tokens by image: `rows[image_id]` is the row of `tokens`. `detector` is the hash of what found them."""

    rows: dict[str, int]
    tokens: RegionTokens
    detector: str | None
    vocabulary: Mapping[str, torch.Tensor]

    def row(self, image_id: str) -> int:
        """Raises RegionError where the file has no such image."""
        if image_id not in self.rows:
            raise RegionError(f"image {image_id!r} has no region tokens; run grounding.predict on its store")
        return self.rows[image_id]


def read_table(path: str | Path) -> TokenTable:
    """Read a region-token file. Raises RegionError where it is missing or another kind of file."""
    image_ids, tokens, meta, vocabulary = load_region_tokens(Path(path))
    rows = {image_id: k for k, image_id in enumerate(image_ids)}
    return TokenTable(rows, tokens, meta.get("checkpoint"), vocabulary)


@dataclass(frozen=True)
class RegionSource:
    """One column of the experiment: whose regions an image gets. `partner` gives another image's instead of its own."""

    table: TokenTable
    partner: Mapping[str, str] | None = None
    is_empty: bool = False
    features: str = "full"

    def slots(self, image_id: str, named: frozenset[str], tree: LabelTree, k: int) -> RegionTokens:
        """The K slots (a batch of one) for a question about `image_id` that names the labels `named`."""
        image_id = image_id if self.partner is None else self.partner[image_id]
        chosen = pick(self.table.tokens, self.table.row(image_id), named, tree, k, self.table.vocabulary)
        chosen = empty(chosen) if self.is_empty else chosen
        return features_zero(chosen) if self.features == "zero" else chosen


def open_source(
    source: str, tables: Mapping[str, TokenTable], patients: Mapping[str, str], features: str = "full", seed: int = 0
) -> RegionSource:
    """Make one of `SOURCES` from `tables` ("predicted", "annotated"); "file:PATH" reads its own.

    `patients`: image_id → patient_id of the images that will be asked about, for `shuffled`.
    Raises ValueError for an unknown source or one whose table is not given, RegionError for a file that cannot be read.
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r}; known: {', '.join(FEATURES)}")
    if source.startswith("file:"):
        return RegionSource(read_table(source.removeprefix("file:")), features=features)
    if source not in SOURCES:
        raise ValueError(f"source {source!r}; known: {', '.join(SOURCES)}")
    needed = "annotated" if source == "annotated" else "predicted"
    if needed not in tables:
        raise ValueError(f"source {source!r} needs the {needed} region tokens; give {needed}=PATH")
    partner = shuffled(patients, seed) if source == "shuffled" else None
    return RegionSource(tables[needed], partner, source == "empty", features)
