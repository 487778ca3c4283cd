"""Reading a medical image file, and preparing its pixels for a network.

Three kinds of file: a picture (PNG, JPEG, TIFF, BMP), DICOM (see grounding.dicom_image), and one slice of a NIfTI
volume (`vol.nii.gz@axial:87`). Where a file holds several frames one is chosen by `file.dcm@frame:3`; indices count
from 0. The pixels that `read_image` returns are what every normalised box in the framework refers to: a picture after
its EXIF orientation, a DICOM frame as stored, a slice as `slice_volume` displays it.

Greys of more than 8 bits are scaled by their 0.5 and 99.5 percentiles, not by their upper byte: such files mostly hold
10 to 14 bits, and the upper byte of those is black. Colours of 16 bits keep their upper byte.

Dimension key: H, W the image as read; S side of the square network input; I, J, K a volume in RAS+ order (axis 0 grows
to the patient's right, 1 to anterior, 2 to superior).
"""

import gzip
import io
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from PIL import Image

from grounding.dicom_image import MODALITIES, read_dicom
from grounding.pixels import (
    MAX_PIXELS,
    WINDOWS,
    ImageError,
    MedicalImage,
    check_size,
    choose_frame,
    grey_if_equal,
    preset_limits,
    thin,
    to_uint8,
    window_limits,
)

__all__ = [
    "DICOM_SUFFIXES",
    "MAX_PIXELS",
    "MODALITIES",
    "WINDOWS",
    "ImageError",
    "Letterbox",
    "MedicalImage",
    "preset_limits",
    "read_image",
    "slice_spacing",
    "slice_volume",
    "to_pixel_values",
    "to_uint8",
    "window_limits",
]

MAX_VOXELS = 600_000_000  # of one volume: 512 x 512 x 2000 passes
MAX_HEADER = 2**26  # bytes before the voxels of a NIfTI file; extensions may lie there
MAX_PAGES = 10_000  # of a TIFF
SLAB = 8_000_000  # voxels that are read at a time
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PICTURES = ("PNG", "JPEG", "TIFF", "BMP")
PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# EXIF 2.32, 4.6.4 A: what brings the stored picture upright.
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

if TYPE_CHECKING:  # torch takes seconds and 200 MB, which who only reads pictures need not pay
    import torch
