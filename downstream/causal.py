"""How much less probable what a model said becomes without a region: a score of cause, not of attention.

The text that was said is put behind the prompt again, once with all regions and once with some of them masked out; the
log-probability of its tokens is read off in one forward pass each (teacher forcing), nothing is generated. The fall is
the drop, in nats: 0.7 is half as probable. A masked slot takes no attention and no position, and the others keep their
places, so `[rK]` means the same region in each prompt. Citations are no part of what is scored: without a region its
mark would fall by itself.
Dimension key: B prompts, K region slots of a prompt, A answer tokens.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from downstream.answerer import Answerer
from downstream.citations import CITATION, found_slots, sentence_of_characters, supporting
from downstream.decoding import answered, token_log_probabilities
from downstream.prompts import Prompt
from grounding.labels import LabelTree
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

Masked = frozenset[int]  # slots that are masked out
NOTHING_MASKED = Masked()


@dataclass(frozen=True)
class Fixed:
    """A source of regions that gives the same slots for every question, whatever the image. `image_of_slot`: of a study
    of several images, whose free slots are laid out last (see `routes.pick_study`)."""

    tokens: RegionTokens
    image_of_slot: Sequence[int] = ()

    def slots(self, image_id: str, named: frozenset[str], tree: LabelTree, k: int) -> RegionTokens:
        return self.tokens

    def study_slots(
        self, image_ids: Sequence[str], named: frozenset[str], tree: LabelTree, k: int
    ) -> tuple[RegionTokens, list[int]]:
        valid = self.tokens.valid[0].tolist()
        order = sorted(range(len(valid)), key=lambda i: not valid[i])
        tensors = {name: getattr(self.tokens, name)[:, order] for name in RegionTokens.TENSORS}
        labels = [[self.tokens.labels[0][i] for i in order]]
        return replace(self.tokens, **tensors, labels=labels), [self.image_of_slot[i] for i in order]


@dataclass(frozen=True)
class Said:
    """A text that was said in answer to a prompt. `slots`: the regions it was given (a batch of one). `prompt`: slots →
    the prompt without answer. `is_report`: it is scored by sentence; else as one part, its end token included.
    `rests_on`: for each part the slots that it rests on."""

    slots: RegionTokens
    prompt: Callable[[RegionTokens], Prompt]
    text: str
    is_report: bool
    rests_on: Sequence[Masked]

    @property
    def valid(self) -> Masked:
        return Masked(torch.nonzero(self.slots.valid[0]).flatten().tolist())

    @property
    def masks(self) -> list[Masked]:
        """What is masked out: nothing, each region, everything; and what each part rests on, and all but that."""
        each = [Masked({k}) for k in sorted(self.valid)]
        parts = [masked for rests_on in self.rests_on if rests_on for masked in (rests_on, self.valid - rests_on)]
        return list(dict.fromkeys([NOTHING_MASKED, *each, self.valid, *parts]))


@dataclass(frozen=True)
class Scores:
    """`totals[masked][part]`: log-probability (nats) of a part with these slots masked; `tokens[part]`: how many."""

    totals: Mapping[Masked, Sequence[float]]
    tokens: Sequence[int]
    is_report: bool

    def confidence(self, part: int, masked: Masked = NOTHING_MASKED) -> float:
        """In [0, 1]: of an answer its probability; of a sentence that of a token, the geometric mean over its tokens,
        since a long sentence is never probable as a whole."""
        total = self.totals[masked][part]
        return math.exp(total / max(1, self.tokens[part]) if self.is_report else total)

    def drop(self, part: int, masked: Masked) -> float:
        return self.totals[NOTHING_MASKED][part] - self.totals[masked][part]


def score(answerer: Answerer, said: Sequence[Said], batch_size: int = 16) -> list[Scores]:
    """Scores of each text, in order."""
    owners = [_token_owners(answerer, one) for one in said]
    totals: list[dict[Masked, list[float]]] = [{} for _ in said]
    jobs = [(n, masked) for n, one in enumerate(said) for masked in one.masks]
    jobs.sort(key=lambda job: len(said[job[0]].text))
    for start in range(0, len(jobs), batch_size):
        some = jobs[start : start + batch_size]
        prompts = [_without(said[n], masked, answerer) for n, masked in some]
        values = token_log_probabilities(answerer.vlm, answerer.base, prompts, batch_size)
        for (n, masked), row in zip(some, values, strict=True):
            totals[n][masked] = _sums(row, *owners[n])
    tokens = [_sums([1] * len(rows), rows, parts) for rows, parts in owners]
    return [
        Scores(total, list(map(int, count)), one.is_report)
        for total, count, one in zip(totals, tokens, said, strict=True)
    ]


def without(slots: RegionTokens, masked: Collection[int]) -> RegionTokens:
    """`slots` (a batch of one) with those of `masked` free; the others keep their numbers, and labels their colours."""
    gone = torch.zeros_like(slots.valid)
    gone[0, list(masked)] = True
    columns = {name: getattr(slots, name) for name in RegionTokens.TENSORS}
    masks = {name: gone.reshape(*gone.shape, *[1] * (column.ndim - 2)) for name, column in columns.items()}
    return replace(slots, **{name: column.masked_fill(masks[name], 0) for name, column in columns.items()})


def why(
    answerer: Answerer,
    question: str,
    answer: str,
    slots: RegionTokens,
    prompt: Callable[[RegionTokens], Prompt],
    modality: str | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Why an answer was given, in probabilities of exactly this answer: {"confidence": with all regions,
    "without_regions": with none of them, "without_named": without those that question and answer name,
    "with_named_only": with those alone (both None where they name none), "regions": a row a region, the largest drop
    first}. A row: {"region", "phrase", "label", "found", "score", "box", "named", "confidence": without it, "drop"
    (nats)}. A finding that was looked for and not found has a row as well.

    `slots` (a batch of one): what the source of regions gave for the question. `prompt`: see `Said`.
    """
    found = found_slots(slots)
    rows = supporting(question, answer, [slots.labels[0][k] for k in found], answerer.tree, modality)
    named = Masked(found[i] for i in rows)
    said = Said(slots, prompt, answer, False, [named])
    (scores,) = score(answerer, [said], batch_size)
    drops = drops_of(scores, 0, slots, answerer.tree)
    for row in drops:
        row |= {"named": row["region"] in named, "confidence": scores.confidence(0, Masked({row["region"]}))}
    return {
        "confidence": scores.confidence(0),
        "without_regions": scores.confidence(0, said.valid),
        "without_named": scores.confidence(0, named) if named else None,
        "with_named_only": scores.confidence(0, said.valid - named) if named else None,
        "regions": drops,
    }


