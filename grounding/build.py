"""Build a region store from datasets in their own layouts (`medglip data build`).

The sources' items are cut into parts. Worker processes turn each part into a small store of its own, complete or not
there; then the parts are joined. A build that was killed goes on with the parts that are missing.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from configs import ConfigError, write_atomic
from eval.fingerprint import fingerprint
from grounding.convert.record import Item, Skipped, load
from grounding.converters import CONVERTERS
from grounding.datacard import data_card
from grounding.images import read_image
from grounding.labels import load_label_tree
from grounding.stats import unmapped_labels
from grounding.store import Store, StoreError, StoreWriter, open_store, replace_folder
from grounding.types import GroundingSample

PART_ITEMS = 64


@dataclass(frozen=True)
class BuildConfig:
    """`sources`: each CONVERTER:PATH?name=N&licence=L&option=value, PATH below `root`. `embed`: image files go into the
    store; otherwise it points at them. `max_bad`: with more records skipped than this, the build stops."""

    sources: tuple[str, ...]
    out: Path
    root: Path = Path(".")
    workers: int = os.cpu_count() or 1
    embed: bool = False
    max_bad: int | None = None

    def __post_init__(self):
        if not self.sources or self.workers < 1:
            raise ValueError("give one source or more, and one worker or more")


@dataclass(frozen=True)
class Source:
    """One of `BuildConfig.sources`. The option `name` (default: the converter's) is kept with each image; options that
    are not `name` or `licence` are the converter's own."""

    converter: str
    path: Path
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, root: Path) -> "Source":
        """Raises ConfigError where the converter is not known or the path does not exist."""
        converter, colon, rest = text.partition(":")
        path, _, query = rest.partition("?")
        path = root / path
        if not colon or converter not in CONVERTERS:
            raise ConfigError(f"source {text}: give CONVERTER:PATH; converters: {', '.join(CONVERTERS)}")
        if not path.exists():
            raise ConfigError(f"source {text}: {path} does not exist")
        return cls(converter, path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)))

    @property
    def name(self) -> str:
        return self.options.get("name", self.converter)

    @property
    def licence(self) -> str:
        return self.options.get("licence", CONVERTERS[self.converter].licence)

    def items(self) -> Iterator[Item]:
        """Raises ConfigError where the converter does not know an option, or lacks one."""
        options = {key: value for key, value in self.options.items() if key not in ("name", "licence")}
        try:
            return CONVERTERS[self.converter].read(self.path, source=self.name, licence=self.licence, **options)
        except TypeError as error:
            raise ConfigError(f"source {self.converter}:{self.path}: {error}") from error


@dataclass(frozen=True)
class Report:
    """What a build did. `sources`: name, converter, licence, items, images, skipped (records and regions) of each;
    `unmapped`: labels that the tree does not know, kept as free phrases."""

    sources: list[dict]
    skipped: list[dict[str, str]]
    unmapped: list[str]


def build(config: BuildConfig) -> Report:
    """Writes the store `config.out` and returns its Report.

    Raises:
        ConfigError, AnnotationError: a source that is not what its converter reads.
        StoreError: nothing could be kept, too much was skipped, or two sources have one name.
        OSError: the disk. Parts that are complete stay, and the next build with the same sources uses them.
    """
    sources = [Source.parse(text, config.root) for text in config.sources]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"two sources are called {Counter(names).most_common(1)[0][0]!r}; add ?name=… to one")
    folder = config.out.with_name(f".{config.out.name}.building")
    settings = {"sources": [asdict(s) | {"path": str(s.path.resolve())} for s in sources], "embed": config.embed}
    _start(folder, settings)
    report = _join(_make_parts(sources, folder, config), sources, folder / "joined", config.out)
    shutil.rmtree(folder)
    return report


def _start(folder: Path, settings: dict) -> None:
    """An empty folder for the parts, unless one of the same settings is there to go on with."""
    text, file = json.dumps(settings, sort_keys=True, default=str), folder / "build.json"
    if not file.exists() or file.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomic(file, text)


def _make_parts(sources: Sequence[Source], folder: Path, config: BuildConfig) -> list[tuple[str, Path]]:
    """All parts in order, made where they are not there yet: (source's name, folder)."""
    parts, bad = [], 0
    jobs = _jobs(sources, folder, config.embed)
    with tqdm(desc="records", unit="") as bar:
        for done in map(make_part, jobs) if config.workers == 1 else in_processes(jobs, config.workers):
            parts.append((done.source, done.folder))
            bar.update(done.items)
            bad += done.skipped
            if config.max_bad is not None and bad > config.max_bad:
                raise StoreError(f"more than {config.max_bad} records were skipped; see {done.folder}/store.json")
    return sorted(parts, key=lambda part: part[1])


@dataclass(frozen=True)
class Job:
    source: str
    folder: Path
    items: list[Item]
    embed: bool


@dataclass(frozen=True)
class Done:
    source: str
    folder: Path
    items: int
    skipped: int


def _jobs(sources: Sequence[Source], folder: Path, embed: bool) -> Iterator[Job]:
    number = 0
    for source in sources:
        items = source.items()
        while batch := list(islice(items, PART_ITEMS)):
            yield Job(source.name, folder / f"part-{number:06d}", batch, embed)
            number += 1


