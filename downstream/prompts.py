"""Samples → prompts → batches. One layout serves training and prediction.

A prompt is the model's chat template around: images, K region slots, what was said before, the question (see
`Base.encode`). Routes `none`, `overlay` and `tokens` have the same K slots, so the same length; a slot without a region
has attention 0 and takes no position, so that it changes nothing. With `names` each region's slot is followed by its
name and size in words. Route `text` writes the regions out instead, and route `crop` has pictures of them, so both are
longer. Of several images each has its own region slots, behind its number.

A prompt that is longer than the model's context loses regions, the least important first, then the oldest turns of the
conversation, as a whole: nothing is cut in two.
Dimension key: B prompts, T tokens (left-padded), K region slots, A answer tokens (end token included).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bridges.budget import Dropped, most_that_fit
from bridges.routes import NO_IMAGE, Extent, empty, extent_of, importance, most_important, region_name, regions_as_text
from downstream.base import Base, stack_images
from downstream.pictures import NAMES, colours_of, crops, overlaid
from downstream.samples import ReportSample
from grounding.labels import LabelTree
from grounding.types import NOT_FOUND_LEVEL, RegionTokens, stack_region_tokens

REPORT_QUESTION = "Write a report."
LIST_QUESTION = "List the regions."
IGNORED = -100  # label of tokens that the loss leaves out
PICTURED = ("overlay", "crop")  # routes that show regions as pictures


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. `slots`: what is put into its K region slots (a batch of one; K = 0 for route `text`).
    `regions`: what the prompt tells, by any route, so that `[rK]` is its K-th region; of each `image_of_slot` has the
    number of the image (NO_IMAGE for none). `token_types` and `images`: see `downstream.base.Encoded`; the former with
    the answer's tokens. `dropped`: what was left out, since the prompt was too long."""

    input_ids: list[int]
    attention_mask: list[int]
    answer_ids: list[int]
    slots: RegionTokens
    regions: RegionTokens
    image_of_slot: list[int]
    token_types: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: Dropped = field(default_factory=Dropped)


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


@dataclass(frozen=True)
class _Told:
    """The regions of a prompt and how they are spoken of."""

    slots: RegionTokens
    image_of_slot: list[int]
    tree: LabelTree
    named: frozenset[str]
    extents: list[Extent]  # one an image
    presence: bool
    names: bool

    def name(self, i: int) -> str:
        extent = extent_of(self.extents, self.image_of_slot[i])
        return region_name(self.slots, i, self.tree, extent, self.presence)

    @property
    def shown(self) -> list[int]:
        """The image of each slot, NO_IMAGE where it holds no region with a box."""
        found = (self.slots.valid & (self.slots.levels != NOT_FOUND_LEVEL))[0].tolist()
        return [number if real else NO_IMAGE for number, real in zip(self.image_of_slot, found, strict=True)]

    def only(self, n: int) -> "_Told":
        """With the n most important regions."""
        slots, image_of_slot = most_important(self.slots, self.image_of_slot, n, self.named, self.tree)
        return replace(self, slots=slots, image_of_slot=image_of_slot)


