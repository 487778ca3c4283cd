"""Does the audit find planted leaks, and only those? Measured on real images.

    python -m eval.bench.leakage --data ../shared/data --out runs/leakage.json

Half of the real images, split by patient, are the training set, the other half the test set. Into the test set 500
leaks are planted: copies, resized (0.5 to 2 times, each side by itself), compressed again (JPEG, quality 30 to 80),
flipped or turned, all without patient or study; true neighbouring slices under another name (as many as the data hold
within `eval.leakage.NEIGHBOUR`, 37); and, of a training patient, a picture that is in no set. A leak counts as found
where the audit names the very pair, by the kind that was planted. Rates include decoding; two processes decode.
"""

import argparse
import json
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs import write_atomic
from eval.bench.real_images import Item, read_items
from eval.fingerprint import Fingerprint, fingerprint, read_picture
from eval.leakage import NEIGHBOUR, Images, audit, audit_questions, flagged, images_of_questions, report

PLANTS = 500
QUESTIONS = 50
PROCESSES = 2
PIXEL_KINDS = {
    "copy": "pixels",
    "resized": "near-duplicate",
    "compressed": "near-duplicate",
    "flipped": "near-duplicate",
}
# Pairs of images of different "patients" (file names, where a source knows none) that were looked at side by side and
# show the same picture: one breast scanned again, one blood smear a little further on.
SAME_PICTURE = {
    frozenset(("busi/malignant (4)", "busi/malignant (5)")),
    frozenset(("busi/malignant (7)", "busi/malignant (8)")),
    frozenset(("busi/malignant (7)", "busi/malignant (9)")),
    frozenset(("busi/malignant (8)", "busi/malignant (9)")),
    frozenset(("bccd/BloodImage_00037", "bccd/BloodImage_00038")),
}


# The two sets


