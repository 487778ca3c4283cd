"""Which regions reach a prompt, in which order, and what the control sources make of them."""

import dataclasses

import pytest
import torch

from bridges.projector import ProjectorConfig, RegionProjector
from bridges.routes import (
    NO_IMAGE,
    empty,
    features_zero,
    labels_in,
    most_important,
    pick,
    pick_study,
    region_name,
    regions_as_text,
    shuffled,
)
from grounding.labels import load_label_tree
from grounding.types import RegionTokens

TREE = load_label_tree()
LEFT, RIGHT = "brain/temporal_lobe/left_temporal_lobe", "brain/temporal_lobe/right_temporal_lobe"


def regions(*rows: tuple[str, float, float, int]) -> RegionTokens:
    """Rows of (label, score, side of a square box, level), as a batch of one."""
    n = len(rows)
    sides = torch.tensor([[row[2] for row in rows]])
    boxes = torch.stack([torch.zeros(1, n), torch.zeros(1, n), sides, sides], -1)
    return RegionTokens(
        features=torch.arange(1.0, n + 1)[None, :, None].repeat(1, 1, 3),
        boxes=boxes,
        scores=torch.tensor([[row[1] for row in rows]]),
        labels=[[row[0] for row in rows]],
        label_vectors=torch.ones(1, n, 2),
        levels=torch.tensor([[row[3] for row in rows]]),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[{"phrase": label, "label": label, "presence": 0.5} for label in (LEFT, RIGHT)]],
    )


TOKENS = regions(
    ("brain", 0.99, 0.9, 2),
    (f"{LEFT}/lesion", 0.6, 0.1, 0),
    (f"{RIGHT}/lesion", 0.5, 0.2, 1),
    (LEFT, 0.9, 0.4, 2),
    (f"{RIGHT}/lesion", 0.1, 0.0, 3),
    (RIGHT, 0.8, 0.4, 2),
)


def test_a_question_names_the_longest_labels_and_findings_in_places():
    assert labels_in("Is there a lesion in the left temporal lobe?", TREE) == {f"{LEFT}/lesion"}
    assert labels_in("Does the left temporal lobe contain a lesion?", TREE) == {LEFT, "brain/lesion", f"{LEFT}/lesion"}
    assert labels_in("How are you?", TREE) == frozenset()


def test_a_finding_that_was_asked_for_and_is_not_there_takes_a_slot():
    asked = "brain/insula/left_insula/lesion"
    slots = pick(TOKENS, 0, [asked, f"{LEFT}/lesion"], TREE, 8, {asked: torch.tensor([3.0, 4.0])})
    k = slots.labels[0].index(asked)
    assert slots.levels[0, k] == 3 and slots.valid[0, k] and not slots.features[0, k].any()
    assert slots.label_vectors[0, k].tolist() == [3, 4]
    assert slots.labels[0].count(f"{LEFT}/lesion") == 1  # this one is there


def test_findings_come_first_and_the_largest_leads():
    slots = pick(TOKENS, 0, [], TREE, 4, {})
    assert slots.labels[0] == [f"{RIGHT}/lesion", f"{LEFT}/lesion", "brain", LEFT]
    assert slots.valid.tolist() == [[True] * 4]
    assert slots.features[0, :, 0].tolist() == [3, 2, 1, 4]


def test_labels_of_the_question_are_chosen_even_when_not_found():
    slots = pick(TOKENS, 0, [RIGHT, f"{RIGHT}/lesion"], TREE, 3, {})
    assert slots.labels[0] == [f"{RIGHT}/lesion", RIGHT, f"{RIGHT}/lesion"]
    assert slots.levels[0].tolist() == [1, 2, 3]
    assert [query["label"] for query in slots.queries[0]] == [RIGHT]


def test_free_slots_are_zero_and_invalid():
    slots = pick(TOKENS, 0, [], TREE, 9, {})
    assert slots.valid[0].tolist() == [True] * 6 + [False] * 3
    assert slots.labels[0][6:] == ["", "", ""] and not slots.features[0, 6:].any()


