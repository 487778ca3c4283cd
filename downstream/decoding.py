"""How an answer is read out of a language model: greedily, by beams or sampling, as one of several options, by section.

Dimension key: B prompts, A answer tokens (end token included), V vocabulary.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bridges.region_vlm import RegionVLM
from downstream.base import Base
from downstream.prompts import IGNORED, Prompt, collate

SECTIONS = {"findings": "Findings:", "impression": "Impression:"}  # as `prompts.report_text` writes them, in its order
YES_NO = ("yes", "no")
# A checkpoint answers with the spelling of its training data.
SPELLINGS = {"yes": ("yes", "Yes"), "no": ("no", "No")}
# How a question begins that yes or no answers.
ASKING = re.compile(
    r"\W*(is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|isn't|aren't|doesn't)\b", re.I
)
LETTERED = re.compile(r"(?:^|(?<=[\s;,(]))\(?([A-H])[:.)]\s*")  # "A: lung", "B) heart", "(C) liver"


@dataclass(frozen=True)
class Decoding:
    """Greedy as it stands. `beams` > 1: beam search, the most probable of so many. `temperature` > 0: sampled from the
    tokens that hold `top_p` of the probability. `closed`: the answer to a closed question is the most probable of its
    options (see `options_of`). `sections` of SECTIONS: a report is written section by section, each with what stands
    before it as its beginning, and with as many tokens as a whole report may have otherwise. `seed`: of sampling."""

    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    closed: bool = False
    sections: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.beams < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("beams must be 1 or more, temperature 0 or more, top_p above 0 and at most 1")
        if self.beams > 1 and self.temperature:
            raise ValueError(f"beams={self.beams} and temperature={self.temperature:g} exclude each other; give one")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p={self.top_p:g} is for sampling; give a temperature as well")
        if list(self.sections) != [name for name in SECTIONS if name in self.sections]:
            raise ValueError(f"sections={','.join(self.sections)}; known, in this order: {', '.join(SECTIONS)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What `generate` of transformers takes; nothing where it is greedy."""
        if self.temperature:
            return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"num_beams": self.beams} if self.beams > 1 else {}


GREEDY = Decoding()


def options_of(question: str, given: Sequence[str] = ()) -> tuple[str, ...]:
    """What a closed question can be answered with: `given`; else what it lists ("A: lung; B: heart"); else yes and no
    where it begins as such a question does and offers no "or"; () where none of these is known."""
    if given:
        return tuple(dict.fromkeys(given))
    marks = list(LETTERED.finditer(question))
    letters = "".join(mark[1] for mark in marks)
    if len(marks) > 1 and "ABCDEFGH".startswith(letters):
        ends = [mark.start() for mark in marks[1:]] + [len(question)]
        texts = [question[mark.end() : end].strip(" ;,\n") for mark, end in zip(marks, ends, strict=True)]
        return tuple(dict.fromkeys(filter(None, texts)))
    return YES_NO if ASKING.match(question) and not re.search(r"\bor\b", question) else ()


def answered(prompt: Prompt, base: Base, text: str) -> Prompt:
    """`prompt`, built without an answer, with `text` and the end token as the answer, for teacher forcing."""
    ids = base.tokenizer(text.strip(), add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]
    return replace(_longer(prompt, base, ids), answer_ids=ids)


def _longer(prompt: Prompt, base: Base, ids: Sequence[int]) -> Prompt:
    """`prompt` with the beginning of its answer."""
    types = {name: [*row, *([base.answer_type] * len(ids))] for name, row in prompt.token_types.items()}
    mask = [*prompt.attention_mask, *([1] * len(ids))]
    return replace(prompt, input_ids=[*prompt.input_ids, *ids], attention_mask=mask, token_types=types)


def log_probabilities(vlm: RegionVLM, base: Base, prompts: Sequence[Prompt], batch_size: int = 32) -> list[float]:
    """Natural logarithm of the probability of each prompt's answer, its end token included."""
    return [sum(row) for row in token_log_probabilities(vlm, base, prompts, batch_size)]


@torch.no_grad()
def token_log_probabilities(
    vlm: RegionVLM, base: Base, prompts: Sequence[Prompt], batch_size: int = 32
) -> list[list[float]]:
    """Natural logarithm of the probability of each token of each prompt's answer, given those before it; the end token
    is the last. One forward pass a batch of prompts of like length; nothing is generated."""
    device, values = next(vlm.projector.parameters()).device, [list[float]()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows], base.tokenizer.pad_token_id).to(device)
        out = vlm(batch.slots, **batch.inputs, logits_to_keep=batch.keep, use_cache=False)
        logits = out.logits.float()  # (B, A, V)
        each = logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
        for i, row, label in zip(rows, each, batch.labels, strict=True):
            values[i] = row[label != IGNORED].tolist()
    return values


def choose(
    vlm: RegionVLM, base: Base, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], batch_size: int = 32
) -> list[dict[str, float]]:
    """The probability of each of a prompt's options, given that the answer is one of them: B dictionaries in the order
    of `options`, each of sum 1. An option is said exactly, to its end token; "yes" may be spelled "Yes", as "no"."""
    spelled = [(k, option, text) for k, row in enumerate(options) for option in row for text in _spellings(option)]
    rows = [answered(prompts[k], base, text) for k, _, text in spelled]
    values = log_probabilities(vlm, base, rows, batch_size)
    highest = [-math.inf] * len(prompts)
    for (k, _, _), value in zip(spelled, values, strict=True):
        highest[k] = max(highest[k], value)
    found: list[dict[str, float]] = [dict.fromkeys(row, 0.0) for row in options]
    for (k, option, _), value in zip(spelled, values, strict=True):
        found[k][option] += math.exp(value - highest[k])
    return [{option: value / sum(row.values()) for option, value in row.items()} for row in found]


def _spellings(option: str) -> tuple[str, ...]:
    return SPELLINGS.get(option, (option,))


def likeliest(probabilities: Mapping[str, float]) -> str:
    """The option of the highest probability; of equal ones the first."""
    return max(probabilities, key=lambda option: probabilities[option])


def write_sections(
    generate: Callable[..., list[str]], prompts: Sequence[Prompt], base: Base, sections: Sequence[str]
) -> list[str]:
    """A report a prompt: "Findings: … Impression: …", section by section. A section in which nothing is said is left
    out. `generate(prompts, **settings)` gives the continuation of each prompt; `settings` are of transformers."""
    texts = [""] * len(prompts)
    for name in sections:
        begun = [f"{text} {SECTIONS[name]}".strip() for text in texts]
        ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in begun]
        longer = [_longer(prompt, base, row) for prompt, row in zip(prompts, ids, strict=True)]
        said = [_until_section(text) for text in generate(longer, **_stop(base.tokenizer))]
        texts = [f"{head} {more}" if more else text for head, more, text in zip(begun, said, texts, strict=True)]
    return texts


def _stop(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"stop_strings": list(SECTIONS.values()), "tokenizer": tokenizer}


def _until_section(text: str) -> str:
    """What stands before the next section's name, if the model went on to it."""
    return re.split("|".join(map(re.escape, SECTIONS.values())), text)[0].strip()
