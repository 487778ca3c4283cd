"""Turn question and report sets in their own layouts into what a bridge is trained on (`medglip data questions`).

An adapter (`downstream.question_sets`, `downstream.report_sets`) yields what it `Found` in a source. Here is what the
adapters share, the table of layouts, and the build: images become a region store, samples JSON Lines, and patients and
images are on one side of a split alone.
"""

import importlib
import json
import os
import re
import shutil
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from configs import ConfigError, write_atomic
from downstream.region_qa import LOOKS_FILE
from downstream.samples import ReportSample, VQASample, to_row
from grounding.build import PART_ITEMS, Job, in_processes, make_part
from grounding.convert.record import Item, Regions, Skipped, finish, frame_scale, load
from grounding.convert.tables import NOT_ON_DISK, index_images
from grounding.images import MedicalImage
from grounding.split import split_by_group
from grounding.store import Store, StoreWriter, open_store, replace_folder
from grounding.types import GroundingSample

# Layout → adapter, what it was checked on, and the licence of the set where its publisher states one.
REAL, BOTH, FIXTURE = "real files", "real annotations", "fixture"
LAYOUTS = {
    "vqa-rad": ("question_sets.vqa_rad", REAL, "CC0 1.0"),
    "slake": ("question_sets.slake", BOTH, "CC BY 4.0"),
    "path-vqa": ("question_sets.path_vqa", FIXTURE, ""),
    "vqa-med": ("question_sets.vqa_med", BOTH, "CC BY 4.0"),
    "pmc-vqa": ("question_sets.pmc_vqa", FIXTURE, ""),
    "omnimedvqa": ("question_sets.omni_med_vqa", FIXTURE, ""),
    "csv": ("question_sets.csv_questions", FIXTURE, ""),
    "iu-xray": ("report_sets.iu_xray", BOTH, ""),
    "mimic-cxr": ("report_sets.mimic_cxr", FIXTURE, "PhysioNet Credentialed Health Data License 1.5.0"),
    "chexpert-plus": ("report_sets.chexpert_plus", FIXTURE, ""),
    "padchest-gr": ("report_sets.padchest_gr", FIXTURE, ""),
    "jsonl": ("report_sets.jsonl", FIXTURE, ""),
}