Boxes = TypeVar("Boxes", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class Letterbox:
    """Where an (H, W) image lies in the (S, S) network input; `content` = (top, left, height, width) in its pixels."""

    image_size: tuple[int, int]
    size: int
    content: tuple[int, int, int, int]

    @classmethod
    def fit(cls, image_size: tuple[int, int], size: int) -> "Letterbox":
        """Largest centred fit that keeps the aspect ratio."""
        scale = size / max(image_size)
        height, width = (max(1, round(side * scale)) for side in image_size)
        return cls(image_size, size, ((size - height) // 2, (size - width) // 2, height, width))

    def apply(self, boxes: Boxes) -> Boxes:
        """(..., 4) xyxy in [0, 1] of the image -> the same boxes in [0, 1] of the network input."""
        scale, shift = self._affine(boxes)
        return boxes * scale + shift

    def invert(self, boxes: Boxes) -> Boxes:
        """Inverse of `apply`. A box that reaches into the padding comes out beyond [0, 1]; the caller may clip it."""
        scale, shift = self._affine(boxes)
        return (boxes - shift) / scale

    def _affine(self, boxes: Boxes) -> tuple[Boxes, Boxes]:
        top, left, height, width = (side / self.size for side in self.content)
        scale, shift = [width, height, width, height], [left, top, left, top]
        if isinstance(boxes, np.ndarray):
            return np.asarray(scale, boxes.dtype), np.asarray(shift, boxes.dtype)
        return boxes.new_tensor(scale), boxes.new_tensor(shift)


def read_image(source: str | Path | bytes, window: str | None = None) -> MedicalImage:
    """Decode a picture, a DICOM file or a NIfTI slice, from a path or (not NIfTI) from the file's bytes.

    `window`: a name in `WINDOWS`, for CT in DICOM or NIfTI. Without one a DICOM file is shown through its own window,
    and a volume through the percentiles of all its voxels.

    Raises:
        ImageError: missing, empty, truncated, oversized or unknown file; a volume or multi-frame file without a choice;
            an unknown window, or one for what is not CT.
    """
    limits = None if window is None else preset_limits(window)
    name, path, kind, index = _locate(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decoders remark on every oddity, at times with a patient's name
            if path is not None and path.name.lower().endswith((".nii", ".nii.gz")):
                return _read_nifti(path, kind, index, limits)
            if kind in PLANES:
                raise ImageError(f"@{kind} chooses a slice of a NIfTI volume; give the picture's path alone")
            with io.BytesIO(source) if isinstance(source, bytes) else cast(Path, path).open("rb") as stream:
                return _read_stream(stream, path, index, limits)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; crop or downsample it first") from None
    except Exception as error:  # on a broken file the decoders raise nearly anything
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded ({reason}); export it again, or convert it to PNG") from error


def _read_stream(
    stream: BinaryIO, path: Path | None, index: int | None, limits: tuple[float, float] | None
) -> MedicalImage:
    start = stream.read(132)
    stream.seek(0)
    named_dicom = path is not None and path.suffix.lower() in DICOM_SUFFIXES
    if start[128:] == b"DICM" or (named_dicom and not start.startswith(PICTURE_STARTS)):
        return read_dicom(stream, index, limits)
    if limits is not None:
        raise ImageError("a picture holds no Hounsfield units; leave the window out")
    return MedicalImage(_read_picture(stream, index))


def slice_volume(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice of a RAS+ volume (I, J, K) as it is displayed in radiology.

    axial: (J, I), anterior up, the patient's left on the image's right; coronal: (K, I), superior up, left on right;
    sagittal: (K, J), superior up, anterior on the image's left. `index` counts voxels from 0 along the plane's axis.
    """
    # The display convention is the same for all three planes: the later axis becomes the rows, and both run downwards.
    return np.moveaxis(volume, PLANES[plane], 0)[index].T[::-1, ::-1]


def slice_spacing(zooms: tuple[float, float, float], plane: str) -> tuple[float, float]:
    """Millimetres per pixel (row, column) of `slice_volume`, from the voxel sizes along (I, J, K)."""
    columns, rows = (float(zoom) for axis, zoom in enumerate(zooms) if axis != PLANES[plane])
    return rows, columns


def to_pixel_values(pixels: np.ndarray, size: int) -> "tuple[torch.Tensor, Letterbox]":
    """uint8 (H, W) or (H, W, 3) -> float32 (3, S, S) and where the image lies in it.

    Bilinear with antialiasing, aspect kept, centred on black, then ImageNet mean and standard deviation.
    """
    import torch

    pixels = np.asarray(pixels)
    box = Letterbox.fit(pixels.shape[:2], size)
    top, left, height, width = box.content
    canvas = np.zeros((size, size, 3), np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    canvas[top : top + height, left : left + width] = resized.reshape(height, width, -1)
    values = torch.from_numpy(canvas).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], box


def _locate(source: str | Path | bytes) -> tuple[str, Path | None, str | None, int | None]:
    """(name for messages, path, plane or `frame`, index); checks that there is something to read."""
    if isinstance(source, bytes):
        if not source:
            raise ImageError("image bytes: empty (0 bytes); read the file again")
        return "image bytes", None, None, None
    try:
        return _locate_file(source)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{source}: cannot be opened ({error}); give the path of an image") from None


def _locate_file(source: str | Path) -> tuple[str, Path | None, str | None, int | None]:
    path, kind, index = Path(source), None, None
    chosen = re.fullmatch(r"(.+)@(\w+):(-?\d{1,9})", str(source))
    if chosen and not path.exists():
        path, kind, index = Path(chosen[1]), chosen[2], int(chosen[3])
        if kind not in (*PLANES, "frame"):
            raise ImageError(f"{source}: unknown choice {kind!r}; use axial, coronal, sagittal or frame")
    if not path.is_file():
        raise ImageError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of an image")
    if not path.stat().st_size:
        raise ImageError(f"{path}: empty file (0 bytes); copy or export it again")
    return str(path), path, kind, index


# Pictures


def _read_picture(stream: BinaryIO, frame: int | None) -> np.ndarray:
    try:
        image = Image.open(stream, formats=PICTURES)
    except Image.UnidentifiedImageError:
        raise ImageError("not an image this program reads; use PNG, JPEG, TIFF, BMP, DICOM or NIfTI") from None
    check_size(*image.size)
    if image.format == "TIFF":
        image.seek(choose_frame(frame, _count_pages(image)))
        check_size(*image.size)
    else:
        choose_frame(frame, 1)
    return _picture_pixels(_upright(image))


def _count_pages(image: Image.Image) -> int:
    """As `image.n_frames`, but it ends: a small file can chain pages for minutes."""
    for page in range(1, MAX_PAGES):
        try:
            image.seek(page)
        except EOFError:
            return page
    raise ImageError(f"holds more than {MAX_PAGES:,} pages; split it first")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF is turned by this already, and then states no orientation
    try:
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF data raise nearly anything; viewers then show the picture as it is
        turn = None
    return image if turn is None else image.transpose(turn)


def _picture_pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) from any mode; transparency over black, deep greys by percentiles."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        return to_uint8(values, *window_limits(values))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size)
        image.paste(rgba, mask=rgba.getchannel("A"))
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return grey_if_equal(np.asarray(image if image.mode == mode else image.convert(mode)))  # convert always copies


# NIfTI


def _read_nifti(path: Path, plane: str | None, index: int | None, limits: tuple[float, float] | None) -> MedicalImage:
    with path.open("rb") as file:
        # By content: a .nii.gz that is not compressed occurs, and a compressed .nii.
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if file.peek(2)[:2] == b"\x1f\x8b" else file
        header = _nifti_header(stream)
        shape = _volume_shape(header)
        # (3, 2): for each stored axis the RAS+ axis that it runs along, and 1 with it or -1 against it
        orientation = nib.io_orientation(header.get_best_affine())
        if np.isnan(orientation).any():
            raise ImageError("its affine has no direction for an axis; write the file again with a valid one")
        axes = [int(axis) for axis in orientation[:, 0]]
        count = shape[axes.index(PLANES[plane])] if plane in PLANES else 0
        if plane not in PLANES or index is None:
            raise ImageError(f"a volume; choose a slice, for example {path.name}@axial:{shape[axes.index(2)] // 2}")
        if not 0 <= index < count:
            raise ImageError(f"{plane} slice {index} does not exist; choose one from 0 to {count - 1}")
        axis = axes.index(PLANES[plane])
        place = index if orientation[axis, 1] == 1 else count - 1 - index
        values, sample = _scan(ArrayProxy(stream, header, mmap=False), shape, axis, place, limits is None)
    volume = nib.apply_orientation(values, orientation)
    pixels = to_uint8(slice_volume(volume, plane, 0), *(limits or window_limits(sample)))
    zooms = [float(header.get_zooms()[axes.index(axis)]) for axis in range(3)]
    spacing = slice_spacing(tuple(zooms), plane) if all(0 < zoom < 1e4 for zoom in zooms) else None
    return MedicalImage(np.ascontiguousarray(pixels), spacing)


def _nifti_header(stream: BinaryIO) -> nib.Nifti1Header:
    """https://nifti.nimh.nih.gov/nifti-1/documentation and nifti-2; a header with its voxels in one file."""
    start = stream.read(540)
    kinds = {b"n+1\0": (nib.Nifti1Header, start[344:348], 348), b"n+2\0": (nib.Nifti2Header, start[4:8], 540)}
    for magic, (kind, found, length) in kinds.items():
        if found == magic:
            header = kind(start[:length])
            if not 0 <= header.get_data_offset() <= MAX_HEADER:
                raise ImageError(f"its voxels start at byte {header.get_data_offset()}; write the file again")
            return header
    raise ImageError("not a NIfTI volume with its voxels in one file; convert it to .nii.gz, or give its real suffix")


def _volume_shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Of one grey volume that fits the limits."""
    whole, dtype = header.get_data_shape(), header.get_data_dtype()
    shape = whole[:3] if whole[3:] in ((), (1,)) else whole
    if len(shape) != 3 or dtype.names or dtype.kind not in "iuf":
        raise ImageError(f"shape {whole} of {dtype.name} is not one grey volume; split it into 3-D volumes first")
    if math.prod(shape) > MAX_VOXELS:
        raise ImageError(f"{shape} is more than {MAX_VOXELS:,} voxels; crop or resample it first")
    _, side, longest = sorted(shape)
    check_size(longest, min(shape) and side)
    return shape


def _scan(
    proxy: ArrayProxy, shape: tuple[int, int, int], axis: int, place: int, sampled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One slice of a stored volume, float32 with 1 along `axis`; and a sample of all its voxels. Slab by slab, so that
    neither the memory nor a compressed file is gone through twice."""
    parts, samples = [], [np.zeros(0, np.float32)]
    step = max(1, SLAB // (shape[0] * shape[1]))
    for start in range(0, shape[2], step):
        slab = np.asarray(proxy[:, :, start : start + step], np.float32).reshape(*shape[:2], -1)
        if axis != 2:
            parts.append(slab.take([place], axis=axis))
        elif start <= place < start + step:
            parts.append(slab[:, :, place - start : place - start + 1].copy())
        if sampled:
            samples.append(thin(slab, math.prod(shape)).copy())
    return np.concatenate(parts, axis=2), np.concatenate(samples)
