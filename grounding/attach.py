"""What the label tree and geometry say of found regions: which stand for the same thing, and where a finding hangs."""

import numpy as np
import torch
from pycocotools import mask as rle

from grounding.boxes import area, containment, pairwise_iou
from grounding.labels import LabelTree
from grounding.types import RegionSet

LEAST_HELD = 0.2  # share of a finding that a place must hold for the finding to hang on it


def drop_broader(regions: RegionSet, tree: LabelTree, apart: frozenset[str] = frozenset()) -> RegionSet:
    """``regions`` without those that a narrower label covers ("insula" by "left insula"), and without those that lie in
    another, better one of the same label. Regions come best first. What the phrases ``apart`` found, by the regions'
    ``texts``, is compared with nothing but itself."""
    boxes = torch.from_numpy(regions.boxes)
    groups = [
        f"{label}\n{text}" if text in apart else label
        for label, text in zip(regions.labels, regions.texts or [""] * len(regions), strict=True)
    ]
    narrower: dict[str, list[int]] = {}
    for j, label in enumerate(groups):
        for wider in tree.broader(label) if label in tree.nodes else []:
            narrower.setdefault(wider, []).append(j)
    kept: dict[str, list[int]] = {}
    for i, label in enumerate(groups):
        covers, better = narrower.get(label, []), kept.get(label, [])
        covered = bool(covers) and bool((pairwise_iou(boxes[[i]], boxes[covers]) > 0.6).any())
        same = bool(better) and bool((containment(boxes[[i]], boxes[better]) > 0.8).any())
        if not covered and not same:
            kept.setdefault(label, []).append(i)
    return regions.select(sorted(i for rows in kept.values() for i in rows))


def attach_findings(regions: RegionSet, tree: LabelTree, places: RegionSet | None = None) -> list[str]:
    """Labels of ``regions`` in which each bare finding has the path of the place that holds it, among ``places``
    (default: ``regions`` themselves).

    With masks: the place with the largest (share of the finding inside) × (its score). With boxes alone, which overlap:
    the smallest that holds at least half. A finding that already has a place, or that none holds, keeps its label.
    """
    places = regions if places is None else places
    bare = [k for k, x in enumerate(regions.labels) if x in tree.nodes and tree.is_finding(x) and not tree.broader(x)]
    rows = [j for j, x in enumerate(places.labels) if x in tree.nodes and not tree.is_finding(x) and tree.parent(x)]
    labels = list(regions.labels)
    if not bare or not rows:
        return labels
    places = places.select(rows)
    inside = _contained(regions.select(bare), places)
    for k, held in zip(bare, inside, strict=True):
        j = _holder(held, places, tree)
        path = f"{places.labels[j]}/{labels[k].rsplit('/', 1)[1]}"
        labels[k] = path if held[j] >= LEAST_HELD and path in tree.nodes else labels[k]
    return labels


def _holder(held: np.ndarray, places: RegionSet, tree: LabelTree) -> int:
    """Index of the place that a finding hangs on; ``held`` (P,) is the share of it in each."""
    if places.full_masks is None:
        sizes = area(torch.from_numpy(places.boxes)).numpy()
        return int(np.where(held >= 0.5, sizes, np.inf).argmin()) if (held >= 0.5).any() else int(held.argmax())
    scores = np.ones(len(places)) if places.scores is None else places.scores
    best = int((held * scores).argmax())
    # "insula" never scores below "left insula"; the side is believed where it scores nearly as much.
    sided = [
        j for j, x in enumerate(places.labels) if places.labels[best] in tree.broader(x) and held[j] > 0.5 * held[best]
    ]
    sided = [j for j in sided if scores[j] > 0.5 * scores[best]]
    return max(sided, key=lambda j: held[j] * scores[j], default=best)


def _contained(inner: RegionSet, outer: RegionSet) -> np.ndarray:
    """(I, O) share of each inner region that lies in each outer one: by masks where both have them, else by boxes."""
    if inner.full_masks is None or outer.full_masks is None:
        return containment(torch.from_numpy(inner.boxes), torch.from_numpy(outer.boxes)).numpy()
    # COCO's IoU with a "crowd" is the intersection over the first area.
    return np.asarray(rle.iou(inner.full_masks, outer.full_masks, [True] * len(outer)), np.float32)
