"""A trained bridge at work: prompts in, answers and reports out.

Dimension key: B prompts, K region slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations import unset_hf_deepspeed_config

from bridges.region_vlm import CheckpointError, RegionVLM, checkpoint_hash, read_checkpoint
from bridges.routes import Extent, labels_in
from downstream.base import Base
from downstream.citations import found_slots
from downstream.decoding import GREEDY, Decoding, choose, likeliest, write_sections
from downstream.embedded import load_base
from downstream.prompts import Prompt, build_prompt, collate
from downstream.sources import RegionSource
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet, RegionTokens

LONGEST_ANSWER = 32  # tokens of an answer to a question; a report may have the checkpoint's `max_answer`

Said = tuple[str, dict[str, float] | None]  # a text, and of one that was chosen the probability of each option


@dataclass(frozen=True)
class Answerer:
    """A loaded checkpoint, ready to answer; `hash` is of its tensors. `names`, `presence` and `cite_answers`: as it was
    trained (see `build_prompt`, `citations.cite_answer`)."""

    vlm: RegionVLM
    base: Base
    tree: LabelTree
    route: str
    k: int
    max_answer: int
    hash: str
    names: bool = False
    presence: bool = False
    cite_answers: bool = False
    decoding: Decoding = GREEDY

    def prompt(
        self,
        question: str,
        source: RegionSource,
        image_id: str | Sequence[str],
        extent: Extent | Sequence[Extent],
        modality: str | None = None,
        images: Sequence[np.ndarray] = (),
    ) -> Prompt:
        """The prompt for a question about an image, with the regions that `source` has for it. About the several images
        of a study: `image_id` and `extent` are lists."""
        named, of_slot = labels_in(question, self.tree, modality), None
        if isinstance(image_id, str):
            slots = source.slots(image_id, named, self.tree, self.k)
        else:
            slots, of_slot = source.study_slots(image_id, named, self.tree, self.k)
        return build_prompt(
            self.base,
            question,
            slots,
            self.route,
            self.tree,
            extent,
            max_answer=self.max_answer * max(1, len(self.decoding.sections)),
            images=images,
            names=self.names,
            named=named,
            presence=self.presence,
            image_of_slot=of_slot,
        )

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, **settings: Any) -> list[str]:
        """B prompts → B texts of at most `max_new_tokens` tokens each. `settings`: more for `generate`."""
        device = next(self.vlm.projector.parameters()).device
        batch = collate(prompts, self.base.tokenizer.pad_token_id).to(device)
        more = self.decoding.settings | settings
        tokens = self.vlm.generate(batch.slots, max_new_tokens, **more, **batch.inputs)
        return [text.strip() for text in self.base.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def answers(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]], max_new_tokens: int = LONGEST_ANSWER
    ) -> list[Said]:
        """B answers. Where a prompt has `options`: the likeliest, with the probability of each; else free text."""
        given = [i for i, row in enumerate(options) if row]
        free = [i for i, row in enumerate(options) if not row]
        rows = [prompts[i] for i in given], [options[i] for i in given]
        chosen = choose(self.vlm, self.base, *rows, max(1, len(prompts)))
        said: dict[int, Said] = {i: (likeliest(row), row) for i, row in zip(given, chosen, strict=True)}
        texts = self.generate([prompts[i] for i in free], max_new_tokens) if free else []
        said |= {i: (text, None) for i, text in zip(free, texts, strict=True)}
        return [said[i] for i in range(len(prompts))]

    def reports(self, prompts: Sequence[Prompt]) -> list[str]:
        """B reports, whole or by section."""
        if not self.decoding.sections:
            return self.generate(prompts, self.max_answer)

        def go_on(longer: Sequence[Prompt], **settings: Any) -> list[str]:
            return self.generate(longer, self.max_answer, **settings)

        return write_sections(go_on, prompts, self.base, self.decoding.sections)


def load_answerer(checkpoint: str | Path) -> Answerer:
    """Load a checkpoint of `downstream.train` with its base model.

    Raises CheckpointError or BaseModelError where one of them cannot be used.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 splits the base model while it is loaded; it is needed whole
    config, settings = read_checkpoint(checkpoint)
    base = load_base(config.base, config.four_bit)
    vlm = RegionVLM.load(checkpoint, base.model, base.fingerprint)
    if config.region_token_id != base.region_token_id:
        raise CheckpointError(
            f"{checkpoint}: trained with region token {config.region_token_id}, but base model {config.base!r} has "
            f"{base.region_token!r} at {base.region_token_id}; take the tokenizer that it was trained with"
        )
    parts = {name: settings[name] for name in ("route", "k", "max_answer")}
    # Checkpoints written before there was a choice have none of these.
    parts |= {name: settings.get(name, False) for name in ("names", "presence", "cite_answers")}
    return Answerer(vlm, base, load_label_tree(), hash=checkpoint_hash(checkpoint), **parts)


def evidence_of(
    slots: RegionTokens,
    image_size: tuple[int, int],
    image_of_slot: Sequence[int] = (),
    image_ids: Sequence[str] = (),
) -> RegionSet:
    """The regions that a prompt tells, in its order: region K of the set is `[rK]`; with the presence of what was
    asked. Of several images, `image_size` is the first one's, and each region has the attribute `image`, an id."""
    rows = found_slots(slots)  # they come first (see routes.pick), so that their numbers are kept
    return RegionSet(
        boxes=slots.boxes[0][rows].numpy(),
        labels=[slots.labels[0][i] for i in rows],
        scores=slots.scores[0][rows].numpy(),
        image_size=image_size,
        queries=slots.queries[0],
        attributes=[{"image": image_ids[image_of_slot[i]]} for i in rows] if len(image_ids) > 1 else None,
    )
