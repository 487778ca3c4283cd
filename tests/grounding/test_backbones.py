"""Trunks of every family, from tiny random checkpoints saved as a hub's would be."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from grounding.backbones import HubTrunk
from grounding.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from grounding.images import MEAN, STD
from grounding.losses import Targets, losses, total
from grounding.model import CheckpointError, MedGLIPConfig, build_model, load_checkpoint, save_checkpoint
from grounding.store import open_store
from grounding.text import PhraseBatch
from grounding.types import read_regions

SIZE = 64
STAGES = ((1, 3, 1, 1, 8), (2, 3, 2, 2, 8), (1, 3, 2, 2, 16), (1, 3, 2, 2, 24), (1, 3, 2, 2, 32))


def saved_model(family: str) -> transformers.PreTrainedModel:
    widths = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1]}
    if family == "swin":
        config = transformers.SwinConfig(
            image_size=224, embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=7, num_labels=3
        )
        return transformers.SwinForImageClassification(config)
    if family == "convnextv2":
        return transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**widths, num_labels=3))
    if family == "dinov3_convnext":
        return transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**widths, layer_scale_init_value=0.5))
    if family == "resnet":
        config = transformers.ResNetConfig(**widths, embedding_size=8, layer_type="basic", num_labels=3)
        return transformers.ResNetForImageClassification(config)
    if family == "regnet":
        return transformers.RegNetModel(transformers.RegNetConfig(**widths, embedding_size=8, groups_width=8))
    return EfficientNetLiteModel(EfficientNetLiteConfig(STAGES, 8, 32))


FAMILIES = ("swin", "convnextv2", "dinov3_convnext", "resnet", "regnet", "efficientnet_lite")


@pytest.fixture
def folder(request, tmp_path):
    torch.manual_seed(0)
    saved_model(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def every_family(test):
    return pytest.mark.parametrize("folder", FAMILIES, indirect=True)(test)


def only(*families):
    return pytest.mark.parametrize("folder", families, indirect=True)


def built(folder, pretrained=True, **fields):
    config = MedGLIPConfig(trunk=str(folder), image_size=SIZE, width=32, region_width=24, **fields)
    return build_model(config, seed=0, pretrained=pretrained)


def some_images(n: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_phrases(n: int = 4) -> PhraseBatch:
    vectors = torch.nn.functional.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    return PhraseBatch([str(k) for k in range(n)], vectors, torch.arange(n) % 3 - 1)


def some_targets(size: int = SIZE) -> Targets:
    boxes = torch.tensor([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.95]], [[0.2, 0.2, 0.8, 0.8], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    positive = torch.zeros(2, 2, 4, dtype=torch.bool)
    positive[0, 0, 0] = positive[0, 1, 1] = positive[1, 0, 2] = True
    known, masks = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 2, size // 4, size // 4)
    modality = torch.tensor([2, 2])
    return Targets(
        boxes, boxes, valid, positive, known, masks, valid.clone(), modality, torch.tensor([[0, 1]]), [[0, 1]]
    )


def step(model, size: int = SIZE) -> torch.Tensor:
    targets = some_targets(size)
    model.zero_grad()
    loss = total(losses(model(some_images(2, size), some_phrases(), None, targets.jittered), targets, size))
    loss.backward()
    return loss.detach()


@every_family
def test_trains_and_loads_where_the_trunks_folder_is_gone(folder, tmp_path):
    model = built(folder).train()
    assert torch.isfinite(step(model))
    trained = {name: p for name, p in model.trunk.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    assert sum(p.grad.abs().max() > 0 for p in trained.values()) > len(trained) / 2
    save_checkpoint(tmp_path / "out", model.config, model.state_dict())
    shutil.rmtree(folder)
    again = load_checkpoint(tmp_path / "out")
    assert again.config == model.config
    images, phrases = some_images(2), some_phrases()
    with torch.no_grad():
        assert torch.equal(again(images, phrases).logits, model.eval()(images, phrases).logits)


@every_family
def test_the_weights_of_the_folder_are_in_the_trunk(folder):
    own = list(built(folder).trunk.state_dict().values())
    tables = {name: x for name, x in load_file(folder / "model.safetensors").items() if x.dim() > 1}
    assert len(tables) > 5
    for name, table in tables.items():
        found = any(table.shape == x.shape and torch.equal(table, x) for x in own)
        assert found or "classifier" in name, name


@every_family
def test_random_weights_are_not_the_folders_and_train_from_the_first_layer(folder):
    torch.manual_seed(7)
    (folder / "model.safetensors").unlink()  # what is not read need not be there
    model = built(folder, pretrained=False).train()
    step(model)
    first = next(p for p in model.trunk.parameters() if p.dim() > 1)
    assert first.grad is not None and first.grad.abs().max() > 0
    with torch.no_grad():
        spread = [maps.std() for maps in model.trunk.feature_maps(some_images(2))]
    assert min(spread) > 1e-2 and max(spread) < 1e2  # a signal from end to end


@every_family
def test_layers_before_stride_8_are_frozen_and_the_maps_new_norms_are_not(folder):
    model = built(folder)
    frozen = {name for name, p in model.trunk.named_parameters() if not p.requires_grad}
    trained = {name for name, p in model.trunk.named_parameters() if p.requires_grad}
    first = next(name for name, p in model.trunk.named_parameters() if p.dim() > 1)
    assert first in frozen and len(trained) > len(frozen) / 2
    assert not any("hidden_states_norms" in name for name in frozen)


@pytest.mark.parametrize("size", (192, 256, 480))
@only("swin", "convnextv2")
def test_any_multiple_of_32_is_a_size(folder, size):
    model = built(folder).train()
    assert [x.shape[-1] for x in model.trunk.feature_maps(some_images(1, size))] == [size // s for s in (4, 8, 16, 32)]
    assert torch.isfinite(step(model, size))
    with pytest.raises(ValueError, match="multiple of 32"):
        model(some_images(1, size + 4), some_phrases())


@every_family
def test_gradient_checkpointing_changes_memory_and_nothing_else(folder):
    model = built(folder).train()

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            targets = some_targets()
            torch.manual_seed(0)  # stochastic depth
            model.zero_grad()
            out = model(some_images(2), some_phrases(), None, targets.jittered)
        loss = total(losses(out, targets, SIZE))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept)

    loss, gradients, memory = outcome()
    model.gradient_checkpointing(True)
    again, same, less = outcome()
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert less < memory
    model.gradient_checkpointing(False)
    assert outcome()[2] == memory


@only("convnextv2")
def test_pixels_are_normalised_as_the_trunk_was_trained(folder):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255})
    )
    model = built(folder).eval()
    pixels = torch.rand(1, 3, SIZE, SIZE)
    ours = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        here, there = model.trunk.feature_maps(ours), model.trunk.model((pixels - 0.5) / 0.25).feature_maps
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(here, there, strict=True))


@only("resnet")
def test_batch_statistics_stay_as_they_came(folder):
    model = built(folder).train()
    before = {name: x.clone() for name, x in model.trunk.state_dict().items()}
    step(model)
    assert all(torch.equal(before[name], x) for name, x in model.trunk.state_dict().items())
    fresh = built(folder, pretrained=False).train()
    step(fresh)
    norm = next(m for m in fresh.trunk.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.running_mean.abs().max() > 0


def test_what_is_no_pyramid_is_refused_with_its_strides(tmp_path):
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=4, num_attention_heads=1, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    with pytest.raises(CheckpointError, match="strides: 14; 4, 8, 16 and 32"):
        built(tmp_path / "dino")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="no image pyramid"):
        built(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="cannot be read"):
        built(tmp_path / "nothing")


@only("swin")
def test_a_folder_without_some_weights_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    lost = next(name for name, x in state.items() if x.dim() > 1 and "layers.1" in name)
    del state[lost]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="no weights for"):
        built(folder)


@only("convnextv2")
def test_a_checkpoint_is_complete_whoever_made_its_config(folder, tmp_path):
    """The training loop may save the configuration that it began with."""
    model = built(folder)
    config = MedGLIPConfig(trunk=str(folder), image_size=SIZE, width=32, region_width=24)
    save_checkpoint(tmp_path / "out", config, model.state_dict())
    shutil.rmtree(folder)
    assert isinstance(load_checkpoint(tmp_path / "out").trunk, HubTrunk)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ("cpu", "ddp", "zero2", "zero3"))
@only("swin")
def test_trains_and_predicts_by_the_real_commands(folder, brain_store, launch, tmp_path, processes):
    """DDP fails where a trained parameter gets no gradient."""
    out = tmp_path / "grounder"
    settings = ("image_size=64", "scales=[64,96]", "width=32", "batch_size=2", "calibration=4", "steps=3")
    settings += ("fusion=two_way", "mask_head=false", "checkpointing=true")
    launch(processes, "grounding.train", *settings, f"trunk={folder}", f"store={brain_store}", f"out={out}")
    shutil.rmtree(folder)
    found = tmp_path / "regions"
    launch("cpu", "grounding.predict", f"checkpoint={out}", f"store={brain_store}", f"out={found}")
    assert read_regions(found / "regions.jsonl").keys() == set(open_store(brain_store).image_ids)


@pytest.mark.slow
@torch.no_grad()
def test_many_phrases_cost_little(tmp_path):
    """In multiplications, which no other program on the machine disturbs: 198 phrases against one, Swin-T at 480."""
    transformers.SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]).save_pretrained(tmp_path)
    model = build_model(MedGLIPConfig(trunk=str(tmp_path)), seed=0, pretrained=False).eval()
    cost = {}
    for n in (1, 198):
        with FlopCounterMode(display=False) as counter:
            model(some_images(1, 480), some_phrases(n))
        cost[n] = counter.get_total_flops()
    assert cost[198] < 1.1 * cost[1]
