"""COCO average precision and recall by class: values from faster-coco-eval, intervals from weighted matches.

Boxes in COCO rows are xywh in pixels. Dimension key: D detections of one class, T IoU thresholds,
R bootstrap resamples.
"""

import gc
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
# Sizes are COCO's: areas in pixels below 32², to 96², above. AR1, AR10, AR100: so many detections an image and class.
COCO_METRICS = (
    *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    *("AR1", "AR10", "AR100", "AR small", "AR medium", "AR large"),
)

_BLOCK = 8_000_000  # weights held at once, so that many detections do not need gigabytes


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

    Classes without a reference box are absent from the answer: COCO's -1 must never enter a mean. iou_type: "bbox" or
    "segm".
    """
    by_class = {name: precision[:, :, 0, -1] for name, (precision, _) in _evaluate(truth, results, iou_type).items()}
    return {name: values.mean(1) for name, values in by_class.items() if (values > -1).all()}


def coco_family(
    truth: Mapping, results: Sequence[Mapping], iou_type: str = "bbox"
) -> dict[str, dict[str, float | None]]:
    """Class name → the twelve COCO_METRICS (Lin et al. 2014, https://cocodataset.org/#detection-eval).

    None where the class has no reference of that size; a class without any reference is absent. The mean of a metric
    over the classes that have it is COCO's own number. iou_type: "bbox" or "segm" (every row then has a mask).
    """
    family = {}
    for name, (precision, recall) in _evaluate(truth, results, iou_type).items():
        if (precision[..., 0, -1] > -1).all():
            family[name] = dict(zip(COCO_METRICS, _twelve(precision, recall), strict=True))
    return family


def _twelve(precision: np.ndarray, recall: np.ndarray) -> list[float | None]:
    """(T, 101, 4 areas, 3 limits) precision and (T, 4, 3) recall of one class → its COCO_METRICS."""

    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if (values > -1).all() else None

    of_all = precision[..., 0, -1]
    return [
        *(mean(of_all), mean(of_all[0]), mean(of_all[5])),
        *(mean(precision[..., area, -1]) for area in (1, 2, 3)),
        *(mean(recall[:, 0, limit]) for limit in (0, 1, 2)),
        *(mean(recall[:, area, -1]) for area in (1, 2, 3)),
    ]


def _evaluate(truth: Mapping, results: Sequence[Mapping], iou_type: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Class name → (precision (T, 101, areas, limits), recall (T, areas, limits)); -1 where undefined.

    Annotation ids are counted anew from 1, since COCO takes an id of 0 for "not matched".
    """
    if not truth["annotations"]:
        return {}
    collecting = gc.isenabled()
    gc.disable()  # every row lives to the end, so a collection frees nothing, and there would be many
    try:
        return _run(truth, results, iou_type)
    finally:
        if collecting:
            gc.enable()


def _run(truth: Mapping, results: Sequence[Mapping], iou_type: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = [_complete(row, k) for k, row in enumerate(truth["annotations"], 1)]
    found = [dict(row) for row in results]
    if iou_type == "segm":  # of a result with box and mask the library takes the box's area, which is not the mask's
        for row in found:
            row.pop("bbox", None)
    images = truth["images"]
    if not all(isinstance(image["id"], int) for image in images):  # COCO asks for numbers
        images = _number(images, (annotations, found))
    reference = COCO({**truth, "images": images, "annotations": annotations})
    evaluation = COCOeval_faster(reference, reference.loadRes(found), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = (np.asarray(evaluation.eval[key]) for key in ("precision", "recall"))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return {names[k]: (precision[:, :, i], recall[:, i]) for i, k in enumerate(evaluation.params.catIds)}


def bootstrap_precision(
    truth: Mapping,
    results: Sequence[Mapping],
    clusters: Mapping[Any, str],
    seed: int = SEED,
    resamples: int = RESAMPLES,
    iou_type: str = "bbox",
) -> dict[str, np.ndarray] | None:
    """Class name → (R, 10) AP of each resample of the clusters; NaN where it holds no reference of the class.

    clusters: image id → patient. None with fewer than two clusters or with crowd annotations.
    """
    names = sorted({clusters[image["id"]] for image in truth["images"]})
    if len(names) < 2 or any(row.get("iscrowd") for row in truth["annotations"]):
        return None
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    column = {name: k for k, name in enumerate(names)}
    weights = {image["id"]: drawn[:, column[clusters[image["id"]]]] for image in truth["images"]}
    return {name: weighted_precision(*table, weights) for name, table in match_tables(truth, results, iou_type).items()}


def match_tables(
    truth: Mapping, results: Sequence[Mapping], iou_type: str = "bbox"
) -> dict[str, tuple[list, np.ndarray, dict]]:
    """Class name → (image ids (D), hits (D, T) bool, {image id: number of reference boxes}); best score first.

    Matched as COCO does: within an image greedily by score, each reference box once, at each IoU threshold anew.
    """
    key = "segmentation" if iou_type == "segm" else "bbox"
    shapes, found = defaultdict(list), defaultdict(list)
    for row in truth["annotations"]:
        shapes[row["category_id"], row["image_id"]].append(row[key])
    for row in results:
        found[row["category_id"], row["image_id"]].append(row)
    images = sorted(image["id"] for image in truth["images"])
    tables = {}
    for category in truth["categories"]:
        k = category["id"]
        counts = {i: len(shapes[k, i]) for i in images if shapes[k, i]}
        if counts:
            matched = [_match(found[k, i], shapes[k, i], i, key) for i in images if found[k, i]]
            rows = sorted((row for image in matched for row in image), key=lambda row: -row[0])
            hits = np.array([row[2] for row in rows], dtype=bool).reshape(-1, len(IOU_THRESHOLDS))
            tables[category["name"]] = ([row[1] for row in rows], hits, counts)
    return tables


def weighted_precision(image_ids: Sequence, hits: np.ndarray, counts: Mapping, weights: Mapping) -> np.ndarray:
    """(R, T) interpolated AP (101 recall points) where image i counts weights[i] (R,) times; NaN without references."""
    total = sum(weights[i] * n for i, n in counts.items())
    if not image_ids:
        return np.where(total[:, None] > 0, 0.0, np.nan).repeat(hits.shape[1], 1)
    block = max(1, _BLOCK // len(image_ids))
    blocks = []
    for start in range(0, len(total), block):
        weight = np.stack([weights[i][start : start + block] for i in image_ids], 1).astype(float)
        part = total[start : start + block]
        blocks.append(np.stack([_interpolated(column, weight, part) for column in hits.T], 1))
    return np.concatenate(blocks)


def _interpolated(hits: np.ndarray, weight: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(D,) hits, (R, D) weights of the detections, (R,) reference weights → (R,) AP."""
    found, said = (weight * hits).cumsum(1), weight.cumsum(1)
    precision = np.maximum.accumulate((found / np.maximum(said, np.spacing(1)))[:, ::-1], 1)[:, ::-1]
    # Only a hit raises recall; the recall points that it passes get the best precision from there on.
    recall, precision = found[:, hits] / np.maximum(total, 1)[:, None], precision[:, hits]
    passed = np.searchsorted(RECALLS, recall, side="right")
    values = (precision * np.diff(passed, axis=1, prepend=0)).sum(1) / len(RECALLS)
    return np.where(total > 0, values, np.nan)


def _match(found: Sequence[Mapping], shapes: Sequence, image_id: Any, key: str) -> list[tuple[float, Any, np.ndarray]]:
    """One image and class: (score, image id, hits (T,)) of each detection, best score first."""
    found = sorted(found, key=lambda row: -row["score"])[:MAX_DETECTIONS]
    if not shapes:
        return [(row["score"], image_id, np.zeros(len(IOU_THRESHOLDS), bool)) for row in found]
    said = [row[key] for row in found]
    if key == "bbox":
        said, shapes = np.array(said, float), np.array(shapes, float)
    overlap = rle.iou(said, shapes, [0] * len(shapes))
    free = np.ones((len(IOU_THRESHOLDS), len(shapes)), bool)
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


def _number(images: Sequence[Mapping], tables: Sequence[list[dict]]) -> list[dict]:
    """Images with ids from 1, in the order of their ids as text; the rows of the tables (ours to change) follow."""
    ids = {image_id: k for k, image_id in enumerate(sorted((image["id"] for image in images), key=str), 1)}
    for row in (row for table in tables for row in table):
        row["image_id"] = ids[row["image_id"]]
    return [{**image, "id": ids[image["id"]]} for image in images]


def _complete(row: Mapping, number: int) -> dict:
    """What COCO evaluation reads of an annotation, with area (of the mask, else the box) and iscrowd where the file
    leaves them out."""
    if "area" in row and "iscrowd" in row:
        return {**row, "id": number}
    mask = row.get("segmentation")
    coded = isinstance(mask, dict) and not isinstance(mask["counts"], list)
    area = float(rle.area(mask)) if coded else row["bbox"][2] * row["bbox"][3]
    return {"iscrowd": 0, "area": area, **row, "id": number}
