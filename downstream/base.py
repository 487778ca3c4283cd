"""A vision-language model as the bridge needs it: how it reads text, region slots and images of any size.

One path serves every family of `AutoModelForImageTextToText`: its own processor and chat template make the prompt, in
which image placeholders are followed by region placeholders and the text. The embedded model has neither: its image is
letterboxed to a square and stands for a fixed number of tokens.
Dimension key: H, W height and width of an image, S side of the letterbox, T tokens.
"""

import importlib.util
import inspect
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import prepare_model_for_kbit_training
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file

from bridges.region_vlm import input_embeddings, weights_fingerprint
from grounding.images import to_pixel_values

log = logging.getLogger(__name__)

# Tokens that a tokenizer reserves and ordinary text never uses, so that no embedding table is resized.
REGION_TOKENS = ("<reponame>", "<|reserved_special_token_0|>", "<unused0>", "<|box_start|>")
RESERVED = re.compile(r"<\|?(reserved|unused|extra|placeholder)[^<>]*>")
ADDED_REGION_TOKEN = "<region>"
# Checkpoints of these families come without a chat template: they were trained on the bare text.
PLAIN_TEMPLATES = {
    "paligemma": "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
}
# The token type of an answer; elsewhere it is 0, as for all text.
ANSWER_TYPES = {"paligemma": 1}
NOT_IMAGES = ("input_ids", "attention_mask", "labels")  # what else a processor returns and a model's forward takes
# What a checkpoint has beside weights and `processor_config.json`, and an export keeps as it is.
SIDE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json")


class BaseModelError(RuntimeError):
    """A base model that cannot be had; the message says which and the remedy."""


@dataclass(frozen=True)
class Encoded:
    """One prompt without its answer. `token_types`: name → T values (`token_type_ids`, `mm_token_type_ids`).
    `images`: what the model's forward takes for the images (`pixel_values`, `image_grid_thw` …), a batch of one."""

    input_ids: list[int]
    token_types: dict[str, list[int]]
    images: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A language-and-vision model as the bridge needs it. `fingerprint` tells two bases of one name apart.

    With a `processor`, images go through it, and `listed` says whether `template` takes a message as a list of parts
    (else as one string). Without, `image_tokens` placeholders stand for one image of `image_size` × `image_size`
    pixels.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_token: str
    region_token: str
    fingerprint: str
    image_tokens: int = 0
    image_size: int = 0
    processor: ProcessorMixin | None = None
    template: str | None = None
    listed: bool = False

    @property
    def region_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.region_token)

    @property
    def answer_type(self) -> int:
        """The token type of an answer's tokens."""
        return ANSWER_TYPES.get(self.model.config.model_type, 0)

    def encode(self, text: str, regions: int, images: Sequence[np.ndarray] = ()) -> Encoded:
        """A user's turn, up to where the answer begins: `images`, then `regions` placeholders, then `text`.

        images: uint8 (H, W) or (H, W, 3), of any size. Without a processor they may be left out: their placeholders
        are there all the same, and `pixel_values` are the caller's.
        """
        text = self.region_token * regions + text
        if self.processor is None:
            return self._letterboxed(text, images)
        rendered = _render(self.tokenizer, self.template, self.listed, self.image_token, len(images), text)
        bos = self.tokenizer.bos_token
        out = self.processor(
            images=[[Image.fromarray(image).convert("RGB") for image in images]] if images else None,
            text=[rendered],
            add_special_tokens=not (bos and rendered.startswith(bos)),  # as the processors' own chat templates do
            return_tensors="pt",
        )
        accepted = inspect.signature(self.model.forward).parameters
        named = {name: out[name] for name in out if name in accepted and name not in NOT_IMAGES}
        types = {name: value[0].tolist() for name, value in named.items() if name.endswith("token_type_ids")}
        tensors = {name: value for name, value in named.items() if name not in types}
        return Encoded(out["input_ids"][0].tolist(), types, tensors)

    def _letterboxed(self, text: str, images: Sequence[np.ndarray]) -> Encoded:
        content = self.image_token * self.image_tokens * max(1, len(images)) + text
        chat = [{"role": "user", "content": content}]
        rendered = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        pixels = [to_pixel_values(image, self.image_size)[0] for image in images]
        return Encoded(ids, {}, {"pixel_values": torch.stack(pixels)} if pixels else {})

    def save_processor(self, folder: str | Path) -> None:
        """Write tokenizer, image processor and chat template beside a model saved in `folder`; the video part, which
        is not loaded here, is copied."""
        if self.processor is None:
            self.tokenizer.save_pretrained(folder)
            return
        self.processor.save_pretrained(folder)
        for name in SIDE_FILES:
            if (source := _file(self.name, name)) is not None:
                shutil.copyfile(source, Path(folder) / name)
        source, target = _file(self.name, "processor_config.json"), Path(folder) / "processor_config.json"
        video = json.loads(Path(source).read_text()).get("video_processor") if source else None
        if video is not None:
            target.write_text(json.dumps(json.loads(target.read_text()) | {"video_processor": video}, indent=2) + "\n")


