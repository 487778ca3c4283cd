"""Several questions about one image as one row: the image and its regions are read once for all of them.

A question sees the image, the regions and itself, never another question, and counts its positions from the end of what
all share; so each has the loss that it has in a row of its own.
Dimension key: B images, T tokens (left-padded), A positions kept.
"""

from collections.abc import Sequence

import torch

from downstream.base import stack_images
from downstream.prompts import IGNORED, Batch, Prompt
from grounding.types import stack_region_tokens

SHARED, PADDING = 0, -1


def pack(groups: Sequence[Sequence[Prompt]], pad_token_id: int) -> Batch:
    """One row a group of prompts about the same image with the same slots.

    `attention_mask` is (B, 1, T, T) float32, added to the attention scores: 0 where a token may look. Raises ValueError
    for prompts with token types: their models compute positions of their own.
    """
    if any(prompt.token_types for group in groups for prompt in group):
        raise ValueError("this model computes positions from its token types; train it with pack=1")
    rows = [_row(group, pad_token_id) for group in groups]
    longest = max(len(row["ids"]) for row in rows)

    def left(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in rows])

    part, labels = left("part", PADDING), left("labels", IGNORED)
    attended = left("attended", 0).bool()
    keep = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    return Batch(
        inputs={
            "input_ids": left("ids", pad_token_id),
            "attention_mask": _visible(part, attended),
            "position_ids": left("positions", 0),
            **stack_images([group[0].images for group in groups]),
        },
        labels=labels[:, keep + 1],
        slots=stack_region_tokens([group[0].slots for group in groups]),
        keep=keep,
        part=part[:, keep + 1],
    )


def _visible(part: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """(B, T) → (B, 1, T, T), 0 for earlier tokens that are shared or of the same question, else the least float; a
    token always sees itself, since a row of nothing would be NaN."""
    t = part.shape[1]
    near = (part[:, None, :] == SHARED) | (part[:, None, :] == part[:, :, None])
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    seen = (near & causal & attended[:, None, :]) | torch.eye(t, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _row(group: Sequence[Prompt], pad_token_id: int) -> dict[str, list[int]]:
    """One row's tokens: what is shared, then each prompt's rest."""
    shared = _shared(group)
    head = group[0].attention_mask[:shared]
    row = {
        "ids": list(group[0].input_ids[:shared]),
        "attended": list(head),
        "positions": _positions(head, 0),
        "part": [SHARED] * shared,
        "labels": [IGNORED] * shared,
    }
    for number, prompt in enumerate(group, 1):
        rest, mask = prompt.input_ids[shared:], prompt.attention_mask[shared:]
        row["ids"] += rest
        row["attended"] += mask
        row["positions"] += _positions(mask, sum(head))
        row["part"] += [number] * len(rest)
        row["labels"] += [IGNORED] * (len(rest) - len(prompt.answer_ids)) + prompt.answer_ids
    return row


def _shared(group: Sequence[Prompt]) -> int:
    """Length of the common beginning; the token that an answer is read from stays a question's own."""
    limit = min(len(prompt.input_ids) - len(prompt.answer_ids) - 1 for prompt in group)
    first = group[0]
    for t in range(limit):
        if any(p.input_ids[t] != first.input_ids[t] or p.attention_mask[t] != first.attention_mask[t] for p in group):
            return t
    return limit


def _positions(mask: Sequence[int], start: int) -> list[int]:
    """Attended tokens counted from `start`."""
    positions, seen = [], start
    for attended in mask:
        seen += attended
        positions.append(max(seen - 1, 0) if attended else 0)
    return positions
