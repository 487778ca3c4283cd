"""Findings of grounded reports: hallucinated, missing, misplaced; and whether citations hold what they are cited for.

Both reports are read with eval/findings.py, sentence by sentence, and their findings paired one to one, the best first:
- right: the same kind, places that agree (one is in the other, or one is not told), no opposite sides; and where both
  have boxes, more than half of the predicted area lies in the reference's boxes.
- misplaced: the same kind, but another place, the other side, or the boxes elsewhere.
- hallucinated: a predicted finding that is left over. missing: a reference finding that is left over.
Boxes are xyxy in [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.areas import mostly_covered
from eval.entailment import Kinds
from eval.findings import Finding, parse_findings
from eval.grounded_reports import Sentence, sentences_of
from eval.statistics import bootstrap_interval, mean_of, number
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree

VERSION = "1"


class Stated(NamedTuple):
    """A finding, the row and text of the sentence that states it, and that sentence's boxes."""

    finding: Finding
    row: int
    sentence: Sentence

    def __str__(self) -> str:
        """ "effusion, left pleura"."""
        where = " ".join(part for part in (self.finding.side, self.finding.structure) if part)
        return self.finding.kind + (f", {where}" if where else "")


def finding_errors(
    predictions: Mapping[str, Any],
    references: Mapping[str, Any],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
) -> dict[str, Any]:
    """Shares and lists of the errors.

    predictions, references: sample_id → report as `sentences_of` reads it; a missing prediction is an empty report.
    Returns {"right", "misplaced", "hallucinated": shares of the predicted findings, "missing": share of the
    reference's, "counts"}; per_sample rows hold "findings": [{"finding", "sentence", "reference", "why"}].
    """
    tree = tree or load_label_tree()
    compare, ids, known = Kinds(tree), sorted(references), {}
    rows = []
    for i in ids:
        said, truth = (_read(sentences_of(r.get(i), i), tree, compare, known) for r in (predictions, references))
        rows.append(sort_findings(said, truth, compare) | {"said": len(said), "true": len(truth)})
    clusters = [(patients or {}).get(i, i) for i in ids]

    def score(name: str, of: str) -> Score:
        counts = [(len(row[name]), row[of]) for row in rows]
        detail = [{"findings": row[name]} for row in rows]
        reason = "no findings stated" if of == "said" else "no true findings"
        return _ratio(f"{name} findings", ids, counts, clusters, detail, reason)

    return {
        **{name: score(name, "said") for name in ("right", "misplaced", "hallucinated")},
        "missing": score("missing", "true"),
        "counts": {"stated": sum(row["said"] for row in rows), "true": sum(row["true"] for row in rows)},
    }


def citation_scores(
    predictions: Mapping[str, Any],
    references: Mapping[str, Any],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
) -> dict[str, Any]:
    """Do the regions that sentences cite hold what the sentences say?

    predictions: sample_id → line of predictions.jsonl ({"sentences": [{"text", "region_ids"}], "evidence": {"regions":
    [{"box", "label"}]}}, or a "prediction" with `[rK]` marks). references: sample_id → report for `sentences_of`.
    A citation is right where its sentence states a finding that the reference has (see the head of this module, boxes
    aside), the region's label names that finding in a place that agrees with it, and, where the reference has boxes for
    it, more than half of the region lies in them. A region that does not exist is a wrong citation.
    Returns {"precision": right citations of all, "recall": reference findings with a right citation of all, "cited":
    of those that are rightly stated, "counts"}; per_sample of precision lists the citations with "why" where wrong.
    """
    tree = tree or load_label_tree()
    compare, ids = Kinds(tree), sorted(references)
    rows = [_judge_citations(predictions.get(i), references[i], i, tree, compare) for i in ids]
    clusters = [(patients or {}).get(i, i) for i in ids]
    made = [(sum(c["right"] for c in row["citations"]), len(row["citations"])) for row in rows]
    detail = [{"citations": row["citations"]} for row in rows]
    citations = [citation for row in rows for citation in row["citations"]]
    return {
        "precision": _ratio("citation precision", ids, made, clusters, detail, "no citations"),
        "recall": _ratio(
            "citation recall", ids, [(r["found"], r["true"]) for r in rows], clusters, None, "no true findings"
        ),
        "cited": _ratio(
            "rightly stated findings cited",
            ids,
            [(r["found"], r["stated"]) for r in rows],
            clusters,
            None,
            "no finding rightly stated",
        ),
        "counts": {
            "citations": len(citations),
            "of no region": sum(c["why"] == "no such region" for c in citations),
            "in sentences without findings": sum(c["why"] == "the sentence states no finding" for c in citations),
        },
    }


def sort_findings(said: Sequence[Stated], truth: Sequence[Stated], compare: Kinds) -> dict[str, list[dict]]:
    """{"right", "misplaced", "hallucinated", "missing"} → rows of findings."""
    ranked = []
    for a, f in enumerate(said):
        for b, g in enumerate(truth):
            if compare.same(f.finding.kind, g.finding.kind):
                why = _differences(f, g, compare)
                ranked.append((len(why), f.finding != g.finding, a, b, why))
    result: dict[str, list[dict]] = {"right": [], "misplaced": [], "hallucinated": [], "missing": []}
    free: tuple[set[int], set[int]] = (set(range(len(said))), set(range(len(truth))))
    for *_, a, b, why in sorted(ranked):
        if a in free[0] and b in free[1]:
            free[0].discard(a)
            free[1].discard(b)
            row = {"finding": str(said[a]), "sentence": said[a].sentence.text, "reference": str(truth[b])}
            result["misplaced" if why else "right"].append({**row, "why": ", ".join(why)})
    for name, left, rows in (("hallucinated", free[0], said), ("missing", free[1], truth)):
        result[name] = [{"finding": str(rows[k]), "sentence": rows[k].sentence.text} for k in sorted(left)]
    return result


