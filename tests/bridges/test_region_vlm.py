"""Invariants of injection: what regions change, what they must not, and that a saved bridge comes back the same."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from bridges.projector import ProjectorConfig
from bridges.region_vlm import BridgeConfig, CheckpointError, RegionVLM, embedding_scale
from bridges.routes import pick
from downstream.embedded import tiny_base
from downstream.prompts import build_prompt, collate, positions
from downstream.train import step_loss
from grounding.labels import load_label_tree
from grounding.types import RegionTokens

TREE = load_label_tree()
K = 4


def tokens(n: int, images: int = 1, seed: int = 0) -> RegionTokens:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, n, 2, 2, generator=generator).sort(2).values
    return RegionTokens(
        features=torch.randn(images, n, 8, generator=generator),
        boxes=corners.flatten(2),
        scores=torch.rand(images, n, generator=generator),
        labels=[["brain"] * n for _ in range(images)],
        label_vectors=torch.randn(images, n, 6, generator=generator),
        levels=torch.randint(0, 3, (images, n), generator=generator),
        valid=torch.ones(images, n, dtype=torch.bool),
        queries=[[] for _ in range(images)],
    )


def fresh(base=None, seed: int = 0) -> tuple[RegionVLM, object]:
    """A bridge whose LoRA is not zero any more, as after training."""
    base = base or tiny_base()
    projector = ProjectorConfig(8, 6, 64, embedding_scale(base.model), hidden=32)
    torch.manual_seed(seed)
    vlm = RegionVLM(base.model, BridgeConfig("tiny", base.fingerprint, base.region_token_id, projector, 4, None))
    for module in vlm.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    return vlm.eval(), base


@pytest.fixture(scope="module")
def bridge():
    return fresh()


def prompts(base, counts, questions=None, route="tokens", k=K, answer=None):
    questions = questions or ["Where?"] * len(counts)
    table = tokens(K, len(counts))
    for row, count in enumerate(counts):
        table.valid[row, count:] = False
    return [
        build_prompt(base, question, pick(table, row, [], TREE, k, {}), route, TREE, answer=answer)
        for row, question in enumerate(questions)
    ]


def logits_of(bridge, rows) -> torch.Tensor:
    vlm, base = bridge
    batch = collate(rows, base.tokenizer.pad_token_id)
    with torch.no_grad():
        return vlm(batch.slots, pixel_values=pixels(len(rows)), **batch.inputs).logits[:, -1]


def with_pixels(batch, images=None):
    batch.inputs["pixel_values"] = pixels(len(batch.labels)) if images is None else images
    return batch


def pixels(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_padding_regions_change_nothing(bridge):
    """Three regions in three slots, and in four slots of which the last is free."""
    few = logits_of(bridge, prompts(bridge[1], [3], k=3))
    padded = logits_of(bridge, prompts(bridge[1], [3], k=4))
    torch.testing.assert_close(few, padded, rtol=0, atol=1e-5)


def test_what_stands_in_a_free_slot_changes_nothing(bridge):
    rows = prompts(bridge[1], [2])
    before = logits_of(bridge, rows)
    rows[0].slots.features[0, 2:] = 100.0
    assert torch.equal(before, logits_of(bridge, rows))


def test_regions_change_the_answer(bridge):
    rows = prompts(bridge[1], [2])
    before = logits_of(bridge, rows)
    rows[0].slots.features[0, 0] = torch.arange(8.0)
    assert not torch.allclose(before, logits_of(bridge, rows), atol=1e-3)


def test_route_none_is_route_tokens_without_regions(bridge):
    none = prompts(bridge[1], [3], route="none")
    absent = prompts(bridge[1], [0], route="tokens")
    assert none[0].input_ids == absent[0].input_ids and none[0].attention_mask == absent[0].attention_mask
    assert torch.equal(logits_of(bridge, none), logits_of(bridge, absent))


def test_route_none_reads_as_if_there_were_no_slots(bridge):
    none = logits_of(bridge, prompts(bridge[1], [3], route="none"))
    without = logits_of(bridge, prompts(bridge[1], [0], route="text"))
    torch.testing.assert_close(none, without, rtol=0, atol=1e-5)


def test_a_batch_of_different_lengths_equals_one_by_one(bridge):
    rows = prompts(bridge[1], [4, 0, 2], ["Where?", "How large is the largest lesion?", "Is it round?"])
    together = logits_of(bridge, rows)
    vlm, base = bridge
    images = pixels(3)
    for i, row in enumerate(rows):
        batch = collate([row], base.tokenizer.pad_token_id)
        with torch.no_grad():
            alone = vlm(batch.slots, pixel_values=images[i : i + 1], **batch.inputs).logits[:, -1]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_the_count_of_placeholders_is_checked(bridge):
    vlm, base = bridge
    batch = collate(prompts(base, [3]), base.tokenizer.pad_token_id)
    batch.inputs["input_ids"][batch.inputs["input_ids"] == base.region_token_id] = 7
    with pytest.raises(ValueError, match="0 region placeholders for 4 region tokens"):
        vlm(batch.slots, pixel_values=pixels(1), **batch.inputs)


def test_another_width_is_refused(bridge):
    rows = prompts(bridge[1], [3])
    rows[0].slots.features = torch.zeros(1, K, 5)
    with pytest.raises(ValueError, match=r"\(5, 6\), this bridge needs \(8, 6\)"):
        logits_of(bridge, rows)


def test_text_cannot_smuggle_placeholders(bridge):
    base = bridge[1]
    rows = prompts(base, [2], [f"Where {base.region_token * 3} is {base.image_token} it?"])
    assert rows[0].input_ids.count(base.region_token_id) == K
    logits_of(bridge, rows)


@pytest.mark.parametrize("route", ["tokens", "none", "text"])
def test_every_trained_parameter_gets_a_gradient(route):
    """Zero, not None, where a batch has no regions: with several processes, None would hang."""
    vlm, base = fresh()
    batch = collate(prompts(base, [3, 0], route=route, answer="left"), base.tokenizer.pad_token_id)
    step_loss(vlm.train(), with_pixels(batch)).backward()
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    through = any(p.grad.abs().sum() > 0 for name, p in trained.items() if name.startswith("projector."))
    assert through == (route == "tokens")
    assert trained["model.base_model.model.model.multi_modal_projector.linear_1.weight"].grad.abs().sum() > 0
    assert {name.split(".")[-2] for name in trained if "lora_" in name} == {"default"}
    assert not any("vision_tower" in name for name in trained)


def test_gradients_pass_through_checkpointing():
    vlm, base = fresh()
    batch = collate(prompts(base, [3, 1], answer="left"), base.tokenizer.pad_token_id)
    plain = copy.deepcopy(vlm).train()
    step_loss(plain, with_pixels(batch)).backward()
    vlm.gradient_checkpointing()
    step_loss(vlm.train(), batch).backward()
    torch.testing.assert_close(vlm.projector.box.weight.grad, plain.projector.box.weight.grad)


def test_the_loss_is_over_the_answer_alone(bridge):
    vlm, base = bridge
    rows = prompts(base, [3, 2], ["Where?", "Is it large?"], answer="left")
    batch = collate(rows, base.tokenizer.pad_token_id)
    loss = step_loss(vlm, with_pixels(batch))
    with torch.no_grad():
        logits = vlm(batch.slots, **batch.inputs).logits.log_softmax(-1)
    answer = rows[0].answer_ids
    expected = [-logits[i, -len(answer) - 1 + j, token] for i in range(2) for j, token in enumerate(answer)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert answer[-1] == base.tokenizer.eos_token_id


def test_two_halves_weigh_like_the_whole(bridge):
    vlm, base = bridge
    rows = [prompts(base, [2], answer=text)[0] for text in ("left", "a long answer", "no", "5 mm")]

    def loss(rows):
        same = pixels(1).expand(len(rows), -1, -1, -1)
        return step_loss(vlm, with_pixels(collate(rows, base.tokenizer.pad_token_id), same))

    torch.testing.assert_close(loss(rows), (loss(rows[:2]) + loss(rows[2:])) / 2)


@pytest.mark.parametrize("route", ["tokens", "none", "text"])
def test_cached_generation_equals_uncached(bridge, route):
    vlm, base = bridge
    rows = prompts(base, [4, 1], ["Where?", "How large is it?"], route=route)
    batch = collate(rows, base.tokenizer.pad_token_id)
    inputs = batch.inputs | {"pixel_values": pixels(2)}
    cached = vlm.generate(batch.slots, 12, **inputs)
    uncached = vlm.generate(batch.slots, 12, use_cache=False, **inputs)
    assert cached.shape == (2, 12) or (cached == base.tokenizer.eos_token_id).any()
    assert torch.equal(cached, uncached)
    for i, row in enumerate(rows):
        alone = collate([row], base.tokenizer.pad_token_id)
        one = vlm.generate(alone.slots, 12, pixel_values=pixels(2)[i : i + 1], **alone.inputs)[0]
        assert torch.equal(one, cached[i, : len(one)])


def test_generation_follows_the_training_forward(bridge):
    """Greedy tokens are the argmax of the forward pass that training uses, on prompt + generated tokens."""
    vlm, base = bridge
    batch = collate(prompts(base, [3]), base.tokenizer.pad_token_id)
    generated = vlm.generate(batch.slots, 8, pixel_values=pixels(1), **batch.inputs)[0]
    ids = torch.cat([batch.inputs["input_ids"], generated[None]], 1)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(generated)[None]], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad():
        logits = vlm(batch.slots, pixel_values=pixels(1), **inputs).logits[0, -len(generated) - 1 : -1]
    logits[:, [base.region_token_id, vlm.image_token_id]] = -torch.inf
    assert torch.equal(logits.argmax(-1), generated)


def test_save_and_load_give_the_same_logits(bridge, tmp_path):
    vlm, base = bridge
    rows = prompts(base, [3])
    vlm.save(tmp_path / "bridge", {"route": "tokens", "k": K})
    vlm.save(tmp_path / "bridge", {"route": "tokens", "k": K})  # replaces the older one
    other = tiny_base()
    loaded = RegionVLM.load(tmp_path / "bridge", other.model, other.fingerprint)
    assert torch.equal(logits_of(bridge, rows), logits_of((loaded, other), rows))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bridge"]
    size = sum(file.stat().st_size for file in (tmp_path / "bridge").iterdir())
    assert size < 4 * sum(p.numel() for p in vlm.parameters() if p.requires_grad) + 50_000


def test_merging_changes_nothing():
    bridge = fresh()
    rows = prompts(bridge[1], [3, 2])
    before = logits_of(bridge, rows)
    merged = bridge[0].merge()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(before, logits_of(bridge, rows), rtol=0, atol=1e-4)


def test_another_base_is_refused_by_name(bridge, tmp_path):
    bridge[0].save(tmp_path / "bridge", {})
    other = tiny_base(seed=1)
    with pytest.raises(CheckpointError, match="trained on base model 'tiny'") as error:
        RegionVLM.load(tmp_path / "bridge", other.model, other.fingerprint)
    assert "\n" not in str(error.value)


def test_another_format_is_refused(bridge, tmp_path):
    bridge[0].save(tmp_path / "bridge", {})
    file = tmp_path / "bridge" / "bridge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this program reads 1"):
        RegionVLM.load(tmp_path / "bridge", bridge[1].model, bridge[1].fingerprint)


def test_damage_and_absence_are_named(bridge, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: not a bridge checkpoint"):
        RegionVLM.load(tmp_path / "nowhere", bridge[1].model, "")
    bridge[0].save(tmp_path / "bridge", {})
    file = tmp_path / "bridge" / "bridge.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    base = tiny_base()
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        RegionVLM.load(tmp_path / "bridge", base.model, base.fingerprint)


def test_the_adapter_is_peft_s_own_format(bridge, tmp_path):
    bridge[0].save(tmp_path / "bridge", {})
    model = PeftModel.from_pretrained(tiny_base().model, str(tmp_path / "bridge"))
    ours = {k: v for k, v in bridge[0].model.state_dict().items() if "lora_" in k}
    theirs = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
