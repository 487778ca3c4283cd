"""Text encoders of every kind, from tiny random checkpoints saved as a hub's would be."""

import json
import warnings

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from grounding.text import PhraseEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "left", "right", "lung", "lesion", "of", "the", "opacity"]
SMALL = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {
    "intermediate_size": 32,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TOWER = SMALL | {"projection_dim": 24, "projection_size": 24}
POOLING = {
    "bert": "mean",
    "roberta": "mean",
    "llama": "last",
    "t5": "mean",
    "t5_encoder": "mean",
    "clip": "features",
    "clip_text": "pooler",
    "siglip": "features",
}


def text_model(kind: str) -> transformers.PreTrainedModel:
    t = transformers
    if kind == "bert":
        return t.BertModel(t.BertConfig(**SMALL))
    if kind == "roberta":
        return t.RobertaModel(t.RobertaConfig(**SMALL | {"pad_token_id": 1}))
    if kind == "llama":
        return t.LlamaModel(t.LlamaConfig(**SMALL))
    if kind.startswith("t5"):
        config = t.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return t.T5ForConditionalGeneration(config) if kind == "t5" else t.T5EncoderModel(config)
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 32, "patch_size": 16}
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=TOWER, vision_config=vision, projection_dim=24))
    if kind == "clip_text":
        return t.CLIPTextModel(t.CLIPTextConfig(**TOWER))
    return t.SiglipModel(t.SiglipConfig(text_config=TOWER, vision_config=vision))


def tokenizer(limit: int | None = 12) -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    said = {} if limit is None else {"model_max_length": limit}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **said
    )


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGLIP_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    text_model(request.param).save_pretrained(tmp_path / request.param)
    tokenizer().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def only(*kinds):
    return pytest.mark.parametrize("folder", kinds, indirect=True)


@only(*POOLING)
def test_a_phrase_has_one_vector_of_unit_length_from_any_encoder(folder):
    encoder = PhraseEncoder(str(folder))
    batch = encoder.encode(["left lung", "opacity of the right lung", "lesion"])
    assert encoder.pooling == POOLING[folder.name]
    assert batch.vectors.dtype == torch.float32 and batch.vectors.norm(dim=-1).allclose(torch.ones(3))
    assert encoder.width == batch.vectors.shape[1] == (24 if encoder.pooling == "features" else 16)
    assert (batch.vectors @ batch.vectors.T).fill_diagonal_(0).max() < 0.9999  # phrases are told apart
    again = PhraseEncoder(str(folder))
    again._embed = None  # a second run must not need the model
    assert torch.equal(again.encode(["lesion"]).vectors[0], batch.vectors[2]) and again.width == encoder.width
    assert encoder.encode([]).vectors.shape == (0, encoder.width)


@only("clip", "siglip")
@torch.no_grad()
def test_image_text_models_give_the_vector_they_compare_with_images(folder):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    padding = {"padding": "max_length", "max_length": 12} if folder.name == "siglip" else {}
    encoded = tokenizer()(["left lung"], return_tensors="pt", **padding)
    pixels = torch.rand(1, 3, 32, 32)
    given = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    expected = model(**given, pixel_values=pixels).text_embeds[0]
    ours = PhraseEncoder(str(folder)).encode(["left lung"]).vectors[0]
    assert (ours - expected / expected.norm()).abs().max() < 1e-5


@only("llama")
@torch.no_grad()
def test_a_causal_models_vector_comes_from_the_token_that_has_read_it_all(folder):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    states = model(tokenizer()(["left lung"], return_tensors="pt")["input_ids"]).last_hidden_state[0, -1]
    assert (PhraseEncoder(str(folder)).encode(["left lung"]).vectors[0] - states / states.norm()).abs().max() < 1e-5


@only("bert")
def test_the_pooling_that_the_folder_names_is_used_and_cached_apart(folder):
    mean = PhraseEncoder(str(folder))
    (folder / "1_Pooling").mkdir()
    said = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    first = PhraseEncoder(str(folder))
    assert (mean.pooling, first.pooling) == ("mean", "cls")
    assert not torch.equal(mean.encode(["left lung"]).vectors, first.encode(["left lung"]).vectors)


@only("bert", "roberta", "siglip", "t5")
def test_a_phrase_that_is_cut_is_said_once(folder):
    tokenizer(limit=12 if folder.name == "t5" else None).save_pretrained(folder)  # else the positions are the limit
    encoder, long = PhraseEncoder(str(folder)), "opacity of the left lung " * 9
    with pytest.warns(UserWarning, match=r"phrase 'opacity.*has 47 tokens, the text encoder reads 1[0-2]"):
        encoder.encode([long, "left lung"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([long, "right lung", "left lesion of the right lung"])


@only("bert")
def test_other_weights_have_another_cache(folder):
    before = PhraseEncoder(str(folder))
    vectors = before.encode(["left lung"]).vectors
    torch.manual_seed(1)
    text_model("bert").save_pretrained(folder)
    after = PhraseEncoder(str(folder))
    assert before.hash != after.hash
    assert not torch.equal(vectors, after.encode(["left lung"]).vectors)


def test_an_encoder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OSError, match="text encoder '.*nothing' cannot be read") as error:
        PhraseEncoder(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)