def in_processes(jobs: Iterator[Job], workers: int) -> Iterator[Done]:
    """`make_part` of each job, in any order, with a few jobs in flight."""
    # Not a fork of this process: its threads (Arrow's, torch's) would not come along, but their locks would.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grounding.build"])
    executor, running = ProcessPoolExecutor(workers, context), set()
    try:
        while True:
            running |= {executor.submit(make_part, job) for job in islice(jobs, 2 * workers - len(running))}
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        why = "a worker process died: out of memory, or a crash on a file"
        raise StoreError(f"{why}; build again with workers=1, which goes on with what is missing") from None
    finally:
        executor.shutdown(cancel_futures=True)


def make_part(job: Job) -> Done:
    """The store of one part, made unless it is there."""
    keys = hashlib.sha256("\n".join(item.key for item in job.items).encode()).hexdigest()
    try:
        about = json.loads((job.folder / "store.json").read_text())
        if about["keys"] == keys:
            return Done(job.source, job.folder, len(job.items), len(about["skipped"]))
    except (OSError, ValueError, KeyError):
        pass
    partial = job.folder.with_name(f".{job.folder.name}-{os.getpid()}")
    for folder in (partial, job.folder):
        shutil.rmtree(folder, ignore_errors=True)
    writer, skipped = StoreWriter(partial), []
    try:
        for item in job.items:
            for found in _read(item, job.embed):
                if isinstance(found, Skipped):
                    skipped.append(asdict(found))
                else:
                    writer.add(*found)
        writer.close({"keys": keys, "items": len(job.items), "skipped": skipped})
        partial.rename(job.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Done(job.source, job.folder, len(job.items), len(skipped))


def _read(item: Item, embed: bool) -> list[tuple[GroundingSample, bytes, bytes] | Skipped]:
    """All that an item yields, with fingerprints. One that fails midway is skipped as a whole."""
    try:
        return [found if isinstance(found, Skipped) else _marked(found, embed) for found in item.read()]
    except (ValueError, OSError) as error:
        return [Skipped(item.key, (str(error).splitlines() or [type(error).__name__])[0])]


def _marked(sample: GroundingSample, embed: bool) -> tuple[GroundingSample, bytes, bytes]:
    # Half characters (a file name that is not UTF-8, "\\ud800" in a json) cannot be stored: a ValueError, here.
    "".join([sample.image_id, *sample.regions.labels, *(sample.regions.texts or [])]).encode()
    image = load(sample.image) if isinstance(sample.image, str) else read_image(sample.image)
    mark = fingerprint(image.pixels)
    if isinstance(sample.image, str):
        plain = embed and "@" not in sample.image  # a slice of a volume stays where it is
        path = Path(sample.image)
        sample = replace(sample, image=path.read_bytes() if plain else os.path.abspath(path))
    return sample, mark.pixels, mark.thumbnail.tobytes()


def _join(parts: list[tuple[str, Path]], sources: Sequence[Source], partial: Path, out: Path) -> Report:
    """The store of all parts, with its card and skipped.jsonl, made in `partial` and put in the place of `out`."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        writer = StoreWriter(partial)
        rows, skipped = _join_parts(parts, writer)
        if not writer.images:
            why = f"; the first: {skipped[0]['key']}: {skipped[0]['why']}" if skipped else ""
            raise StoreError(f"{out}: no image could be kept{why}")
        about = [{"name": s.name, "converter": s.converter, "licence": s.licence, **rows[s.name]} for s in sources]
        writer.close({"sources": about})
        write_atomic(partial / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped))
        store = open_store(partial)
        writer.describe(data_card(store, about, skipped))
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Report(about, skipped, unmapped_labels(store, load_label_tree()))


def _join_parts(parts: list[tuple[str, Path]], writer: StoreWriter) -> tuple[dict[str, Counter], list[dict[str, str]]]:
    """Adds the parts to `writer`; counts by source, and all that was skipped."""
    rows: dict[str, Counter] = defaultdict(Counter)
    skipped: list[dict[str, str]] = []
    seen: set[str] = set()
    for name, folder in parts:
        store, about = open_store(folder), json.loads((folder / "store.json").read_text())
        again = _add_new(store, writer, seen)
        left_out = about["skipped"] + [asdict(Skipped(key, "another image has the same id")) for key in again]
        skipped += [{"source": name, **row} for row in left_out]
        counts = {"items": about["items"], "images": len(store) - len(again), "skipped": len(left_out)}
        rows[name].update(counts)
    return rows, skipped


def _add_new(store: Store, writer: StoreWriter, seen: set[str]) -> list[str]:
    """Adds the images whose id is new to `seen`; the ids of the others."""
    again = []
    for block in store.remapped(writer):
        ids = block.column("image_id").to_pylist()
        new = [not (image_id in seen or seen.add(image_id)) for image_id in ids]
        again += [image_id for image_id, fresh in zip(ids, new, strict=True) if not fresh]
        writer.add_block(block if all(new) else block.filter(pa.array(new)))
    return again
