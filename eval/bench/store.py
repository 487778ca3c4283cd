"""A region store of Med-GLIP-5M's size beside one COCO json of the same regions, in one run.

    python -m eval.bench.store [--images 1000000] [--regions 5300000] [--out scores.json]

The metadata is synthetic: drawn with a seed in Med-GLIP's proportions (198 labels, 38 classes, 7 modalities), without
pictures. Each measurement is a process of its own, so that its memory is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LABELS, CLASSES, MODALITIES = 198, 38, ("ct", "mri", "xray", "ultrasound", "fundus", "endoscopy", "dermoscopy")
SHARES = (0.55, 0.2, 0.1, 0.05, 0.03, 0.04, 0.03)  # ours: CT and MRI volumes make up most of such a collection

WRITE = """
import time, json, sys, numpy as np
from pathlib import Path
from grounding.store import StoreWriter
from grounding.types import GroundingSample, RegionSet
data = np.load(sys.argv[1])
boxes, labels, ends, modality = (data[k] for k in ("boxes", "labels", "ends", "modality"))
names, kinds = [str(x) for x in data["names"]], [str(x) for x in data["modalities"]]
began = time.perf_counter()
writer, first = StoreWriter(Path(sys.argv[2])), 0
for k, last in enumerate(ends):
    words = [names[x] for x in labels[first:last]]
    regions = RegionSet(boxes[first:last], words, (512, 512), texts=words)
    kind = kinds[modality[k]]
    writer.add(GroundingSample(f"synthetic/{k:07d}", f"synthetic/p{k // 20:06d}", "synthetic", kind, f"{k:07d}.png",
                               regions, tuple(names[:20])))
    first = last
writer.close()
print(json.dumps({"seconds": time.perf_counter() - began}))
"""

READ = """
import time, json, sys, numpy as np
def memory():
    rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon", "VmHWM")))
    return {k: int(v.split()[0]) / 1024 for k, v in rows.items()}
from grounding.store import open_store
before = memory()
began = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter() - began
order = np.random.default_rng(0).permutation(len(store))[:300_000].tolist()
for k in order[:1000]: store.metadata(k)
began = time.perf_counter()
regions = sum(len(store.metadata(k).labels) for k in order)
reads = len(order) / (time.perf_counter() - began)
began = time.perf_counter()
counts, total = np.zeros(len(store.labels), int), np.zeros(4)
for block in store.blocks:
    counts += np.bincount(block.labels, minlength=len(counts))
    total += block.boxes.sum(0)
streamed = counts.sum() / (time.perf_counter() - began)
began = time.perf_counter()
for k in range(len(store)): store.metadata(k)
print(json.dumps({"open_s": opened, "random_reads_per_s": reads, "regions_streamed_per_s": streamed,
    "all_rows_s": time.perf_counter() - began, "images": len(store), "regions": int(counts.sum()),
    "checksum": total.round(0).tolist(), "before_mb": before, "after_mb": memory()}))
"""

COCO = """
import time, json, sys, contextlib, io
began = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    from pycocotools.coco import COCO
    coco = COCO(sys.argv[1])
peak = [int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmRSS")][0]
print(json.dumps({"open_s": time.perf_counter() - began, "rss_mb": peak, "regions": len(coco.anns)}))
"""


def draw(images: int, regions: int, seed: int) -> dict[str, np.ndarray]:
    """Labels fall off as 1 / rank; each image has at least one region."""
    rng = np.random.default_rng(seed)
    counts = 1 + rng.multinomial(regions - images, rng.dirichlet(np.full(images, 2.0)))
    weights = 1 / np.arange(1, LABELS + 1)
    low = rng.random((regions, 2), np.float32) * 0.7
    return {
        "boxes": np.concatenate([low, low + 0.02 + rng.random((regions, 2), np.float32) * 0.28], 1),
        "labels": rng.choice(LABELS, regions, p=weights / weights.sum()).astype(np.int32),
        "ends": np.cumsum(counts),
        "modality": rng.choice(len(MODALITIES), images, p=SHARES),
        "names": np.array([f"region/class {k % CLASSES}/label {k}" for k in range(LABELS)]),
        "modalities": np.array(MODALITIES),
    }


def write_coco(data: dict[str, np.ndarray], path: Path) -> None:
    """One json, as COCO has it, written piece by piece."""
    owner = np.repeat(np.arange(len(data["ends"])), np.diff(data["ends"], prepend=0))
    xywh = (np.concatenate([data["boxes"][:, :2], data["boxes"][:, 2:] - data["boxes"][:, :2]], 1) * 512).round(2)
    with path.open("w") as file:
        file.write('{"images": [')
        rows = (f'{{"id": {k}, "file_name": "{k:07d}.png", "height": 512, "width": 512}}' for k in range(owner[-1] + 1))
        file.write(",".join(rows) + '], "categories": ')
        file.write(json.dumps([{"id": k, "name": str(name)} for k, name in enumerate(data["names"])]))
        file.write(', "annotations": [')
        for k, (box, label, image) in enumerate(
            zip(xywh.tolist(), data["labels"].tolist(), owner.tolist(), strict=True)
        ):
            area = round(box[2] * box[3], 1)
            row = {"id": k + 1, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
            file.write(("," if k else "") + json.dumps(row))
        file.write("]}")


def run(code: str, *arguments: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"eval.bench.store: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--regions", type=int, default=5_300_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, store, coco = Path(folder) / "data.npz", Path(folder) / "store", Path(folder) / "coco.json"
        drawn = draw(options.images, options.regions, options.seed)
        np.savez(data, **drawn)
        result = {"written": run(WRITE, data, store), "store": run(READ, store)}
        size = sum(file.stat().st_size for file in store.iterdir())
        result["written"] |= {"bytes": size, "bytes_a_region": size / options.regions}
        write_coco(drawn, coco)
        del drawn
        result["coco"] = run(COCO, coco) | {"bytes": coco.stat().st_size}
    print(as_text(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def as_text(result: dict) -> str:
    store, coco, written = result["store"], result["coco"], result["written"]
    after = store["after_mb"]
    return "\n".join(
        [
            f"synthetic metadata: {store['images']:,} images, {store['regions']:,} regions",
            f"write   {written['seconds']:.0f} s, {written['bytes_a_region']:.1f} bytes a region",
            f"open    store {store['open_s']:.2f} s; COCO json through pycocotools {coco['open_s']:.1f} s "
            f"({coco['open_s'] / store['open_s']:.0f} x)",
            f"memory  store {after['VmRSS']:.0f} MB resident after all was read ({after['RssAnon']:.0f} MB its own, "
            f"the rest mapped files); COCO json {coco['rss_mb']:,.0f} MB ({coco['rss_mb'] / after['VmRSS']:.0f} x)",
            f"read    {store['random_reads_per_s']:,.0f} random rows/s, {store['regions_streamed_per_s']:,.0f} "
            "regions/s streamed, in one process",
        ]
    )


if __name__ == "__main__":
    main()
