"""What must hold for any MedGLIP, shown on a tiny random one."""

import dataclasses
import json

import pytest
import torch

from grounding.losses import Targets, assign, losses, total
from grounding.model import (
    CheckpointError,
    MedGLIPConfig,
    build_model,
    load_checkpoint,
    location_grid,
    save_checkpoint,
)
from grounding.text import PhraseBatch, PhraseEncoder

SIZE = 64


@pytest.fixture(scope="module")
def model():
    return build_model(MedGLIPConfig(trunk="tiny", image_size=SIZE, width=32, region_width=24), seed=0).eval()


def some_phrases(n: int, seed: int = 0) -> PhraseBatch:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(n, 384, generator=generator), dim=-1)
    return PhraseBatch([str(k) for k in range(n)], vectors, torch.arange(n) % 3 - 1)


def some_images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_phrase_does_not_see_its_neighbours(model):
    images, every = some_images(2), some_phrases(40)
    first = PhraseBatch(every.texts[:1], every.vectors[:1], every.sides[:1])
    alone, together = model(images, first), model(images, every)
    assert (alone.logits[..., 0] - together.logits[..., 0]).abs().max() < 1e-4
    assert (alone.presence[:, 0] - together.presence[:, 0]).abs().max() < 1e-4
    assert torch.equal(alone.boxes, together.boxes)


@torch.no_grad()
def test_four_images_together_equal_four_alone(model):
    images, phrases = some_images(4), some_phrases(5)
    together = model(images, phrases)
    alone = torch.cat([model(image[None], phrases).logits for image in images])
    assert (together.logits - alone).abs().max() < 1e-4


@torch.no_grad()
def test_the_side_of_a_phrase_counts(model):
    phrases = some_phrases(1)
    left, right = (dataclasses.replace(phrases, sides=torch.tensor([side])) for side in (-1, 1))
    assert (model(some_images(1), left).logits - model(some_images(1), right).logits).abs().max() > 1e-3


@torch.no_grad()
def test_save_load_same_logits(model, tmp_path):
    save_checkpoint(tmp_path, model.config, model.state_dict())
    again = load_checkpoint(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(some_images(1), some_phrases(3)).logits, model(some_images(1), some_phrases(3)).logits)


def test_another_format_version_is_refused(model, tmp_path):
    save_checkpoint(tmp_path, dataclasses.replace(model.config, format_version=99), model.state_dict())
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no grounding checkpoint"):
        load_checkpoint(tmp_path / "nothing")


def some_targets(phrases: int = 4) -> Targets:
    boxes = torch.tensor([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.95]], [[0.2, 0.2, 0.8, 0.8], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    positive = torch.zeros(2, 2, phrases, dtype=torch.bool)
    positive[0, 0, 0] = positive[0, 1, 1] = positive[1, 0, 2] = True
    return Targets(
        boxes=boxes,
        jittered=boxes,
        valid=valid,
        positive=positive,
        known=torch.ones(2, phrases, dtype=torch.bool),
        masks=torch.ones(2, 2, SIZE // 4, SIZE // 4),
        has_mask=valid.clone(),
        modality=torch.tensor([2, 2]),
        narrower=torch.tensor([[0, 1]]),
        siblings=[[0, 1]],
    )


def test_every_region_gets_a_location():
    targets = some_targets()
    for boxes, valid in zip(targets.boxes, targets.valid, strict=True):
        owners = set(assign(boxes, valid, SIZE).tolist()) - {-1}
        assert owners == set(valid.nonzero()[:, 0].tolist())
    tiny = torch.tensor([[0.5, 0.5, 0.505, 0.505]])
    assert 0 in assign(tiny, torch.tensor([True]), SIZE).tolist()


def test_locations_of_a_region_lie_inside_it():
    boxes = some_targets().boxes[0]
    owner = assign(boxes, torch.tensor([True, True]), SIZE)
    centres, _ = location_grid(SIZE)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        x, y = centres[owner == k].T
        assert ((x > x1) & (x < x2) & (y > y1) & (y < y2)).all()


def test_what_a_source_does_not_label_is_no_negative(model):
    phrases, targets = some_phrases(4), some_targets()
    targets.known[:, 3] = False
    targets.narrower = targets.narrower[:0]
    out = model(some_images(2), phrases, None, targets.jittered)
    out.logits.retain_grad()
    out.presence.retain_grad()
    total(losses(out, targets, SIZE)).backward()
    assert not out.logits.grad[..., 3].any() and not out.presence.grad[:, 3].any()
    assert out.logits.grad[..., 2].any()


def test_a_child_is_pulled_below_its_parent(model):
    targets = some_targets()
    out = model(some_images(2), some_phrases(4), None, targets.jittered)
    out.presence = torch.tensor([[3.0, -3, 0, 0], [3.0, -3, 0, 0]], requires_grad=True)
    losses(out, targets, SIZE)["tree"].backward()
    assert (out.presence.grad[:, 0] > 0).all() and (out.presence.grad[:, 1] < 0).all()


def fused(fusion: str, **fields):
    config = MedGLIPConfig(trunk="tiny", image_size=SIZE, width=32, region_width=24, fusion=fusion, **fields)
    model = build_model(config, seed=0).eval()
    for parameter in model.parameters():  # layers that start at zero would hide a dependence
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def first_of(phrases: PhraseBatch, n: int) -> PhraseBatch:
    return PhraseBatch(phrases.texts[:n], phrases.vectors[:n], phrases.sides[:n])


@torch.no_grad()
@pytest.mark.parametrize("adapters", (True, False))
@pytest.mark.parametrize("fusion", ("phrase", "none"))
def test_other_phrases_move_no_score(fusion, adapters):
    model, images, every = fused(fusion, adapters=adapters), some_images(2), some_phrases(40)
    few, many = model(images, first_of(every, 3)), model(images, every)
    assert (few.logits - many.logits[..., :3]).abs().max() < 1e-5
    assert (few.presence - many.presence[:, :3]).abs().max() < 1e-5
    assert torch.equal(few.boxes, many.boxes) and torch.equal(few.quality, many.quality)


@torch.no_grad()
def test_two_way_fusion_sees_the_other_phrases_but_region_features_do_not():
    model, images, every = fused("two_way"), some_images(2), some_phrases(40)
    boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.5]]]).repeat(2, 1, 1)
    few, many = model(images, first_of(every, 3), None, boxes), model(images, every, None, boxes)
    assert (few.logits - many.logits[..., :3]).abs().max() > 1e-3
    assert torch.equal(few.regions.features, many.regions.features)
    assert model(images, first_of(every, 0)).logits.shape[-1] == 0


