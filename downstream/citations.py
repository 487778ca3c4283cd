"""Which region a sentence of a report rests on: written into training text, read back from generated text.

`[rK]` in a report is the K-th region slot of its prompt, from 0.
"""

import re

import torch

from eval.findings import parse_findings
from grounding.labels import LabelTree
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

CITATION = re.compile(r"\s*\[r(\d+)\]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


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
                cited.append(f" [r{k}]")
                del free[k]
        sentences.append(sentence.removesuffix(".") + "".join(cited) + "." * sentence.endswith("."))
    return " ".join(sentences)


def split_report(text: str, slots: RegionTokens) -> tuple[str, list[dict]]:
    """(text, sentences) of a generated report: `sentences` are `{"text", "region_ids", "dropped"}` without the marks.

    A citation of a slot that holds no region is taken out of the text as well, and counted in `dropped`.
    """
    real = set(found_slots(slots))
    sentences = []
    for sentence in filter(None, SENTENCE_END.split(text.strip())):
        cited = [int(k) for k in CITATION.findall(sentence)]
        region_ids = list(dict.fromkeys(k for k in cited if k in real))
        dropped = sum(k not in real for k in cited)
        sentences.append({"text": CITATION.sub("", sentence), "region_ids": region_ids, "dropped": dropped})
    kept = CITATION.sub(lambda mark: mark[0] if int(mark[1]) in real else "", text.strip())
    return kept, sentences


def found_slots(slots: RegionTokens) -> list[int]:
    """Slots of a batch of one that hold a region with a box."""
    return torch.nonzero(slots.valid[0] & (slots.levels[0] != NOT_FOUND_LEVEL)).flatten().tolist()
