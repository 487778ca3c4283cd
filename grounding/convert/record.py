"""What a converter yields, and how the regions of one image are collected.

A converter is a generator of `Item`s: it walks the source's files and annotation lists quickly, and leaves the slow
part (decoding, masks) to `Item.read`, which the build calls in worker processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as rle

from grounding.images import MedicalImage, read_image
from grounding.labels import LabelTree, load_label_tree
from grounding.types import GroundingSample, RegionSet


@dataclass(frozen=True)
class Skipped:
    """A record, or a region of a record, that was left out. `key` is the item's, `why` one line."""

    key: str
    why: str


@dataclass(frozen=True)
class Item:
    """One image or one volume. `key`: its path in the source (unique there), for reports. `read`: picklable (a function
    of a module, with functools.partial); yields samples, and what it left out; may raise ValueError or OSError, which
    skips the whole item with that message."""

    key: str
    read: Callable[[], Iterable["GroundingSample | Skipped"]]


class AnnotationError(ValueError):
    """A source that is not laid out as its converter expects; the message names the file and the remedy."""


@lru_cache(maxsize=2)
def load(path: str) -> MedicalImage:
    """`read_image`, which remembers the last two: the converter and the fingerprint both need the pixels."""
    return read_image(path)


class Regions:
    """Collects the regions of one (H, W) image in pixels of it as displayed.

    A region that breaks the contract (not finite, inverted, without area, outside the image, a mask of another size)
    is left out, and named in `left_out`. A box that reaches over the edge is clipped. `names` translates the source's
    words to phrases the label tree knows, where `modality` decides between meanings ("haemorrhage"); what the tree does
    not know stays a free phrase, in lower case.
    """

    def __init__(
        self, image_size: tuple[int, int], names: Mapping[str, str] | None = None, modality: str | None = None
    ):
        self.image_size, self.names, self.modality = image_size, names or {}, modality
        self.left_out: list[str] = []
        self._rows: list[tuple[list[float], str, dict | None, dict[str, str]]] = []

    def add_box(
        self, xyxy: Sequence[float], text: str, attributes: dict[str, str] | None = None, mask: dict | None = None
    ) -> None:
        """`xyxy`: corners in pixels, so that a one-pixel region has x2 = x1 + 1. `mask`: COCO RLE of that size."""
        height, width = self.image_size
        box = np.asarray(xyxy, np.float64)
        clipped = box.clip(0, [width, height, width, height]) if box.shape == (4,) else box
        where = f"{text}: box {[round(float(v), 2) for v in box.reshape(-1)]}"
        if box.shape != (4,) or not np.isfinite(box).all():
            self.left_out.append(f"{where} is not four finite numbers")
        elif (box[2:] <= box[:2]).any():
            self.left_out.append(f"{where} is inverted or has no area")
        elif (clipped[2:] <= clipped[:2]).any():
            self.left_out.append(f"{where} lies outside the {width} x {height} image")
        else:
            normalised = clipped / [width, height, width, height]
            self._rows.append((normalised.tolist(), text, mask, attributes or {}))

    def add_mask(self, mask: np.ndarray, text: str, attributes: dict[str, str] | None = None) -> None:
        """One region of a (H, W) mask, non-zero inside. An empty mask is no region."""
        mask = np.asarray(mask) != 0
        if mask.shape != self.image_size:
            size = " x ".join(str(side) for side in mask.shape[::-1])
            height, width = self.image_size
            self.left_out.append(f"{text}: mask of {size} on an image of {width} x {height}")
        elif mask.any():
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            self.add_box(box, text, attributes, encode_mask(mask))

    def add_polygons(
        self, rings: Sequence[Sequence[float]], text: str, attributes: dict[str, str] | None = None
    ) -> None:
        """One region of one or several rings, each x1, y1, x2, y2, ... in pixels."""
        height, width = self.image_size
        rings = [list(map(float, np.asarray(ring, np.float64).reshape(-1))) for ring in rings]
        if not rings or any(len(ring) < 6 or len(ring) % 2 or not np.isfinite(ring).all() for ring in rings):
            self.left_out.append(f"{text}: a polygon needs three points of finite numbers or more")
            return
        mask = rle.merge(rle.frPyObjects(rings, height, width))
        points = np.concatenate([np.reshape(ring, (-1, 2)) for ring in rings])
        box = [*points.min(0), *points.max(0)]
        coded = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
        self.add_box(box, text, attributes, coded if rle.area(mask) else None)  # too thin to hold a pixel: a box alone

    def done(self) -> RegionSet:
        """All of them. A region that came as a box alone has no mask."""
        tree = load_label_tree()
        boxes, texts, masks, attributes = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        return RegionSet(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=[find_label(self.names.get(text, text), tree, self.modality) for text in texts],
            image_size=self.image_size,
            masks=list(masks) or None,
            attributes=list(attributes) if any(attributes) else None,
            texts=list(texts),
        )