def build_prompt(
    base: Base,
    question: str,
    slots: RegionTokens,
    route: str,
    tree: LabelTree,
    extent_mm: Extent | list[Extent] = None,
    answer: str | None = None,
    max_answer: int = 128,
    images: Sequence[np.ndarray] = (),
    names: bool = False,
    *,
    named: Iterable[str] = (),
    presence: bool = False,
    image_of_slot: Sequence[int] | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """Tokenise one question about one image whose picked regions are `slots`, a batch of one (see `routes.pick`), or
    about several, with the image of each slot and a list of extents (see `routes.pick_study`).

    `images`: uint8 (H, W) or (H, W, 3), as they are, one or several; only the embedded model's may be left out, and
    only where the route draws nothing. `named`: the labels that the question names; their regions are the last to be
    left out. `presence`: see `routes.region_name`. `history`: earlier questions and answers, the oldest first.
    Without `answer`, the model's context keeps room for one of `max_answer` tokens.
    Raises ValueError for an empty question, an answer of more than `max_answer` tokens with its end token, a route that
    draws without images, and a prompt that is too long for the model without any region.
    """
    if not question.strip():
        raise ValueError("empty question; ask something about the image")
    if route in PICTURED and not images:
        raise ValueError(f"route {route!r} shows regions as pictures; give the image, not what a model reads of it")
    # The model reads answers without surrounding blanks, so that is how they are trained.
    answer_ids = [] if answer is None else _answer_within(base, answer, max_answer)
    slots = empty(slots) if route == "none" else slots
    numbers = [0] * slots.valid.shape[1] if image_of_slot is None else list(image_of_slot)
    extents = extent_mm if isinstance(extent_mm, list) else [extent_mm] * max(1, len(images))
    told = _Told(slots, numbers, tree, frozenset(named), extents, presence, names)

    def build(regions: int, turns: int) -> Prompt:
        some = told if regions == count else told.only(regions)
        return _compose(base, question, some, route, answer_ids, images, history[len(history) - turns :])

    count = int(slots.valid.sum())
    prompt = build(count, len(history))
    room = _room(base, 0 if answer_ids else max_answer)
    if room is None or sum(prompt.attention_mask) <= room:
        return prompt
    costly = count if names or route not in ("none", "overlay") else 0  # masked slots cost nothing

    def length(regions: int, turns: int) -> int:
        return sum(build(regions if costly else count, turns).attention_mask)

    fits = most_that_fit(length, costly, len(history), room)
    if fits is None:
        raise ValueError(
            f"the question and its image take {length(0, 0)} tokens, the model's context has room for {room} beside "
            f"the answer; ask a shorter question, or take a base model with a longer context: {question[:60]!r}"
        )
    regions, turns = fits[0] if costly else count, fits[1]
    return replace(build(regions, turns), dropped=Dropped(1, count - regions, len(history) - turns))


def _room(base: Base, kept_free: int) -> int | None:
    """Tokens that a prompt may have; None for a model without a limit."""
    context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - kept_free


def _compose(
    base: Base,
    question: str,
    told: _Told,
    route: str,
    answer_ids: list[int],
    images: Sequence[np.ndarray],
    history: Sequence[tuple[str, str]],
) -> Prompt:
    text, slots, count = _conversation(question, history, base), told.slots, max(1, len(images))
    if route == "text":
        written = regions_as_text(told.slots, told.tree, told.extents, told.presence, told.image_of_slot)
        text = f"Regions: {_without_special(written, base)}. {text}" if written else text
        slots = _no_slots(slots)
    else:
        words, images = _shown(told, route, images, base)
        slots = slots if route == "tokens" else empty(slots)
        text = _laid_out(words, told.image_of_slot, count, base) + text
    encoded = base.encode(text, 0, images)
    input_ids = encoded.input_ids
    mask = [1] * (len(input_ids) + len(answer_ids))
    if slots.valid.shape[1]:
        places = [t for t, token in enumerate(input_ids) if token == base.region_token_id]
        for t, valid in zip(places, slots.valid[0].tolist(), strict=True):
            mask[t] = int(valid)
    types = {name: row + [base.answer_type] * len(answer_ids) for name, row in encoded.token_types.items()}
    return Prompt(input_ids + answer_ids, mask, answer_ids, slots, told.slots, told.shown, types, encoded.images)


def _conversation(question: str, history: Sequence[tuple[str, str]], base: Base) -> str:
    """What was asked and answered before, and the question."""
    turns = [f"Question: {asked.strip()} Answer: {said.strip()}" for asked, said in history]
    return _without_special("\n".join([*turns, f"Question: {question.strip()}" if turns else question]), base)


def _shown(told: _Told, route: str, images: Sequence[np.ndarray], base: Base) -> tuple[list[str], Sequence[np.ndarray]]:
    """What is written behind each slot, and the pictures with the regions in them."""
    words = [told.name(i) if valid and told.names else "" for i, valid in enumerate(told.slots.valid[0].tolist())]
    if route in PICTURED:
        boxes, numbers = told.slots.boxes[0].cpu().numpy(), told.shown
        if route == "overlay":
            colours = colours_of(told.slots.labels[0])
            images = overlaid(images, boxes, colours, numbers)
            legend = {i: f"{NAMES[colours[i]]} r{i}" for i, number in enumerate(numbers) if number != NO_IMAGE}
        else:
            chosen, cut = crops(images, boxes, numbers, importance(told.slots, told.named, told.tree))
            legend = {i: f"image {len(images) + place}" for place, i in enumerate(chosen, 1)}
            images = [*images, *cut]
        words = [f"{legend[i]}: {word}" if word and i in legend else word for i, word in enumerate(words)]
    return [_without_special(word, base) for word in words], images


def _laid_out(words: Sequence[str], image_of_slot: Sequence[int], images: int, base: Base) -> str:
    """The placeholders of all slots, each with its words behind it; of several images those of each behind its number,
    and free slots last."""
    slots = [base.region_token + (f"{word}; " if word else "") for word in words]
    if images == 1:
        return "".join(slots)
    numbers = [*range(images), NO_IMAGE]
    heads = [*(f"Image {number + 1}: " for number in range(images)), ""]
    groups = ["".join(s for s, own in zip(slots, image_of_slot, strict=True) if own == number) for number in numbers]
    return "".join(head + group for head, group in zip(heads, groups, strict=True))


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


def tokens_of(base: Base, answer: str) -> list[int]:
    """Tokens of an answer as a prompt ends with it: stripped, with the end token."""
    return base.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]


def _answer_within(base: Base, answer: str, max_answer: int) -> list[int]:
    ids = tokens_of(base, answer)
    if len(ids) > max_answer:
        raise ValueError(f"answer of {len(ids)} tokens, more than max_answer={max_answer}: {answer.strip()[:60]!r}")
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
