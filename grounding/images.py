"""Reading a medical image file, and preparing its pixels for a network.

Three kinds of file: a picture (PNG, JPEG, TIFF, BMP), DICOM, and one slice of a NIfTI volume (`vol.nii.gz@axial:87`).
Where a file holds several frames one is chosen by `file.dcm@frame:3`; indices count from 0. The pixels that
`read_image` returns are what every normalised box in the framework refers to.

Dimension key: H, W the image as read; S side of the square network input; I, J, K a volume in RAS+ order (axis 0 grows
to the patient's right, 1 to anterior, 2 to superior).
"""

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import nibabel as nib
import numpy as np
import pydicom
import torch
from PIL import Image, ImageOps
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, pixel_array

MAX_PIXELS = 64_000_000  # of one picture or frame; far above any clinical image, far below what fills the memory
MAX_VOXELS = 600_000_000  # of one volume: 512 x 512 x 2000 passes
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
PERCENTILES = (0.5, 99.5)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PICTURES = ("PNG", "JPEG", "TIFF", "BMP")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# DICOM PS3.3 C.7.3.1.1.1. DMS is dermoscopy proper; older files carry it as XC, a photograph.
MODALITIES = {
    "MR": "mri",
    "CT": "ct",
    "CR": "xray",
    "DX": "xray",
    "MG": "xray",
    "RF": "xray",
    "XA": "xray",
    "US": "ultrasound",
    "OP": "fundus",
    "ES": "endoscopy",
    "DMS": "dermoscopy",
    "XC": "dermoscopy",
    "SM": "microscopy",
    "GM": "microscopy",
}

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)


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
        if isinstance(boxes, torch.Tensor):
            return boxes.new_tensor(scale), boxes.new_tensor(shift)
        return np.asarray(scale, boxes.dtype), np.asarray(shift, boxes.dtype)


def read_image(source: str | Path | bytes) -> MedicalImage:
    """Decode a picture, a DICOM file or a NIfTI slice, from a path or (not NIfTI) from the file's bytes.

    Raises:
        ImageError: missing, empty, truncated, oversized or unknown file; a volume or multi-frame file without a choice.
    """
    name, path, kind, index = _locate(source)
    try:
        if path is not None and path.name.lower().endswith((".nii", ".nii.gz")):
            return _read_nifti(path, kind, index)
        if kind in PLANES:
            raise ImageError(f"@{kind} chooses a slice of a NIfTI volume; give the picture's path alone")
        data = source if isinstance(source, bytes) else path.read_bytes()
        if data[128:132] == b"DICM" or (path is not None and path.suffix.lower() in DICOM_SUFFIXES):
            return _read_dicom(data, index)
        return MedicalImage(_read_picture(data, index))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # on a broken file the decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageError(f"{name}: cannot be decoded ({reason}); export it again, or convert it to PNG") from error


def slice_volume(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice of a RAS+ volume (I, J, K) as it is displayed in radiology.

    axial: (J, I), anterior up, the patient's left on the image's right; coronal: (K, I), superior up, left on right;
    sagittal: (K, J), superior up, anterior on the image's left. `index` counts voxels from 0 along the plane's axis.
    """
    # The display convention is the same for all three planes: the later axis becomes the rows, and both run downwards.
    return volume.take(index, axis=PLANES[plane]).T[::-1, ::-1]


def slice_spacing(zooms: tuple[float, float, float], plane: str) -> tuple[float, float]:
    """Millimetres per pixel (row, column) of `slice_volume`, from the voxel sizes along (I, J, K)."""
    columns, rows = (float(zoom) for axis, zoom in enumerate(zooms) if axis != PLANES[plane])
    return rows, columns


def window_limits(values: np.ndarray) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the finite, non-zero values; 0 is background. (0, 1) if there are none."""
    foreground = values[np.isfinite(values) & (values != 0)]
    if not foreground.size:
        return 0.0, 1.0
    low, high = np.percentile(foreground, PERCENTILES)
    if low == high:  # nearly one value only, as in a mask: the window then spans all, with the background
        low, high = min(foreground.min(), 0), max(foreground.max(), 0)
    return float(low), float(high)


def to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] linearly to 0..255, clipped; not-a-number becomes 0."""
    scaled = (np.asarray(values, np.float32) - low) / max(high - low, 1e-6)
    return np.rint(np.clip(np.nan_to_num(scaled, posinf=1, neginf=0), 0, 1) * 255).astype(np.uint8)


def to_pixel_values(pixels: np.ndarray, size: int) -> tuple[torch.Tensor, Letterbox]:
    """uint8 (H, W) or (H, W, 3) -> float32 (3, S, S) and where the image lies in it.

    Bilinear with antialiasing, aspect kept, centred on black, then ImageNet mean and standard deviation.
    """
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
    path, kind, index = Path(source), None, None
    chosen = re.fullmatch(r"(.+)@(\w+):(-?\d+)", str(source))
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


def _read_picture(data: bytes, frame: int | None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        try:
            image = Image.open(io.BytesIO(data), formats=PICTURES)
        except Image.DecompressionBombError:
            raise ImageError(f"more than {MAX_PIXELS:,} pixels; crop or downsample it first") from None
        except Image.UnidentifiedImageError:
            raise ImageError("not an image this program reads; use PNG, JPEG, TIFF, BMP, DICOM or NIfTI") from None
    _check_size(*image.size)
    frame = _choose(frame, image.n_frames if image.format == "TIFF" else 1)
    if frame:
        image.seek(frame)
        _check_size(*image.size)
    return _picture_pixels(ImageOps.exif_transpose(image))


def _picture_pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) from any mode; transparency over black, deep greys by percentiles."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        return to_uint8(values, *window_limits(values))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return _grey_if_equal(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))


def _grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """A grey image saved as RGB has one channel's worth of information: return (H, W)."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; crop or downsample it first")


