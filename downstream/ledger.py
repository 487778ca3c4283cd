"""What each sentence of a report, or an answer, rests on: sentence → phrase → region, read from text and labels alone.

A row is JSON data. "support" says how a sentence is borne out:
- "cited": it cites regions of its prompt.
- "disagrees": it cites regions, and no label of theirs names a finding that it states.
- "repeated": it cites none, and repeats findings of sentences before it that do (an impression).
- "named": an answer that cites none; question and answer name regions of the prompt.
- "absent": it denies findings that were looked for, each with the probability that it is there.
- "uncited": it states or denies something without any of that: no evidence.
- "no finding": it states nothing that a region could hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from downstream.citations import NOTHING, supporting
from eval.entailment import Kinds
from eval.findings import Finding, parse_findings
from eval.grounded_reports import Sentence
from eval.report_findings import Stated, sort_findings
from grounding.labels import LabelTree, split_negation

# What is printed behind a sentence, so that one without evidence is marked as such.
SUPPORT_NOTES = {
    "cited": "",
    "disagrees": "(its region shows something else)",
    "repeated": "",
    "named": "",
    "absent": "(looked for, not found)",
    "uncited": "(no evidence)",
    "no finding": "",
}

Row = dict[str, Any]


def sentences_with_support(
    sentences: Sequence[Mapping],
    evidence: Mapping[str, Any],
    queries: Sequence[Mapping],
    tree: LabelTree,
    kinds: Kinds | None = None,
) -> list[Row]:
    """One row a sentence of a report: {"sentence": number, "text", "support", "states": findings in words, "rests_on":
    region numbers, "regions", "looked_for": queries, "dropped": citations of regions that are not there}.

    sentences, evidence: those of a `Prediction`. queries: what was looked for in the image, [{"phrase", "label",
    "presence"}]. A region is {"region": K, "phrase", "label", "box", "score", "mask", "agrees"}, the last two where
    known: whether its label names what the sentence states. kinds: of `tree`, where many reports are read.
    """
    kinds = kinds or Kinds(tree)
    rows: list[Row] = []
    held: list[tuple[Finding, list[int]]] = []  # what sentences with citations state, and the regions that they cite
    for number, sentence in enumerate(sentences):
        text, cited = sentence["text"], sentence["region_ids"]
        stated = parse_findings(kinds.singular(text), tree, kinds.names)
        denied = [] if stated else _denied(text, tree, kinds)
        looked_for = [query for query in queries if denied and _agrees(denied, query["label"], tree, kinds)]
        before = [[k for f, ids in held if _same(finding, f, kinds) for k in ids] for finding in stated]
        repeated = sorted({k for ids in before for k in ids}) if before and all(before) else []
        rests_on = cited or repeated
        agrees = {k: _agrees(stated, _label(k, evidence), tree, kinds) for k in rests_on}
        shown = not stated or any(agrees.values())
        support = _support(cited, shown, stated, repeated, denied, looked_for)
        held += [(finding, cited) for finding in stated if cited and shown]
        row = _row(number, text, support, rests_on, looked_for, sentence["dropped"])
        row["states"] = [str(Stated(f, 0, Sentence(text))) for f in stated]
        row["regions"] = [_region(k, evidence, tree) | {"agrees": agrees[k]} for k in rests_on]
        rows.append(row)
    return rows


def answer_with_support(
    question: str,
    answer: str,
    sentences: Sequence[Mapping] | None,
    evidence: Mapping[str, Any],
    queries: Sequence[Mapping],
    tree: LabelTree,
    modality: str | None = None,
) -> Row:
    """The row of an answer to a question; see `sentences_with_support`. queries: what the question asks for."""
    cited = list(dict.fromkeys(k for sentence in sentences or () for k in sentence["region_ids"]))
    labels = [region["label"] for region in evidence["regions"]]
    named = [] if cited else supporting(question, answer, labels, tree, modality)
    absent = bool(NOTHING.match(answer) and queries) and not supporting(question, "yes", labels, tree, modality)
    support = "cited" if cited else "named" if named else "absent" if absent else "uncited"
    dropped = sum(sentence["dropped"] for sentence in sentences or ())
    row = _row(0, answer, support, cited or named, queries if absent else [], dropped)
    row["question"] = question
    row["regions"] = [_region(k, evidence, tree) for k in row["rests_on"]]
    return row


def _row(
    number: int, text: str, support: str, rests_on: Sequence[int], looked_for: Iterable[Mapping], dropped: int
) -> Row:
    return {
        "sentence": number,
        "text": text,
        "support": support,
        "rests_on": list(rests_on),
        "looked_for": [dict(query) for query in looked_for],
        "dropped": dropped,
    }


def _support(
    cited: Sequence[int],
    shown: bool,
    stated: Sequence[Finding],
    repeated: Sequence[int],
    denied: Sequence[Finding],
    looked_for: Sequence[Mapping],
) -> str:
    if cited:
        return "cited" if shown else "disagrees"
    if stated:
        return "repeated" if repeated else "uncited"
    if denied:
        return "absent" if looked_for else "uncited"
    return "no finding"


def _denied(text: str, tree: LabelTree, kinds: Kinds) -> list[Finding]:
    """ "No lesion is seen." → the lesion."""
    rest, negated = split_negation(kinds.singular(text))
    return parse_findings(rest, tree, kinds.names) if negated else []


def _agrees(findings: Iterable[Finding], label: str | None, tree: LabelTree, kinds: Kinds) -> bool:
    """Does a label name one of the findings, in a place that agrees?"""
    phrase = tree.phrase(label) if label in tree.nodes else label or ""
    shown = parse_findings(phrase, tree, kinds.names)
    return any(_same(f, g, kinds) for f in findings for g in shown)


def _same(f: Finding, g: Finding, kinds: Kinds) -> bool:
    nowhere = Sentence("")
    return bool(sort_findings([Stated(f, 0, nowhere)], [Stated(g, 0, nowhere)], kinds)["right"])


def _label(k: int, evidence: Mapping[str, Any]) -> str:
    return evidence["regions"][k]["label"]


def _region(k: int, evidence: Mapping[str, Any], tree: LabelTree) -> Row:
    region = evidence["regions"][k]
    phrase = tree.phrase(region["label"]) if region["label"] in tree.nodes else region["label"]
    kept = {key: region[key] for key in ("label", "box", "score", "mask") if key in region}
    return {"region": k, "phrase": phrase, **kept}
