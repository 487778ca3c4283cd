"""Grounding scores: are the right boxes and masks found for each label?

Classes: a finding counts by the last part of its id (any ".../lesion" is "lesion"); every other label is its own class.
The unit of all but AP is a pair (image, class present in its reference), judged by the top-scoring predicted box of
that class in that image; without one the pair is wrong, and its Dice 0.
- AP, AP50: COCO average precision of boxes, mean over classes with a reference (Lin et al. 2014).
- acc@0.5: IoU of the top box with any reference box of the class is at least 0.5.
- pointing (Zhang et al. 2018): where both sides have masks, the deepest pixel of the top region's mask lies in a
  reference mask of the class (not the centre of its box, which a lobe cut as a crescent does not hold); otherwise the
  centre of the top box lies in a reference box.
- dice: of the top box's mask with the reference masks of the class together, or with the best single one where that is
  better, since a finding may occur several times in an image.
- path: share of correctly found findings (IoU at least 0.5) whose whole label, structure and side, is right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from scipy.ndimage import distance_transform_edt

from eval.coco import average_precision, bootstrap_precision, coco_rows, merge_classes
from eval.records import RegionFiles
from eval.statistics import mean_score
from eval.types import Score, ScoreError
from grounding.labels import LabelTree, load_label_tree
from grounding.types import RegionSet

VERSION = "1"
METRICS = ("AP", "AP50", "acc@0.5", "pointing", "dice")

_NO_MASKS = "no masks in the predictions or the references"


def grounding_scores(
    predictions: Mapping[str, RegionSet],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str] | None = None,
    tree: LabelTree | None = None,
    coco: tuple[Mapping, Sequence[Mapping]] | None = None,
) -> dict[str, Any]:
    """Scores overall, by class ("by_label") and by level ("by_level": structure, finding, other, depth 0, 1, ...).

    predictions, references: image_id → regions. patients: image_id → cluster of the intervals (default: the image).
    coco: the (ground truth, results) that the regions were read from; AP is then computed on those, to the digit.
    Raises ScoreError where masks of one image differ in size.
    Returns {"overall": {metric: Score}, "by_label": {class: {...}}, "by_level": {...}, "path": Score}.
    """
    tree = tree or load_label_tree()
    patients = {image_id: (patients or {}).get(image_id, image_id) for image_id in references}
    labels = {label for regions in references.values() for label in regions.labels}
    classes = sorted({class_of(label, tree) for label in labels})
    pairs = [pair for i in sorted(references) for pair in _judge_image(i, predictions.get(i), references[i], tree)]
    precision = _Precision(predictions, references, patients, tree, coco)
    levels = {name: [c for c in classes if name in levels_of(c, tree)] for c in classes for name in levels_of(c, tree)}

    def scores(names: Sequence[str], detail: bool = False) -> dict[str, Score]:
        rows = [pair for pair in pairs if pair["class"] in names]
        return {**precision.scores(names), **_pair_scores(rows, patients, detail)}

    return {
        "overall": scores(classes, detail=True),
        "by_label": {name: scores([name]) for name in classes},
        "by_level": {name: scores(members) for name, members in sorted(levels.items())},
        "path": path_accuracy(predictions, references, patients, tree),
    }


def scores_by_source(regions: RegionFiles, tree: LabelTree | None = None) -> dict[str, dict[str, Score]]:
    """Source → its overall scores. A prediction counts only if its label is annotated in the image: elsewhere nobody
    knows whether it is wrong (federated evaluation, as in LVIS; Gupta et al. 2019)."""
    tree = tree or load_label_tree()
    predictions = judged(regions.predictions, regions.references, regions.labelled, tree)
    scores = {}
    for source in sorted(set(regions.sources.values())):
        ids = [k for k in regions.references if regions.sources.get(k) == source]
        said, truth = ({k: each[k] for k in ids if k in each} for each in (predictions, regions.references))
        scores[source] = grounding_scores(said, truth, regions.patients, tree)["overall"]
    return scores


def judged(
    predictions: Mapping[str, RegionSet],
    references: Mapping[str, RegionSet],
    labelled: Mapping[str, Sequence[str]],
    tree: LabelTree,
) -> dict[str, RegionSet]:
    """The predictions that can be judged: in an image of `labelled`, those of its labels and of the reference's."""

    def kept(image_id: str, said: RegionSet) -> RegionSet:
        known = {*labelled[image_id], *(references[image_id].labels if image_id in references else ())}
        known |= {class_of(label, tree) for label in known}
        return said.select([k for k, label in enumerate(said.labels) if {label, class_of(label, tree)} & known])

    return {k: kept(k, said) if k in labelled else said for k, said in predictions.items()}


