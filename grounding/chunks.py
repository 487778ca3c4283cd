"""Phrase lists of any length for detectors that read all phrases in one text of limited length.

A list is packed into several texts, no phrase split; a phrase's score is read off exactly its own tokens, by the
tokenizer's character offsets ("lung" is not looked for inside "left lung"); and the scores of different texts are made
comparable by anchors, phrases that every text holds (`anchored`).

How much company matters was measured with tiny detectors (fine-tuned for seconds on generated slices, 36 phrases, 8
images; published checkpoints were not at hand). In 2 to 10 texts instead of one, the best score of a phrase moves by
0.001 to 0.002 on average (0.04 at most; scores are about 0.09) in a Grounding DINO after 50 steps, and by 0.013 to
0.022 (0.15) in an MM-Grounding-DINO after 12 (0.23). Little of that is common to a text: moving each text by one anchor
alone made it worse (to 0.002, and 0.025 to 0.028). With `anchored` the latter is 0.016 to 0.024, 0.09 at most.

Dimension key: V phrases, T tokens of one text, Q object queries.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grounding.phrases import PhraseError

ANCHORS = 3
Columns = tuple[tuple[int, ...], ...]  # for each phrase the columns of the logits that speak of it


@dataclass(frozen=True)
class Caption:
    """``text``: what the model reads; ``spans``: (start, end) of each phrase in it, in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


def spoken(phrase: str) -> str:
    """A phrase as it stands in a caption: "." and "?" end a phrase there, so they are taken out."""
    return " ".join(re.sub(r"[.?]", " ", phrase).split())


def caption(phrases: Sequence[str]) -> Caption:
    """[left lung, lesion] → "left lung. lesion."."""
    text, spans = "", []
    for phrase in map(spoken, phrases):
        text += " " if text else ""
        spans.append((len(text), len(text) + len(phrase)))
        text += phrase + "."
    return Caption(text, tuple(spans))


def token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Columns:
    """Tokens that lie in each character span; ``offsets``: (start, end) of each token, (0, 0) for special ones."""
    return tuple(
        tuple(k for k, (start, end) in enumerate(offsets) if start < end and first <= start and end <= last)
        for first, last in spans
    )


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in their order, in as few packs of at most ``limit`` as can be, and as even as these allow: a phrase
    scores differently among two others than among twenty."""
    if not lengths:
        return []
    fewest = len(_filled(lengths, limit))
    low, high = max(-(-sum(lengths) // fewest), max(lengths)), limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle)) <= fewest else (middle + 1, high)
    return _filled(lengths, high)


def _filled(lengths: Sequence[int], limit: int) -> list[list[int]]:
    packs: list[list[int]] = [[]]
    room = limit
    for k, length in enumerate(lengths):
        if length > room and packs[-1]:
            packs.append([])
            room = limit
        packs[-1].append(k)
        room -= length
    return packs


def anchored_packs(phrases: Sequence[str], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Packs of phrase indices; where one does not hold them all, the first phrases, the anchors, open every pack.

    Raises PhraseError for a phrase that is too long for the model on its own, or that has nothing to read.
    """
    for phrase, length in zip(phrases, lengths, strict=True):
        if not spoken(phrase):
            raise PhraseError(f"phrase {phrase!r} has no words; name what to look for")
        if length > limit:
            raise PhraseError(f"phrase {phrase!r} has {length} tokens and this model reads {limit}; say it shorter")
    if sum(lengths) <= limit:
        return [list(range(len(lengths)))]
    anchors = _anchors(lengths, limit)
    packs = pack(lengths[anchors:], limit - sum(lengths[:anchors]))
    return [[*range(anchors), *(k + anchors for k in rows)] for rows in packs]


def _anchors(lengths: Sequence[int], limit: int) -> int:
    """How many phrases every pack repeats: those that take a quarter of it and leave room for any other; one alone
    could not tell a shift of the pack from one of its own."""
    for count in range(min(ANCHORS, len(lengths) - 1), 1, -1):
        taken = sum(lengths[:count])
        if taken <= limit // 4 and max(lengths[count:]) <= limit - taken:
            return count
    return 0


def phrase_scores(logits: torch.Tensor, columns: Columns) -> torch.Tensor:
    """(Q, T) logits → (Q, V): the mean probability of a phrase's own tokens (as GLIP scores a phrase, Li et al., CVPR
    2022, and MM-Grounding-DINO after it)."""
    if not columns:
        return logits.new_zeros(len(logits), 0)
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[:, list(own)].mean(1) for own in columns], 1)


def anchored(scores: Sequence[torch.Tensor], anchors: int) -> list[torch.Tensor]:
    """Scores (Q, V_c) of each pass over one image, the anchors in the first columns of each → the same, comparable.

    What one text holds lifts or lowers its scores, since the image attends to all of it. The anchors are the same
    phrases on the same image in each; by how much the logits of their best scores differ from their means over passes,
    on average, the pass is moved back; but only as far as the anchors agree (positive-part James-Stein: the shift times
    1 - its squared standard error over its square). Fewer than two passes or anchors: nothing is moved.
    """
    if len(scores) < 2 or anchors < 2:
        return list(scores)
    logits = [s.clamp(1e-6, 1 - 1e-6).logit() for s in scores]
    best = torch.stack([one[:, :anchors].max(0).values for one in logits])
    apart = best - best.mean(0)
    shift, error = apart.mean(1), apart.var(1) / anchors
    sure = (1 - error / shift.square().clamp(min=1e-12)).clamp(min=0)
    return [(one - moved).sigmoid() for one, moved in zip(logits, shift * sure, strict=True)]
