"""Where the regions of a prompt come from: one region-token file a kind, and what the control sources make of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bridges.perturb import elsewhere, jittered
from bridges.routes import SOURCES, empty, features_zero, pick_study, shuffled
from grounding.labels import LabelTree
from grounding.types import NOT_FOUND_LEVEL, RegionError, RegionTokens, load_region_tokens

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
    """One column of the experiment: whose regions an image gets. `partner` gives another image's instead of its own;
    `moved` takes them (a batch of one) to another place, the same for the same `seed` and image."""

    table: TokenTable
    partner: Mapping[str, str] | None = None
    is_empty: bool = False
    features: str = "full"
    moved: Callable[[RegionTokens, str], RegionTokens] | None = None
    seed: int = 0

    def slots(self, image_id: str, named: frozenset[str], tree: LabelTree, k: int) -> RegionTokens:
        """The K slots (a batch of one) for a question about `image_id` that names the labels `named`."""
        return self.study_slots([image_id], named, tree, k)[0]

    def study_slots(
        self, image_ids: Sequence[str], named: frozenset[str], tree: LabelTree, k: int
    ) -> tuple[RegionTokens, list[int]]:
        """The K slots (a batch of one) for a question about all of `image_ids`, and the index in `image_ids` of each
        slot's region (see `routes.pick_study`)."""
        given = [self._given(image_id) for image_id in image_ids]
        chosen, image_of_slot = pick_study(given, named, tree, k, self.table.vocabulary)
        chosen = empty(chosen) if self.is_empty else chosen
        return (features_zero(chosen) if self.features == "zero" else chosen), image_of_slot

    def regions(self, image_id: str) -> RegionTokens:
        """All regions that this source has for an image, (1, N), before any are chosen for a prompt."""
        return empty(self._given(image_id)) if self.is_empty else self._given(image_id)

    def beyond_budget(self, image_ids: Sequence[str], k: int) -> int:
        """How many of the regions found in these images have no slot among K."""
        rows = [self.regions(image_id) for image_id in image_ids]
        return max(0, sum(int((row.valid & (row.levels != NOT_FOUND_LEVEL)).sum()) for row in rows) - k)

    def _given(self, image_id: str) -> RegionTokens:
        image_id = image_id if self.partner is None else self.partner[image_id]
        regions = self.table.tokens.rows([self.table.row(image_id)])
        return regions if self.moved is None else self.moved(regions, f"{self.seed}/{image_id}")


def check_source(source: str) -> None:
    """Raises ValueError for what is none of `SOURCES`, or a jitter that is no number."""
    kind, colon, rest = source.partition(":")
    if kind + colon not in SOURCES or (colon and not rest):
        raise ValueError(f"source {source!r}; known: {', '.join(SOURCES)} (jittered:SIGMA, file:PATH)")
    if kind == "jittered":
        try:
            usable = 0 <= float(rest) < float("inf")
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"source {source!r}; write jittered:SIGMA in box sides, such as jittered:0.1")


def open_source(
    source: str, tables: Mapping[str, TokenTable], patients: Mapping[str, str], features: str = "full", seed: int = 0
) -> RegionSource:
    """Make one of `SOURCES` from `tables` ("predicted", "annotated"); "file:PATH" reads its own.

    `patients`: image_id → patient_id of all images that will be asked about, for `shuffled`.
    Raises ValueError for an unknown source or one whose table is not given, RegionError for a file that cannot be read.
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r}; known: {', '.join(FEATURES)}")
    check_source(source)
    if source.startswith("file:"):
        return RegionSource(read_table(source.removeprefix("file:")), features=features)
    needed = "annotated" if source == "annotated" else "predicted"
    if needed not in tables:
        raise ValueError(f"source {source!r} needs the {needed} region tokens; give {needed}=PATH")
    partner = shuffled(patients, seed) if source == "shuffled" else None
    return RegionSource(tables[needed], partner, source == "empty", features, _mover(source), seed)


def _mover(source: str) -> Callable[[RegionTokens, str], RegionTokens] | None:
    if source.startswith("jittered:"):
        return partial(jittered, sigma=float(source.removeprefix("jittered:")))
    return elsewhere if source == "random" else None
