"""Which pictures are the same, though resized, compressed, flipped, turned, brightened, cropped or padded a little.

Medical images are alike: every fundus is a bright disc, every chest film has two lungs. A short hash calls them all
duplicates. So thumbnails (`eval.fingerprint`) are compared in two steps:

1. Search: low frequencies of the texture, in the 8 orientations, as blocked matrix products; the best few above a bar.
2. Check: the two are laid over each other (shift and scale), then correlated twice: over all their texture, and over
   the texture away from strong edges, since the outline of an eye or a skull is the same in all of them. The score is
   the mean of the two.

Texture is a band-pass, squashed to [-1, 1] by h / (|h| + 1 grey level): what counts is where it gets lighter and
darker, not by how much, so contrast and gamma hardly matter.

Measured on 1,431 real images of 12 sets. Different pictures: the most alike two score 0.72 (two heads in CT), two eyes
0.41 in the median and 0.65 at most. Five pairs score 0.90 to 0.97, and looked at side by side are the same breast or
smear. The same picture: at least 0.94 after a smooth resize (0.5 to 2 times, each side by itself), 0.90 after one by
nearest neighbour, 0.87 after JPEG of quality 30, 0.87 after gamma 0.7 to 1.4, 0.89 after a crop of up to 3 % a side, in
any orientation. Found: 99.9 % after a crop of up to 5 % a side, 99.6 % after a border of up to 5 %, 99.6 % after a
letterbox, 99.9 % after a contrast of 0.8 to 1.25 that clips. A collection of many thousand eyes or chest films will
hold pairs more alike than these: look at what has a score under 0.85.

Dimension key: N, M images; V views of them; T side of a thumbnail; F side of a descriptor; K pairs in a batch.
A placement is (scale - 1, shift) of rows, then of columns, in half sides of the square.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from eval.fingerprint import T

SAME = 0.77  # score of the check
CANDIDATE = 0.65  # score of the search
ALIKE = 0.72  # correlation at half the size below which a pair is not checked further
CLOSE = 0.15  # further than this below SAME, moving them the other way will not help
KEEP = 12  # candidates an image: in 100,000 chest films thousands are above the bar
F = 8
MIN_TEXTURE = 0.05  # mean squared texture; less is an empty image, which has no look-alike by its thumbnail
BORDER = 12  # grey levels within which a row is one colour, and so a border
EDGE = 2  # cells at the rim that the check leaves out: a border's edge lies there
REACH = 0.16  # largest placement: 8 % of the side, each way
BLOCK = 4096  # views a side in one product of the search
CHUNK = 512  # images described at once
BATCH = 64  # pairs checked at once
STEPS = 3
INNER = np.array([-0.1, 0, -0.1, 0], np.float32)

Candidates = np.dtype([("a", np.int32), ("b", np.int32), ("score", np.float32)])


class Views(NamedTuple):
    """Ways to see images: as they are, and without their borders. `owner` (V,) row of the image, `placement` (V, 4)
    of its content, `descriptors` (V, F, F) float16 of length 1."""

    owner: np.ndarray
    placement: np.ndarray
    descriptors: np.ndarray


def near_duplicates(a: np.ndarray, b: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of a, rows of b, scores in [SAME, 1]) of the pairs that show one picture.

    `a` (N, T, T), `b` (M, T, T) uint8 thumbnails; without `b`, pairs i < j within `a`. Memory is some 300
    bytes an image and side, and a block of BLOCK squared scores. Of an image's look-alikes the KEEP best are checked.
    """
    views_a = _views(a)
    views_b = views_a if b is None else _views(b)
    pairs = _search(views_a, views_b, within=b is None)

    def check(start: int) -> np.ndarray:
        batch = pairs[start : start + BATCH]
        return _check(_side(a, views_a, batch["a"]), _side(a if b is None else b, views_b, batch["b"]))

    found: dict[tuple[int, int], float] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run
        for start, scores in enumerate(pool.map(check, range(0, len(pairs), BATCH))):
            for k in np.nonzero(scores >= SAME)[0].tolist():
                pair = pairs[start * BATCH + k]
                key = (int(views_a.owner[pair["a"]]), int(views_b.owner[pair["b"]]))
                found[key] = max(float(scores[k]), found.get(key, 0.0))
    keys = sorted(found)
    rows = np.array(keys, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1], np.array([found[key] for key in keys], np.float32)


# Texture


@cache
def _blur(size: int, sigma: float) -> np.ndarray:
    """(size, size): a Gaussian along one axis; what lies beyond the rim equals the rim."""
    rows, matrix = np.arange(size), np.zeros((size, size), np.float32)
    for offset in range(-int(4 * sigma + 1), int(4 * sigma + 1) + 1):
        np.add.at(matrix, (rows, (rows + offset).clip(0, size - 1)), np.exp(-0.5 * (offset / sigma) ** 2))
    return matrix / matrix.sum(1, keepdims=True)


