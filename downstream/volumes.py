"""Reading a CT or MRI volume as its slices.

A volume is a NIfTI file without a slice (`vol.nii.gz`, or `vol.nii.gz@coronal` for another plane than axial), or a
folder with the DICOM files of one series.
Dimension key: K slices, H, W a slice.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from grounding.images import (
    DICOM_SUFFIXES,
    PLANES,
    ImageError,
    MedicalImage,
    read_image,
    slice_spacing,
    slice_volume,
    to_uint8,
    window_limits,
)

DICOM_TAGS = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber", "Rows")


@dataclass(frozen=True)
class Volume:
    """`slices`: uint8 (K, H, W), or (K, H, W, 3). `spacing`: mm a pixel (row, column) of a slice; `step`: mm from slice
    to slice; `modality`: the framework's name; each None where the file does not say."""

    slices: np.ndarray
    spacing: tuple[float, float] | None
    step: float | None
    modality: str | None

    def image(self, k: int) -> MedicalImage:
        """Slice `k`."""
        return MedicalImage(self.slices[k], self.spacing, self.modality)


def is_volume(source: str | Path) -> bool:
    """Whether `source` names a volume, not one image of it."""
    path, _ = _plane(source)
    return path.is_dir() or path.name.lower().endswith((".nii", ".nii.gz"))


def read_volume(source: str | Path) -> Volume:
    """Read a NIfTI volume or a DICOM series. Slices run towards the patient's right, front or head (NIfTI), or along
    the normal of the slices (DICOM); each looks as `read_image` shows it.

    Raises ImageError for what cannot be read, a folder without DICOM images or with several series.
    """
    path, plane = _plane(source)
    if not path.is_dir():
        return _read_nifti(path, plane or "axial")
    if plane is not None:
        raise ImageError(f"{source}: a DICOM series has the plane of its slices; leave @{plane} out")
    return _read_series(path)


def read_any(source: str | Path) -> MedicalImage | Volume:
    """An image, or a volume. Raises ImageError."""
    return read_volume(source) if is_volume(source) else read_image(source)


def check_readable(source: str | Path) -> None:
    """Raises ImageError for an image that cannot be read. Of a volume, only that it is there is looked at."""
    path, plane = _plane(source)
    if path.is_dir():
        _series(path)
    elif not is_volume(source):
        read_image(source)
    elif not path.is_file():
        read_image(f"{path}@{plane or 'axial'}:0")


def _plane(source: str | Path) -> tuple[Path, str | None]:
    chosen = re.fullmatch(rf"(.+)@({'|'.join(PLANES)})", str(source))
    return (Path(chosen[1]), chosen[2]) if chosen and not Path(source).exists() else (Path(source), None)


def _read_nifti(path: Path, plane: str) -> Volume:
    read_image(f"{path}@{plane}:0")  # checks file, header and size, and says what is wrong
    try:
        stored = nib.load(path)
        values = np.asarray(stored.dataobj, np.float32)
    except Exception as error:  # on a broken file the decoders raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageError(f"{path}: cannot be decoded ({reason}); give it its real suffix, or write it again") from error
    values = values.reshape(values.shape[:3])
    limits = window_limits(values)
    orientation = nib.io_orientation(stored.affine)
    upright = nib.apply_orientation(values, orientation)
    count = upright.shape[PLANES[plane]]
    slices = np.stack([to_uint8(slice_volume(upright, plane, k), *limits) for k in range(count)])
    spacing, step = _nifti_spacing(stored.header.get_zooms(), orientation, plane)
    return Volume(slices, spacing, step, None)


def _nifti_spacing(
    zooms: Sequence[float], orientation: np.ndarray, plane: str
) -> tuple[tuple[float, float] | None, float | None]:
    axes = [int(axis) for axis in orientation[:, 0]]
    i, j, k = (float(zooms[axes.index(axis)]) for axis in range(3))
    if not all(0 < zoom < 1e4 for zoom in (i, j, k)):
        return None, None
    return slice_spacing((i, j, k), plane), (i, j, k)[PLANES[plane]]


def _read_series(folder: Path) -> Volume:
    files, step = _in_order(folder, _series(folder))
    images = [read_image(file) for file in files]
    shapes = Counter(image.pixels.shape for image in images)
    if len(shapes) > 1:
        sizes = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
        raise ImageError(f"{folder}: its slices differ in size ({sizes}); take out what is no slice of the volume")
    return Volume(np.stack([image.pixels for image in images]), images[0].spacing, step, images[0].modality)


def _series(folder: Path) -> dict[Path, pydicom.Dataset]:
    """The DICOM images of a folder, with a few facts of each. Raises ImageError unless they are one series."""
    headers = {file: header for file in sorted(folder.iterdir()) if (header := _header(file)) is not None}
    if not headers:
        raise ImageError(f"{folder}: no DICOM image in this folder; give the folder of one series, or a .nii.gz")
    series = {str(header.get("SeriesInstanceUID", "")) for header in headers.values()}
    if len(series) > 1:
        raise ImageError(f"{folder}: holds {len(series)} series; give a folder for each")
    return headers


def _header(file: Path) -> pydicom.Dataset | None:
    """None for a file that is no DICOM image."""
    if not file.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they remark on every oddity, at times with a patient's name
            forced = file.suffix.lower() in DICOM_SUFFIXES
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(DICOM_TAGS), force=forced)
    except (InvalidDicomError, OSError):
        return None
    return header if "Rows" in header else None


def _in_order(folder: Path, headers: dict[Path, pydicom.Dataset]) -> tuple[list[Path], float | None]:
    """Files along the normal of the slices, and the distance between two of them (PS3.3 C.7.6.2.1.1); where a file does
    not tell its place, by instance number."""
    places = [_place(header) for header in headers.values()]
    if any(place is None for place in places):
        numbered = sorted(headers, key=lambda file: (int(headers[file].get("InstanceNumber") or 0), file.name))
        return numbered, None
    order = np.argsort(np.array(places, float), kind="stable")
    steps = np.diff(np.array(places, float)[order])
    if len(steps) and steps.min() < 1e-3:
        raise ImageError(f"{folder}: several images at one place (phases or echoes); give a folder for each")
    files = list(headers)
    return [files[k] for k in order], float(np.median(steps)) if len(steps) else None


def _place(header: pydicom.Dataset) -> float | None:
    """Of a slice along its normal, in mm."""
    position, directions = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if not position or not directions or len(position) != 3 or len(directions) != 6:
        return None
    normal = np.cross(np.array(directions[:3], float), np.array(directions[3:], float))
    return float(np.array(position, float) @ normal)
