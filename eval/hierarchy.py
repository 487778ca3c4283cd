"""Errors of grounding with the label tree in hand: a region found under a wider name is not a region missed.

Every reference region and every prediction gets one kind. The pairs are made one to one, the best kind first:
- exact: the same label, boxes with IoU at least 0.5.
- narrower, broader: the boxes agree, and the predicted label is below or above the true one (a left lung for a lung, a
  brain lesion for a left frontal lobe lesion, the frontal lobe for its lesion): right organ, wrong level.
- other side: the boxes agree, the label is that of the other side of the body.
- sibling: the boxes agree, the label is that of a neighbour (a part of the same whole, or the same finding there).
- other finding: the boxes agree, the label is another finding of the same place.
- wrong place: exact, narrower or broader label, but the boxes do not agree.
- wrong label: the boxes agree, the labels have nothing to do with each other.
- missed: a reference region that no prediction is left for.
- duplicate, background: predictions left over, over a found region of that label or elsewhere.
The idea of one error a prediction is TIDE's (Bolya et al., ECCV 2020, https://arxiv.org/abs/2008.08115); the kinds are
ours. Boxes are xyxy in [0, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from eval.grounding import pairwise_iou
from eval.means import mean_scores
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree, normalise
from grounding.types import RegionSet

VERSION = "1"
PAIRED = ("exact", "narrower", "broader", "other side", "sibling", "other finding", "wrong place", "wrong label")
RIGHT_ORGAN = ("exact", "narrower", "broader")
IOU = 0.5


class Where(NamedTuple):
    """A label taken apart: places from the body region down, without sides; side -1, 0, 1; the finding or None."""

    places: tuple[str, ...]
    side: int
    finding: str | None


def where(label: str, tree: LabelTree) -> Where | None:
    """The label or name taken apart, None where the tree does not know it (or it could be several)."""
    known = tree.find(label)
    if known is None:
        return None
    node, places = tree.nodes[known], []
    for part in known.split("/")[: -1 if node.finding else None]:
        bare = part.removeprefix("left_").removeprefix("right_") if node.side else part
        if bare not in places[-1:]:
            places.append(bare)
    return Where(tuple(places), node.side, node.finding)


def relation(said: str, truth: str, tree: LabelTree) -> str:
    """What a predicted label is to a true one: one of PAIRED but "wrong place"."""
    a, b = where(said, tree), where(truth, tree)
    if a is None or b is None:
        return "exact" if normalise(said) == normalise(truth) else "wrong label"
    if a == b:
        return "exact"
    if a.finding == b.finding:
        return _of_places(a, b)
    opposite = a.side * b.side < 0
    if a.finding is None and _starts(b.places, a.places):
        return "wrong label" if opposite else "broader"
    if b.finding is None and _starts(a.places, b.places):
        return "wrong label" if opposite else "narrower"
    related = _starts(a.places, b.places) or _starts(b.places, a.places)
    return "other finding" if a.finding and b.finding and related and not opposite else "wrong label"


def region_errors(
    predictions: Mapping[str, RegionSet],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
    min_score: float = 0.0,
) -> dict[str, Any]:
    """Shares of the kinds, with their lists.

    predictions, references: image_id → regions. min_score: a prediction that scores less says nothing.
    Returns {"found": {"exact", "right organ"}: shares of the reference regions, "references": {kind: share},
    "predictions": {kind: share}}. found.exact.per_sample has a row a reference region, {"sample_id", "value", "label",
    "said", "kind"}, and predictions.background.per_sample one a prediction, with "truth" for "said".
    """
    tree, patients = tree or load_label_tree(), patients or {}
    truths: list[dict] = []
    saids: list[dict] = []
    for image_id in sorted(references):
        of_truth, of_said = _judge(_stated(predictions.get(image_id), min_score), references[image_id], tree)
        truths += [{"sample_id": image_id, **row} for row in of_truth]
        saids += [{"sample_id": image_id, **row} for row in of_said]

    of_truth = _shares(truths, (*PAIRED, "missed"), patients, "no reference regions")
    of_said = _shares(saids, (*PAIRED, "duplicate", "background"), patients, "no predictions")
    wide = [{**row, "kind": "right organ" if row["kind"] in RIGHT_ORGAN else row["kind"]} for row in truths]
    return {
        "found": {
            "exact": replace(of_truth["exact"], name="found exactly", per_sample=_column(truths, "exact")),
            "right organ": _shares(wide, ("right organ",), patients, "no reference regions")["right organ"],
        },
        "references": of_truth,
        "predictions": of_said
        | {"background": replace(of_said["background"], per_sample=_column(saids, "background"))},
    }


def _shares(
    rows: Sequence[Mapping], kinds: Sequence[str], patients: Mapping[str, str], reason: str
) -> dict[str, Score]:
    """kind → share of the rows."""
    values = [[float(row["kind"] == kind) for kind in kinds] for row in rows]
    clusters = [patients.get(row["sample_id"], row["sample_id"]) for row in rows]
    return mean_scores(kinds, VERSION, values, clusters, {}, reason)


def _column(rows: Sequence[Mapping], kind: str) -> list[dict]:
    return [{**row, "value": float(row["kind"] == kind)} for row in rows]


def _starts(longer: tuple[str, ...], shorter: tuple[str, ...]) -> bool:
    return longer[: len(shorter)] == shorter


def _of_places(a: Where, b: Where) -> str:
    """The relation of two different labels with the same finding, or without one, by their places."""
    opposite = a.side * b.side < 0
    if _starts(a.places, b.places) or _starts(b.places, a.places):
        if opposite:
            return "other side"
        deeper = len(a.places) - len(b.places) or abs(a.side) - abs(b.side)
        return "narrower" if deeper > 0 else "broader"
    siblings = len(a.places) > 1 and a.places[:-1] == b.places[:-1]
    return "sibling" if siblings and not opposite else "wrong label"


def _stated(said: RegionSet | None, min_score: float) -> RegionSet:
    if said is None:
        return RegionSet(np.zeros((0, 4)), [], (1, 1))
    return said if said.scores is None else said.select(np.flatnonzero(said.scores >= min_score).tolist())


def _judge(said: RegionSet, truth: RegionSet, tree: LabelTree) -> tuple[list[dict], list[dict]]:
    """One row a reference region and one a prediction, each with its kind."""
    overlap = pairwise_iou(said.boxes, truth.boxes)
    names = {(a, b): relation(a, b, tree) for a in set(said.labels) for b in set(truth.labels)}
    kinds = [[_kind(names[a, b], overlap[k, j]) for j, b in enumerate(truth.labels)] for k, a in enumerate(said.labels)]
    pairs = _pair(kinds, overlap, said.scores)
    of_truth = [{"label": label, "said": None, "kind": "missed"} for label in truth.labels]
    of_said = [{"label": label, "truth": None, "kind": "background"} for label in said.labels]
    for k, j in pairs:
        of_truth[j] = {"label": truth.labels[j], "said": said.labels[k], "kind": kinds[k][j]}
        of_said[k] = {"label": said.labels[k], "truth": truth.labels[j], "kind": kinds[k][j]}
    for k in set(range(len(said))) - {k for k, _ in pairs}:
        if any(kind in RIGHT_ORGAN for kind in kinds[k]):
            of_said[k]["kind"] = "duplicate"
    return of_truth, of_said


def _kind(name: str, overlap: float) -> str | None:
    if overlap >= IOU:
        return name
    return "wrong place" if name in RIGHT_ORGAN else None


def _pair(kinds: list[list[str | None]], overlap: np.ndarray, scores: np.ndarray | None) -> list[tuple[int, int]]:
    """One-to-one (prediction, reference) rows: the best kind first, then the best score, then the larger overlap."""
    ranked = [
        (PAIRED.index(kind), 0.0 if scores is None else -float(scores[k]), -float(overlap[k, j]), k, j)
        for k, row in enumerate(kinds)
        for j, kind in enumerate(row)
        if kind is not None
    ]
    pairs: list[tuple[int, int]] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for *_, k, j in sorted(ranked):
        if k not in used[0] and j not in used[1]:
            pairs.append((k, j))
            used[0].add(k)
            used[1].add(j)
    return pairs
