"""What a set of images shares with another one: patients, studies, neighbouring slices, pixels, pictures.

An audit works on columns, so it can read them from a region store, from a folder or from a question file. Each image
of the second set names one partner for each way in which it leaks (every partner for near-duplicates), so the list
grows with the images and not with the pairs: a volume of 500 slices in both sets is 500 rows, not 250,000. To learn
which images of the first set to take out, audit the other way round.

Patient identifiers are compared and never written out.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.duplicates import near_duplicates
from eval.fingerprint import Fingerprint, T, fingerprint, read_picture

KINDS = ("pixels", "near-duplicate", "neighbour", "study", "patient")  # strongest first
NEIGHBOUR = 10  # frames or slices: 1 cm of a CT at 1 mm, under half a second of video
EXAMPLES = 3  # of a kind, in the report
_MEANING = {
    "pixels": "the same pixels",
    "near-duplicate": "the same picture: resized, compressed, flipped, ...",
    "neighbour": f"a slice or frame at most {NEIGHBOUR} away in the same study",
    "study": "the same study, volume or sequence",
    "patient": "the same patient",
}


class LeakageError(ValueError):
    """What cannot be audited: one line with the file, the row and the remedy."""


@dataclass(frozen=True)
class Images:
    """N images of the set `name`, column by column; None where a source does not say.

    pixels: N hashes of `eval.fingerprint`, b"" for an image that could not be read, which then matches nothing.
    thumbnails: (N, T, T) uint8, memory-mapped or not. Raises LeakageError where lengths differ.
    """

    name: str
    ids: Sequence[str]
    patients: Sequence[str | None]
    studies: Sequence[str | None]
    frames: Sequence[int | None]
    pixels: Sequence[bytes]
    thumbnails: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.ids)
        for column in ("patients", "studies", "frames", "pixels"):
            if len(getattr(self, column)) != n:
                raise LeakageError(f"{self.name}: {n} ids but {len(getattr(self, column))} {column}")
        if self.thumbnails.shape != (n, T, T) or self.thumbnails.dtype != np.uint8:
            shape = f"{self.thumbnails.dtype} {self.thumbnails.shape}"
            raise LeakageError(f"{self.name}: thumbnails are {shape}, not uint8 ({n}, {T}, {T}); build it again")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Leak:
    """`kind` is one of KINDS; `id_a` the image of the first set, `id_b` that of the second; within one set, `id_a` is
    the smaller id."""

    kind: str
    id_a: str
    id_b: str
    detail: str


def audit(a: Images, b: Images | None = None) -> list[Leak]:
    """What images of `b` share with `a`; without `b`, what images of `a` with other ids share. Strongest kind first.

    Ids of patients and studies are compared as given. The order of rows makes no difference.
    """
    leaks = {*_shared_columns(a, b), *_shared_pictures(a, b)}
    return sorted(leaks, key=lambda leak: (KINDS.index(leak.kind), leak.id_b, leak.id_a))


def flagged(leaks: Iterable[Leak]) -> set[str]:
    """The ids of the second set that leak."""
    return {leak.id_b for leak in leaks}


def report(leaks: Sequence[Leak]) -> str:
    """Markdown: a row a kind, with images counted once, at the strongest kind that they leak by, then examples."""
    if not leaks:
        return "No leak found.\n"
    seen: set[str] = set()
    lines = ["| kind | means | pairs | images | not yet counted above |", "|---|---|--:|--:|--:|"]
    for kind in KINDS:
        rows = [leak for leak in leaks if leak.kind == kind]
        images = flagged(rows)
        lines.append(f"| {kind} | {_MEANING[kind]} | {len(rows)} | {len(images)} | {len(images - seen)} |")
        seen |= images
    lines += [f"| all | | {len(leaks)} | {len(seen)} | {len(seen)} |", ""]
    for kind in KINDS:
        rows = [leak for leak in leaks if leak.kind == kind]
        lines += [f"- {kind}: `{leak.id_a}` and `{leak.id_b}` ({leak.detail})" for leak in rows[:EXAMPLES]]
        if len(rows) > EXAMPLES:
            lines.append(f"- {kind}: and {len(rows) - EXAMPLES} more")
    return "\n".join(lines) + "\n"


# By columns


class _Index:
    """Who is known so far: the first image of each patient and of each pixel hash, every frame of each study."""

    def __init__(self) -> None:
        self.pixels: dict[bytes, str] = {}
        self.patients: dict[str, str] = {}
        self.studies: dict[str, tuple[str, str | None]] = {}
        self.frames: dict[str, list[tuple[int, str, str]]] = {}

    def add(self, images: Images, row: int) -> None:
        image_id, patient, study = images.ids[row], images.patients[row], images.studies[row]
        if images.pixels[row]:
            self.pixels.setdefault(images.pixels[row], image_id)
        if patient is not None:
            self.patients.setdefault(patient, image_id)
        if study is not None:
            self.studies.setdefault(study, (image_id, patient))
            if images.frames[row] is not None:
                insort(self.frames.setdefault(study, []), (images.frames[row], image_id, patient or ""))

    def leaks_of(self, images: Images, row: int) -> Iterator[Leak]:
        image_id, patient, study = images.ids[row], images.patients[row], images.studies[row]
        if images.pixels[row] in self.pixels:
            yield Leak("pixels", self.pixels[images.pixels[row]], image_id, "same pixels")
        relative = None  # (id, patient) of the nearest image of the study
        if study is not None:
            relative = self.studies.get(study)
            nearest = self._nearest(study, images.frames[row])
            if nearest is not None:
                relative = nearest[1:]
                if abs(nearest[0] - images.frames[row]) <= NEIGHBOUR:
                    yield Leak("neighbour", nearest[1], image_id, f"frames {nearest[0]} and {images.frames[row]}")
            if relative is not None:
                yield Leak("study", relative[0], image_id, "same study")
        if patient is not None and patient in self.patients:
            same = relative is not None and relative[1] == patient
            yield Leak("patient", relative[0] if same else self.patients[patient], image_id, "same patient")

    def _nearest(self, study: str, frame: int | None) -> tuple[int, str, str] | None:
        frames = self.frames.get(study)
        if frame is None or not frames:
            return None
        at = bisect_left(frames, (frame,))
        return min(frames[max(at - 1, 0) : at + 1], key=lambda known: (abs(known[0] - frame), known))


def _shared_columns(a: Images, b: Images | None) -> Iterator[Leak]:
    """In the order of ids, so that the partner which is named does not hang on the order of rows. Within one set an
    image looks among those before it."""
    index, of_a = _Index(), _rows_by_id(a)
    if b is None:
        for row in of_a:
            yield from (leak for leak in index.leaks_of(a, row) if leak.id_a != leak.id_b)
            index.add(a, row)
        return
    for row in of_a:
        index.add(a, row)
    for row in _rows_by_id(b):
        yield from index.leaks_of(b, row)


def _rows_by_id(images: Images) -> list[int]:
    return sorted(range(len(images)), key=lambda row: (images.ids[row], images.pixels[row]))


def _shared_pictures(a: Images, b: Images | None) -> Iterator[Leak]:
    rows_a, rows_b, scores = near_duplicates(a.thumbnails, None if b is None else b.thumbnails)
    for i, j, score in zip(rows_a.tolist(), rows_b.tolist(), scores.tolist(), strict=True):
        pair = (a.ids[i], (a if b is None else b).ids[j])
        if b is None:
            if pair[0] == pair[1]:
                continue
            pair = (min(pair), max(pair))
        yield Leak("near-duplicate", *pair, f"score {score:.2f}")


# Questions and reports


@dataclass(frozen=True)
class Questions:
    """A question or report file: `images` it is about, `samples` image id → sample ids, `unread` image id → why, for
    images that could not be read: of these only patient and study are audited."""

    images: Images
    samples: dict[str, list[str]]
    unread: dict[str, str]


def audit_questions(train: Images, questions: Questions) -> list[Leak]:
    """As `audit`, with a row for each sample: `id_b` is the sample's id, and the detail names its image."""
    leaks = [
        Leak(leak.kind, leak.id_a, sample, f"image {leak.id_b}: {leak.detail}")
        for leak in audit(train, questions.images)
        for sample in questions.samples[leak.id_b]
    ]
    return sorted(leaks, key=lambda leak: (KINDS.index(leak.kind), leak.id_b, leak.id_a))


