"""A small fingerprint of an image: a hash that knows the same pixels again, and a thumbnail that knows the same picture
again after it was resized, compressed or flipped (`eval.duplicates` compares thumbnails).

Dimension key: H, W the image as displayed; T side of the thumbnail in cells.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

T = 64  # at 32 the vessels of a fundus are gone, and two eyes look alike
HASH_BYTES = 16


@dataclass(frozen=True)
class Fingerprint:
    """`pixels`: 16 bytes, equal where shape and pixel values are. `thumbnail`: (T, T) uint8 grey, the whole image
    squeezed into a square, so that a resize which changes the aspect ratio leaves it as it is."""

    pixels: bytes
    thumbnail: np.ndarray


def fingerprint(pixels: np.ndarray) -> Fingerprint:
    """Of uint8 (H, W) or (H, W, 3), as displayed. Grey saved as RGB has the fingerprint of grey.

    Raises ValueError for another type or shape, or an image without pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; give uint8 (H, W) or (H, W, 3)")
    pixels = np.ascontiguousarray(_grey_if_equal(pixels))
    code = blake2b(repr(pixels.shape).encode(), digest_size=HASH_BYTES)
    code.update(pixels)
    # Bilinear with antialiasing: a cell is a weighted mean of the pixels under it and beside it, whatever the ratio,
    # so that 512 and 300 pixels give nearly the same cell.
    image = Image.fromarray(pixels)
    grey = image if image.mode == "L" else image.convert("L")
    return Fingerprint(code.digest(), np.asarray(grey.resize((T, T), Image.Resampling.BILINEAR, reducing_gap=3.0)))


def read_picture(path: str | Path) -> np.ndarray:
    """Pixels of a PNG, JPEG, TIFF or BMP of 8 bits, turned as its EXIF says. Raises OSError or ValueError."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF", "BMP")) as image:
            ImageOps.exif_transpose(image, in_place=True)
            mode = "L" if image.mode in ("1", "L") else "RGB"
            return np.asarray(image if image.mode == mode else image.convert(mode))  # convert always copies
    except (Image.DecompressionBombError, SyntaxError) as error:  # the latter is Pillow's word for a broken PNG
        raise ValueError(f"{path}: {error}") from None


def _grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """One channel where all three are equal; the middle row answers for most colour images."""
    if pixels.ndim == 2:
        return pixels
    for part in (pixels[len(pixels) // 2], pixels):
        if not (np.array_equal(part[..., 0], part[..., 1]) and np.array_equal(part[..., 0], part[..., 2])):
            return pixels
    return pixels[..., 0]
