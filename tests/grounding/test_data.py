"""What a batch says is there, absent or unknown, under each switch; and what a store says about its labels."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from grounding.data import Collator, Stores, check_mapped, labels_by_source, most_boxes, phrase_targets, vocabulary
from grounding.labels import load_label_tree
from grounding.store import StoreError, open_store, write_store
from grounding.types import GroundingSample, RegionSet

TREE = load_label_tree()


def picture(tmp_path) -> str:
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    return str(path)


def store_of(tmp_path, images: list[tuple[str, list[str]]], modality="mri", name="store", labelled=()):
    """A store of (source, labels of the regions) an image."""
    path, samples = picture(tmp_path), []
    for k, (source, labels) in enumerate(images):
        random_ = random.Random(k)
        corners = [[random_.uniform(0, 0.5), random_.uniform(0, 0.5)] for _ in labels]
        boxes = np.array([[x, y, x + 0.3, y + 0.3] for x, y in corners], np.float32).reshape(-1, 4)
        regions = RegionSet(boxes, labels, (40, 60))
        samples.append(GroundingSample(f"{k}", f"p{k}", source, modality, path, regions, tuple(labelled)))
    write_store(samples, tmp_path / name, "# card\n")
    return open_store(tmp_path / name)


@pytest.fixture
def insulas(tmp_path):
    images = [("a", ["brain/insula/left_insula"]), ("a", ["brain/insula/right_insula", "brain/lesion"])]
    return store_of(tmp_path, images, labelled=("brain/insula/left_insula", "brain/lesion"))


def batch_of(store, **switches):
    targets = phrase_targets(store, TREE)
    collate = Collator(targets, TREE, 96, 0, **switches)
    pixels, _, truth = collate([store[k] for k in range(len(store))], 0)
    return pixels, truth, {target.label: k for k, target in enumerate(targets)}


def test_hierarchy_makes_ancestors_positive(insulas):
    for hierarchy in (True, False):
        _, truth, column = batch_of(insulas, hierarchy=hierarchy)
        assert truth.positive[0, 0, column["brain/insula/left_insula"]]
        assert truth.positive[0, 0, column["brain/insula"]] == hierarchy
        assert not truth.positive[0, 0, column["brain/lesion"]]


def test_without_partial_negatives_nothing_is_unknown(insulas):
    _, truth, column = batch_of(insulas)
    assert truth.known[0].tolist() == [label in ("brain/insula/left_insula", "brain/lesion") for label in column]
    assert batch_of(insulas, partial_negatives=False)[1].known.all()


def test_the_size_of_a_step_is_the_same_for_every_rank_and_every_start(insulas):
    targets = phrase_targets(insulas, TREE)
    one, two = (Collator(targets, TREE, 96, 5, scales=(64, 96, 128)) for _ in range(2))
    sizes = [one.size(step) for step in range(60)]
    assert [two.size(step) for step in reversed(range(60))] == sizes[::-1]
    assert min(Counter(sizes).values()) > 10 and set(sizes) == {64, 96, 128}
    pixels, _, truth = one([insulas[0]], 3)
    assert pixels.shape[-1] == one.size(3) == truth.masks.shape[-1] * 4


def test_augmented_batches_depend_on_seed_step_and_sample_alone(insulas):
    targets = phrase_targets(insulas, TREE)
    collate = Collator(targets, TREE, 96, 0, augmented=True)
    both, again = collate([insulas[0], insulas[1]], 7), collate([insulas[1], insulas[0]], 7)
    assert torch.equal(both[0], again[0].flip(0))
    assert not torch.equal(both[0], collate([insulas[0], insulas[1]], 8)[0])


def test_most_boxes_are_those_beyond_the_usual(tmp_path):
    cell = "blood_smear/red_blood_cell"
    images = [("s", [cell] * n) for n in (3, 20, 20)] + [("s", ["brain/lesion"] * 3)]
    images += [("s", ["brain/insula/left_insula", "brain/insula/right_insula"])] * 3
    store = store_of(tmp_path, images)
    labels = vocabulary(phrase_targets(store, TREE), TREE)
    found = most_boxes([store, store], labels, TREE)
    assert found == {cell: 30}


def test_a_source_whose_labels_nobody_mapped_is_named(tmp_path):
    store = store_of(tmp_path, [("good", ["brain/lesion", "odd thing"]), ("bad", ["c1", "c2"]), ("normal", [])])
    assert labels_by_source(store) == {"good": {"brain/lesion", "odd thing"}, "bad": {"c1", "c2"}, "normal": set()}
    with pytest.raises(StoreError, match=r"source bad: .* none of its 2 labels \('c1', 'c2'\)"):
        check_mapped(store, TREE)
    check_mapped(store_of(tmp_path, [("good", ["brain/lesion", "odd thing"])], name="other"), TREE)


def test_several_stores_are_one_after_another(tmp_path, insulas):
    other = store_of(tmp_path, [("b", ["skin/skin_lesion"])], "dermoscopy", "other")
    both = Stores([insulas, other])
    assert len(both) == 3 and [both[k].source for k in range(3)] == ["a", "a", "b"]
    labels = {target.label for target in phrase_targets(both, TREE)}
    assert {"skin/skin_lesion", "brain/insula"} <= labels
    with pytest.raises(IndexError):
        both[3]
