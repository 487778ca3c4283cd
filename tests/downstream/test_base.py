"""What a base model may lack, how its LoRA is made, and what is said where it cannot be used."""

import json
import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from bridges.region_vlm import BridgeConfig, CheckpointError, RegionVLM, read_checkpoint
from downstream.base import BaseModelError, reserve_region_token
from downstream.embedded import load_base, tiny_base
from downstream.export import main as export
from downstream.predict import load_answerer
from downstream.train import step_loss
from tests.bridges.families import save_checkpoint
from tests.bridges.test_families import WIDE, batch_of, bridge, close, logits_of, prompts, slots, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_each_kind_of_lora_trains_saves_and_merges(kind, folder, tmp_path):
    base = load_base(str(folder))
    vlm = bridge(base, lora_kind=kind, lora_r=16, lora_targets=("q_proj", "v_proj"), lora_layers=1)
    lora = {name: p for name, p in vlm.named_parameters() if "lora_" in name}
    assert {name.split("layers.")[1].split(".lora")[0] for name in lora} == {"1.self_attn.q_proj", "1.self_attn.v_proj"}
    assert any("magnitude" in name for name in lora) == (kind == "dora")
    scales = {module.scaling["default"] for module in vlm.modules() if isinstance(module, LoraLayer)}
    assert scales == {2.0}  # rslora's falls with the root of the rank, and is lora's at 16
    for name, parameter in lora.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    rows = prompts(base)
    before = logits_of(vlm.eval(), base, rows)
    vlm.save(tmp_path / "bridge", {})
    other = load_base(str(folder))
    loaded = RegionVLM.load(tmp_path / "bridge", other.model, other.fingerprint)
    close(before, logits_of(loaded, other, rows))
    loaded.merge()
    close(before, logits_of(loaded, other, rows), 1e-4)


def test_gradient_checkpointing_changes_no_gradient(folder):
    grads = []
    for checkpointing in (False, True):
        base = load_base(str(folder))
        vlm = trained(base).train()
        if checkpointing:
            vlm.gradient_checkpointing()
        step_loss(vlm, batch_of(base, prompts(base, answers=("left", "no")))).backward()
        grads.append([p.grad for p in vlm.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_target_modules_that_are_not_there_are_named_with_those_that_are(base):
    with pytest.raises(ValueError, match="lora_targets=qkv: no such layer; there are down_proj, gate_proj,") as error:
        bridge(base, lora_targets=("qkv",))
    one_line(error)
    with pytest.raises(ValueError, match="lora_kind='loha'; known: lora, rslora, dora"):
        bridge(base, lora_kind="loha")


def test_a_model_without_an_embedding_table_is_refused(folder):
    base = load_base(str(folder))
    base.model.set_input_embeddings(torch.nn.Sequential(base.model.get_input_embeddings()))
    with pytest.raises(ValueError, match="input embeddings of LlavaForConditionalGeneration cannot be found") as error:
        bridge(base)
    one_line(error)
    with pytest.raises(ValueError, match="cannot be found"):
        reserve_region_token("x", base.model, base.tokenizer)


def test_a_checkpoint_without_a_chat_template_is_refused(copied):
    for file in copied.glob("*.jinja"):
        file.unlink()
    with pytest.raises(BaseModelError, match="has no chat template; put its chat_template.jinja") as error:
        load_base(str(copied))
    assert str(copied) in one_line(error)


def test_a_template_that_shows_no_image_is_refused(copied):
    (copied / "chat_template.jinja").write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")
    with pytest.raises(BaseModelError, match="its chat template does not show the image token '<image>' once") as error:
        load_base(str(copied))
    one_line(error)


def test_what_is_no_image_text_to_text_model_is_refused(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(BaseModelError, match="cannot be loaded") as error:
            load_base(name)
        assert name in one_line(error)


def test_a_checkpoint_without_its_processor_is_refused(copied):
    (copied / "processor_config.json").unlink()
    with pytest.raises(BaseModelError, match="cannot be loaded") as error:
        load_base(str(copied))
    one_line(error)


def test_the_older_layout_of_the_hub_loads_and_is_exported(tmp_path):
    """Image and video settings in preprocessor_config.json, and no processor_config.json, as Qwen2.5-VL has them."""
    folder = save_checkpoint("qwen2_5_vl", tmp_path / "hub")
    now = load_base(str(folder)).encode("Where?", 2, [WIDE])
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "Qwen2_5_VLProcessor"}))
    (folder / "processor_config.json").unlink()
    base = load_base(str(folder))
    then = base.encode("Where?", 2, [WIDE])
    assert now.input_ids == then.input_ids and torch.equal(now.images["pixel_values"], then.images["pixel_values"])
    trained(base).save(tmp_path / "bridge", {})
    export(["--checkpoint", str(tmp_path / "bridge"), "--out", str(tmp_path / "merged")])
    again = load_base(str(tmp_path / "merged")).encode("Where?", 2, [WIDE])
    assert again.input_ids == now.input_ids
    kept = [(folder / "preprocessor_config.json").read_text() for folder in (folder, tmp_path / "merged")]
    assert kept[0] == kept[1]


