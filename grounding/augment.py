"""Augmentation that stays true to the anatomy: what is shown of an image, and how bright.

Nothing is interpolated: an image is turned by quarters, mirrored, and a window is cut from it, which may reach beyond
its edges. Boxes and masks therefore follow exactly. Hue is never changed: where there is colour it is what the
diagnosis rests on, elsewhere there is none.

Dimension key: N regions, H, W height and width in pixels. Boxes are xyxy in [0, 1].
"""

import dataclasses
import math
import random
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from grounding.labels import LabelTree, normalise
from grounding.tiles import windows
from grounding.types import GroundingSample, RegionSet

LEAST_SHOWN = 0.4  # share of a region's box; of less, nobody can say whether the phrase still names it
# Here heart, liver, spleen and colon lie to one side. Mirrored, they show a situs inversus, which no label tells.
LOPSIDED = ("chest", "abdomen", "pelvis", "gastrointestinal_tract")


@dataclass(frozen=True)
class Policy:
    """What may be done to a modality's images. ``mirror``: left for right, with the labels, except where the image is
    of one of the body regions ``lopsided``. ``turns``: quarter turns, and so upside down. ``zoom``: largest factor in
    or out. ``contrast``: largest relative change of the grey range, ``brightness``: largest shift, in such ranges."""

    mirror: bool
    lopsided: tuple[str, ...] = ()
    turns: bool = False
    zoom: float = 1.3
    contrast: float = 0.1
    brightness: float = 0.05


POLICIES = {
    # Exposure and processing vary between makers. Patients stand or lie in a known way: no turns.
    "xray": Policy(mirror=True, lopsided=LOPSIDED, contrast=0.2, brightness=0.1),
    # Readers change window width and level as they go: contrast and brightness are these two (see `tone`).
    "ct": Policy(mirror=True, lopsided=LOPSIDED, contrast=0.25, brightness=0.1),
    # Intensities have no unit. Slices are displayed one way up.
    "mri": Policy(mirror=True, lopsided=LOPSIDED, contrast=0.2, brightness=0.1),
    # Gain is set by hand, and a probe may be held either way round; but depth, and with it each shadow, runs down.
    "ultrasound": Policy(mirror=True, lopsided=LOPSIDED, contrast=0.2, brightness=0.1),
    # A mirrored right eye looks as a left eye does. Vessels run level, and colour tells blood from exudate.
    "fundus": Policy(mirror=True),
    # The scope rolls, yet fluid pools below and light falls from where the camera is: mirrored, not turned over.
    "endoscopy": Policy(mirror=True),
    # Neither a lesion on the skin nor a smear has an up; colour is a criterion in both.
    "dermoscopy": Policy(mirror=True, turns=True),
    "microscopy": Policy(mirror=True, turns=True),
}


@dataclass(frozen=True)
class View:
    """What is shown of an (H, W) image: turned ``turns`` quarters against the clock, then mirrored, then the
    ``window`` (top, left, height, width) in pixels, black where it reaches beyond the image."""

    image_size: tuple[int, int]
    turns: int
    mirror: bool
    window: tuple[int, int, int, int]

    def pixels(self, array: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, C) of any dtype → (height, width[, C])."""
        array = np.rot90(array, self.turns)
        array = array[:, ::-1] if self.mirror else array
        top, left, height, width = self.window
        out = np.zeros((height, width, *array.shape[2:]), array.dtype)
        y, x = max(top, 0), max(left, 0)
        part = array[y : top + height, x : left + width]
        out[y - top : y - top + part.shape[0], x - left : x - left + part.shape[1]] = part
        return out

    def apply(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) in [0, 1] of the image → of the view; beyond [0, 1] where the view does not show them."""
        boxes = boxes.astype(np.float64)
        for _ in range(self.turns):
            boxes = np.stack([boxes[:, 1], 1 - boxes[:, 2], boxes[:, 3], 1 - boxes[:, 0]], 1)
        if self.mirror:
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        scale, shift = self._affine()
        return boxes * scale + shift

    def invert(self, boxes: np.ndarray) -> np.ndarray:
        """Inverse of ``apply``."""
        scale, shift = self._affine()
        boxes = (boxes - shift) / scale
        if self.mirror:
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        for _ in range(self.turns):
            boxes = np.stack([1 - boxes[:, 3], boxes[:, 0], 1 - boxes[:, 1], boxes[:, 2]], 1)
        return boxes

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        h, w = self.image_size[::-1] if self.turns % 2 else self.image_size
        top, left, height, width = self.window
        return np.array([w / width, h / height] * 2), -np.array([left / width, top / height] * 2)


def draw_view(random_: random.Random, image_size: tuple[int, int], policy: Policy, mirror: bool) -> View:
    """A view with the image's own proportions. ``mirror``: whether it may be mirrored."""
    turns = random_.randrange(4) if policy.turns else 0
    mirrored = random_.random() < 0.5 and mirror
    share = math.exp(random_.uniform(-1, 1) * math.log(policy.zoom))
    shown = image_size[::-1] if turns % 2 else image_size
    sides = [max(1, round(side * share)) for side in shown]
    corner = [random_.randint(*sorted((0, whole - side))) for whole, side in zip(shown, sides, strict=True)]
    return View(image_size, turns, mirrored, (*corner, *sides))


