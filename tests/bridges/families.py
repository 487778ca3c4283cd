"""Tiny random checkpoints of the families of vision-language models: real configuration classes, processors and
tokenizers, made on the spot, in the layout of the hub. Images of 28 pixels a side (or tiles of it) give 4 or 16 tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    GemmaConfig,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from downstream.base import image_only

SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
LAYERS = {"num_hidden_layers": 2, "intermediate_size": 96, "initializer_range": 0.1}
TEXT = LAYERS | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = LAYERS | {"hidden_size": 32, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 7}


def turn(start: str, image: str, end: str, reply: str) -> str:
    """A chat template over lists of parts: `image` is what stands for an image."""
    part = f"{{{{ '{image}' if part['type'] == 'image' else part['text'] }}}}"
    body = f"{{% for part in message['content'] %}}{part}{{% endfor %}}"
    turns = f"{{% for message in messages %}}{start}{body}{end}{{% endfor %}}"
    return f"{turns}{{% if add_generation_prompt %}}{reply}{{% endif %}}"


VICUNA = turn("USER: ", r"<image>\n", " ", "ASSISTANT:")
CHATML = "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"
QWEN = turn(CHATML[0], "<|vision_start|><|image_pad|><|vision_end|>", *CHATML[1:])
ONE_STRING = "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"


@dataclass(frozen=True)
class Family:
    """`config` and `processor` make it for a tokenizer with `tokens`; `named` are those that the tokenizer knows by a
    name. `spare`: rows of the embedding table beyond the vocabulary. `region`: the token that a region should get."""

    config: Callable
    processor: Callable
    tokens: tuple[str, ...]
    template: str | None
    region: str
    named: dict[str, str] = field(default_factory=dict)
    spare: int = 0
    adds_bos: bool = False


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Bytes as text, and the family's tokens."""
    special = ["<pad>", "<s>", "</s>", *family.tokens]
    vocabulary = {token: k for k, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if family.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=family.named,
        chat_template=family.template,
    )


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write a random model of a family, its processor, and the settings of a video part, as checkpoints of the hub have
    them."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    processor = family.processor(tokenizer)
    processor.chat_template = family.template
    config = family.config(tokenizer, len(tokenizer) + family.spare)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():  # Gemma 3's image projector: no image would be seen through it
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    saved = folder / "processor_config.json"
    if "video_processor" in type(processor).__mro__[1].get_attributes():
        video = {"video_processor": {"video_processor_type": "AVideoProcessor"}}
        saved.write_text(json.dumps(json.loads(saved.read_text()) | video))
    return folder


def text_ids(tokenizer) -> dict:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llava(text_class):
    def config(tokenizer, rows):
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=text_class(**TEXT, **text_ids(tokenizer), vocab_size=rows),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
        )

    return config


def clip_images():
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)


def llava_processor(tokenizer):
    return LlavaProcessor(
        clip_images(),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next(tokenizer, rows):
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), vocab_size=rows),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )


def llava_next_processor(tokenizer):
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(images, tokenizer, patch_size=7, **strategy)


def llava_onevision(tokenizer, rows):
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer), vocab_size=rows),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def llava_onevision_processor(tokenizer):
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return image_only(LlavaOnevisionProcessor)(
        images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full"
    )


def qwen_ids(tokenizer):
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}


QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 7}
QWEN_VISION |= {"out_hidden_size": 64, "initializer_range": 0.1}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}


def qwen2_5_vl(tokenizer, rows):
    text = TEXT | text_ids(tokenizer) | {"vocab_size": rows, "rope_parameters": ROPE}
    vision = QWEN_VISION | {"window_size": 28, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))


def qwen3_vl(tokenizer, rows):
    text = TEXT | text_ids(tokenizer) | {"vocab_size": rows, "rope_parameters": ROPE, "head_dim": 16}
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))