def class_of(label: str, tree: LabelTree) -> str:
    """The class that AP counts a label in: of a finding its kind, of anything else the label itself."""
    known = tree.find(label)
    return known.rpartition("/")[2] if known and tree.is_finding(known) else label


def levels_of(name: str, tree: LabelTree) -> tuple[str, ...]:
    """The levels that a class belongs to: "finding"; or "structure", its depth in the tree and, below a body region,
    "named region"; or "other"."""
    label = tree.find(name)
    if label is None:
        kinds = {other.rpartition("/")[2] for other in tree.ids if tree.is_finding(other)}
        return ("finding",) if name in kinds else ("other",)
    if tree.is_finding(label):
        return ("finding",)
    depth = label.count("/")
    return ("structure", f"depth {depth}", *(["named region"] if depth else []))


def path_accuracy(
    predictions: Mapping[str, RegionSet],
    references: Mapping[str, RegionSet],
    patients: Mapping[str, str],
    tree: LabelTree,
) -> Score:
    """Of the reference findings that a predicted box of their class covers (IoU at least 0.5, greedily by score): the
    share whose predicted label is the whole reference label, so that the finding hangs on the right structure."""
    rows: list[dict[str, Any]] = []
    for image_id in sorted(references):
        truth = _findings(references[image_id], tree)
        said = _findings(predictions.get(image_id), tree)
        for k, j in _greedy_pairs(said, truth, tree):
            value = float(said.labels[k] == truth.labels[j])
            rows.append({"sample_id": image_id, "value": value, "said": said.labels[k], "label": truth.labels[j]})
    clusters = [patients[row["sample_id"]] for row in rows]
    values = [row["value"] for row in rows]
    return mean_score("path accuracy", VERSION, values, clusters, rows, "no finding was found at IoU 0.5")


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, 4), (B, 4) xyxy → (A, B) float64 IoU; 0 where both are empty."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    size = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    both = size.clip(min=0).prod(-1)
    area_a, area_b = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b))
    return both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-12)


class _Precision:
    """AP of any set of classes: values and resamples are computed once for all classes."""

    def __init__(self, predictions, references, patients, tree, coco):
        def merged(label: str) -> str:
            return class_of(label, tree)

        if coco is None:
            truth, results = coco_rows(references, predictions, merged)
            clusters = {k: patients[image_id] for k, image_id in enumerate(sorted(references), 1)}
        else:
            truth, results = merge_classes(*coco, merged)
            clusters = {image["id"]: patients[str(image["id"])] for image in truth["images"]}
        names = {category["id"]: category["name"] for category in truth["categories"]}
        self.boxes = [names[row["category_id"]] for row in truth["annotations"]]
        self.values = average_precision(truth, results)
        self.resampled = bootstrap_precision(truth, results, clusters)
        self.clusters = len(set(clusters.values()))

    def scores(self, names: Sequence[str]) -> dict[str, Score]:
        present = [name for name in names if name in self.values]
        n = sum(name in present for name in self.boxes)
        if not present:
            return {key: Score(key, VERSION, None, 0, reason="no reference boxes") for key in ("AP", "AP50")}
        values = np.stack([self.values[name] for name in present])  # (classes, T)
        return {
            "AP": Score("AP", VERSION, float(values.mean()), n, self._interval(present, slice(None)), self.clusters),
            "AP50": Score("AP50", VERSION, float(values[:, 0].mean()), n, self._interval(present, [0]), self.clusters),
        }

    def _interval(self, names: Sequence[str], thresholds) -> tuple[float, float] | None:
        if self.resampled is None:
            return None
        by_class = np.stack([self.resampled[name][:, thresholds].mean(1) for name in names])  # (classes, R)
        present = ~np.isnan(by_class)
        counted = present.sum(0)
        means = np.where(present, by_class, 0).sum(0)[counted > 0] / counted[counted > 0]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)


def _judge_image(image_id: str, said: RegionSet | None, truth: RegionSet, tree: LabelTree) -> list[dict]:
    """One row a class present in the reference: its verdicts, dice None where masks are missing."""
    rows = []
    classes = [class_of(label, tree) for label in truth.labels]
    for name in sorted(set(classes)):
        reference = truth.select([k for k, other in enumerate(classes) if other == name])
        top = _top_box(said, name, tree)
        check_masks(image_id, top, reference)
        rows.append({"image_id": image_id, "class": name, **_judge_pair(top, reference)})
    return rows