def images_of_questions(
    path: str | Path, image_root: str | Path, read: Callable[[Path], np.ndarray] = read_picture
) -> Questions:
    """The images of a question or report file, read from below `image_root`.

    The file is JSON Lines (`sample_id` or `study_id`, `image` or `images` or `image_id`, `patient_id`), or a list as
    VQA-RAD (osf.io/89kps: `qid`, `image_name`) and SLAKE (med-vqa.com/slake: `qid`, `img_name`) have it. `read`: a
    file → uint8 pixels; the default knows pictures, not DICOM. Raises LeakageError for a file or row that is broken.
    """
    samples: dict[str, list[str]] = {}
    about: dict[str, tuple[str | None, str | None, str | None]] = {}  # image id → file, patient, study
    for where, row in _read_rows(Path(path)):
        sample = _first(row, "sample_id", "study_id", "qid")
        if sample is None:
            raise LeakageError(f'{where}: no "sample_id"; every row needs one')
        for image_id, file in _images_of_row(row, sample):
            samples.setdefault(image_id, []).append(sample)
            about.setdefault(image_id, (file, _first(row, "patient_id"), _first(row, "study_id")))
    prints: list[Fingerprint] = []
    unread: dict[str, str] = {}
    for image_id, (file, _, _) in about.items():
        try:
            if file is None:
                raise LeakageError("names no image")
            prints.append(fingerprint(read(Path(image_root) / file)))
        except (OSError, ValueError) as error:
            unread[image_id] = str(error)
            prints.append(Fingerprint(b"", np.zeros((T, T), np.uint8)))
    images = Images(
        name=Path(path).stem,
        ids=list(about),
        patients=[patient for _, patient, _ in about.values()],
        studies=[study for _, _, study in about.values()],
        frames=[None] * len(about),
        pixels=[item.pixels for item in prints],
        thumbnails=np.stack([item.thumbnail for item in prints]),
    )
    return Questions(images, samples, unread)


