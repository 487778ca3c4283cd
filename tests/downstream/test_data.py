"""What the alignment stage makes a bridge say about the regions of a prompt."""

import pytest
import torch

from bridges.routes import pick
from downstream.brain_qa import describe, lesions_of
from downstream.data import list_regions
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import RegionTokens

TREE = load_label_tree()


def as_tokens(regions) -> RegionTokens:
    n = len(regions)
    return RegionTokens(
        features=torch.zeros(1, n, 2),
        boxes=torch.tensor(regions.boxes)[None],
        scores=torch.ones(1, n),
        labels=[list(regions.labels)],
        label_vectors=torch.zeros(1, n, 2),
        levels=torch.zeros(1, n, dtype=torch.long),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.fixture(scope="module")
def with_lesion(brain_store):
    store = open_store(brain_store)
    return next(s for s in (store[k] for k in range(len(store))) if len(lesions_of(s.regions)) == 1)


def test_a_lesion_is_listed_first_with_its_size_and_looks(with_lesion):
    slots = pick(as_tokens(with_lesion.regions), 0, [], TREE, 8, {})
    first = list_regions(slots, with_lesion, TREE).split("; ")[0]
    (lesion,) = lesions_of(with_lesion.regions, with_lesion.spacing)
    assert first == f"{TREE.phrase(with_lesion.regions.labels[lesion.index])}, {describe(lesion)}"


def test_a_false_lesion_is_listed_by_its_label_alone(with_lesion):
    tokens = as_tokens(with_lesion.regions)
    k = lesions_of(with_lesion.regions)[0].index
    tokens.boxes[0, k] = torch.tensor([0.0, 0.0, 0.02, 0.02])
    first = list_regions(pick(tokens, 0, [], TREE, 8, {}), with_lesion, TREE).split("; ")[0]
    assert first == TREE.phrase(with_lesion.regions.labels[k])


def test_no_region_is_none(with_lesion):
    nothing = as_tokens(with_lesion.regions.select([]))
    assert list_regions(pick(nothing, 0, [], TREE, 8, {}), with_lesion, TREE) == "none"