@dataclass(frozen=True)
class Box:
    """A region that a source states. `xyxy`: in pixels of `frame` (H, W), of the image itself where that is None, or in
    [0, 1] of it where `fraction`."""

    xyxy: tuple[float, ...]
    text: str
    attributes: dict[str, str] = field(default_factory=dict)
    fraction: bool = False
    frame: tuple[float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a sample. `named`: what the source calls it; `item`: reads it, None where it is not on disk."""

    image_id: str
    patient_id: str
    named: str
    item: Item | None


@dataclass(frozen=True)
class Found:
    """A sample with its images. `where`: file and row; `split`: the publisher's part (train, val, test), "" where there
    is none; `more`: further keys of its line in the output (`options`, `references`, `language`)."""

    where: str
    sample: VQASample | ReportSample
    pictures: tuple[Picture, ...]
    split: str = ""
    more: dict[str, Any] = field(default_factory=dict)


Yield = Iterator[Found | Skipped]


# Images of a source


def read_picture(file: Path, boxes: Sequence[Box], make: partial, key: str) -> Iterable[GroundingSample | Skipped]:
    """An image file with the regions that its source states; `make`: GroundingSample of what is left."""
    image = load(str(file))
    return sample_of_image(str(file), image, boxes, make, key)


def sample_of_image(
    stored: str | bytes, image: MedicalImage, boxes: Sequence[Box], make: partial, key: str
) -> Iterator[GroundingSample | Skipped]:
    """The sample of an image that is read, and the boxes that had to be left out. `stored`: its path, or its bytes."""
    size = image.pixels.shape[:2]
    regions = Regions(size, modality=make.keywords["modality"])
    for box in boxes:
        try:
            scale = (size[1], size[0]) if box.fraction else frame_scale(box.frame, size)
            regions.add_box(np.array(box.xyxy, np.float64) * np.tile(scale, 2), box.text, box.attributes)
        except ValueError as error:
            regions.left_out.append(f"{box.text}: {error}")
    yield from finish(make(image=stored, regions=regions.done(), spacing=image.spacing), regions, key)


def renamed(item: Item, image_id: str, patient_id: str) -> Item:
    """What a converter of `medglip data build` reads, under the names that the samples know it by."""
    return Item(image_id, partial(_renamed, item, image_id, patient_id))


def _renamed(item: Item, image_id: str, patient_id: str) -> Iterator[GroundingSample | Skipped]:
    for found in item.read():
        if isinstance(found, Skipped):
            yield replace(found, key=image_id)
        else:
            yield replace(found, image_id=image_id, patient_id=patient_id)


class Pictures:
    """Finds a source's images by the names that its lists give them."""

    def __init__(self, folder: Path, source: str, licence: str):
        self.folder, self.source, self.licence = folder, source, licence

    @cached_property
    def _found(self) -> dict[str, list[Path]]:
        return index_images(self.folder.resolve())

    def file(self, name: str) -> Path | None:
        """The one image file whose path ends with `name`, whatever its suffix. Raises ValueError where several do."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        stems = {parts[-1], PurePosixPath(parts[-1]).stem} if parts else set()
        files = [f for stem in stems for f in self._found.get(stem, []) if f.parts[-len(parts) : -1] == parts[:-1]]
        exact = [file for file in files if file.name == parts[-1]] or files
        if len(exact) > 1:
            raise ValueError(f"several files are called {name}, such as {exact[0]} and {exact[1]}; give ?images=FOLDER")
        return exact[0] if exact else None

    def __call__(
        self, name: str, modality: str, patient: str = "", study: str | None = None, boxes: Sequence[Box] = ()
    ) -> Picture:
        """`patient`, `study`: the source's words; without a patient the image is its own. Raises ValueError where
        several files have that name."""
        suffix = PurePosixPath(name).suffix
        key = name[: -len(suffix)] if re.fullmatch(r"\.\w{2,5}", suffix) else name
        image_id, who = f"{self.source}/{key}", f"{self.source}/{patient or key}"
        make = self.make(image_id, who, modality, f"{self.source}/{study}" if study else None)
        file = self.file(name)
        item = Item(image_id, partial(read_picture, file, tuple(boxes), make, image_id)) if file else None
        return Picture(image_id, who, name, item)

    def make(self, image_id: str, patient_id: str, modality: str, study_id: str | None = None) -> partial:
        known: dict[str, Any] = {"image_id": image_id, "patient_id": patient_id, "study_id": study_id}
        return partial(
            GroundingSample, **known, modality=modality, source=self.source, licence=self.licence, labelled=()
        )


# The build


@dataclass(frozen=True)
class QuestionConfig:
    """`sources`: each LAYOUT:PATH?name=N&licence=L&option=value, PATH below `root`.

    `split`: None puts all in `out`; "train", "val" or "test" the publisher's part of that name; "published" each of the
    publisher's parts in a folder of `out`, less what shares a patient or image with a later part; "image" parts of
    their own, made by patient and image with `shares` and `seed`. `embed`: image files go into the store.
    `workers`: processes that read images.
    """

    sources: tuple[str, ...]
    out: Path
    split: str | None = None
    shares: tuple[str, ...] = ("train=0.8", "test=0.2")
    seed: int = 0
    root: Path = Path(".")
    embed: bool = False
    workers: int = 1

    def __post_init__(self):
        if not self.sources or self.workers < 1:
            raise ConfigError("give one source or more, and one worker or more")
        if self.split not in (None, "published", "image", *ORDER):
            raise ConfigError(f"split is {self.split!r}; give {', '.join(ORDER)}, published or image")


@dataclass(frozen=True)
class QuestionReport:
    """What a build did. `parts`: part ("" where there is one alone) → questions, reports, images, patients. `skipped`:
    source, key, why of each row, image and sample that was left out. `text_only`: no image is on disk. `shared`: how
    many samples the publisher's parts had in common by patient or image, before any was left out."""

    parts: dict[str, dict[str, int]]
    skipped: list[dict[str, str]]
    text_only: bool
    shared: int


ORDER = ("train", "val", "test")  # what two of them share stays in the later one
Row = tuple[str, Found]  # name of the source, what it yields


def build_questions(config: QuestionConfig) -> QuestionReport:
    """Writes `out`/{store, questions.jsonl, reports.jsonl}, or `out`/PART/… for the parts of a split, and
    `out`/{skipped.jsonl, split.json}. Without any image on disk there is no store, and all samples are kept.

    Raises:
        ConfigError: a source, layout or option that does not exist, a part that no source has.
        AnnotationError: a source that is not what its layout says.
        ValueError: nothing could be kept.
    """
    rows, skipped = _collect(config)
    rows = _of_part(rows, config.split)
    partial_folder = config.out.with_name(f".{config.out.name}.part-{os.getpid()}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        store, missing = _store(rows, partial_folder, config)
        skipped += missing
        text_only = not len(store)
        rows = [_as_text(row) for row in rows] if text_only else list(_with_images(rows, store, skipped))
        if not rows:
            first = f"; the first: {skipped[0]['key']}: {skipped[0]['why']}" if skipped else ""
            raise ValueError(f"{config.out}: no question or report could be kept{first}")
        parts, shared = _parts(rows, store, config, skipped)
        counts = {name: _write(part, store, config.out / name, text_only) for name, part in parts.items()}
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    write_atomic(config.out / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped))
    about = {"split": config.split, "sources": list(config.sources), "shared_samples": shared, "parts": counts}
    if config.split == "image":
        about |= {"seed": config.seed, "shares": list(config.shares)}
    write_atomic(config.out / "split.json", json.dumps(about, indent=1) + "\n")
    return QuestionReport(counts, skipped, text_only, shared)


def _collect(config: QuestionConfig) -> tuple[list[Row], list[dict[str, str]]]:
    """All samples of all sources, and what was left out; a sample's id is used once."""
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    seen: set[str] = set()
    for given in config.sources:
        name, yielded = _read(given, config.root)
        if name in {row[0] for row in rows}:
            raise ConfigError(f"two sources are called {name!r}; add ?name=… to one")
        for found in yielded:
            if isinstance(found, Found) and (key := _sample_id(found.sample)) not in seen:
                seen.add(key)
                rows.append((name, found))
            else:
                left = found if isinstance(found, Skipped) else Skipped(found.where, f"{key} is there already")
                skipped.append({"source": name} | asdict(left))
    return rows, skipped


def _read(given: str, root: Path) -> tuple[str, Yield]:
    layout, colon, rest = given.partition(":")
    path, _, query = rest.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if not colon or layout not in LAYOUTS:
        raise ConfigError(f"source {given}: give LAYOUT:PATH; layouts: {', '.join(LAYOUTS)}")
    if not (root / path).exists():
        raise ConfigError(f"source {given}: {root / path} does not exist")
    adapter, _, licence = LAYOUTS[layout]
    module, function = adapter.split(".")
    name, licence = options.pop("name", layout), options.pop("licence", licence)
    try:
        return name, getattr(importlib.import_module(f"downstream.{module}"), function)(
            root / path, name, licence, **options
        )
    except TypeError as error:
        raise ConfigError(f"source {given}: {error}") from error


def _sample_id(sample: VQASample | ReportSample) -> str:
    return sample.sample_id if isinstance(sample, VQASample) else sample.study_id


def _of_part(rows: list[Row], split: str | None) -> list[Row]:
    if split not in (*ORDER, "published"):
        return rows
    there = Counter(found.split for _, found in rows)
    if split == "published" and set(there) - set(ORDER):
        raise ConfigError(f"{there['']} samples are in no published part; give split image, which makes one")
    if split in ORDER and not there[split]:
        told = ", ".join(name for name in there if name) or "none"
        raise ConfigError(f"no sample is in the published part {split}; there is: {told}")
    return rows if split == "published" else [row for row in rows if row[1].split == split]


# Images


def _store(rows: Sequence[Row], folder: Path, config: QuestionConfig) -> tuple[Store, list[dict[str, str]]]:
    """A store of every image that can be read, and the images that cannot, or are not there."""
    pictures = {picture.image_id: (name, picture) for name, found in rows for picture in found.pictures}
    missing = [
        {"source": name} | asdict(Skipped(picture.named, NOT_ON_DISK))
        for name, picture in pictures.values()
        if picture.item is None
    ]
    items = [(name, picture.item) for name, picture in pictures.values() if picture.item is not None]
    writer, source_of = StoreWriter(folder / "all"), {item.key: name for name, item in items}
    jobs = [
        Job("", folder / f"part-{start:09d}", [item for _, item in items[start : start + PART_ITEMS]], config.embed)
        for start in range(0, len(items), PART_ITEMS)
    ]
    done = map(make_part, jobs) if config.workers == 1 else in_processes(iter(jobs), config.workers)
    for made in sorted(part.folder for part in tqdm(done, "images", len(jobs), unit=" parts", disable=None)):
        for block in open_store(made).remapped(writer):
            writer.add_block(block)
        about = json.loads((made / "store.json").read_text())
        missing += [{"source": source_of.get(row["key"], "")} | row for row in about["skipped"]]
    writer.close()
    return open_store(folder / "all"), missing


def _as_text(row: Row) -> Row:
    """A question names the file that its image would be; a report keeps the ids."""
    name, found = row
    if isinstance(found.sample, ReportSample):
        return row
    return name, replace(found, sample=replace(found.sample, image=found.pictures[0].named))


def _with_images(rows: Sequence[Row], store: Store, skipped: list[dict[str, str]]) -> Iterator[Row]:
    """The samples that have an image in the store; a study loses those of its images that have none."""
    there = set(store.image_ids)
    for name, found in rows:
        kept = tuple(picture for picture in found.pictures if picture.image_id in there)
        if not kept:
            why = f"its image {found.pictures[0].named} is not on disk, or cannot be read"
            skipped.append({"source": name} | asdict(Skipped(found.where, why)))
        elif isinstance(found.sample, ReportSample):
            images = tuple(dict.fromkeys(picture.image_id for picture in kept))
            yield name, replace(found, pictures=kept, sample=replace(found.sample, images=images))
        else:
            yield name, found


# Parts


def _parts(
    rows: list[Row], store: Store, config: QuestionConfig, skipped: list[dict[str, str]]
) -> tuple[dict[str, list[Row]], int]:
    """Part → its samples, and how many the publisher's parts share with a later one."""
    if config.split == "image":
        shares = _shares(config.shares)
        strata = [f"{name}: {getattr(found.sample, 'question_type', 'report')}" for name, found in rows]
        sides = split_by_group(_groups(rows, store), strata, shares, config.seed)
        return {part: [r for r, s in zip(rows, sides, strict=True) if s == part] for part in shares}, 0
    groups = _groups(rows, store)
    last: dict[str, int] = {}
    for group, (_, found) in zip(groups, rows, strict=True):
        place = ORDER.index(found.split) if found.split else 0
        last[group] = max(last.get(group, 0), place)
    leaks = [bool(f.split) and ORDER.index(f.split) < last[g] for g, (_, f) in zip(groups, rows, strict=True)]
    if config.split != "published":
        return {"": rows}, sum(leaks)
    parts: dict[str, list[Row]] = {part: [] for part in ORDER if any(found.split == part for _, found in rows)}
    for leak, group, row in zip(leaks, groups, rows, strict=True):
        if leak:
            why = f"its patient or image is in the published {ORDER[last[group]]} part, too"
            skipped.append({"source": row[0]} | asdict(Skipped(row[1].where, why)))
        else:
            parts[row[1].split].append(row)
    return parts, sum(leaks)


def _shares(given: Sequence[str]) -> dict[str, float]:
    try:
        shares = {name: float(share) for name, _, share in (word.partition("=") for word in given)}
    except ValueError:
        raise ConfigError(f"shares {' '.join(given)}: give NAME=SHARE, such as train=0.8") from None
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        raise ConfigError(f"shares {shares} must be positive and sum to 1")
    return shares


def _groups(rows: Sequence[Row], store: Store) -> list[str]:
    """What must stay together: samples that a chain of patients, images and equal pixels connects."""
    pixels = dict(zip(store.image_ids, store.column("pixels"), strict=True))
    names: dict[tuple[str, str | bytes], int] = {}
    links = []
    for number, (_, found) in enumerate(rows):
        ids: list[tuple[str, str | bytes]] = [("patient", found.sample.patient_id)]
        ids += [("image", pixels.get(picture.image_id) or picture.image_id) for picture in found.pictures]
        links += [(number, names.setdefault(key, len(names))) for key in ids]
    a, b = np.array(links).T
    size = len(rows) + len(names)
    graph = coo_array((np.ones(len(a)), (a, b + len(rows))), (size, size))
    return connected_components(graph, directed=False)[1][: len(rows)].astype(str).tolist()


def _write(rows: Sequence[Row], store: Store, out: Path, text_only: bool) -> dict[str, int]:
    """store, questions.jsonl, reports.jsonl and looks.jsonl of one part."""
    wanted = {picture.image_id for _, found in rows for picture in found.pictures}
    places = [k for k, image_id in enumerate(store.image_ids) if image_id in wanted]
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "store", ignore_errors=True) if text_only else _write_store(store, places, out / "store")
    founds = [found for _, found in rows]
    lines: dict[type, list[str]] = defaultdict(list)
    for found in founds:
        line = json.dumps(to_row(found.sample) | found.more, ensure_ascii=False)
        lines[type(found.sample)].append(line + "\n")
    write_atomic(out / "questions.jsonl", "".join(lines[VQASample]))
    write_atomic(out / "reports.jsonl", "".join(lines[ReportSample]))
    write_atomic(out / LOOKS_FILE, "")  # nothing is known of the looks of what is boxed, so that lists give names alone
    patients = {found.sample.patient_id for found in founds}
    counts = {"questions": len(lines[VQASample]), "reports": len(lines[ReportSample])}
    return counts | {"images": len(places), "patients": len(patients)}


def _write_store(store: Store, places: Sequence[int], out: Path) -> None:
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    writer = StoreWriter(part)
    for block in store.remapped(writer, places):
        writer.add_block(block)
    writer.close()
    sources = Counter(zip(store.column("source"), store.column("licence"), strict=True))
    told = "\n".join(
        f"- {name}: {count} images, licence: {licence or 'not stated'}" for (name, licence), count in sources.items()
    )
    writer.describe(f"# Data card\n\nImages of question and report sets (`medglip data questions`).\n\n{told}\n")
    replace_folder(part, out)