def qwen_processor(processor_class):
    def make(tokenizer):
        size = {"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE}
        return image_only(processor_class)(Qwen2VLImageProcessorPil(patch_size=7, size=size), tokenizer)

    return make


def idefics(config_class):
    def config(tokenizer, rows):
        return config_class(
            vision_config=VISION,
            text_config=LlamaConfig(**TEXT, **text_ids(tokenizer), vocab_size=rows),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        )

    return config


def idefics_processor(processor_class, image_class):
    def make(tokenizer):
        images = image_class(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return image_only(processor_class)(images, tokenizer, image_seq_len=4, **VIDEO.get(processor_class, {}))

    return make


VIDEO = {SmolVLMProcessor: {"video_processor": None}}
TILES = tuple(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *TILES)
IDEFICS_TEMPLATE = turn("<s>User:", "<image>", "<end_of_utterance>\n", "Assistant:")


def paligemma(tokenizer, rows):
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, **text_ids(tokenizer), vocab_size=rows, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
        vocab_size=rows,
    )


def paligemma_processor(tokenizer):
    return PaliGemmaProcessor(SiglipImageProcessorPil(size=SQUARE, image_seq_length=16), tokenizer)


def internvl(tokenizer, rows):
    return InternVLConfig(
        vision_config=VISION,
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer), vocab_size=rows),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def internvl_processor(tokenizer):
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    return image_only(InternVLProcessor)(images, tokenizer, image_seq_length=4)


INTERNVL = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}


def gemma3(tokenizer, rows):
    text = TEXT | text_ids(tokenizer) | {"vocab_size": rows, "head_dim": 16, "query_pre_attn_scalar": 16}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA3.items()}
    return Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )


def gemma3_processor(tokenizer):
    return Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tokenizer, image_seq_length=4)


GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA3_TEMPLATE = turn("<s><start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n")

FAMILIES: dict[str, Family] = {
    "llava": Family(llava(LlamaConfig), llava_processor, ("<image>",), VICUNA, "<region>", spare=8, adds_bos=True),
    "llava_med": Family(llava(MistralConfig), llava_processor, ("<image>",), ONE_STRING, "<region>"),
    "llava_next": Family(llava_next, llava_next_processor, ("<image>", "<unk_7>"), VICUNA, "<region>", spare=1),
    "llava_onevision": Family(
        llava_onevision,
        llava_onevision_processor,
        ("<image>", "<video>", "<|extra_3|>"),
        turn(CHATML[0], r"<image>\n", *CHATML[1:]),
        "<|extra_3|>",
    ),
    "qwen2_5_vl": Family(
        qwen2_5_vl,
        qwen_processor(Qwen2_5_VLProcessor),
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|box_start|>"),
        QWEN,
        "<|box_start|>",
    ),
    "qwen3_vl": Family(
        qwen3_vl,
        qwen_processor(Qwen3VLProcessor),
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|box_start|>"),
        QWEN,
        "<|box_start|>",
    ),
    "smolvlm": Family(
        idefics(SmolVLMConfig),
        idefics_processor(SmolVLMProcessor, SmolVLMImageProcessorPil),
        (*IDEFICS, "<reponame>"),
        IDEFICS_TEMPLATE,
        "<reponame>",
    ),
    "idefics3": Family(
        idefics(Idefics3Config),
        idefics_processor(Idefics3Processor, Idefics3ImageProcessorPil),
        (*IDEFICS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        IDEFICS_TEMPLATE,
        "<|reserved_special_token_0|>",
    ),
    "paligemma": Family(
        paligemma, paligemma_processor, ("<image>", "<unused0>"), None, "<unused0>", {"image_token": "<image>"}
    ),
    "internvl": Family(
        internvl,
        internvl_processor,
        (*INTERNVL.values(), "<unused_9>"),
        turn(CHATML[0], r"<IMG_CONTEXT>\n", *CHATML[1:]),
        "<unused_9>",
        {f"{name}_token": token for name, token in INTERNVL.items()},
    ),
    "gemma3": Family(gemma3, gemma3_processor, (*GEMMA3.values(), "<unused0>"), GEMMA3_TEMPLATE, "<unused0>", GEMMA3),
}