def stack_images(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The `images` of several prompts as one batch: one after the other, padded at the end with zeros where their
    sizes differ (tiles of an image, and their pixels), as the families' own processors do."""
    return {name: _padded([part[name] for part in parts]) for name in parts[0]}


def _padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    dims = range(tensors[0].ndim - 1, 0, -1)  # torch wants the last dimension first
    longest = {d: max(t.shape[d] for t in tensors) for d in dims}
    return torch.cat(
        [torch.nn.functional.pad(t, [p for d in dims for p in (0, longest[d] - t.shape[d])]) for t in tensors]
    )


def load_family(name: str, config: PreTrainedConfig, four_bit: bool = False) -> Base:
    """Load a model of any family under `name`, a folder or hub id with the configuration `config`, in float32 (or, with
    `four_bit`, its linear layers in 4 bits and the rest in bfloat16: QLoRA), with its family's processor.

    Raises BaseModelError where model, processor or chat template cannot be had, or the input embeddings not be found.
    """
    weights = four_bit_weights(name) if four_bit else {"dtype": torch.float32}
    try:
        processor = load_processor(name, config)
        model = AutoModelForImageTextToText.from_pretrained(name, **weights)
    except (OSError, ValueError, ImportError) as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise BaseModelError(f"base model {name!r} cannot be loaded ({reason}); use 'embedded' or a folder") from error
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    fingerprint, tokenizer = weights_fingerprint(model), processor.tokenizer
    try:
        region_token = reserve_region_token(name, model, tokenizer)
    except ValueError as error:
        raise BaseModelError(f"base model {name!r}: {error}") from error
    image_token = processor.image_token
    template = _template(name, processor, config.model_type)
    listed = _takes_parts(name, tokenizer, template, image_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.generation_config = _greedy(model.generation_config, tokenizer)
    return Base(
        name=name,
        model=model.eval(),
        tokenizer=tokenizer,
        image_token=image_token,
        region_token=region_token,
        fingerprint=fingerprint,
        processor=processor,
        template=template,
        listed=listed,
    )


def load_processor(name: str, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of a checkpoint, for images and text alone. Raises ValueError for a family without one."""
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"transformers has no processor for model type {config.model_type!r}")
    return image_only(PROCESSOR_MAPPING[type(config)]).from_pretrained(name)


def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`processor_class` without its video part, which wants torchvision and more."""
    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]
    if attributes == processor_class.get_attributes():
        return processor_class

    class ImageOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return attributes

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any):
            return super().from_args_and_dict(args, {**processor_dict, "video_processor": None}, **kwargs)

    ImageOnly.__name__ = processor_class.__name__  # it is written into processor_config.json
    return ImageOnly


def four_bit_weights(name: str) -> dict[str, Any]:
    """What `from_pretrained` takes for 4-bit weights (Dettmers et al., QLoRA, NeurIPS 2023: NF4, double quantisation).

    Raises BaseModelError without a GPU or bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise BaseModelError(
            f"base model {name!r}: 4-bit weights (QLoRA) need a GPU and the package bitsandbytes; "
            "install them, or set four_bit=false"
        )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = torch.cuda.current_device()
    return {"quantization_config": quantised, "dtype": torch.bfloat16, "device_map": {"": device}}


def reserve_region_token(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that stands for a region: one that the tokenizer reserves, else an added one, whose row in the
    embedding table is spare where the table is larger than the vocabulary, else one more. A region takes the row's
    place, so it is never trained. Raises ValueError where the input embeddings cannot be found."""
    known = tokenizer.get_vocab()
    reserved = [token for token in REGION_TOKENS if token in known]
    reserved += sorted(token for token in known if RESERVED.fullmatch(token))
    token = reserved[0] if reserved else ADDED_REGION_TOKEN
    # Also where it is known: as a special token it is never split, nor joined with its neighbours.
    tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)
    rows, index = len(input_embeddings(model).weight), tokenizer.convert_tokens_to_ids(token)
    if index >= rows:
        log.warning("base model %r reserves no token: %r added, and one row to its embeddings", name, token)
        model.resize_token_embeddings(index + 1, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[rows:] = 0.0  # not random: two loads give the same model
    return token


def _template(name: str, processor: ProcessorMixin, model_type: str) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template or PLAIN_TEMPLATES.get(model_type)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise BaseModelError(f"base model {name!r} has no chat template; put its chat_template.jinja into its folder")
    return template


def _takes_parts(name: str, tokenizer: PreTrainedTokenizerBase, template: str, image_token: str) -> bool:
    """Whether `template` takes a message as a list of parts; those of text models take one string."""
    for listed in (True, False):
        try:
            rendered = _render(tokenizer, template, listed, image_token, 1, "question")
        except Exception:  # a template raises whatever its author thought of
            continue
        if rendered.count(image_token) == 1 and rendered.count("question") == 1:
            return listed
    raise BaseModelError(f"base model {name!r}: its chat template does not show the image token {image_token!r} once")


def _render(tokenizer: PreTrainedTokenizerBase, template: str, listed: bool, image_token: str, images: int, text: str):
    content: Any = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    if not listed:
        content = f"{image_token}\n" * images + text
    chat = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)


def _greedy(saved: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Without the penalties and the sampling that a checkpoint may come with; an answer may end as it was trained."""
    ends = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    return GenerationConfig(bos_token_id=saved.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def _file(name: str, file: str) -> str | None:
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