def tone(random_: random.Random, pixels: np.ndarray, modality: str) -> np.ndarray:
    """uint8 → uint8 with other contrast and brightness, the same for all colours.

    Of CT it is the window that changes, about the middle grey; what the stored picture's own window cut off stays
    cut off. Elsewhere contrast changes about the mean.
    """
    policy = POLICIES[modality]
    gain = math.exp(random_.uniform(-1, 1) * math.log1p(policy.contrast))
    shift = 255 * random_.uniform(-1, 1) * policy.brightness
    pivot = 127.5 if modality == "ct" else float(pixels.mean())
    table = np.rint((np.arange(256) - pivot) * gain + pivot + shift).clip(0, 255).astype(np.uint8)
    return table[pixels]


def augment(
    sample: GroundingSample, pixels: np.ndarray, random_: random.Random, tree: LabelTree, known: Collection[str]
) -> tuple[GroundingSample, np.ndarray]:
    """A view of ``sample`` and its uint8 ``pixels``, with the regions that it shows.

    ``known``: the labels that are trained; a mirrored region must have one of them. A region that is cut until less
    than LEAST_SHOWN is left is neither there nor absent: its labels leave ``labelled``.
    """
    policy = POLICIES[sample.modality]
    swapped = mirrored(sample, policy, tree, known)
    view = draw_view(random_, pixels.shape[:2], policy, swapped is not None)
    sample = swapped if view.mirror and swapped is not None else sample
    return _seen_through(view, sample, tree), tone(random_, view.pixels(pixels), sample.modality)


def tile(
    sample: GroundingSample, pixels: np.ndarray, random_: random.Random, tree: LabelTree, tiles: int
) -> tuple[GroundingSample, np.ndarray]:
    """A window of an image, as large as `grounding.tiles` cuts them for prediction, but anywhere in it: lesions of a
    pixel or two in the whole image are learned at the size in which they are then looked for."""
    cuts = windows(pixels.shape[:2], tiles, 1)
    if not cuts:
        return sample, pixels
    sides = cuts[0][2:]
    corner = [random_.randint(0, whole - side) for whole, side in zip(pixels.shape[:2], sides, strict=True)]
    view = View(pixels.shape[:2], 0, False, (*corner, *sides))
    return _seen_through(view, sample, tree), view.pixels(pixels)


def mirrored(
    sample: GroundingSample, policy: Policy, tree: LabelTree, known: Collection[str]
) -> GroundingSample | None:
    """The sample with left and right exchanged in its labels; None where that would be wrong: the policy or the body
    region forbids it, or a label has no twin on the other side."""
    said = {*sample.regions.labels, *sample.labelled}
    lopsided = any(label in tree.nodes and label.split("/")[0] in policy.lopsided for label in said)
    labels = [twin(label, tree) for label in sample.regions.labels]
    if not policy.mirror or lopsided or any(label not in known for label in labels):
        return None
    labelled = tuple(x for x in (twin(label, tree) for label in sample.labelled) if x is not None)
    regions = dataclasses.replace(sample.regions, labels=labels)
    return dataclasses.replace(sample, regions=regions, labelled=labelled)


def twin(label: str, tree: LabelTree) -> str | None:
    """The label of the same on the other side; itself where it has no side; None where the other side has no such.

    Of a free phrase, the phrase with the words exchanged.
    """
    if label not in tree.nodes:
        swap = {"left": "right", "right": "left"}
        sided = re.search(r"\b(left|right|lt|rt)\b", label, re.IGNORECASE)
        return " ".join(swap.get(word, word) for word in normalise(label).split()) if sided else label
    if not tree.nodes[label].side:
        return label
    other = "/".join(_other_side(part) for part in label.split("/"))
    return other if other in tree.nodes and other != label else None


def _other_side(part: str) -> str:
    side, _, rest = part.partition("_")
    return {"left": f"right_{rest}", "right": f"left_{rest}"}.get(side, part)


def _seen_through(view: View, sample: GroundingSample, tree: LabelTree) -> GroundingSample:
    """The regions that the view shows enough of, clipped to it."""
    regions = sample.regions
    whole = view.apply(regions.boxes)
    clipped = whole.clip(0, 1)
    shown = _areas(clipped) / np.maximum(_areas(whole), 1e-12)
    gone = (shown == 0) & (_areas(whole) > 0)
    cut = {regions.labels[k] for k in np.flatnonzero((shown < LEAST_SHOWN) & ~gone)}
    unsure = cut | {wider for label in cut if label in tree.nodes for wider in tree.broader(label)}
    kept = regions.select(np.flatnonzero(shown >= LEAST_SHOWN).tolist())
    inside = RegionSet(
        boxes=clipped[shown >= LEAST_SHOWN].astype(np.float32),
        labels=kept.labels,
        image_size=view.window[2:],
        masks=None if kept.masks is None else [_moved(mask, view) for mask in kept.masks],
        attributes=kept.attributes,
        texts=kept.texts,
    )
    return dataclasses.replace(sample, regions=inside, labelled=tuple(x for x in sample.labelled if x not in unsure))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _moved(mask: dict, view: View) -> dict:
    coded = rle.encode(np.asfortranarray(view.pixels(rle.decode(mask))))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}
