"""COCO average precision by class: the value from faster-coco-eval, the interval from weighted matches.

Boxes in COCO rows are xywh in pixels. Dimension key: D detections of one class, T IoU thresholds,
R bootstrap resamples.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from eval.statistics import SEED

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # an image and class, as COCO has it
RESAMPLES = 500


def coco_rows(references: Mapping, predictions: Mapping, class_of: Callable[[str], str]) -> tuple[dict, list[dict]]:
    """image_id → RegionSet of truth and of predictions → (COCO ground truth, COCO results).

    Ids are counted from 1 in sorted order. A prediction without scores counts as certain; predicted classes that no
    reference has are left out, since they have no category. An image without a prediction has no detections.
    """
    classes = sorted({class_of(label) for regions in references.values() for label in regions.labels})
    numbers = {name: k for k, name in enumerate(classes, 1)}
    images, annotations, results = [], [], []
    for number, image_id in enumerate(sorted(references), 1):
        height, width = references[image_id].image_size
        images.append({"id": number, "height": int(height), "width": int(width)})
        annotations += _rows(references[image_id], number, numbers, class_of)
        for row in _rows(predictions.get(image_id), number, numbers, class_of):
            results.append({"score": 1.0, **row})
    categories = [{"id": k, "name": name} for name, k in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def merge_classes(
    truth: Mapping, results: Sequence[Mapping], class_of: Callable[[str], str]
) -> tuple[dict, list[dict]]:
    """The same COCO rows with categories merged by class (".../lesion" → "lesion"); category ids are counted from 1.

    Results whose category the ground truth does not list are left out, as pycocotools does.
    """
    classes = sorted({class_of(category["name"]) for category in truth["categories"]})
    numbers = {name: k for k, name in enumerate(classes, 1)}
    new_id = {category["id"]: numbers[class_of(category["name"])] for category in truth["categories"]}
    annotations = [{**row, "category_id": new_id[row["category_id"]]} for row in truth["annotations"]]
    kept = [{**row, "category_id": new_id[row["category_id"]]} for row in results if row["category_id"] in new_id]
    categories = [{"id": k, "name": name} for name, k in numbers.items()]
    return {"images": truth["images"], "annotations": annotations, "categories": categories}, kept


def average_precision(truth: Mapping, results: Sequence[Mapping], iou_type: str = "bbox") -> dict[str, np.ndarray]:
    """Class name → (10,) AP at IoU .50, .55 ... .95 (all areas, 100 detections); their mean is COCO AP, the first AP50.

    Classes without a reference box are absent from the answer: COCO's -1 must never enter a mean. Annotation ids are
    counted anew from 1, since COCO takes an id of 0 for "not matched". iou_type: "bbox" or "segm".
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if not truth["annotations"]:
        return {}
    annotations = [_complete(row, k) for k, row in enumerate(truth["annotations"], 1)]
    reference = COCO({**truth, "annotations": annotations})
    evaluation = COCOeval_faster(reference, reference.loadRes([dict(row) for row in results]), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (T, 101 recalls, classes)
    names = {category["id"]: category["name"] for category in truth["categories"]}
    by_class = {names[k]: precision[:, :, i] for i, k in enumerate(evaluation.params.catIds)}
    return {name: values.mean(1) for name, values in by_class.items() if (values > -1).all()}


def bootstrap_precision(
    truth: Mapping,
    results: Sequence[Mapping],
    clusters: Mapping[Any, str],
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> dict[str, np.ndarray] | None:
    """Class name → (R, 10) box AP of each resample of the clusters; NaN where it holds no reference of the class.

    clusters: image id → patient. None with fewer than two clusters or with crowd annotations.
    """
    names = sorted({clusters[image["id"]] for image in truth["images"]})
    if len(names) < 2 or any(row.get("iscrowd") for row in truth["annotations"]):
        return None
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    column = {name: k for k, name in enumerate(names)}
    weights = {image["id"]: drawn[:, column[clusters[image["id"]]]] for image in truth["images"]}
    return {name: weighted_precision(*table, weights) for name, table in match_tables(truth, results).items()}


def match_tables(truth: Mapping, results: Sequence[Mapping]) -> dict[str, tuple[list, np.ndarray, dict]]:
    """Class name → (image ids (D), hits (D, T) bool, {image id: number of reference boxes}); best score first.

    Matched as COCO does: within an image greedily by score, each reference box once, at each IoU threshold anew.
    """
    boxes, found = defaultdict(list), defaultdict(list)
    for row in truth["annotations"]:
        boxes[row["category_id"], row["image_id"]].append(row["bbox"])
    for row in results:
        found[row["category_id"], row["image_id"]].append(row)
    images = sorted(image["id"] for image in truth["images"])
    tables = {}
    for category in truth["categories"]:
        k = category["id"]
        counts = {i: len(boxes[k, i]) for i in images if boxes[k, i]}
        if counts:
            matched = [_match(found[k, i], boxes[k, i], i) for i in images if found[k, i]]
            rows = sorted((row for image in matched for row in image), key=lambda row: -row[0])
            hits = np.array([row[2] for row in rows], dtype=bool).reshape(-1, len(IOU_THRESHOLDS))
            tables[category["name"]] = ([row[1] for row in rows], hits, counts)
    return tables


def weighted_precision(image_ids: Sequence, hits: np.ndarray, counts: Mapping, weights: Mapping) -> np.ndarray:
    """(R, T) interpolated AP (101 recall points) where image i counts weights[i] (R,) times; NaN without references."""
    total = sum(weights[i] * n for i, n in counts.items())
    if not image_ids:
        return np.where(total[:, None] > 0, 0.0, np.nan).repeat(hits.shape[1], 1)
    weight = np.stack([weights[i] for i in image_ids], 1).astype(float)
    columns = [_interpolated(weight * hits[:, t], weight, total) for t in range(hits.shape[1])]
    return np.stack(columns, 1)


def _interpolated(true: np.ndarray, weight: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(R, D) true-positive weights and weights, (R,) reference weights → (R,) AP."""
    found, said = true.cumsum(1), weight.cumsum(1)
    recall = found / np.maximum(total, 1)[:, None]
    precision = np.maximum.accumulate((found / np.maximum(said, np.spacing(1)))[:, ::-1], 1)[:, ::-1]
    # Each row's recall rises within [0, 1], so shifted rows form one sorted array and one search serves all.
    shift = 2.0 * np.arange(len(recall))[:, None]
    at = np.searchsorted((recall + shift).ravel(), (RECALLS[None] + shift).ravel()).reshape(len(recall), -1)
    at -= np.arange(len(recall))[:, None] * recall.shape[1]
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], 1)
    values = np.take_along_axis(padded, np.minimum(at, recall.shape[1]), 1).mean(1)
    return np.where(total > 0, values, np.nan)


def _match(found: Sequence[Mapping], boxes: Sequence, image_id: Any) -> list[tuple[float, Any, np.ndarray]]:
    """One image and class: (score, image id, hits (T,)) of each detection, best score first."""
    found = sorted(found, key=lambda row: -row["score"])[:MAX_DETECTIONS]
    if not boxes:
        return [(row["score"], image_id, np.zeros(len(IOU_THRESHOLDS), bool)) for row in found]
    overlap = rle.iou(np.array([r["bbox"] for r in found], float), np.array(boxes, float), [0] * len(boxes))
    free = np.ones((len(IOU_THRESHOLDS), len(boxes)), bool)
    rows = []
    for row, ious in zip(found, overlap, strict=True):
        usable = np.where(free & (ious >= IOU_THRESHOLDS[:, None]), ious, -1.0)
        best = usable.shape[1] - 1 - usable[:, ::-1].argmax(1)  # of equal overlaps COCO takes the last
        hits = usable.max(1) >= 0
        free[np.flatnonzero(hits), best[hits]] = False
        rows.append((row["score"], image_id, hits))
    return rows


def _rows(regions, number: int, numbers: Mapping[str, int], class_of: Callable[[str], str]) -> list[dict]:
    if regions is None:
        return []
    known = regions.select([k for k, label in enumerate(regions.labels) if class_of(label) in numbers])
    return known.to_coco(number, {label: numbers[class_of(label)] for label in known.labels})


def _complete(row: Mapping, number: int) -> dict:
    """What COCO evaluation reads of an annotation, with area and iscrowd where the file leaves them out."""
    return {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row, "id": number}
