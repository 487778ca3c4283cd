"""Do citations hold? Against annotated regions, and against what the model says without the cited region.

Boxes are xyxy in [0, 1]; drops are in nats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.report_findings import citation_scores
from eval.statistics import mean_score
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

VERSION = "1"


def cited_region_scores(
    predictions: Mapping[str, Mapping],
    annotated: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
) -> dict[str, Any]:
    """Precision and recall of citations, where the truth is not a report but regions: those of `annotated` (sample_id →
    the image's regions) that are findings.

    predictions: sample_id → line of predictions.jsonl. A citation is right where its sentence states a finding that is
    annotated, the cited region's label names that finding, and more than half of the region lies in the annotated box
    of it; recall counts annotated findings with a right citation. See `citation_scores` for the result. A label outside
    the label tree is read as a phrase.
    """
    tree = tree or load_label_tree()
    references = {i: _sentences(regions, tree) for i, regions in annotated.items()}
    return citation_scores(predictions, references, patients, tree)


def _sentences(regions: RegionSet, tree: LabelTree) -> list[dict[str, Any]]:
    """The annotated findings as a report with boxes."""
    findings = [k for k, x in enumerate(regions.labels) if x not in tree.nodes or tree.is_finding(x)]
    phrases = [tree.phrase(x) if x in tree.nodes else x for x in regions.labels]
    return [{"text": f"{phrases[k]}.", "boxes": [regions.boxes[k].tolist()]} for k in findings]


def drop_scores(rows: Sequence[Mapping], patients: Mapping[str, str] | None = None) -> dict[str, Score]:
    """Does what a sentence cites matter more to it than the other regions of its prompt? Of the lines of evidence.jsonl
    that cite (or name) a region and were scored with a model.

    drop: how much the log-probability of the sentence falls without a region. Returns
    - "cited": mean drop without all regions that it rests on.
    - "cited region", "other region": mean drop without one of them, and without one of the others of the prompt.
    - "cited first": share of the sentences for which no other region matters more; "cited first by chance": what that
      would be for regions cited at random. Both of sentences with both kinds of region.
    """
    rows = [row for row in rows if row.get("drops") and row["rests_on"]]
    own, other = (
        [[d["drop"] for d in row["drops"] if d["found"] and (d["region"] in row["rests_on"]) is cited] for row in rows]
        for cited in (True, False)
    )
    both = [bool(a and b) for a, b in zip(own, other, strict=True)]
    first = [float(max(a) >= max(b)) if ok else None for a, b, ok in zip(own, other, both, strict=True)]
    chance = [len(a) / (len(a) + len(b)) if ok else None for a, b, ok in zip(own, other, both, strict=True)]
    clusters = [(patients or {}).get(row["sample_id"], row["sample_id"]) for row in rows]

    def score(name: str, values: Sequence[float | None], reason: str) -> Score:
        column = [
            {"sample_id": row["sample_id"], "sentence": row["sentence"], "value": value}
            for row, value in zip(rows, values, strict=True)
        ]
        return mean_score(name, VERSION, values, clusters, column, reason)

    nothing, alone = "no sentence that rests on a region", "no prompt with a cited and another region"
    return {
        "cited": score("drop without what is cited", [row["drop"] for row in rows], nothing),
        "cited region": score("drop without a cited region", list(map(_mean, own)), nothing),
        "other region": score("drop without another region", list(map(_mean, other)), alone),
        "cited first": score("cited region matters most", first, alone),
        "cited first by chance": score("cited region matters most, by chance", chance, alone),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
