"""Every grounding number the field reports, over everything it is sliced by.

The unit of all but the COCO family is a pair (image, class present in its reference), as in eval/grounding.py: a
finding counts by its kind, any other label or phrase is its own class. A phrase may have several boxes; two rules are
in use:
- best: the top-scoring box against that reference box of the class which it overlaps most (ANY-BOX, as Kamath et al.,
  ICCV 2021, https://arxiv.org/abs/2104.12763, call it). Scores without a suffix.
- union: all predicted boxes of the class together against all reference boxes together, areas exact (the way masks of
  MS-CXR's boxes are compared; Boecking et al., ECCV 2022, https://arxiv.org/abs/2204.09817). Suffix "union".
Scores of a pair:
- acc@t: IoU at least t. mIoU: the IoU itself; a pair without a prediction has 0.
- recall@k: one of the k best-scoring boxes has IoU at least 0.5 with a reference box (R@k of phrase grounding).
- pointing, dice: as in eval/grounding.py. HD95: eval/heatmaps.py, of the pairs where both sides have a mask; a pair
  that was not found has no distance, so read it beside recall@1. In mm only where the spacing is known.
The COCO family (eval/coco.py) is a mean over classes. Sizes are COCO's, by the area of the reference in pixels: small
below 32², medium to 96², large. CNR needs heat maps: eval/heatmaps.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from eval.areas import union_area, union_iou
from eval.coco import COCO_METRICS, bootstrap_precision, coco_family, coco_rows, merge_classes
from eval.grounding import best_dice, check_masks, class_of, judged, levels_of, pairwise_iou, points_into
from eval.heatmaps import best_hausdorff95
from eval.hierarchy import region_errors
from eval.means import mean_scores
from eval.types import Score
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

PROTOCOL = "regions"
VERSION = "1"
THRESHOLDS = (0.3, 0.5, 0.7)
RANKS = (1, 5, 10)
PAIR_METRICS = (
    *(f"acc@{t}" for t in THRESHOLDS),
    *(f"acc@{t} union" for t in THRESHOLDS),
    *("mIoU", "mIoU union"),
    *(f"recall@{k}" for k in RANKS),
    *("pointing", "dice", "HD95 px", "HD95 mm"),
)
SIZES = ("small", "medium", "large")

_REASONS = {
    "dice": "no masks in the predictions or the references",
    "HD95 px": "no pair with a mask on both sides",
    "HD95 mm": "no pair with masks and a known spacing",
}


def region_scores(
    predictions: Mapping[str, RegionSet],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
    *,
    coco: tuple[Mapping, Sequence[Mapping]] | None = None,
    sources: Mapping[str, str] | None = None,
    modalities: Mapping[str, str] | None = None,
    labelled: Mapping[str, Sequence[str]] | None = None,
    spacing: Mapping[str, tuple[float, float]] | None = None,
    min_score: float = 0.0,
) -> dict[str, Any]:
    """All scores, overall and by class, tree level, modality, source and size; and the errors by kind.

    predictions, references: image_id → regions. patients: image_id → cluster of the intervals. coco: the (ground truth,
    results) that the regions were read from; the family is then computed on those. labelled: image_id → labels
    annotated exhaustively; a prediction of another label cannot be judged and is left out (the family is then computed
    on the regions). spacing: image_id → mm a pixel (row, column). min_score: what scores less is not stated; it counts
    in the family and in recall@k only. Raises ScoreError where masks of one image differ in size.
    Returns {"protocol", "version", "overall": {metric: Score}, "masks": {metric: Score}, "by_label", "by_level",
    "by_modality", "by_source", "by_size": {name: {metric: Score}}, "errors": see eval/hierarchy.py, "counts"}.
    """
    tree = tree or load_label_tree()
    patients = {image_id: (patients or {}).get(image_id, image_id) for image_id in references}
    said = {k: regions for k, regions in predictions.items() if k in references}
    kept = judged(said, references, labelled or {}, tree)
    family = _Family(_rows(kept, references, None if labelled else coco, tree), patients)
    rows = [
        row
        for i in sorted(references)
        for row in _pairs(i, kept.get(i), references[i], tree, (spacing or {}).get(i), min_score)
    ]
    return {
        "protocol": PROTOCOL,
        "version": VERSION,
        "overall": family.scores() | _pair_scores(rows, patients, detail=True),
        "masks": _Family(family.data, patients, "segm").scores(),
        **_by_class(family, rows, patients, tree),
        "by_modality": _by_image(family, rows, patients, modalities),
        "by_source": _by_image(family, rows, patients, sources),
        "by_size": {size: _pair_scores([row for row in rows if row["size"] == size], patients) for size in SIZES},
        "errors": region_errors(kept, references, patients, tree, min_score),
        "counts": _counts(said, kept, references, rows),
    }


def _by_class(family: "_Family", rows: list[dict], patients: Mapping[str, str], tree: LabelTree) -> dict[str, Any]:
    classes = sorted({row["class"] for row in rows})
    levels = sorted({level for name in classes for level in levels_of(name, tree)})

    def scores(names: set[str]) -> dict[str, Score]:
        return family.scores(names) | _pair_scores([row for row in rows if row["class"] in names], patients)

    return {
        "by_label": {name: scores({name}) for name in classes},
        "by_level": {level: scores({c for c in classes if level in levels_of(c, tree)}) for level in levels},
    }


def _by_image(
    family: "_Family", rows: list[dict], patients: Mapping[str, str], groups: Mapping[str, str] | None
) -> dict[str, dict[str, Score]]:
    """Scores of the images of each group; groups: image_id → group."""
    members: dict[str, set[str]] = {}
    for image_id in patients:
        if groups and image_id in groups:
            members.setdefault(groups[image_id], set()).add(image_id)
    return {
        name: _Family(family.of(ids), patients).scores()
        | _pair_scores([row for row in rows if row["image_id"] in ids], patients)
        for name, ids in sorted(members.items())
    }


def _counts(said: Mapping, kept: Mapping, references: Mapping, rows: Sequence[Mapping]) -> dict[str, int]:
    """What the scores rest on, and what was left out of them."""
    return {
        "images": len(references),
        "images without predictions": sum(not len(kept.get(k, ())) for k in references),
        "predictions": sum(len(regions) for regions in kept.values()),
        "predictions not judged": sum(len(regions) - len(kept[k]) for k, regions in said.items()),
        "pairs": len(rows),
        **{f"{size} pairs": sum(row["size"] == size for row in rows) for size in SIZES},
    }


def _rows(predictions, references, coco, tree) -> tuple[Mapping, list[dict], dict[Any, str]]:
    """(COCO ground truth, COCO results, image number → image_id), classes merged."""

    def merged(label: str) -> str:
        return class_of(label, tree)

    if coco is not None:
        truth, results = merge_classes(*coco, merged)
        return truth, results, {image["id"]: str(image["id"]) for image in truth["images"]}
    truth, results = coco_rows(references, predictions, merged)
    return truth, results, dict(enumerate(sorted(references), 1))


class _Family:
    """The COCO family of one set of images: computed once, then read for any set of classes."""

    def __init__(self, data: tuple[Mapping, list[dict], dict], patients: Mapping[str, str], iou_type: str = "bbox"):
        self.data = truth, results, images = data
        self.name = "mask " if iou_type == "segm" else ""
        self.reason = "no reference boxes"
        self.values, self.resampled = {}, None
        if iou_type == "segm" and not all(row.get("segmentation") for row in (*truth["annotations"], *results)):
            self.reason = "no masks in the predictions or the references"
            return
        clusters = {number: patients[image_id] for number, image_id in images.items()}
        self.clusters = len(set(clusters.values()))
        self.values = coco_family(truth, results, iou_type)
        self.resampled = bootstrap_precision(truth, results, clusters, iou_type=iou_type)
        names = {category["id"]: category["name"] for category in truth["categories"]}
        self.counts = Counter(names[row["category_id"]] for row in truth["annotations"])

    def of(self, image_ids: set[str]) -> tuple[Mapping, list[dict], dict]:
        """The rows of these images alone."""
        truth, results, images = self.data
        images = {number: image_id for number, image_id in images.items() if image_id in image_ids}
        annotations = [row for row in truth["annotations"] if row["image_id"] in images]
        shown = [image for image in truth["images"] if image["id"] in images]
        found = [row for row in results if row["image_id"] in images]
        return {**truth, "annotations": annotations, "images": shown}, found, images

    def scores(self, names: set[str] | None = None) -> dict[str, Score]:
        """COCO_METRICS, mean over the classes (all without `names`); intervals of AP, AP50 and AP75 only."""
        chosen = [name for name in self.values if names is None or name in names]
        return {metric: self._score(metric, chosen) for metric in COCO_METRICS}

    def _score(self, metric: str, chosen: list[str]) -> Score:
        present = [name for name in chosen if self.values[name][metric] is not None]
        if not present:
            reason = self.reason if not chosen else "no reference of this size"
            return Score(self.name + metric, VERSION, None, 0, reason=reason)
        value = float(np.mean([self.values[name][metric] for name in present]))
        interval = self._interval(metric, present)
        n = sum(self.counts[name] for name in present)
        return Score(self.name + metric, VERSION, value, n, interval, self.clusters if interval else None)

    def _interval(self, metric: str, names: list[str]) -> tuple[float, float] | None:
        columns = {"AP": slice(None), "AP50": [0], "AP75": [5]}.get(metric)
        if self.resampled is None or columns is None:
            return None
        by_class = np.stack([self.resampled[name][:, columns].mean(1) for name in names])  # (classes, R)
        present = ~np.isnan(by_class)
        counted = present.sum(0)
        means = np.where(present, by_class, 0).sum(0)[counted > 0] / counted[counted > 0]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)


def _pairs(
    image_id: str,
    said: RegionSet | None,
    truth: RegionSet,
    tree: LabelTree,
    spacing: tuple[float, float] | None,
    min_score: float,
) -> list[dict[str, Any]]:
    """One row a class present in the reference."""
    true_classes = [class_of(label, tree) for label in truth.labels]
    said_classes = [] if said is None else [class_of(label, tree) for label in said.labels]
    rows = []
    for name in sorted(set(true_classes)):
        reference = truth.select([k for k, other in enumerate(true_classes) if other == name])
        order = [k for k, other in enumerate(said_classes) if other == name]
        stated = order
        if said is not None and said.scores is not None:
            order = sorted(order, key=lambda k: -said.scores[k])
            stated = [k for k in order if said.scores[k] >= min_score]
        found = said.boxes[order] if said is not None else np.zeros((0, 4))
        row = {"image_id": image_id, "class": name, "size": region_size(reference)}
        top = said.select(stated[:1]) if stated else None
        rows.append(row | _boxes(found, len(stated), reference) | _masks(image_id, top, reference, spacing))
    return rows


def _boxes(found: np.ndarray, stated: int, reference: RegionSet) -> dict[str, float]:
    """The scores of one pair that rest on boxes; found: (N, 4) best first, of which the first so many are stated."""
    best = pairwise_iou(found, reference.boxes).max(1) if len(found) else []
    top = float(best[0]) if stated else 0.0
    union = union_iou(found[:stated], reference.boxes)
    return {
        **{f"acc@{t}": float(top >= t) for t in THRESHOLDS},
        **{f"acc@{t} union": float(union >= t) for t in THRESHOLDS},
        **{"mIoU": top, "mIoU union": union},
        **{f"recall@{k}": float(max(best[:k], default=0.0) >= 0.5) for k in RANKS},
    }


def _masks(
    image_id: str, top: RegionSet | None, reference: RegionSet, spacing: tuple[float, float] | None
) -> dict[str, float | None]:
    """The scores of one pair that rest on masks, where both sides have them; pointing takes boxes, too."""
    check_masks(image_id, top, reference)
    true = reference.full_masks
    said = None if top is None else top.full_masks
    return {
        "pointing": float(top is not None and points_into(top, reference)),
        "dice": best_dice(said[0], true) if said and true else 0.0 if top is None and true else None,
        "HD95 px": best_hausdorff95(said[0], true) if said and true else None,
        "HD95 mm": best_hausdorff95(said[0], true, spacing) if said and true and spacing else None,
    }


def region_size(reference: RegionSet) -> str:
    height, width = reference.image_size
    area = union_area(reference.boxes) * height * width
    if reference.full_masks is not None:
        area = float(rle.area(rle.merge(reference.full_masks)))
    return SIZES[(area >= 32**2) + (area >= 96**2)]


def _pair_scores(rows: Sequence[Mapping], patients: Mapping[str, str], detail: bool = False) -> dict[str, Score]:
    """PAIR_METRICS over these pairs."""
    values = [[np.nan if row[name] is None else row[name] for name in PAIR_METRICS] for row in rows]
    clusters = [patients[row["image_id"]] for row in rows]
    scores = mean_scores(PAIR_METRICS, VERSION, values, clusters, _REASONS, "no reference regions")
    if not detail:
        return scores
    return {
        name: replace(
            score,
            per_sample=[{"sample_id": r["image_id"], "class": r["class"], "value": r[name]} for r in rows],
        )
        for name, score in scores.items()
    }