def _top_box(said: RegionSet | None, name: str, tree: LabelTree) -> RegionSet | None:
    """The best-scoring region of a class, as a set of one; None without any."""
    rows = [] if said is None else [k for k, label in enumerate(said.labels) if class_of(label, tree) == name]
    if said is None or not rows:
        return None
    best = 0 if said.scores is None else int(said.scores[rows].argmax())
    return said.select([rows[best]])


def _judge_pair(top: RegionSet | None, reference: RegionSet) -> dict[str, float | None]:
    if top is None:
        return {"acc@0.5": 0.0, "pointing": 0.0, "dice": None if reference.full_masks is None else 0.0}
    hit = pairwise_iou(top.boxes, reference.boxes).max() >= 0.5
    said, true = top.full_masks, reference.full_masks
    return {
        "acc@0.5": float(hit),
        "pointing": float(points_into(top, reference)),
        "dice": best_dice(said[0], true) if said and true else None,
    }


def check_masks(image_id: str, top: RegionSet | None, reference: RegionSet) -> None:
    """Raises ScoreError where masks of one image differ in size."""
    masks = [mask for regions in (top, reference) if regions is not None for mask in regions.masks or []]
    sizes = sorted({tuple(mask["size"]) for mask in masks if mask is not None})
    if len(sizes) > 1:
        raise ScoreError(f"image {image_id}: masks of sizes {sizes[0]} and {sizes[1]}; resize the predicted ones first")


def points_into(top: RegionSet, reference: RegionSet) -> bool:
    """The pointing game: does the deepest pixel (with masks) or the centre of the top region hit the reference?"""
    said, true = top.full_masks, reference.full_masks
    if said and true:
        row, column = deepest_pixel(rle.decode(said[0]))
        return any(rle.decode(mask)[row, column] for mask in true)
    point = (top.boxes[0, :2] + top.boxes[0, 2:]) / 2
    return bool(((reference.boxes[:, :2] <= point) & (point <= reference.boxes[:, 2:])).all(1).any())


def deepest_pixel(mask: np.ndarray) -> tuple[int, int]:
    """(H, W) mask → (row, column) of its pixel farthest from the outside; the image's centre for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask.shape[0] // 2, mask.shape[1] // 2
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    depth = distance_transform_edt(np.pad(window, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(rows[0] + row), int(columns[0] + column)


def best_dice(mask: Mapping, references: Sequence[Mapping]) -> float:
    """Dice = 2 |A ∩ B| / (|A| + |B|) with the references together or the best single one; 1 where both are empty."""
    return max(_overlap(mask, other) for other in (rle.merge(list(references)), *references))


def _overlap(a: Mapping, b: Mapping) -> float:
    total = float(rle.area(a)) + float(rle.area(b))
    return 2 * float(rle.area(rle.merge([a, b], intersect=True))) / total if total else 1.0


def _pair_scores(rows: Sequence[Mapping], patients: Mapping[str, str], detail: bool) -> dict[str, Score]:
    clusters = [patients[row["image_id"]] for row in rows]
    scores = {}
    for name in METRICS[2:]:
        column = [{"sample_id": r["image_id"], "class": r["class"], "value": r[name]} for r in rows] if detail else None
        reason = _NO_MASKS if name == "dice" else "no reference regions"
        scores[name] = mean_score(name, VERSION, [row[name] for row in rows], clusters, column, reason)
    return scores


def _findings(regions: RegionSet | None, tree: LabelTree) -> RegionSet:
    if regions is None:
        return RegionSet(np.zeros((0, 4)), [], (1, 1))
    return regions.select([k for k, label in enumerate(regions.labels) if class_of(label, tree) != label])


def _greedy_pairs(said: RegionSet, truth: RegionSet, tree: LabelTree) -> list[tuple[int, int]]:
    """(predicted, reference) rows of one class with IoU at least 0.5; best score first, each reference once."""
    if not len(said) or not len(truth):
        return []
    overlap = pairwise_iou(said.boxes, truth.boxes)
    order = range(len(said)) if said.scores is None else np.argsort(-said.scores, kind="stable")
    pairs, free = [], set(range(len(truth)))
    for k in map(int, order):
        usable = [j for j in free if class_of(said.labels[k], tree) == class_of(truth.labels[j], tree)]
        best = max(usable, key=lambda j: overlap[k, j], default=None)
        if best is not None and overlap[k, best] >= 0.5:
            pairs.append((k, best))
            free.discard(best)
    return pairs
