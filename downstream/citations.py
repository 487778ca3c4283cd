"""Which region a sentence of a report, or an answer, rests on: written into training text, read back from what was
generated.

`[rK]` in a text is the K-th region slot of its prompt, from 0.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from bridges.routes import labels_in
from eval.findings import parse_findings
from grounding.labels import LabelTree, parse_side
from grounding.types import NOT_FOUND_LEVEL, RegionSet, RegionTokens

CITATION = re.compile(r"\s*\[r(\d+)\]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
NOTHING = re.compile(r"\s*(?:no|none|nothing|zero|0)(?!\w|\.\d)", re.IGNORECASE)
_LARGEST = re.compile(r"\b(?:largest|biggest|main)\b", re.IGNORECASE)


def cite(findings: str, slots: RegionTokens, tree: LabelTree) -> str:
    """`findings` with `[rK]` before the full stop of each sentence that states a finding which slot K holds.

    Sentence and region belong together where finding, structure and side agree; of several such slots each is cited
    once, in order. A finding that no slot holds stays without a citation.
    """
    labels = {k: slots.labels[0][k] for k in found_slots(slots)}
    free = {k: parse_findings(tree.phrase(label), tree) for k, label in labels.items() if label in tree.nodes}
    sentences = []
    for sentence in SENTENCE_END.split(findings.strip()):
        cited = []
        for finding in parse_findings(sentence, tree):
            k = next((k for k, held in free.items() if finding in held), None)
            if k is not None:
                cited.append(k)
                del free[k]
        sentences.append(marked(sentence, cited))
    return " ".join(sentences)


def cite_answer(answer: str, question: str, slots: RegionTokens, tree: LabelTree, modality: str | None = None) -> str:
    """`answer` with `[rK]` of the slots that support it (see `supporting`): "yes [r0]"; unchanged where none does."""
    found = found_slots(slots)
    rows = supporting(question, answer, [slots.labels[0][k] for k in found], tree, modality)
    return marked(answer.strip(), [found[i] for i in rows])


def supporting(
    question: str, answer: str, labels: Sequence[str], tree: LabelTree, modality: str | None = None
) -> list[int]:
    """Indices of the regions that a question and its answer speak of, by what they name.

    `labels`: of the regions of a prompt, findings from the largest to the smallest (see `routes.pick`). "Where is the
    lesion?" "left insula" speaks of the left insula lesions; "Is there a lesion?" "yes" of all lesions, "… the largest
    lesion …" of the first. An answer that says that there is nothing ("no", "none", "0") has none: a region cannot show
    what is absent.
    """
    if NOTHING.match(answer):
        return []
    named = labels_in(f"{question} {answer}", tree, modality)
    findings = {label for label in named if tree.is_finding(label)}
    wider = {other for label in findings for other in tree.broader(label)}
    wider |= {other for label in named - findings for other in tree.ancestors(label)}
    wanted = (findings or named) - wider
    side = parse_side(answer) or parse_side(question)
    rows = [i for i, label in enumerate(labels) if label in tree.nodes and wanted & {label, *tree.broader(label)}]
    rows = [i for i in rows if not side or tree.nodes[labels[i]].side in (0, side)]
    return rows[:1] if _LARGEST.search(question) else rows


def split_report(text: str, slots: RegionTokens) -> tuple[str, list[dict]]:
    """(text, sentences) of a generated report: `sentences` are `{"text", "region_ids", "dropped"}` without the marks.

    A citation of a slot that holds no region is taken out of the text as well, and counted in `dropped`.
    """
    real = set(found_slots(slots))
    kept = CITATION.sub(lambda mark: mark[0] if int(mark[1]) in real else "", text.strip())
    return kept, split_sentences(text, real)


def split_sentences(text: str, real: Collection[int]) -> list[dict]:
    """The sentences of a text as `split_report` gives them; `real`: the regions that there are."""
    sentences = []
    for sentence in filter(None, SENTENCE_END.split(text.strip())):
        cited = [int(k) for k in CITATION.findall(sentence)]
        region_ids = list(dict.fromkeys(k for k in cited if k in real))
        dropped = sum(k not in real for k in cited)
        sentences.append({"text": CITATION.sub("", sentence), "region_ids": region_ids, "dropped": dropped})
    return sentences


def split_answer(text: str, slots: RegionTokens) -> tuple[str, list[dict] | None]:
    """(answer without its marks, sentences as those of `split_report`) of an answer to a question; the latter None
    where it cites nothing."""
    if not CITATION.search(text):
        return text, None
    return CITATION.sub("", text).strip(), split_report(text, slots)[1]


def sentence_of_characters(text: str) -> list[int]:
    """For each character of a report the number of its sentence, -1 for citations and between sentences. Sentences are
    counted as `split_report` does, without those that are nothing but a citation."""
    owners, number = [-1] * len(text), 0
    for start, end in _sentence_spans(text):
        marks = {i for mark in CITATION.finditer(text, start, end) for i in range(*mark.span())}
        own = [i for i in range(start, end) if i not in marks]
        if "".join(text[i] for i in own).strip():
            for i in own:
                owners[i] = number
            number += 1
    return owners


def found_slots(slots: RegionTokens) -> list[int]:
    """Slots of a batch of one that hold a region with a box."""
    return torch.nonzero(slots.valid[0] & (slots.levels[0] != NOT_FOUND_LEVEL)).flatten().tolist()


def with_masks(evidence: RegionSet, found: RegionSet) -> RegionSet:
    """`evidence`, the regions of a prompt, with the masks that the same regions (label and box) have in `found`."""
    if found.masks is None or not len(evidence):
        return evidence
    masks: list[dict | None] = []
    for box, label in zip(evidence.boxes, evidence.labels, strict=True):
        near = np.abs(found.boxes - box).max(1) < 1e-3
        same = [j for j in np.nonzero(near)[0] if found.labels[j] == label]
        masks.append(found.masks[same[0]] if same else None)
    return dataclasses.replace(evidence, masks=masks)


def marked(sentence: str, cited: Sequence[int]) -> str:
    """`sentence` with `[rK]` of each of `cited` before its full stop."""
    marks = "".join(f" [r{k}]" for k in cited)
    return sentence.removesuffix(".") + marks + "." * sentence.endswith(".")


def _sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in SENTENCE_END.finditer(text):
        yield start, gap.start()
        start = gap.end()
    yield start, len(text)
