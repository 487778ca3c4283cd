"""One path for every family of vision-language models: a tiny random checkpoint of each goes through train step, save,
load, generate, merge and export, with two images of different size in a batch."""

import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from bridges.projector import ProjectorConfig
from bridges.region_vlm import BridgeConfig, RegionVLM, embedding_scale, language_prefix
from downstream.base import Base, stack_images
from downstream.embedded import load_base
from downstream.export import main
from downstream.prompts import build_prompt, collate
from downstream.train import step_loss
from grounding.labels import load_label_tree
from grounding.types import RegionTokens
from tests.bridges.families import FAMILIES, save_checkpoint

TREE = load_label_tree()
FAST = ("llava", "qwen2_5_vl", "smolvlm")
rng = np.random.default_rng(0)
WIDE = rng.integers(0, 256, (30, 80, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (50, 45), dtype=np.uint8)
QUESTIONS = ("Where?", "How large is the largest lesion?")


@dataclass(frozen=True)
class Case:
    """A saved checkpoint, its model as it is, and a bridge, as after training, on another copy of it."""

    name: str
    folder: Path
    plain: Base
    base: Base
    vlm: RegionVLM


@pytest.fixture(
    scope="module", params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def case(request, tmp_path_factory) -> Case:
    folder = save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    base = load_base(str(folder))
    return Case(request.param, folder, load_base(str(folder)), base, trained(base))


def bridge(base: Base, **settings) -> RegionVLM:
    projector = ProjectorConfig(8, 6, 64, embedding_scale(base.model), hidden=32)
    torch.manual_seed(0)
    settings = {"lora_r": 4, "lora_layers": None} | settings
    return RegionVLM(base.model, BridgeConfig(base.name, base.fingerprint, base.region_token_id, projector, **settings))


def trained(base: Base) -> RegionVLM:
    vlm = bridge(base)
    for module in vlm.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    return vlm.eval()


def slots(count: int, k: int, seed: int = 0) -> RegionTokens:
    """`count` regions in `k` slots: a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "features": torch.randn(1, 8, 8, generator=generator),
        "boxes": torch.rand(1, 8, 2, 2, generator=generator).sort(2).values.flatten(2),
        "scores": torch.rand(1, 8, generator=generator),
        "label_vectors": torch.randn(1, 8, 6, generator=generator),
        "levels": torch.randint(0, 3, (1, 8), generator=generator),
        "valid": torch.arange(8)[None] < count,
    }
    tensors = {name: tensor[:, :k] for name, tensor in tensors.items()}
    return RegionTokens(**tensors, labels=[["brain"] * count + [""] * (k - count)], queries=[[]])


def prompts(base: Base, counts=(4, 2), k=4, route="tokens", answers=(None, None)):
    """A prompt about the wide image and one about the grey one."""
    asked = zip(QUESTIONS, counts, (WIDE, GREY), answers, strict=True)
    return [
        build_prompt(base, question, slots(count, k, i), route, TREE, answer=answer, images=[image])
        for i, (question, count, image, answer) in enumerate(asked)
    ]


def batch_of(base: Base, rows):
    return collate(rows, base.tokenizer.pad_token_id)


def logits_of(vlm, base, rows) -> torch.Tensor:
    """(B, V) of the last position."""
    batch = batch_of(base, rows)
    with torch.no_grad():
        return vlm(batch.slots, **batch.inputs).logits[:, -1]


def native_inputs(base: Base) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of the same questions and images, without regions."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in QUESTIONS]
    if not base.listed:
        chats = [[{"role": "user", "content": f"{base.image_token}\n{question}"}] for question in QUESTIONS]
    texts = base.tokenizer.apply_chat_template(
        chats, chat_template=base.template, tokenize=False, add_generation_prompt=True
    )
    images = [[Image.fromarray(image).convert("RGB")] for image in (WIDE, GREY)]
    inputs = base.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    accepted = inspect.signature(base.model.forward).parameters
    return {name: value for name, value in inputs.items() if name in accepted and name != "labels"}


def native_logits(model, base: Base) -> torch.Tensor:
    with torch.no_grad():
        return model(**native_inputs(base)).logits[:, -1]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_the_region_token_is_reserved_or_spare_or_one_more(case):
    assert case.base.region_token == FAMILIES[case.name].region
    assert [row.input_ids.count(case.base.region_token_id) for row in prompts(case.base)] == [4, 4]
    saved = AutoConfig.from_pretrained(case.folder).get_text_config().vocab_size
    rows = len(case.plain.model.get_input_embeddings().weight)
    assert rows - saved == (1 if case.name == "llava_med" else 0)  # neither a reserved token nor a spare row


def test_images_are_batched_as_the_family_s_processor_does(case):
    ours, theirs = batch_of(case.base, prompts(case.base, route="text", k=4)).inputs, native_inputs(case.base)
    assert theirs.keys() - ours.keys() == set() and ours.keys() - theirs.keys() == {"position_ids"}
    tensors = stack_images([row.images for row in prompts(case.base)])
    assert all(torch.equal(tensors[name], theirs[name]) for name in tensors) and "pixel_values" in tensors


def test_without_regions_the_logits_are_the_untouched_model_s(case):
    vocabulary = AutoConfig.from_pretrained(case.folder).get_text_config().vocab_size
    untouched = native_logits(AutoModelForImageTextToText.from_pretrained(case.folder).eval(), case.base)
    base = load_base(str(case.folder))
    vlm = bridge(base)  # LoRA starts at zero
    for route in ("none", "tokens"):  # free slots of both
        rows = prompts(base, (0, 0), route=route)
        close(logits_of(vlm.eval(), base, rows)[:, :vocabulary], untouched[:, :vocabulary])
    assert untouched.std() > 0.05


def test_regions_change_the_answer_and_free_slots_do_not(case):
    few = logits_of(case.vlm, case.base, prompts(case.base, (3, 2), k=3))
    close(few, logits_of(case.vlm, case.base, prompts(case.base, (3, 2), k=6)))
    assert (few - logits_of(case.vlm, case.base, prompts(case.base, (0, 0), k=3))).abs().max() > 1e-3


def test_a_batch_of_different_sizes_equals_one_by_one(case):
    rows = prompts(case.base)
    alone = torch.cat([logits_of(case.vlm, case.base, [row]) for row in rows])
    close(logits_of(case.vlm, case.base, rows), alone)


def test_several_images_a_prompt(case):
    images = ([WIDE, GREY], [GREY, WIDE[:, :40]])
    rows = [build_prompt(case.base, "Where?", slots(2, 3), "tokens", TREE, images=pair) for pair in images]
    alone = torch.cat([logits_of(case.vlm, case.base, [row]) for row in rows])
    close(logits_of(case.vlm, case.base, rows), alone)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_projected_regions_are_as_large_as_words(case):
    """Gemma's embedding layer multiplies its table by a constant."""
    table = case.plain.model.get_input_embeddings()
    words = table(torch.arange(100)).pow(2).mean().sqrt().item()
    rows = case.vlm.projector(slots(4, 4)).pow(2).mean().sqrt().item()
    assert rows == pytest.approx(words, rel=0.1)


def test_a_train_step_reaches_projector_and_lora_and_lowers_the_loss(case):
    base = load_base(str(case.folder))
    vlm = bridge(base).train()
    batch = batch_of(base, prompts(base, answers=("left", "12 mm")))
    weights = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = step_loss(vlm, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not any(module.training for tower in vlm._towers for module in tower.modules())
    reached = {name for name, p in weights.items() if p.grad.abs().sum() > 0}
    assert any(name.startswith("projector.") for name in reached)
    own = f"model.base_model.model.{language_prefix(base.model)}.layers."  # no vision tower
    lora = {name for name in weights if "lora_" in name}
    assert lora <= reached and all(name.startswith(own) for name in lora)
    optimizer.zero_grad()
    step_loss(vlm, batch_of(base, prompts(base, (0, 0), route="none", answers=("left", "12 mm")))).backward()
    projector = [p.grad for name, p in weights.items() if name.startswith("projector.")]
    assert all(grad is not None and not grad.any() for grad in projector)  # None would hang several processes


def test_cached_generation_equals_uncached_and_one_by_one(case):
    rows = prompts(case.base)
    batch = batch_of(case.base, rows)
    cached = case.vlm.generate(batch.slots, 8, **batch.inputs)
    assert torch.equal(cached, case.vlm.generate(batch.slots, 8, use_cache=False, **batch.inputs))
    for i, row in enumerate(rows):
        one = batch_of(case.base, [row])
        answer = case.vlm.generate(one.slots, 8, **one.inputs)[0]
        assert torch.equal(answer, cached[i, : len(answer)])
    beams = case.vlm.generate(batch.slots, 8, num_beams=2, **batch.inputs)
    assert len(beams) == 2 and beams.shape[1] <= 8


def test_generation_follows_the_training_forward(case):
    """Greedy tokens are the argmax of the pass that training uses, over the prompt with these tokens as its answer."""
    row = prompts(case.base)[0]
    batch = batch_of(case.base, [row])
    said = case.vlm.generate(batch.slots, 6, **batch.inputs)[0].tolist()
    types = {name: ids + [case.base.answer_type] * len(said) for name, ids in row.token_types.items()}
    mask = row.attention_mask + [1] * len(said)
    row = replace(row, input_ids=row.input_ids + said, attention_mask=mask, token_types=types, answer_ids=said)
    batch = batch_of(case.base, [row])
    with torch.no_grad():
        logits = case.vlm(batch.slots, **batch.inputs).logits[0, -len(said) - 1 : -1]
    logits[:, [case.base.region_token_id, case.vlm.image_token_id]] = -torch.inf
    assert logits.argmax(-1).tolist() == said


def test_no_answer_token_sees_a_later_one(case):
    """Prefix models read the question in both directions; an answer that did would be trained on itself."""
    seen = []
    for answers in (("left", "12 mm"), ("lefx", "12 mx")):
        batch = batch_of(case.base, prompts(case.base, answers=answers))
        with torch.no_grad():
            seen.append(case.vlm(batch.slots, **batch.inputs).logits)
    close(seen[0][:, -4:-2], seen[1][:, -4:-2])  # at the last position stands the end token, before it what differs
    assert (seen[0][:, -2:] - seen[1][:, -2:]).abs().max() > 1e-3


def test_save_load_merge_and_export(case, tmp_path):
    rows = prompts(case.base)
    before = logits_of(case.vlm, case.base, rows)
    case.vlm.save(tmp_path / "bridge", {})
    other = load_base(str(case.folder))
    loaded = RegionVLM.load(tmp_path / "bridge", other.model, other.fingerprint)
    assert torch.equal(before, logits_of(loaded, other, rows))
    merged = loaded.merge()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    close(before, logits_of(loaded, other, rows), 1e-4)
    main(["--checkpoint", str(tmp_path / "bridge"), "--out", str(tmp_path / "merged")])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    close(native_logits(plain, case.base), logits_of(case.vlm, case.base, prompts(case.base, (0, 0))), 1e-4)
    again = load_base(str(tmp_path / "merged"))
    if type(again.processor).__module__.startswith("transformers."):  # the others' video part wants torchvision
        assert type(AutoProcessor.from_pretrained(tmp_path / "merged")) is type(again.processor)
    assert again.region_token_id == case.base.region_token_id
    assert torch.equal(again.encode("Where?", 2, [WIDE]).images["pixel_values"], rows[0].images["pixel_values"])
    settings = [
        json.loads((folder / "processor_config.json").read_text()) for folder in (case.folder, tmp_path / "merged")
    ]
    assert settings[0] == settings[1]  # the video part included