def drops_of(scores: Scores, part: int, slots: RegionTokens, tree: LabelTree) -> list[dict[str, Any]]:
    """One row a region of the prompt, the largest drop first: {"region", "phrase", "label", "found", "score", "box":
    None where it was not found, "drop"}."""
    rows = []
    for k in torch.nonzero(slots.valid[0]).flatten().tolist():
        label, found = slots.labels[0][k], int(slots.levels[0, k]) != NOT_FOUND_LEVEL
        rows.append(
            {
                "region": k,
                "phrase": tree.phrase(label) if label in tree.nodes else label,
                "label": label,
                "found": found,
                "score": round(float(slots.scores[0, k]), 6),
                "box": [round(float(v), 6) for v in slots.boxes[0, k]] if found else None,
                "drop": scores.drop(part, Masked({k})),
            }
        )
    return sorted(rows, key=lambda row: -row["drop"])


def why_lines(reasons: Mapping[str, Any]) -> list[str]:
    """What `why` found, to be printed: the answer's probability, then a line a region."""
    lines = [
        f"probability of this answer {reasons['confidence']:.2f}; without any region {reasons['without_regions']:.2f}"
    ]
    for row in reasons["regions"]:
        name = f"[r{row['region']}] {row['phrase']}" if row["found"] else f"not found: {row['phrase']}"
        lines.append(f"  without {name:<40} {row['confidence']:.2f}  drop {row['drop']:+.2f}")
    return lines


def _without(said: Said, masked: Masked, answerer: Answerer) -> Prompt:
    prompt = said.prompt(without(said.slots, masked) if masked else said.slots)
    return answered(prompt, answerer.base, said.text)


def _token_owners(answerer: Answerer, said: Said) -> tuple[list[int], int]:
    """For each token of the text the part that it belongs to by its last character, -1 for none; number of parts."""
    text = said.text.strip()
    characters = sentence_of_characters(text) if said.is_report else _answer_characters(text)
    spans = answerer.base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    owners = [characters[stop - 1] if stop > start else -1 for start, stop in spans]
    return [*owners, -1 if said.is_report else 0], len(said.rests_on)


def _answer_characters(text: str) -> list[int]:
    marks = {i for mark in CITATION.finditer(text) for i in range(*mark.span())}
    return [-1 if i in marks else 0 for i in range(len(text))]


def _sums(values: Sequence[float], owners: Sequence[int], parts: int) -> list[float]:
    sums = [0.0] * parts
    for value, owner in zip(values, owners, strict=True):
        if owner >= 0:
            sums[owner] += value
    return sums
