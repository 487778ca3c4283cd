"""What the image readers share: the decoded image, its limits, and the way from stored values to 8 bits.

Dimension key: H, W the image as read. Windows are in Hounsfield units (HU) unless said otherwise.
"""

from dataclasses import dataclass

import numpy as np

MAX_PIXELS = 128_000_000  # of one picture or frame; far above any clinical image, far below what fills the memory
SAMPLE = 16_000_000  # percentiles of more values than this are taken from every second, third, ... of them
PERCENTILES = (0.5, 99.5)
RADIOPAEDIA = "https://radiopaedia.org/articles/windowing-ct"
ORTHANC = "https://orthanc.uclouvain.be/hg/orthanc-stone/diff/0598c87e1e88/Applications/StoneWebViewer/WebApplication/configuration.json"
# Name -> (center, width, where it is from). Where the page gives a range (subdural, neck), its middle; of two windows
# for stroke the wider, for the temporal bone the first.
WINDOWS = {
    "brain": (40, 80, RADIOPAEDIA),
    "subdural": (75, 215, RADIOPAEDIA),
    "stroke": (40, 40, RADIOPAEDIA),
    "temporal_bone": (600, 2800, RADIOPAEDIA),
    "neck": (40, 375, RADIOPAEDIA),
    "lung": (-600, 1500, RADIOPAEDIA),
    "mediastinum": (50, 350, RADIOPAEDIA),
    "abdomen": (50, 400, RADIOPAEDIA),
    "liver": (30, 150, RADIOPAEDIA),
    "spine": (50, 250, RADIOPAEDIA),
    "bone": (400, 1800, RADIOPAEDIA),
    "angiography": (300, 600, ORTHANC),
}


class ImageError(ValueError):
    """An image that cannot be read: one line with the file and the remedy."""


@dataclass(frozen=True)
class MedicalImage:
    """One decoded image.

    pixels: uint8, (H, W) grey or (H, W, 3) RGB. spacing: millimetres per pixel (row, column). modality: the framework's
    name (`mri`, `xray`, ...). The last two are None where the file does not say.
    """

    pixels: np.ndarray
    spacing: tuple[float, float] | None = None
    modality: str | None = None


def preset_limits(window: str) -> tuple[float, float]:
    """(low, high) HU of a name in `WINDOWS`, for `to_uint8`. Raises ImageError naming those known."""
    if window not in WINDOWS:
        raise ImageError(f"unknown window {window!r}; choose one of {', '.join(WINDOWS)}")
    center, width, _ = WINDOWS[window]
    return center - width / 2, center + width / 2


def window_limits(values: np.ndarray) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the finite, non-zero values; 0 is background. (0, 1) if there are none.

    Of more than `SAMPLE` values a regular part is looked at.
    """
    values = thin(values)
    foreground = values[np.isfinite(values) & (values != 0)]
    if not foreground.size:
        return 0.0, 1.0
    low, high = np.percentile(foreground, PERCENTILES)
    if low == high:  # nearly one value only, as in a mask: the window then spans all, with the background
        low, high = min(foreground.min(), 0), max(foreground.max(), 0)
    return float(low), float(high)


def thin(values: np.ndarray, size: int | None = None) -> np.ndarray:
    """At most `SAMPLE` values, evenly over `values`, 1-D. `size`: how many there are in all if these are a part."""
    return values.ravel(order="K")[:: -(-(size or values.size) // SAMPLE) or 1]


def to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] linearly to 0..255, clipped; not-a-number becomes 0."""
    scaled = np.asarray(values, np.float32) - np.float32(low)  # one copy; the rest happens in place
    scaled /= np.float32(max(high - low, 1e-6))
    np.nan_to_num(scaled, copy=False, posinf=1, neginf=0)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= 255
    return np.rint(scaled, out=scaled).astype(np.uint8)


def grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """A grey image saved as RGB has one channel's worth of information: return (H, W)."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels)


def check_size(width: int, height: int) -> None:
    """Raises ImageError beyond `MAX_PIXELS`, and for an image without any."""
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} holds no pixel; export it again")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; crop or downsample it first")


def choose_frame(index: int | None, count: int) -> int:
    """The frame to read: the only one, or the one asked for. Raises ImageError where a choice is left, or is wrong."""
    if index is None and count > 1:
        raise ImageError(f"holds {count} frames; choose one, for example FILE@frame:{count // 2}")
    if not 0 <= (index or 0) < count:
        raise ImageError(f"frame {index} does not exist; choose one from 0 to {count - 1}")
    return index or 0