def _read(
    sentences: Sequence[Sentence], tree: LabelTree, compare: Kinds, known: dict[str, list[Finding]] | None = None
) -> list[Stated]:
    """The findings of a report; known: those of sentences that were read before."""
    known, stated = {} if known is None else known, []
    for row, sentence in enumerate(sentences):
        if sentence.text not in known:
            known[sentence.text] = parse_findings(compare.singular(sentence.text), tree, compare.names)
        stated += [Stated(finding, row, sentence) for finding in known[sentence.text]]
    return stated


def _differences(f: Stated, g: Stated, compare: Kinds) -> list[str]:
    """What speaks against two findings of one kind being the same: "side", "place", "boxes"."""
    why = _apart(f.finding, g.finding, compare)
    if not why and f.sentence.boxes is not None and g.sentence.boxes is not None:
        why = [] if mostly_covered(f.sentence.boxes, g.sentence.boxes) else ["boxes"]
    return why


def _apart(f: Finding, g: Finding, compare: Kinds) -> list[str]:
    why = ["side"] if f.side and g.side and f.side != g.side else []
    told = f.structure is not None and g.structure is not None and not compare.says_place(f.kind)
    if told and not compare.within(f.structure, g.structure) and not compare.within(g.structure, f.structure):
        why.append("place")
    return why


def _judge_citations(said: Any, reference: Any, sample_id: str, tree: LabelTree, compare: Kinds) -> dict[str, Any]:
    """{"citations": [{"sentence", "region", "label", "right", "why"}], "found", "stated", "true": counts}."""
    sentences = sentences_of(said, sample_id)
    regions = (said.get("evidence") or {}).get("regions") or [] if isinstance(said, Mapping) else []
    truth = _read(sentences_of(reference, sample_id), tree, compare)
    stated = _read([sentence._replace(boxes=None) for sentence in sentences], tree, compare)
    supported: set[int] = set()
    citations = []
    for row, sentence in enumerate(sentences):
        mine = [f.finding for f in stated if f.row == row]
        for region_id in sentence.cited:
            region = regions[region_id] if 0 <= region_id < len(regions) else None
            hits, why = _supports(region, mine, truth, tree, compare)
            supported |= hits
            label = None if region is None else region.get("label")
            place = {"sentence": sentence.text, "region": region_id, "label": label}
            citations.append({**place, "right": bool(hits), "why": why})
    pairs = _pairs(stated, truth, compare)
    return {"citations": citations, "found": len(supported), "stated": len(pairs | supported), "true": len(truth)}


def _pairs(stated: Sequence[Stated], truth: Sequence[Stated], compare: Kinds) -> set[int]:
    """Rows of the reference findings that are rightly stated."""
    return {b for b, g in enumerate(truth) if any(_agree(f.finding, g.finding, compare) for f in stated)}


def _agree(f: Finding, g: Finding, compare: Kinds) -> bool:
    return compare.same(f.kind, g.kind) and not _apart(f, g, compare)


def _supports(
    region: Mapping | None, mine: Sequence[Finding], truth: Sequence[Stated], tree: LabelTree, compare: Kinds
) -> tuple[set[int], str | None]:
    """(rows of the reference findings that the citation holds for, why it is wrong)."""
    if region is None:
        return set(), "no such region"
    if not mine:
        return set(), "the sentence states no finding"
    shown = parse_findings(_said(str(region.get("label", "")), tree), tree, compare.names)

    named = [f for f in mine if any(_agree(f, g, compare) for g in shown)]
    if not named:
        return set(), "the region shows another finding"
    true = {b for b, g in enumerate(truth) if any(_agree(f, g.finding, compare) for f in named)}
    if not true:
        return set(), "the reference has no such finding"
    inside = {b for b in true if _lies_in(region, truth[b].sentence.boxes)}
    return inside, None if inside else "the region lies elsewhere"


def _said(label: str, tree: LabelTree) -> str:
    known = tree.find(label)
    return tree.phrase(known) if known else label


def _lies_in(region: Mapping, boxes: np.ndarray | None) -> bool:
    return boxes is None or mostly_covered([region["box"]], boxes)


def _ratio(
    name: str,
    ids: Sequence[str],
    counts: Sequence[tuple[int, int]],
    clusters: Sequence[str],
    detail: list[dict] | None,
    reason: str,
) -> Score:
    """Sum of the firsts over sum of the seconds, with its clustered interval."""
    table = np.array(counts, float).reshape(-1, 2)
    value = number(mean_of(table.sum(0)))
    column = detail and [
        {"sample_id": i, "value": number(mean_of(row)), **more} for i, row, more in zip(ids, table, detail, strict=True)
    ]
    interval = None if value is None else bootstrap_interval(table, clusters)
    return Score(
        name,
        VERSION,
        value,
        int(table[:, 1].sum()),
        interval,
        len(set(clusters)) or None,
        column or None,
        None if value is not None else reason,
    )
