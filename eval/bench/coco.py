"""Our COCO family beside faster-coco-eval's own run, on the same rows in one process.

    python -m eval.bench.coco [--images 2000] [--rounds 5] [--masks]

The rows are synthetic and seeded: 40 classes, about 6 boxes an image, detections that are shifted, doubled,
mislabelled, missing and tied in score. The program's own time is that of what its users run: COCO, loadRes, evaluate,
accumulate, summarize. Prints both times (the least of alternating rounds, since other programs only add to it), their
ratio, and the largest difference of the twelve values.
"""

import argparse
import contextlib
import copy
import gc
import io
import time

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle

from eval.coco import COCO_METRICS, coco_family

SIZE, CLASSES = 512, 40


def draw(images: int, masks: bool, seed: int = 0) -> tuple[dict, list[dict]]:
    """(COCO ground truth, COCO results); boxes are xywh in pixels."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(1, 12)):
            size = rng.choice([20, 60, 200]) * rng.uniform(0.6, 1.4, 2)
            box = np.concatenate([rng.uniform(0, SIZE - size), size])
            kind = int(rng.integers(1, CLASSES + 1))
            annotations.append(_row(image, kind, box, masks) | {"id": len(annotations) + 1, "iscrowd": 0})
            for _ in range(rng.integers(0, 4)):
                shifted = box + rng.normal(0, 0.08, 4) * np.tile(size, 2)
                said = kind if rng.random() > 0.15 else int(rng.integers(1, CLASSES + 1))
                row = _row(image, said, shifted.clip(0.5, SIZE), masks)
                results.append(row | {"score": float(rng.integers(1, 100)) / 100})
    for row in annotations:
        row["area"] = float(rle.area(row["segmentation"])) if masks else row["bbox"][2] * row["bbox"][3]
    truth = {
        "images": [{"id": k, "height": SIZE, "width": SIZE} for k in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    return truth, results


def _row(image: int, kind: int, box: np.ndarray, masks: bool) -> dict:
    row = {"image_id": image, "category_id": kind}
    if masks:
        x, y, w, h = box
        corners = [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
        row["segmentation"] = rle.merge(rle.frPyObjects(corners, SIZE, SIZE))
    return row | {"bbox": [float(v) for v in box]}


def theirs(truth: dict, results: list[dict], iou_type: str) -> np.ndarray:
    """The twelve values of faster-coco-eval."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(truth)
        evaluation = COCOeval_faster(reference, reference.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats[:12], float)


def ours(truth: dict, results: list[dict], iou_type: str) -> np.ndarray:
    """The twelve values of eval/coco.py; -1 where undefined, as COCO has it."""
    family = coco_family(truth, results, iou_type).values()
    columns = ([row[name] for row in family if row[name] is not None] for name in COCO_METRICS)
    return np.array([np.mean(column) if column else -1.0 for column in columns])


def measure(rounds: int, *rows) -> tuple[np.ndarray, list[np.ndarray]]:
    """(least seconds of ours and theirs, their values). The program writes into the rows, so each run has its own."""
    times, values = [], [np.empty(0), np.empty(0)]
    for k in range(rounds):
        seconds = [0.0, 0.0]
        for who in (0, 1) if k % 2 else (1, 0):
            copied = copy.deepcopy(rows)
            gc.collect()
            began = time.perf_counter()
            values[who] = (ours, theirs)[who](*copied)
            seconds[who] = time.perf_counter() - began
        times.append(seconds)
    return np.min(times, 0), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masks", action="store_true", help="masks instead of boxes")
    options = parser.parse_args()
    truth, results = draw(options.images, options.masks)
    kind = "segm" if options.masks else "bbox"
    if options.masks:  # of a result with both, the program takes the box's area
        results = [{key: value for key, value in row.items() if key != "bbox"} for row in results]
    (own, program), values = measure(options.rounds, truth, results, kind)
    print(f"{options.images:,} images, {len(truth['annotations']):,} references, {len(results):,} detections, {kind}")
    print(f"eval.coco {own:.2f} s, faster-coco-eval {program:.2f} s: {own / program:.2f} x")
    print(f"largest difference of the twelve values: {np.abs(values[0] - values[1]).max():.1e}")


if __name__ == "__main__":
    main()