@torch.no_grad()
def test_without_adapters_the_modality_says_nothing():
    images, phrases = some_images(2), some_phrases(3)
    one_hot = torch.nn.functional.one_hot(torch.tensor([1, 2]), 8).float()
    for adapters in (True, False):
        model = fused("phrase", adapters=adapters)
        same = torch.equal(model(images, phrases, one_hot).logits, model(images, phrases, one_hot.flip(0)).logits)
        assert same is not adapters


@pytest.mark.parametrize(
    "fields", ({"mask_head": False}, {"fusion": "none"}, {"fusion": "two_way"}, {"adapters": False})
)
def test_every_parameter_learns_whatever_is_switched_off(fields):
    """Several processes wait for the gradient of each."""
    model, targets = fused(**{"fusion": "phrase"} | fields).train(), some_targets()
    out = model(some_images(2), some_phrases(4), None, targets.jittered)
    parts = losses(out, targets, SIZE)
    assert ("mask" in parts) is model.config.mask_head is (out.prototypes is not None)
    total(parts).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    "fields", ({"mask_head": False}, {"fusion": "none"}, {"fusion": "two_way"}, {"adapters": False})
)
def test_switches_are_kept_in_the_checkpoint(fields, tmp_path):
    model = fused(**{"fusion": "phrase"} | fields)
    save_checkpoint(tmp_path, model.config, model.state_dict())
    with torch.no_grad():
        again = load_checkpoint(tmp_path)(some_images(1), some_phrases(3))
        assert torch.equal(again.logits, model(some_images(1), some_phrases(3)).logits)


def test_a_checkpoint_from_before_the_switches_loads(model, tmp_path):
    save_checkpoint(tmp_path, model.config, model.state_dict())
    row = json.loads((tmp_path / "config.json").read_text())
    for name in ("fusion", "adapters", "mask_head", "trunk_config", "most_boxes"):
        del row[name]
    (tmp_path / "config.json").write_text(json.dumps(row))
    assert load_checkpoint(tmp_path).config == model.config


def test_an_unknown_fusion_is_refused():
    with pytest.raises(CheckpointError, match="unknown fusion 'deep'; known: phrase, none, two_way"):
        MedGLIPConfig(fusion="deep")


def test_without_hierarchy_there_is_no_tree_term(model):
    targets = some_targets()
    out = model(some_images(2), some_phrases(4), None, targets.jittered)
    with_tree, without = losses(out, targets, SIZE), losses(out, targets, SIZE, hierarchy=False)
    assert with_tree.keys() - without.keys() == {"tree"}
    assert all(torch.equal(without[name], with_tree[name]) for name in without)


@pytest.mark.parametrize("mask_head", (True, False))
@pytest.mark.parametrize("phrases", (4, 0))
def test_a_batch_without_regions_or_phrases_has_finite_losses(phrases, mask_head):
    model = fused("phrase", mask_head=mask_head)
    targets = some_targets(phrases) if phrases else dataclasses.replace(
        some_targets(), positive=torch.zeros(2, 2, 0, dtype=torch.bool), known=torch.zeros(2, 0, dtype=torch.bool),
        narrower=torch.zeros(0, 2, dtype=torch.long), siblings=[],
    )  # fmt: skip
    targets.valid[:] = False
    out = model(some_images(2), some_phrases(phrases), None, targets.jittered)
    parts = losses(out, targets, SIZE)
    assert all(torch.isfinite(part) for part in parts.values())
    assert parts["box"] == 0 and parts["edges"] == 0
    total(parts).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("autocast", (True, False))
def test_losses_in_float32_where_the_model_computes_in_bfloat16(autocast):
    model, targets = fused("phrase"), some_targets()
    exact = losses(model(some_images(2), some_phrases(4), None, targets.jittered), targets, SIZE)
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = losses(model(some_images(2), some_phrases(4), None, targets.jittered), targets, SIZE)
    for name, part in parts.items():
        assert part.dtype == torch.float32 and part.item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.05), name
    total(parts).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_phrase_vectors_come_from_the_cache_and_tell_no_neighbour(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGLIP_CACHE", str(tmp_path))
    alone = PhraseEncoder().encode(["left insula"])
    together = PhraseEncoder().encode(["a much longer phrase about the right temporal lobe", "left insula"])
    assert torch.equal(alone.vectors[0], together.vectors[1])
    assert together.sides.tolist() == [1, -1]
    again = PhraseEncoder()
    again._embed = None  # a second run must not need the model
    assert torch.equal(again.encode(["left insula"]).vectors, alone.vectors)
    with pytest.raises(ValueError, match="empty phrase"):
        again.encode([" "])