def find_label(phrase: str, tree: LabelTree, modality: str | None = None) -> str:
    """The tree's id of a phrase about an image of `modality`, or the phrase itself in lower case."""
    return tree.find(phrase, modality=modality) or " ".join(phrase.lower().split())


def find_labels(phrases: Iterable[str], modality: str | None) -> tuple[str, ...]:
    """Ids of what a source annotates exhaustively, for `GroundingSample.labelled`."""
    tree = load_label_tree()
    return tuple(dict.fromkeys(find_label(phrase, tree, modality) for phrase in phrases))


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool → COCO RLE with a string."""
    coded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def finish(sample: GroundingSample, regions: Regions, key: str) -> Iterable[GroundingSample | Skipped]:
    """The sample, then what was left out of it: the last line of most readers."""
    yield sample
    for why in regions.left_out:
        yield Skipped(key, why)


def frame_scale(stated: tuple[float, float] | None, actual: tuple[int, int]) -> tuple[float, float]:
    """Factors (x, y) from the frame that an annotation states to the image on disk, both (H, W).

    A resized copy keeps its shape, and the boxes are scaled with it. Where the shape differs, nobody can tell a crop
    from a resize or a rotation: raises ValueError.
    """
    if stated is None or min(stated) <= 0:
        return 1.0, 1.0
    (height, width), (rows, columns) = stated, actual
    if abs(height * columns - width * rows) > max(height, width, rows, columns):  # a pixel of rounding
        raise ValueError(f"annotated at {width:g} x {height:g}, but the image on disk is {columns} x {rows}")
    return columns / width, rows / height


@contextmanager
def named(regions: Regions, where: str) -> Iterator[None]:
    """Everything that is left out inside says `where` it stood; a ValueError leaves the row out."""
    start = len(regions.left_out)
    try:
        yield
    except ValueError as error:
        regions.left_out.append(str(error))
    regions.left_out[start:] = [f"{where}: {why}" for why in regions.left_out[start:]]


def unused_name(relative: str, taken: set[str]) -> str:
    """The path without its suffix; with it, where that name is in `taken`. The name is added to `taken`."""
    name = str(PurePosixPath(relative).with_suffix(""))
    name = relative if name in taken else name
    taken.add(name)
    return name


def left_out(key: str, reasons: Iterable[str]) -> list[Skipped]:
    """For an Item that holds nothing but what was left out."""
    return [Skipped(key, why) for why in reasons]


def add_polygon_rings(regions: Regions, rings: list[list[float]], text: str, attributes: dict[str, str]) -> None:
    """`Regions.add_polygons` of rings in pixels. Raises ValueError where one reaches an image's size or more outside:
    drawing it would take memory without bound."""
    height, width = regions.image_size
    for ring in rings:
        x, y = np.array(ring[0::2]), np.array(ring[1::2])
        if (x < -width).any() or (x > 2 * width).any() or (y < -height).any() or (y > 2 * height).any():
            raise ValueError(f"{text}: the polygon reaches far outside the {width} x {height} image")
    regions.add_polygons(rings, text, attributes)


def below(root: Path, *patterns: str) -> list[Path]:
    """Files under `root` that match one of the glob patterns, sorted. Links to folders are not followed, so that a
    loop of links ends. Raises AnnotationError where there are none."""
    files = sorted({path for pattern in patterns for path in Path(root).glob(pattern) if path.is_file()})
    if not files:
        raise AnnotationError(f"{root}: no file matches {' or '.join(patterns)}; is this the folder of the source?")
    return files