def test_four_bits_want_a_gpu_and_bitsandbytes(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BaseModelError, match="need a GPU and the package bitsandbytes.*four_bit=false") as error:
        load_base(str(folder), four_bit=True)
    one_line(error)
    with pytest.raises(BaseModelError, match="has no 4-bit weights"):
        load_base("tiny", four_bit=True)


def test_an_adapter_for_another_base_is_refused_by_its_name(base, copied, tmp_path):
    trained(load_base(base.name)).save(tmp_path / "bridge", {"route": "tokens", "k": 4, "max_answer": 8})
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(copied)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(copied)
    other = load_base(str(copied))
    with pytest.raises(CheckpointError, match="trained on base model") as error:
        RegionVLM.load(tmp_path / "bridge", other.model, other.fingerprint)
    assert base.name in one_line(error) and base.fingerprint in str(error.value)
    file = tmp_path / "bridge" / "bridge.json"
    saved = json.loads(file.read_text())
    saved["config"]["region_token_id"] = 5
    file.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="trained with region token 5"):
        load_answerer(tmp_path / "bridge")


@pytest.mark.parametrize("name", ["features", "label_vectors", "boxes", "scores"])
def test_regions_that_are_not_finite_are_named(name, base):
    tokens = slots(3, 4)
    getattr(tokens, name)[0, 2] = torch.nan
    with pytest.raises(ValueError, match=rf"region 2 \(brain\) of prompt 0 in the batch: its {name} hold NaN") as error:
        bridge(tiny_base()).projector(tokens)
    one_line(error)


def test_checkpoints_from_before_there_was_a_choice_still_load(tmp_path):
    base = tiny_base()
    vlm = bridge(base)
    vlm.save(tmp_path / "bridge", {})
    file = tmp_path / "bridge" / "bridge.json"
    saved = json.loads(file.read_text())
    for name in ("lora_kind", "lora_targets", "four_bit"):
        del saved["config"][name]
    file.write_text(json.dumps(saved))
    config, _ = read_checkpoint(tmp_path / "bridge")
    assert config == vlm.config and isinstance(config, BridgeConfig)
    again = tiny_base()
    RegionVLM.load(tmp_path / "bridge", again.model, again.fingerprint)


def test_an_export_needs_a_checkpoint_and_whole_weights(base, tmp_path):
    with pytest.raises(SystemExit, match="downstream.export: .*not a bridge checkpoint"):
        export(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    trained(load_base(base.name)).save(tmp_path / "bridge", {})
    file = tmp_path / "bridge" / "bridge.json"
    file.write_text(file.read_text().replace('"four_bit": false', '"four_bit": true'))
    with pytest.raises(SystemExit, match="does not merge exactly into 4-bit weights"):
        export(["--checkpoint", str(tmp_path / "bridge"), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge"]
