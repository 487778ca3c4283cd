"""Samples → prompts → batches. One layout serves training and prediction.

A prompt is the model's chat template around: images, K region slots, the question (see `Base.encode`). Routes `none`
and `tokens` have the same K slots, so the same length; a slot without a region has attention 0 and takes no position,
so that it changes nothing. With `names` each region's token is followed by its name and size in words. Route `text`
writes the regions out instead.
Dimension key: B prompts, T tokens (left-padded), K region slots, A answer tokens (end token included).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bridges.routes import empty, region_name, regions_as_text
from downstream.base import Base, stack_images
from downstream.samples import ReportSample
from grounding.labels import LabelTree
from grounding.types import RegionTokens, stack_region_tokens

REPORT_QUESTION = "Write a report."
LIST_QUESTION = "List the regions."
IGNORED = -100  # label of tokens that the loss leaves out


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. `slots`: its K region slots (a batch of one; K = 0 for route `text`). `token_types` and
    `images`: see `downstream.base.Encoded`; the former with the answer's tokens."""

    input_ids: list[int]
    attention_mask: list[int]
    answer_ids: list[int]
    slots: RegionTokens
    token_types: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """`inputs`: `input_ids`, `attention_mask`, `position_ids` (B, T) int64, and what the model takes beside them: token
    types (B, T), `pixel_values` … of the images. `keep` (A,): the positions that predict answer tokens, and `labels`
    (B, A) int64 what they should, IGNORED where a row has none; A = 0 without answers. `part` (B, A): which of a row's
    questions a label belongs to (see `downstream.packing`). `slots`: (B, K) regions."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    slots: RegionTokens
    keep: torch.Tensor
    part: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        slots = replace(self.slots, **{name: getattr(self.slots, name).to(device) for name in RegionTokens.TENSORS})
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), slots, self.keep.to(device), self.part.to(device))


def report_text(report: ReportSample) -> str | None:
    """The answer that a report trains: "Findings: … Impression: …" less an absent section; None for neither."""
    parts = [("Findings", report.findings), ("Impression", report.impression)]
    return " ".join(f"{name}: {text}" for name, text in parts if text) or None


def build_prompt(
    base: Base,
    question: str,
    slots: RegionTokens,
    route: str,
    tree: LabelTree,
    extent_mm: tuple[float, float] | None = None,
    answer: str | None = None,
    max_answer: int = 128,
    images: Sequence[np.ndarray] = (),
    names: bool = False,
) -> Prompt:
    """Tokenise one question about one image whose picked regions are `slots`, a batch of one (see `routes.pick`).

    `images`: uint8 (H, W) or (H, W, 3), as they are, one or several; only the embedded model's may be left out.
    Raises ValueError for an empty question, or an answer of more than `max_answer` tokens with its end token.
    """
    if not question.strip():
        raise ValueError("empty question; ask something about the image")
    text = _without_special(question, base)
    if route == "text":
        written = regions_as_text(slots, tree, extent_mm)
        text = f"Regions: {_without_special(written, base)}. {text}" if written else text
        slots = _no_slots(slots)
    elif route == "none":
        slots = empty(slots)
    k = slots.valid.shape[1]
    if names and route != "text":
        encoded = base.encode(_named(slots, base, tree, extent_mm) + text, 0, images)
    else:
        encoded = base.encode(text, k, images)
    input_ids = encoded.input_ids
    # The model reads answers without surrounding blanks, so that is how they are trained.
    answer_ids = [] if answer is None else _answer_ids(base, answer.strip(), max_answer)
    mask = [1] * (len(input_ids) + len(answer_ids))
    if k:
        places = [t for t, token in enumerate(input_ids) if token == base.region_token_id]
        for t, valid in zip(places, slots.valid[0].tolist(), strict=True):
            mask[t] = int(valid)
    types = {name: row + [base.answer_type] * len(answer_ids) for name, row in encoded.token_types.items()}
    return Prompt(input_ids + answer_ids, mask, answer_ids, slots, types, encoded.images)


def _named(slots: RegionTokens, base: Base, tree: LabelTree, extent_mm: tuple[float, float] | None) -> str:
    """The placeholders of all slots, each region's with its name behind it."""
    text = ""
    for i, valid in enumerate(slots.valid[0].tolist()):
        name = _without_special(region_name(slots, i, tree, extent_mm), base) if valid else ""
        text += base.region_token + (f"{name}; " if name else "")
    return text


def collate(prompts: Sequence[Prompt], pad_token_id: int) -> Batch:
    """Left-pad prompts to one length."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    answer = max(len(prompt.answer_ids) for prompt in prompts)

    def left(rows: Sequence[list[int]], value: int, length: int) -> torch.Tensor:
        return torch.tensor([[value] * (length - len(row)) + row for row in rows], dtype=torch.long)

    attention_mask = left([prompt.attention_mask for prompt in prompts], 0, longest)
    types = {
        name: left([prompt.token_types[name] for prompt in prompts], 0, longest) for name in prompts[0].token_types
    }
    labels = left([prompt.answer_ids for prompt in prompts], IGNORED, answer)
    return Batch(
        inputs={
            "input_ids": left([prompt.input_ids for prompt in prompts], pad_token_id, longest),
            "attention_mask": attention_mask,
            "position_ids": positions(attention_mask),
            **types,
            **stack_images([prompt.images for prompt in prompts]),
        },
        labels=labels,
        slots=stack_region_tokens([prompt.slots for prompt in prompts]),
        keep=torch.arange(longest - answer - 1, longest - 1),
        part=torch.zeros_like(labels),
    )


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) mask → (B, T) position ids that count attended tokens only, as `generate` of transformers does."""
    return (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def _answer_ids(base: Base, answer: str, max_answer: int) -> list[int]:
    ids = base.tokenizer(answer, add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]
    if len(ids) > max_answer:
        raise ValueError(f"answer of {len(ids)} tokens, more than max_answer={max_answer}: {answer[:60]!r}")
    return ids


def _without_special(text: str, base: Base) -> str:
    """`text` without strings that the tokenizer would read as control tokens or placeholders."""
    for token in base.tokenizer.added_tokens_decoder.values():
        if token.content.strip():  # Gemma's runs of blanks and line ends are tokens of their own
            text = text.replace(token.content, " ")
    return text.strip()


def _no_slots(slots: RegionTokens) -> RegionTokens:
    tensors = {name: getattr(slots, name)[:, :0] for name in RegionTokens.TENSORS}
    return RegionTokens(**tensors, labels=[[] for _ in slots.labels], queries=slots.queries)
