"""DICOM series: the images of a folder by series, in order, and the objects (SEG, RTSTRUCT) that refer to them.

Places are in millimetres of the patient (PS3.3 C.7.6.2.1.1); P points.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from grounding.convert.record import Skipped, below
from grounding.images import DICOM_SUFFIXES, MODALITIES

IMAGE_TAGS = [
    "Modality",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "InstanceNumber",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
]
REFERENCES = (0x00081155, 0x0020000E)  # Referenced SOP Instance UID, Series Instance UID


@dataclass(frozen=True)
class Place:
    """Where an image lies. position: of the first pixel's centre; across, down: unit vectors along a row and a column;
    spacing: mm between pixels (down, across)."""

    position: tuple[float, ...]
    across: tuple[float, ...]
    down: tuple[float, ...]
    spacing: tuple[float, ...]

    def pixels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P, 3) mm → (P, 2) pixels x, y, and (P,) mm off the plane."""
        axes = np.array([self.across, self.down, np.cross(self.across, self.down)])
        x, y, off = axes @ (points - self.position).T
        return np.stack([x / self.spacing[1], y / self.spacing[0]], 1), off


@dataclass(frozen=True)
class Plane:
    """One image of a series; `place` is None where the file does not say, `order` its place among the others."""

    path: Path
    uid: str
    frame_of_reference: str
    size: tuple[int, int]
    order: float
    place: Place | None = None


@dataclass(frozen=True)
class Series:
    """`planes` in order. patient, study: pseudonyms."""

    planes: tuple[Plane, ...]
    annotations: tuple[Path, ...]
    modality: str
    patient: str
    study: str


# Finding series and what refers to them


def find_series(root: Path, kind: str) -> Iterator[Series | Skipped]:
    headers: dict[str, list[tuple[Path, Dataset]]] = {}
    annotations: dict[Path, set[str]] = {}
    uids: set[str] = set()
    for path in filter(_is_dicom, below(root, "**/*")):
        key = path.relative_to(root).as_posix()
        try:
            header = _header(path, kind)
            modality, uid = str(header.get("Modality", "")), str(header.SOPInstanceUID)
            if modality == kind:
                annotations[path] = {str(element.value) for element in header.iterall() if element.tag in REFERENCES}
            elif MODALITIES.get(modality) is None:
                yield Skipped(key, f"modality {modality or 'unknown'} is neither {kind} nor one of the images'")
            elif int(header.get("NumberOfFrames") or 1) > 1:
                yield Skipped(key, "image of several frames; split it into single ones")
            elif uid in uids:
                yield Skipped(key, "copy of an image of this folder (same SOP Instance UID)")
            else:
                uids.add(uid)
                headers.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
        except Exception as error:  # on a broken file pydicom raises nearly anything
            yield Skipped(key, f"not a DICOM file that can be read ({reason(error)})")
    yield from _link(root, headers, annotations, kind)


def _header(path: Path, kind: str) -> Dataset:
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=IMAGE_TAGS)
    if header.get("Modality") == kind:
        return pydicom.dcmread(path, stop_before_pixels=True, force=True)
    return header


def _link(
    root: Path, headers: dict[str, list[tuple[Path, Dataset]]], annotations: dict[Path, set[str]], kind: str
) -> Iterator[Series | Skipped]:
    used: set[Path] = set()
    for series_uid, files in headers.items():
        key = files[0][0].relative_to(root).as_posix()
        known = {series_uid, *(str(header.SOPInstanceUID) for _, header in files)}
        own = tuple(path for path, named in annotations.items() if named & known)
        used.update(own)
        try:
            found = _series(series_uid, files, own)
            yield found if own else Skipped(key, f"no {kind} refers to this series of {len(files)} images")
        except Exception as error:
            yield Skipped(key, f"series of {len(files)} images cannot be read ({reason(error)})")
    for path in sorted(annotations.keys() - used):
        yield Skipped(path.relative_to(root).as_posix(), "refers to no image of this folder")


def _series(uid: str, files: list[tuple[Path, Dataset]], annotations: tuple[Path, ...]) -> Series:
    planes = [_plane(path, header) for path, header in files]
    if all(plane.place for plane in planes):
        normal = np.cross(planes[0].place.across, planes[0].place.down)
        planes = [replace(plane, order=float(normal @ plane.place.position)) for plane in planes]
    first = files[0][1]
    patient = str(first.get("PatientID") or first.get("StudyInstanceUID") or uid)
    ordered = tuple(sorted(planes, key=lambda plane: (plane.order, plane.path)))
    return Series(ordered, annotations, MODALITIES[first.Modality], _pseudonym(patient), _pseudonym(uid))


def _plane(path: Path, header: Dataset) -> Plane:
    return Plane(
        path=path,
        uid=str(header.SOPInstanceUID),
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        size=(int(header.Rows), int(header.Columns)),
        order=float(header.get("InstanceNumber") or 0),
        place=_place(header),
    )


def _place(header: Dataset) -> Place | None:
    position, axes = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    spacing = header.get("PixelSpacing")
    if not position or not axes or not spacing or (len(position), len(axes), len(spacing)) != (3, 6, 2):
        return None
    across, down = np.array(axes, np.float64).reshape(2, 3)
    lengths = [np.linalg.norm(across), np.linalg.norm(down), 1 + across @ down, np.isfinite(list(position)).all()]
    if not np.allclose(lengths, 1, atol=1e-3) or not 0 < min(spacing) <= max(spacing) < np.inf:
        return None
    return Place(tuple(map(float, position)), tuple(across), tuple(down), tuple(map(float, spacing)))


def _is_dicom(path: Path) -> bool:
    if path.name == "DICOMDIR" or path.name.startswith("."):
        return False
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _pseudonym(identifier: str) -> str:
    return hashlib.sha256(identifier.strip().encode()).hexdigest()[:16]


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