def _choose(index: int | None, count: int) -> int:
    """The frame to read: the only one, or the one that was asked for."""
    if index is None and count > 1:
        raise ImageError(f"holds {count} frames; choose one, for example FILE@frame:{count // 2}")
    if not 0 <= (index or 0) < count:
        raise ImageError(f"frame {index} does not exist; choose one from 0 to {count - 1}")
    return index or 0


# DICOM


def _read_dicom(data: bytes, index: int | None) -> MedicalImage:
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise ImageError("DICOM without pixels (a report, a plan or a broken file); give an image object")
    _check_size(int(dataset.Columns), int(dataset.Rows))
    frame = _choose(index, int(dataset.get("NumberOfFrames") or 1))
    modality = MODALITIES.get(str(dataset.get("Modality", "")))
    return MedicalImage(_dicom_pixels(dataset, frame), _dicom_spacing(dataset, frame), modality)


def _dicom_pixels(dataset: Dataset, frame: int) -> np.ndarray:
    raw = _decode_frame(dataset, frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raw = apply_color_lut(raw, dataset)
    if raw.ndim == 3:
        return _grey_if_equal(raw if raw.dtype == np.uint8 else to_uint8(raw, 0, np.iinfo(raw.dtype).max))
    pixels = _dicom_grey(dataset, frame, raw)
    return 255 - pixels if dataset.PhotometricInterpretation == "MONOCHROME1" else pixels


def _decode_frame(dataset: Dataset, frame: int) -> np.ndarray:
    """Stored values (H, W) or RGB (H, W, 3); YBR colour is converted by pydicom."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # DICOM's default
    try:
        return pixel_array(dataset, index=frame)
    except (RuntimeError, NotImplementedError):
        syntax = dataset.file_meta.TransferSyntaxUID.name
        remedy = "pip install 'pylibjpeg[all]', or convert the file with gdcmconv --raw"
        raise ImageError(f"no decoder for {syntax}; {remedy}") from None


def _dicom_grey(dataset: Dataset, frame: int, raw: np.ndarray) -> np.ndarray:
    """Stored values (H, W) -> uint8: rescale, then the file's window, else percentiles (PS3.3 C.11.1 and C.11.2)."""
    values = apply_modality_lut(raw, _frame_group(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope"))
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return to_uint8(apply_voi(values.astype(np.int64), dataset), 0, 2**bits - 1)
    voi = _frame_group(dataset, frame, "FrameVOILUTSequence", "WindowCenter")
    center, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if center is not None and width is not None and width > 1:
        return _window(values, center, width, str(voi.get("VOILUTFunction") or "LINEAR"))
    # Padding is not tissue: as values it would set the window.
    known = raw != dataset.PixelPaddingValue if "PixelPaddingValue" in dataset else np.ones(raw.shape, bool)
    low, high = np.percentile(values[known] if known.any() else values, PERCENTILES)
    return to_uint8(values, low, high)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: LINEAR counts whole values, LINEAR_EXACT is continuous, SIGMOID is soft."""
    if function == "SIGMOID":
        return to_uint8(1 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width)), 0, 1)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return to_uint8(values, center - width / 2, center + width / 2)


def _dicom_spacing(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    """(row, column) in mm; a projection without PixelSpacing states it at the detector."""
    measures = _frame_group(dataset, frame, "PixelMeasuresSequence", "PixelSpacing")
    spacing = measures.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    if not spacing or len(spacing) != 2 or min(spacing) <= 0:
        return None
    return float(spacing[0]), float(spacing[1])


def _frame_group(dataset: Dataset, frame: int, sequence: str, keyword: str) -> Dataset:
    """The data set that holds `keyword`: the file itself, or in an enhanced file the item of this or of all frames."""
    if keyword in dataset:
        return dataset
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*frames[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        if group.get(sequence):
            return group[sequence][0]
    return dataset


def _first(value: object) -> float | None:
    """A window may come with alternatives; the first is the default one."""
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)


# NIfTI


def _read_nifti(path: Path, plane: str | None, index: int | None) -> MedicalImage:
    image = nib.as_closest_canonical(nib.load(path))
    shape = image.shape[:3] if image.shape[3:] in ((), (1,)) else image.shape
    if len(shape) != 3 or np.dtype(image.get_data_dtype()).names:
        raise ImageError(f"shape {image.shape} is not one grey volume; split it into 3-D volumes first")
    if plane not in PLANES or index is None:
        raise ImageError(f"a volume; choose a slice, for example {path.name}@axial:{shape[2] // 2}")
    if not 0 <= index < shape[PLANES[plane]]:
        raise ImageError(f"{plane} slice {index} does not exist; choose one from 0 to {shape[PLANES[plane]] - 1}")
    if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
        raise ImageError(f"{shape} is more than {MAX_VOXELS:,} voxels; crop or resample it first")
    volume = np.asarray(image.dataobj, np.float32).reshape(shape)
    pixels = to_uint8(slice_volume(volume, plane, index), *window_limits(volume))
    return MedicalImage(np.ascontiguousarray(pixels), slice_spacing(image.header.get_zooms()[:3], plane))
