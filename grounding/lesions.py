"""Generated lesions: drawn into a grey slice with known mask, brightness, margin, shape and texture.

Everything is in pixels of the slice. A lesion is a profile in [0, 1] (1 = full contrast) that blends the slice towards
one target grey level, so what a lesion looks like is set by its attributes and not by the anatomy under it.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

ATTRIBUTES = {
    "brightness": ("bright", "dark"),
    "margin": ("sharp", "blurred"),
    "shape": ("round", "irregular"),
    "texture": ("solid", "ring"),
}
CLEARANCE = 3  # pixels between two lesions, and between a lesion and the edge of the brain's slice
SURROUND = 5  # width in pixels of the rim around a lesion that counts as its surroundings
RESIDUE = 0.25  # share of the anatomy's own contrast that is still seen through a lesion
FEWEST_GREYS = 38  # least contrast to the surroundings, of 255


@dataclass(frozen=True)
class Lesion:
    """mask (H, W) bool with its core filled; attributes as in `ATTRIBUTES`; structure: index of its structure."""

    mask: np.ndarray
    attributes: dict[str, str]
    structure: int


def draw_attributes(rng: np.random.Generator) -> dict[str, str]:
    """Each attribute independent, both values equally likely."""
    return {name: values[rng.integers(2)] for name, values in ATTRIBUTES.items()}


def smallest_diameter(attributes: dict[str, str]) -> float:
    """Least diameter in mm at which the attributes can be seen at about 1 mm a pixel: 8 for a plain sharp disc, 13 with
    one of blurred, irregular or ring, 17 with two of them or more."""
    plain = {"margin": "sharp", "shape": "round", "texture": "solid"}
    hard = sum(attributes[name] != value for name, value in plain.items())
    return (8.0, 13.0, 17.0, 17.0)[hard]


def profile(attributes: dict[str, str], radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(profile, mask), both (S, S) with the lesion in the middle: float32 in [0, 1], and bool.

    The outline is r(a) = radius * (1 + sum_k c_k cos(k a + p_k)). The mask is where the profile is at least half of its
    maximum, with the core of a ring filled; its area is that of the disc of this radius (in pixels).
    """
    half = int(np.ceil(radius * 1.8)) + 3
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    angle, distance = np.arctan2(rows, columns), np.hypot(rows, columns)
    outline = radius * _outline(attributes["shape"], rng)(angle)
    core = rng.uniform(0.5, 0.62) if attributes["texture"] == "ring" else 0.0
    width = max(1.3, 0.16 * radius) if attributes["margin"] == "blurred" else 0.3
    mask = _draw(distance, outline, core, width)[1]
    outline *= radius / np.sqrt(mask.sum() / np.pi)  # half of a blurred ring's maximum lies further out
    return _draw(distance, outline, core, width)


def _draw(distance, outline, core: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """(profile, mask): full between core * outline and outline, with edges of `width` pixels."""
    drawn = _step((outline - distance) / width)
    if core:
        drawn = drawn * _step((distance - core * outline) / (0.6 * width))
    drawn /= drawn.max()
    return drawn, ndimage.binary_fill_holes(drawn >= 0.5)


def _step(x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 to 1 through 1/2 at 0 (logistic)."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _outline(shape: str, rng: np.random.Generator):
    """Relative radius as a function of the angle; mean square 1, so the area is that of the disc."""
    if shape == "round":
        orders, sizes = np.array([2]), np.array([rng.uniform(0, 0.05)])
    else:
        orders = np.array([2, 3, 4, 5])
        sizes = np.array([rng.uniform(*span) for span in ((0.08, 0.2), (0.14, 0.24), (0.05, 0.14), (0.04, 0.1))])
    phases = rng.uniform(0, 2 * np.pi, len(orders))

    def radius(angle: np.ndarray) -> np.ndarray:
        waves = 1 + sum(c * np.cos(k * angle + p) for c, k, p in zip(sizes, orders, phases, strict=True))
        return np.maximum(waves, 0.3) / np.sqrt(1 + (sizes**2).sum() / 2)

    return radius


def add_lesion(
    image: np.ndarray,
    room: np.ndarray,
    depth: np.ndarray,
    attributes: dict[str, str],
    diameter: float,
    rng: np.random.Generator,
    tries: int = 12,
) -> np.ndarray | None:
    """Draw one lesion into `image` (H, W float32, changed in place); its mask (H, W) bool, or None if it finds no room.

    room, depth: (H, W), for each pixel the distance to the nearest one where no lesion may lie, and to the nearest one
    outside the structure. All of the lesion keeps `CLEARANCE` from the former, 60 % of it lies in the structure.
    """
    drawn, mask = profile(attributes, diameter / 2, rng)
    half = len(drawn) // 2
    rows, columns = np.nonzero((depth > 0.35 * diameter / 2) & (room > 0.8 * diameter / 2 + CLEARANCE))
    for k in rng.permutation(len(rows))[:tries]:
        window = _window(rows[k], columns[k], half, image.shape)
        if window is None or room[window][mask].min() < CLEARANCE or (depth[window][mask] > 0).mean() < 0.6:
            continue
        if _blend(image[window], room[window] > 0, drawn, mask, attributes, rng):
            whole = np.zeros(image.shape, bool)
            whole[window] = mask
            return whole
    return None


def _window(row: int, column: int, half: int, shape: tuple[int, int]) -> tuple[slice, slice] | None:
    """The (2 half + 1) square around a pixel, None if it leaves the image."""
    if min(row, column) < half or row + half >= shape[0] or column + half >= shape[1]:
        return None
    return slice(row - half, row + half + 1), slice(column - half, column + half + 1)


def _blend(patch, clear, drawn, mask, attributes: dict[str, str], rng: np.random.Generator) -> bool:
    """Blend the profile into `patch` (a view). False, with nothing drawn, where the grey scale leaves no contrast."""
    rim = ndimage.binary_dilation(mask, iterations=SURROUND) & ~mask & clear
    if rim.sum() < mask.sum() / 4:
        return False
    level, greys = patch[rim].mean(), rng.uniform(FEWEST_GREYS + 7, 95) + 12 * (attributes["margin"] == "blurred")
    target = min(level + greys, 245) if attributes["brightness"] == "bright" else max(level - greys, 12)
    if abs(target - level) < FEWEST_GREYS:
        return False
    cover = drawn
    if attributes["texture"] == "ring":  # the core becomes neutral, whatever lay there
        cover = np.maximum(drawn, ndimage.gaussian_filter(mask.astype(np.float32), 1.0))
    patch += cover * (1 - RESIDUE) * (level - patch) + drawn * (target - level)
    return True