def _images_of_row(row: dict, sample: str) -> list[tuple[str, str | None]]:
    """(image id, file or None) of each image that a row is about."""
    if isinstance(row.get("images"), list) and row["images"]:
        return [(str(file), str(file)) for file in row["images"]]
    file = _first(row, "image", "image_name", "img_name", "image_id")
    return [(_first(row, "image_id") or file or sample, file)]


def _first(row: dict, *keys: str) -> str | None:
    return next((str(row[key]) for key in keys if row.get(key) not in (None, "")), None)


def _read_rows(path: Path) -> list[tuple[str, dict]]:
    """(file:line or file: row, object)."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = [(f"{path}: row {k}", row) for k, row in enumerate(json.loads(text))]
        else:
            # Not splitlines(): texts may hold U+2028, which is no line end in JSON Lines.
            lines = enumerate(text.split("\n"), 1)
            rows = [(f"{path}:{number}", json.loads(line)) for number, line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise LeakageError(f"{path}: not a question file ({error}); give JSON Lines or a JSON list") from None
    for where, row in rows:
        if not isinstance(row, dict):
            raise LeakageError(f"{where}: not a JSON object; write one object a sample")
    if not rows:
        raise LeakageError(f"{path}: holds no samples; give JSON Lines or a JSON list")
    return rows