def test_padding_of_the_file_is_never_chosen():
    tokens = regions((LEFT, 0.9, 0.4, 2), (RIGHT, 0.95, 0.4, 2))
    tokens.valid[0, 1] = False
    assert pick(tokens, 0, [], TREE, 2, {}).labels[0] == [LEFT, ""]


def test_empty_keeps_the_slots_and_nothing_else():
    nothing = empty(pick(TOKENS, 0, [], TREE, 4, {}))
    assert nothing.valid.shape == (1, 4) and not nothing.valid.any() and nothing.labels == [[""] * 4]


def test_features_zero_touches_features_only():
    slots = pick(TOKENS, 0, [], TREE, 4, {})
    control = features_zero(slots)
    assert not control.features.any() and slots.features.any()
    assert control.boxes is slots.boxes and control.labels is slots.labels and control.valid is slots.valid


def test_shuffled_gives_each_image_once_to_another_patient():
    patients = {f"image{i}": f"patient{i // 2}" for i in range(20)}
    partner = shuffled(patients, seed=3)
    assert sorted(partner.values()) == sorted(patients)
    assert all(patients[a] != patients[b] for a, b in partner.items())
    assert partner == shuffled(dict(reversed(patients.items())), seed=3) != shuffled(patients, seed=4)


def test_shuffled_refuses_what_one_patient_dominates():
    with pytest.raises(ValueError, match="2 of 3 images"):
        shuffled({"a": "p", "b": "p", "c": "q"}, seed=0)


def test_regions_as_text():
    slots = pick(TOKENS, 0, [f"{RIGHT}/lesion"], TREE, 3, {})
    text = regions_as_text(slots, TREE, extent_mm=(100.0, 150.0))
    assert text.startswith("right temporal lobe lesion 30 mm at 0,0,20,20; ")
    assert text.endswith("; no right temporal lobe lesion")
    assert regions_as_text(empty(slots), TREE) == ""


def study() -> tuple[RegionTokens, RegionTokens]:
    """Two images: a large lesion and a place in the first, a small one in the second, where the place is not found."""
    first = regions((f"{LEFT}/lesion", 0.7, 0.5, 1), (LEFT, 0.9, 0.4, 2), ("brain/insula", 0.2, 0.0, 3))
    second = regions((f"{RIGHT}/lesion", 0.8, 0.1, 0), (LEFT, 0.3, 0.0, 3), ("brain/insula", 0.4, 0.0, 3))
    second.queries[0][0]["presence"] = 0.9
    return first, second


def test_a_study_is_laid_out_image_by_image():
    slots, image_of = pick_study(study(), [], TREE, 6, {})
    assert slots.labels[0] == [f"{LEFT}/lesion", LEFT, f"{RIGHT}/lesion", "brain/insula", "", ""]
    assert image_of == [0, 0, 1, NO_IMAGE, NO_IMAGE, NO_IMAGE]
    assert slots.levels[0].tolist()[:4] == [1, 2, 0, 3]  # LEFT is not "not found": the first image has it
    assert slots.scores[0, 3] == pytest.approx(0.4)  # the likelier of the two
    assert slots.valid[0].tolist() == [True] * 4 + [False] * 2


def test_the_best_of_a_whole_study_are_chosen():
    slots, image_of = pick_study(study(), [LEFT], TREE, 2, {})
    assert (slots.labels[0], image_of) == ([LEFT, f"{RIGHT}/lesion"], [0, 1])
    assert [query["presence"] for query in slots.queries[0]] == [0.9]  # of either image


def test_a_study_of_one_image_is_that_image():
    alone, image_of = pick_study([TOKENS], [RIGHT], TREE, 5, {})
    picked = pick(TOKENS, 0, [RIGHT], TREE, 5, {})
    assert alone.labels == picked.labels and torch.equal(alone.features, picked.features)
    assert image_of == [0, 0, 0, 0, 0]