def _band(images: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """(K, S, S) → details between two widths (sigmas in cells), in grey levels."""
    low, high = _blur(images.shape[-1], coarse), _blur(images.shape[-1], fine)
    return high @ images @ high.T - low @ images @ low.T


def _squash(band: np.ndarray) -> np.ndarray:
    return band / (np.abs(band) + 1)


def _away_from_edges(band: np.ndarray) -> np.ndarray:
    """`_squash`, faded out around details four times as strong as the image's median."""
    strength = np.abs(band)
    usual = np.maximum(np.median(strength[:, ::2, ::2], axis=(1, 2), keepdims=True), 1)  # a quarter: it is slow
    for rows in (strength, strength.swapaxes(1, 2)):  # the largest of 3 x 3
        before = rows.copy()
        np.maximum(rows[:, 1:], before[:, :-1], out=rows[:, 1:])
        np.maximum(rows[:, :-1], before[:, 1:], out=rows[:, :-1])
    return _squash(band) / (1 + (strength / (4 * usual)) ** 2)


# Views and descriptors


def _views(thumbnails: np.ndarray) -> Views:
    owners, placements, descriptors = [], [], []
    for start in range(0, max(len(thumbnails), 1), CHUNK):
        images = np.asarray(thumbnails[start : start + CHUNK], np.float32)
        full = (_squash(_band(images, 0.7, 2.0)) ** 2).mean((1, 2)) >= MIN_TEXTURE
        content = _content(images)
        bordered = np.nonzero(full & (content != 0).any(1))[0]
        owner = np.concatenate([np.nonzero(full)[0], bordered])
        placement = np.concatenate([np.tile(INNER, (int(full.sum()), 1)), content[bordered]])
        owners.append(owner + start)
        placements.append(placement)
        descriptors.append(_describe(_place(images[owner], placement)[0]))
    return Views(np.concatenate(owners), np.concatenate(placements), np.concatenate(descriptors))


def _content(images: np.ndarray) -> np.ndarray:
    """(K, 4) placement of what lies within a border of one colour; zeros where there is no border."""
    spans = [_span(images), _span(images.swapaxes(1, 2))]
    return np.stack([part for low, high in spans for part in ((high - low) / T - 1, (high + low) / T - 1)], 1)


def _span(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and row after the last one of the content, float32 (K,). The row at the border's edge is a mixture and
    goes with the border. Less than a quarter left is no border but a dark image."""
    mean, plain = images.mean(2), np.ptp(images, axis=2) <= BORDER
    above = np.logical_and.accumulate(plain & (np.abs(mean - mean[:, :1]) <= BORDER), 1).sum(1)
    below = np.logical_and.accumulate((plain & (np.abs(mean - mean[:, -1:]) <= BORDER))[:, ::-1], 1).sum(1)
    above, below = above + (above > 0), below + (below > 0)
    kept = above + below <= 3 * T // 4
    return np.where(kept, above, 0).astype(np.float32), np.where(kept, T - below, T).astype(np.float32)


@lru_cache(maxsize=1)
def _cosines() -> tuple[np.ndarray, np.ndarray]:
    """(F, T) the lowest cosines, and (T, T) weights that fall to 0 at the rim, where crops and borders show."""
    cells = np.arange(T, dtype=np.float32)
    ramp = np.minimum((np.minimum(cells, cells[::-1]) + 0.5) / (T / 10), 1)
    return np.cos(np.pi * (2 * cells + 1) * np.arange(F, dtype=np.float32)[:, None] / (2 * T)), np.outer(ramp, ramp)


def _describe(images: np.ndarray) -> np.ndarray:
    cosines, weights = _cosines()
    coefficients = cosines @ (_squash(_band(images, 1.33, 5.33)) * weights) @ cosines.T
    coefficients[:, 0, 0] = 0
    return (coefficients / (np.linalg.norm(coefficients, axis=(1, 2), keepdims=True) + 1e-6)).astype(np.float16)


def _turn(images: np.ndarray, way: int) -> np.ndarray:
    """One of the 8 orientations: bit 4 transposes, then bit 1 flips rows and bit 2 columns."""
    turned = images.swapaxes(-1, -2) if way & 4 else images
    return turned[..., :: -1 if way & 1 else 1, :: -1 if way & 2 else 1]


def _turn_descriptors(descriptors: np.ndarray, way: int) -> np.ndarray:
    """Descriptors of turned images: a flip changes the sign of every odd cosine."""
    signs = (-1.0) ** np.arange(F, dtype=np.float32)
    turned = descriptors.swapaxes(-1, -2) if way & 4 else descriptors
    turned = turned * signs[:, None] if way & 1 else turned
    return turned * signs if way & 2 else turned


# Search


def _search(a: Views, b: Views, within: bool) -> np.ndarray:
    """Candidates, rows of views: the KEEP best of every view of `a` and of every view of `b`."""
    kept, of_a = [], {start: np.empty(0, Candidates) for start in range(0, len(a.owner), BLOCK)}
    for start_b in range(0, len(b.owner), BLOCK):
        of_b = np.empty(0, Candidates)
        turned = _turned(b.descriptors[start_b : start_b + BLOCK])
        for start_a in of_a:
            hits = _hits(a.descriptors[start_a : start_a + BLOCK], turned)
            hits["a"] += start_a
            hits["b"] += start_b
            if within:
                hits = hits[a.owner[hits["a"]] != b.owner[hits["b"]]]
            of_a[start_a] = _best(np.concatenate([of_a[start_a], hits]), "a")
            of_b = _best(np.concatenate([of_b, hits]), "b")
        kept.append(of_b)
    pairs = np.concatenate([*kept, *of_a.values(), np.empty(0, Candidates)])
    _, first = np.unique(pairs["a"].astype(np.int64) * len(b.owner) + pairs["b"], return_index=True)
    pairs = pairs[first]
    return pairs[a.owner[pairs["a"]] < b.owner[pairs["b"]]] if within else pairs


def _turned(descriptors: np.ndarray) -> list[np.ndarray]:
    flat = [_turn_descriptors(descriptors.astype(np.float32), way).reshape(-1, F * F) for way in range(8)]
    return [np.ascontiguousarray(matrix.T) for matrix in flat]


def _hits(descriptors: np.ndarray, turned: list[np.ndarray]) -> np.ndarray:
    rows = descriptors.astype(np.float32).reshape(-1, F * F)
    scores = rows @ turned[0]
    for matrix in turned[1:]:
        np.maximum(scores, rows @ matrix, out=scores)
    a, b = np.nonzero(scores >= CANDIDATE)
    hits = np.empty(len(a), Candidates)
    hits["a"], hits["b"], hits["score"] = a, b, scores[a, b]
    return hits


def _best(hits: np.ndarray, side: str) -> np.ndarray:
    """The KEEP best of each row of one side."""
    hits = hits[np.lexsort((-hits["score"], hits[side]))]
    first = np.searchsorted(hits[side], hits[side])
    return hits[np.arange(len(hits)) - first < KEEP]


# Check


class Side(NamedTuple):
    """One side of K pairs: `thumbnails` (K, T, T), `placement` (K, 4) and `descriptors` (K, F, F) of a view of each,
    and `small` (K, T / 2, T / 2), the texture of what lies at the placement."""

    thumbnails: np.ndarray
    placement: np.ndarray
    descriptors: np.ndarray
    small: np.ndarray


def _side(thumbnails: np.ndarray, views: Views, rows: np.ndarray) -> Side:
    rows, pair = np.unique(rows, return_inverse=True)  # a view is in several pairs, and looked at once
    images, placement = np.asarray(thumbnails[views.owner[rows]], np.float32), views.placement[rows]
    small = _squash(_band(_place(_halve(images), placement)[0], 0.7, 2.7))
    return Side(*(part[pair] for part in (images, placement, views.descriptors[rows].astype(np.float32), small)))


def _check(x: Side, y: Side) -> np.ndarray:
    """Scores (K,) of pairs; 0 for those that are far from alike when laid over each other at half the size."""
    # The order of a pair must not matter, so that an audit of b against a finds what one of a against b does.
    swap = x.thumbnails.sum((1, 2)) > y.thumbnails.sum((1, 2))
    x, y = _exchange(swap, x, y), _exchange(swap, y, x)
    ways = np.argmax([np.einsum("kij,kij->k", x.descriptors, _turn_descriptors(y.descriptors, w)) for w in range(8)], 0)
    there, agreement = _align(x.small, _turn_each(y.small, ways))
    scores, rest = np.zeros(len(ways), np.float32), np.nonzero(agreement >= ALIKE)[0]
    if len(rest):
        first, second = (_place(side.thumbnails[rest], side.placement[rest])[0] for side in (x, y))
        scores[rest] = _score_both_ways(first, _turn_each(second, ways[rest]), there[rest])
    return scores


def _exchange(swap: np.ndarray, x: Side, y: Side) -> Side:
    return Side(*(np.where(swap.reshape(-1, *[1] * (p.ndim - 1)), q, p) for p, q in zip(x, y, strict=True)))


def _turn_each(images: np.ndarray, ways: np.ndarray) -> np.ndarray:
    return np.stack([_turn(image, int(way)) for image, way in zip(images, ways, strict=True)])


def _halve(images: np.ndarray) -> np.ndarray:
    rows = images[:, ::2] + images[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def _score_both_ways(x: np.ndarray, y: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The best of: as they are, y moved onto x, x moved onto y. (K, T, T) each. What is settled is not moved."""
    scale, shift = there[:, ::2], there[:, 1::2]
    back = np.stack([1 / (1 + scale) - 1, -shift / (1 + scale)], 2).reshape(-1, 4)
    seen = _textures(x), _textures(y)
    scores = _score(*seen, np.ones((1, T, T), bool))
    for still, moving, placement, least in ((seen[0], y, there, -1), (seen[1], x, back, SAME - CLOSE)):
        open_ = np.nonzero((scores >= least) & (scores < SAME))[0]
        if not len(open_):
            continue
        moved, inside = _place(moving[open_], placement[open_])
        scores[open_] = np.maximum(scores[open_], _score(still[:, open_], _textures(moved), inside))
    return scores


def _textures(images: np.ndarray) -> np.ndarray:
    """(K, T, T) → (2, K, T, T): all of it, and that away from edges."""
    band = _band(images, 0.7, 2.0)
    return np.stack([_squash(band), _away_from_edges(band)])


def _score(x: np.ndarray, y: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(K,) of two `_textures`."""
    return (_correlate(x[0], y[0], inside) + _correlate(x[1], y[1], inside)) / 2


def _correlate(f: np.ndarray, g: np.ndarray, inside: np.ndarray) -> np.ndarray:
    f, g = f * inside, g * inside
    return (f * g).sum((1, 2)) / np.sqrt(((f * f).sum((1, 2)) + 1) * ((g * g).sum((1, 2)) + 1))


def _align(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, 4) placement in y that shows x, both textures, by Gauss-Newton, and how well they then correlate (K,)."""
    size = x.shape[-1]
    place, along = np.zeros((len(x), 4), np.float32), _centres(size)
    for _ in range(STEPS):
        moved, inside = _place(y, place, cubic=False)
        down, across = np.gradient(moved, axis=1) * (size / 2), np.gradient(moved, axis=2) * (size / 2)
        slopes = np.stack([down * along[:, None], down, across * along, across], 1) * inside[:, None]
        slopes = slopes.reshape(len(x), 4, -1)
        curvature = slopes @ slopes.swapaxes(1, 2)
        curvature += np.eye(4, dtype=np.float32) * (1e-3 * np.trace(curvature, axis1=1, axis2=2)[:, None, None] + 1e-3)
        step = np.linalg.solve(curvature, slopes @ (x - moved).reshape(len(x), -1, 1))
        place = (place + step[..., 0]).clip(-REACH, REACH)
    return place, _correlate(x, *_place(y, place, cubic=False))


def _centres(size: int) -> np.ndarray:
    return ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)


def _place(images: np.ndarray, placement: np.ndarray, cubic: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What lies at the placements (K, 4) of (K, S, S), resampled to S x S; and (K, S, S) bool where it is known, the
    rim of both left out."""
    size = images.shape[-1]
    weights, known = [], []
    for scale, shift in (placement[:, :2].T, placement[:, 2:].T):
        at = ((1 + scale[:, None]) * _centres(size) + shift[:, None] + 1) / 2 * size - 0.5
        rim, cells = EDGE * size / T, np.arange(size)
        known.append((at >= rim) & (at <= size - 1 - rim) & (cells >= rim) & (cells <= size - 1 - rim))
        weights.append(_interpolate(at.clip(0, size - 1), cubic))
    return weights[0] @ images @ weights[1].swapaxes(1, 2), known[0][:, :, None] & known[1][:, None, :]


def _interpolate(at: np.ndarray, cubic: bool) -> np.ndarray:
    """(K, S) positions → (K, S, S) weights: linear, or Keys' cubic (IEEE Trans. ASSP 29(6), 1981)."""
    size, below = at.shape[1], np.floor(at)
    weights = np.zeros(
        (len(at), size, size + 3), np.float32
    )  # a cell more before, two after: what falls there is cut off
    rows = np.arange(at.size).reshape(at.shape) * (size + 3) + 1
    for step in (-1, 0, 1, 2) if cubic else (0, 1):  # the cells around a position; all others weigh nothing
        cell = below + np.float32(step)
        d = np.abs(at - cell)
        near = (1.5 * d - 2.5) * d * d + 1 if cubic else np.maximum(1 - d, 0)
        far = ((-0.5 * d + 2.5) * d - 4) * d + 2 if cubic else near
        weights.reshape(-1)[rows + cell.astype(np.int64)] = np.where(d < 1, near, far)
    return weights[:, :, 1 : size + 1]