def split(items: Sequence[Item], rng: np.random.Generator) -> tuple[list[Item], list[Item], list[tuple[Item, Item]]]:
    """(train, test, neighbours): no patient on both sides. A neighbour is (training slice, slice to plant); all of the
    volumes that hold some are training volumes."""
    neighbours = _neighbours(items)
    planted = {slice_.id for _, slice_ in neighbours}
    first = {slice_.patient for _, slice_ in neighbours}
    patients: dict[str, list[str]] = defaultdict(list)  # source → patients
    for item in items:
        source = item.id.split("/")[0]
        if item.patient not in first and item.patient not in patients[source]:
            patients[source].append(item.patient)
    for source in patients.values():
        first.update(source[k] for k in rng.permutation(len(source))[: len(source) // 2])
    rest = [item for item in items if item.id not in planted]
    return [i for i in rest if i.patient in first], [i for i in rest if i.patient not in first], neighbours


def _neighbours(items: Sequence[Item]) -> list[tuple[Item, Item]]:
    """As many slices as can be taken out so that each has a slice within NEIGHBOUR left: the usual greedy cover of
    points on a line."""
    volumes: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.study is not None:
            volumes[item.study].append(item)
    pairs = []
    for volume in volumes.values():
        left = sorted(volume, key=lambda item: item.frame)
        while left:
            kept = [item for item in left if item.frame - left[0].frame <= NEIGHBOUR][-1]
            near = [item for item in left if abs(item.frame - kept.frame) <= NEIGHBOUR]
            pairs += [(kept, item) for item in near if item is not kept]
            left = left[len(near) :]
    return pairs


# Plants


def plant(
    train: Sequence[Item],
    test: Sequence[Item],
    neighbours: Sequence[tuple[Item, Item]],
    folder: Path,
    rng: np.random.Generator,
) -> tuple[list[Item], list[Item]]:
    """(test without the pictures that stand in, plants): PLANTS of them, files in `folder`."""
    plants = [replace(s, id=f"planted/neighbour-{a.id}", origin=a.id, kind="neighbour") for a, s in neighbours]
    plants = [replace(item, id=f"{item.id}-{k}") for k, item in enumerate(plants)]
    each, extra = divmod(PLANTS - len(plants), len(PIXEL_KINDS) + 1)
    counts = {kind: each + (k < extra) for k, kind in enumerate((*PIXEL_KINDS, "patient"))}
    drawn = iter(rng.permutation(len(train)).tolist())
    for kind in PIXEL_KINDS:
        for k in range(counts[kind]):
            origin = train[next(drawn)]
            path = _write(kind, read_picture(origin.path), folder / f"{kind}-{k}", rng)
            plants.append(Item(f"planted/{kind}-{k}", path, None, origin=origin.id, kind=PIXEL_KINDS[kind]))
    out = {test[k].id: test[k] for k in rng.permutation(len(test))[: counts["patient"]]}
    for k, picture in enumerate(out.values()):
        origin = train[next(drawn)]
        plants.append(Item(f"planted/patient-{k}", picture.path, origin.patient, origin=origin.id, kind="patient"))
    return [item for item in test if item.id not in out], plants


def _write(kind: str, pixels: np.ndarray, stem: Path, rng: np.random.Generator) -> Path:
    image = Image.fromarray(pixels)
    if kind == "compressed":
        path = stem.with_suffix(".jpg")
        image.save(path, quality=int(rng.integers(30, 81)))
        return path
    if kind == "resized":
        width, height = (max(8, round(side * rng.uniform(0.5, 2))) for side in image.size)
        image = image.resize((width, height), Image.Resampling(int(rng.choice([1, 2, 3]))))
    if kind == "flipped":
        image = image.transpose(Image.Transpose(int(rng.integers(0, 7))))
    path = stem.with_suffix(".png")
    image.save(path, compress_level=1)
    return path


# The audit


def images_of(name: str, items: Sequence[Item], prints: Sequence[Fingerprint]) -> Images:
    """Columns for `eval.leakage`."""
    return Images(
        name=name,
        ids=[item.id for item in items],
        patients=[item.patient for item in items],
        studies=[item.study for item in items],
        frames=[item.frame for item in items],
        pixels=[item.pixels for item in prints],
        thumbnails=np.stack([item.thumbnail for item in prints]),
    )


def _read(path: Path) -> Fingerprint:
    return fingerprint(read_picture(path))


def read_prints(items: Sequence[Item]) -> list[Fingerprint]:
    """Fingerprints, read by PROCESSES processes."""
    with get_context("spawn").Pool(PROCESSES) as pool:
        return pool.map(_read, [item.path for item in items], chunksize=16)


def measure_plants(data: Path, folder: Path, seed: int) -> dict:
    """Plants found by kind, real test images flagged, and the rate."""
    rng = np.random.default_rng(seed)
    train, test, neighbours = split(read_items(data), rng)
    test, plants = plant(train, test, neighbours, folder, rng)
    items = [*train, *test, *plants]
    start, cpu = time.perf_counter(), _cpu_seconds()
    prints = read_prints(items)
    middle = time.perf_counter()
    columns = images_of("train", train, prints[: len(train)])
    leaks = audit(columns, images_of("test", [*test, *plants], prints[len(train) :]))
    end, cpu = time.perf_counter(), _cpu_seconds() - cpu
    named = {(leak.kind, leak.id_a, leak.id_b) for leak in leaks}
    found = [item for item in plants if _is_named(item, train, named)]
    real = [leak for leak in leaks if not leak.id_b.startswith("planted/")]
    false = [leak for leak in real if frozenset((leak.id_a, leak.id_b)) not in SAME_PICTURE]
    return {
        "train": len(train),
        "test": len(test),
        "planted": dict(Counter(_name(item) for item in plants)),
        "found": dict(Counter(_name(item) for item in found)),
        "missed": sorted({item.id for item in plants} - {item.id for item in found}),
        "real test images flagged": len(flagged(real)),
        "of them the same picture, looked at": len(flagged(real) - flagged(false)),
        "false share": len(flagged(false)) / len(test),
        "false": [f"{leak.kind}: {leak.id_a} {leak.id_b} {leak.detail}" for leak in false],
        "neighbours found without their study": _by_picture(columns, plants, prints[-len(plants) :]),
        "seconds": {"read": middle - start, "audit": end - middle, "processor": cpu},
        "images a second": len(items) / (end - start),
        "images a second and core": len(items) / cpu,
        "report": report(leaks),
    }


def _name(item: Item) -> str:
    return item.id.removeprefix("planted/").split("-")[0]


def _is_named(item: Item, train: Sequence[Item], named: set[tuple[str, str, str]]) -> bool:
    """By its kind, and with its origin; with any image of the patient, where it is the patient that leaks."""
    patient = next(other.patient for other in train if other.id == item.origin)
    partners = [o.id for o in train if o.patient == patient] if item.kind in ("patient", "neighbour") else [item.origin]
    return any((item.kind, partner, item.id) in named for partner in partners)


def _by_picture(train: Images, plants: Sequence[Item], prints: Sequence[Fingerprint]) -> str:
    rows = [k for k, item in enumerate(plants) if item.kind == "neighbour"]
    bare = [replace(plants[k], patient=None, study=None, frame=None) for k in rows]
    return f"{len(flagged(audit(train, images_of('bare', bare, [prints[k] for k in rows]))))} of {len(rows)}"


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_pairs(data: Path) -> dict:
    """Every real image against all others: pairs of different patients that are called the same picture."""
    items = read_items(data)
    leaks = audit(images_of("all", items, read_prints(items)))
    patients = {item.id: item.patient for item in items}
    pairs = {
        frozenset((leak.id_a, leak.id_b))
        for leak in leaks
        if leak.kind in ("pixels", "near-duplicate") and patients[leak.id_a] != patients[leak.id_b]
    }
    return {
        "images": len(items),
        "pairs flagged": len(pairs),
        "of them the same picture, looked at": len(pairs & SAME_PICTURE),
        "false": sorted(" and ".join(sorted(pair)) for pair in pairs - SAME_PICTURE),
    }


# Beyond the planted leaks


def _changes(rng: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    def curve(image: Image.Image, function: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
        return Image.fromarray((function(np.asarray(image) / 255.0).clip(0, 1) * 255 + 0.5).astype(np.uint8))

    def gamma(image: Image.Image) -> Image.Image:
        power = float(rng.choice([0.7, 0.8, 1.25, 1.4]))
        return curve(image, lambda x: x**power)

    def contrast(image: Image.Image) -> Image.Image:
        factor, shift = rng.uniform(0.8, 1.25), rng.uniform(-0.08, 0.08)
        return curve(image, lambda x: (x - 0.5) * factor + 0.5 + shift)

    def crop(image: Image.Image) -> Image.Image:
        left, top, right, bottom = rng.uniform(0, 0.05, 4) * np.tile(image.size, 2)
        return image.crop((int(left), int(top), int(image.width - right), int(image.height - bottom)))

    def pad(image: Image.Image) -> Image.Image:
        border = tuple(int(side) for side in rng.uniform(0, 0.05, 4) * np.tile(image.size, 2))
        return ImageOps.expand(image, border, fill=int(rng.choice([0, 255])) * (1 if image.mode == "L" else 0x10101))

    def together(image: Image.Image) -> Image.Image:
        width, height = (max(8, round(side * rng.uniform(0.5, 1))) for side in image.size)
        file = BytesIO()
        gamma(crop(image).resize((width, height))).save(file, "JPEG", quality=40)
        return ImageOps.mirror(Image.open(file))

    return {
        "gamma 0.7 to 1.4": gamma,
        "contrast 0.8 to 1.25, brightness ±8 %": contrast,
        "crop of up to 5 % a side": crop,
        "border of up to 5 % a side": pad,
        "letterbox to a square": lambda image: ImageOps.pad(image, (512, 512)),
        "crop, smaller, gamma, JPEG 40, mirrored": together,
    }


def measure_changes(data: Path, seed: int, count: int = 300) -> dict[str, float]:
    """Share of `count` real images that are found again after a change, by the change."""
    rng = np.random.default_rng(seed)
    items = read_items(data)
    items = [items[k] for k in rng.permutation(len(items))[:count]]
    pictures = [Image.fromarray(read_picture(item.path)) for item in items]
    originals = images_of("originals", items, [fingerprint(np.asarray(picture)) for picture in pictures])
    shares = {}
    for name, change in _changes(rng).items():
        changed = [replace(item, patient=None, study=None, frame=None) for item in items]
        prints = [fingerprint(np.asarray(change(picture))) for picture in pictures]
        leaks = audit(originals, images_of(name, changed, prints))
        shares[name] = len(flagged(leak for leak in leaks if leak.id_a == leak.id_b)) / len(items)
    return shares


# Questions


def measure_questions(data: Path, folder: Path, seed: int) -> dict:
    """VQA-RAD, half of its images in training: QUESTIONS questions about training images among those about the rest,
    half of them with the image saved again, smaller, under another name."""
    rng = np.random.default_rng(seed)
    root = (data / "vqa-rad/data").resolve()
    rows = json.loads((root / "trainset.json").read_text(encoding="utf-8"))
    names = sorted({row["image_name"] for row in rows})
    train = {names[k] for k in rng.permutation(len(names))[: len(names) // 2]}
    about = [row for row in rows if row["image_name"] in train]
    planted = [about[k] for k in rng.permutation(len(about))[:QUESTIONS]]
    renamed = [_saved_again(row, root / "images", folder) for row in planted[: QUESTIONS // 2]]
    honest = [row for row in rows if row["image_name"] not in train]
    same_file = planted[QUESTIONS // 2 :]
    test = [{**row, "image_name": str(root / "images" / row["image_name"])} for row in honest + same_file]
    (folder / "test.json").write_text(json.dumps([*test, *renamed]), encoding="utf-8")
    items = [Item(f"vqa-rad/{name}", root / "images" / name, None) for name in sorted(train)]
    questions = images_of_questions(folder / "test.json", folder)
    named = flagged(audit_questions(images_of("train", items, [_read(item.path) for item in items]), questions))
    expected = {str(row["qid"]) for row in planted}
    return {
        "questions": len(test) + len(renamed),
        "images not read": len(questions.unread),
        "found": len(named & expected),
        "others named": sorted(named - expected),
    }


def _saved_again(row: dict, images: Path, folder: Path) -> dict:
    name = f"again-{row['qid']}.jpg"
    with Image.open(images / row["image_name"]) as image:
        image.convert("RGB").resize((400, 360)).save(folder / name, quality=60)
    return {**row, "image_name": name}


def lines(results: dict) -> Iterator[str]:
    """What to read."""
    plants, questions = results["plants"], results["questions"]
    yield f"{plants['train']} training images, {plants['test']} test images and {PLANTS} plants"
    for kind, count in plants["planted"].items():
        yield f"  {kind:<12}{plants['found'].get(kind, 0):>4} of {count}"
    yield f"  {'all':<12}{sum(plants['found'].values()):>4} of {PLANTS}"
    yield f"neighbouring slices found by their picture alone: {plants['neighbours found without their study']}"
    flagged_, same = plants["real test images flagged"], plants["of them the same picture, looked at"]
    yield f"real test images flagged: {flagged_}, of them the same picture {same}; false {plants['false share']:.2%}"
    pairs = results["pairs"]
    yield f"all {pairs['images']} against each other: {pairs['pairs flagged']} pairs of different patients, " + (
        f"{pairs['of them the same picture, looked at']} of them the same picture"
    )
    yield f"{plants['images a second']:.0f} images/s ({plants['images a second and core']:.0f} a second of one core)"
    yield f"questions: {questions['found']} of {QUESTIONS} named, {len(questions['others named'])} others"
    for name, share in results["changes"].items():
        yield f"  found after {name:<42}{share:>7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the real sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "seed": options.seed,
            "plants": measure_plants(options.data, Path(folder), options.seed),
            "pairs": measure_pairs(options.data),
            "questions": measure_questions(options.data, Path(folder), options.seed),
            "changes": measure_changes(options.data, options.seed),
        }
    print("\n".join(lines(results)))
    if options.out:
        write_atomic(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