def test_a_finding_that_no_image_has_takes_one_slot():
    asked = "brain/insula/left_insula/lesion"
    slots, image_of = pick_study(study(), [asked], TREE, 8, {asked: torch.tensor([3.0, 4.0])})
    k = slots.labels[0].index(asked)
    assert slots.labels[0].count(asked) == 1 and slots.levels[0, k] == 3 and image_of[k] == NO_IMAGE


def test_the_least_important_go_first_and_the_others_keep_their_order():
    slots, image_of = pick_study(study(), [], TREE, 5, {})
    fewer, numbers = most_important(slots, image_of, 3, [], TREE)
    assert fewer.labels[0] == [f"{LEFT}/lesion", LEFT, f"{RIGHT}/lesion", "", ""]
    fewer, numbers = most_important(slots, image_of, 1, [], TREE)
    assert fewer.labels[0] == [f"{RIGHT}/lesion", "", "", "", ""] and numbers == [1] + [NO_IMAGE] * 4
    assert not fewer.features[0, 1:].any() and fewer.valid[0].tolist() == [True] + [False] * 4
    fewer, _ = most_important(slots, image_of, 1, ["brain/insula"], TREE)
    assert fewer.labels[0][0] == "brain/insula"  # named, though not found


def test_what_was_not_found_is_told_with_its_probability():
    tokens = regions((f"{LEFT}/lesion", 0.6, 0.1, 0), ("brain/insula", 0.07, 0.0, 3), (RIGHT, 0.2, 0.0, 3))
    slots = pick(tokens, 0, [], TREE, 4, {})
    assert regions_as_text(slots, TREE).endswith("no right temporal lobe; no insula")
    said = regions_as_text(slots, TREE, presence=True)
    assert said.endswith("looked for right temporal lobe: not found (p 0.50); looked for insula: not found (p 0.07)")
    asked = "brain/insula/left_insula/lesion"  # not looked for by itself, so that there is no probability
    missing = pick(tokens, 0, [asked], TREE, 4, {asked: torch.zeros(2)})
    k = missing.labels[0].index(asked)
    assert region_name(missing, k, TREE, presence=True) == "looked for left insula lesion: not found"


def test_what_was_not_found_is_in_the_queries():
    slots = pick(TOKENS, 0, [], TREE, 9, {})
    assert [query["label"] for query in slots.queries[0]] == []
    absent = regions((RIGHT, 0.2, 0.0, 3), (LEFT, 0.9, 0.4, 2))
    assert [query["label"] for query in pick(absent, 0, [], TREE, 4, {}).queries[0]] == [RIGHT]


def test_text_says_on_which_image_a_region_is():
    slots, image_of = pick_study(study(), [], TREE, 5, {})
    said = regions_as_text(slots, TREE, [(100.0, 100.0), None], image_of_slot=image_of)
    assert said == (
        "left temporal lobe lesion 50 mm at 0,0,50,50 in image 1; left temporal lobe in image 1; "
        "right temporal lobe lesion at 0,0,10,10 in image 2; no insula"
    )


def test_a_fitted_projector_starts_from_the_words_of_the_labels():
    torch.manual_seed(0)
    common = torch.randn(6) * 10  # label vectors that differ little, as those of a text encoder do
    labels = [f"label {k}" for k in range(4)]
    tokens = dataclasses.replace(
        regions(*((label, 0.9, 0.3, 1) for label in labels)),
        features=torch.randn(1, 4, 5),
        label_vectors=(common + 0.01 * torch.randn(4, 6))[None],
    )
    words = {label: torch.randn(8) for label in labels}
    projector = RegionProjector(ProjectorConfig(feature_dim=5, label_dim=6, width=8, scale=1.0, hidden=16))
    projector.fit(tokens, words)
    likeness = torch.nn.functional.cosine_similarity(
        projector.words(tokens.label_vectors[0])[:, None], torch.stack([words[label] for label in labels])[None], dim=-1
    )
    assert likeness.diagonal().min() > 0.95
    assert likeness.argmax(1).tolist() == [0, 1, 2, 3]
    standard = projector.label[0](tokens.label_vectors[0])
    assert standard.mean(0).abs().max() < 1e-2 and (standard.std(0, correction=0) - 1).abs().max() < 1e-2
