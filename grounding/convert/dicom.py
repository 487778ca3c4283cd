"""DICOM series with what was marked in them: the segments of DICOM-SEG, or the contours of RTSTRUCT.

Dimension key: H, W one image (Rows, Columns); F frames of a segmentation; P points of a contour. Places are in
millimetres of the patient (PS3.3 C.7.6.2.1.1), pixels count from the centre of the first one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array

from grounding.convert.dicom_series import Plane, Series, find_series, reason
from grounding.convert.record import AnnotationError, Item, Regions, Skipped, find_labels, finish, load
from grounding.convert.tables import skip
from grounding.convert.volume_layouts import spoken
from grounding.images import DICOM_SUFFIXES, MAX_VOXELS
from grounding.labels import load_label_tree, parse_side
from grounding.types import GroundingSample

NEAR = 0.5  # mm that a contour, or a frame of a segmentation, may lie off its image


def dicom_seg(root: Path, source: str, licence: str, skip_empty: str = "true") -> Iterator[Item]:
    """Series of single-frame images and the binary SEG objects that refer to them, in any folders and order below
    `root` (https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.8.20.2.html). One item is a series.

    A frame belongs to the image that its Derivation Image Sequence names, else to the one at its place. The name is the
    Segment Label, with the side of the coded modifier where it names none. All segments of a SEG are annotated
    exhaustively. Patient and series become hashes: the store keeps no identifier of the hospital's. `skip_empty`:
    "true" leaves out images without a region.
    """
    yield from _items(Path(root), "SEG", _segments, _add_segments, source, licence, skip_empty)


def dicom_rtstruct(root: Path, source: str, licence: str, skip_empty: str = "true") -> Iterator[Item]:
    """Series of single-frame images and the RTSTRUCT objects that refer to them, as `dicom_seg`
    (https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.8.8.6.html).

    A contour belongs to the image that its Contour Image Sequence names, else to the one in whose plane it lies, which
    may be oblique; one that leaves its image's plane by more than NEAR is left out. Several contours of a structure on
    one image are filled by the even-odd rule. The name is the ROI Name; a last word L or R is the side (AAPM TG-263,
    https://www.aapm.org/pubs/reports/RPT_263.pdf).
    """
    yield from _items(Path(root), "RTSTRUCT", _structures, _add_contours, source, licence, skip_empty)


def _items(
    root: Path, kind: str, names: Callable, add: Callable, source: str, licence: str, skip_empty: str
) -> Iterator[Item]:
    if skip_empty not in ("true", "false"):
        raise AnnotationError(f"skip_empty={skip_empty}: give true or false")
    for found in find_series(root, kind):
        if isinstance(found, Skipped):
            yield skip(found.key, found.why)
        else:
            key = min(plane.path for plane in found.planes).relative_to(root).as_posix()
            yield Item(key, partial(_read, found, root, key, names, add, source, licence, skip_empty == "true"))


# One series


def _read(
    series: Series,
    root: Path,
    key: str,
    names_of: Callable[[Dataset], Mapping[int, tuple[str, str]]],
    add: Callable[..., Iterator[tuple[str, str]]],
    source: str,
    licence: str,
    skip_empty: bool,
) -> Iterator[GroundingSample | Skipped]:
    datasets, troubles = [], []
    for path in series.annotations:
        try:
            dataset = pydicom.dcmread(path, force=True)
            datasets.append((path.name, dataset, names_of(dataset)))
        except Exception as error:  # on a broken file pydicom raises nearly anything
            troubles.append(f"{path.name}: {reason(error)}")
    phrases = dict(pair for _, _, names in datasets for pair in names.values())
    regions = {plane.uid: Regions(plane.size, phrases, series.modality) for plane in series.planes}
    planes, short = {plane.uid: plane for plane in series.planes}, set()
    for name, dataset, names in datasets:
        try:
            for text, why in add(dataset, names, planes, regions):
                short.add(text)
                troubles.append(f"{name}: {text}: {why}")
        except Exception as error:
            short.update(text for text, _ in names.values())
            troubles.append(f"{name}: {reason(error)}")
    labelled = find_labels((phrase for text, phrase in phrases.items() if text not in short), series.modality)
    yield from (Skipped(key, why) for why in troubles)
    kept = [k for k, plane in enumerate(series.planes) if len(regions[plane.uid].done()) or not skip_empty]
    if not kept or not phrases:
        yield Skipped(key, "no image of the series holds a region")
        return
    for frame in kept:
        plane = series.planes[frame]
        yield from _sample(series, plane, frame, root, regions[plane.uid], labelled, source, licence)


def _sample(
    series: Series,
    plane: Plane,
    frame: int,
    root: Path,
    regions: Regions,
    labelled: tuple[str, ...],
    source: str,
    licence: str,
) -> Iterator[GroundingSample | Skipped]:
    # Only a DICOM suffix is cut off: names such as 1.2.840.10008.5 end in a number, not in a suffix.
    name = re.sub(rf"(?i)({'|'.join(DICOM_SUFFIXES)})$", "", plane.path.relative_to(root).as_posix())
    try:
        image = load(str(plane.path))
        if image.pixels.shape[:2] != plane.size:
            raise ValueError(f"pixels of {image.pixels.shape[:2]}, where the header says {plane.size}")
    except (ValueError, OSError) as error:
        yield Skipped(name, str(error))
        return
    sample = GroundingSample(
        image_id=f"{source}/{name}",
        patient_id=f"{source}/{series.patient}",
        source=source,
        modality=series.modality,
        image=str(plane.path),
        regions=regions.done(),
        labelled=labelled,
        spacing=image.spacing,
        study_id=f"{source}/{series.study}",
        frame=frame,
        licence=licence,
    )
    yield from finish(sample, regions, name)


def _said(name: str) -> str:
    """ "Lung_L" → "left Lung"; a side that is a word moves to the front."""
    side = re.fullmatch(r"(.+)[ _]([LR])", name)
    return spoken(f"{'left' if side[2] == 'L' else 'right'} {side[1]}" if side else name)


def _check_frame_of_reference(uid: object, planes: Mapping[str, Plane]) -> None:
    others = {plane.frame_of_reference for plane in planes.values()} - {"", str(uid or "")}
    if uid and others:
        raise ValueError("lies in another frame of reference than its images")


# DICOM-SEG


def _segments(dataset: Dataset) -> dict[int, tuple[str, str]]:
    """Segment Number → (name in the source, phrase)."""
    found = {}
    for segment in dataset.SegmentSequence:
        kind = _meaning(segment.get("SegmentedPropertyTypeCodeSequence"))
        label = str(segment.get("SegmentLabel") or kind)
        side = _modifier(segment)
        text = f"{side} {label}" if side and not parse_side(label) else label
        said, coded = _said(text), f"{side} {kind}".strip()
        phrase = coded if load_label_tree().find(said) is None and load_label_tree().find(coded) else said
        found[int(segment.SegmentNumber)] = text, phrase
    return found


def _modifier(segment: Dataset) -> str:
    """The side that is coded beside the segment's type, or beside the region of the body: "left", "right" or ""."""
    region = (segment.get("AnatomicRegionSequence") or [Dataset()])[0]
    codes = segment.get("SegmentedPropertyTypeModifierCodeSequence") or region.get("AnatomicRegionModifierSequence")
    side = _meaning(codes).lower()
    return side if side in ("left", "right") else ""


def _meaning(codes: object) -> str:
    return str(codes[0].get("CodeMeaning") or "") if codes else ""


def _add_segments(
    dataset: Dataset, names: Mapping[int, tuple[str, str]], planes: Mapping[str, Plane], regions: Mapping[str, Regions]
) -> Iterator[tuple[str, str]]:
    """Adds the regions of one SEG; yields (name, why) of frames that cannot be used."""
    _check_frame_of_reference(dataset.get("FrameOfReferenceUID"), planes)
    kind = dataset.get("SegmentationType")
    if kind != "BINARY":
        raise ValueError(f"segmentation of type {kind}; only BINARY is read")
    shape = int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != shape[0] or min(shape) < 1 or np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise ValueError(f"{shape[0]} frames of {shape[1:]} with {len(groups)} descriptions")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for k, (group, mask) in enumerate(zip(groups, pixel_array(dataset).reshape(shape), strict=True)):
        number = _group(group, shared, "SegmentIdentificationSequence").get("ReferencedSegmentNumber")
        text = names[int(number)][0] if number in names else f"segment {number}"
        try:
            plane = _plane_of_frame(group, shared, planes)
            if number not in names:
                raise ValueError("is not in the Segment Sequence")
            if plane.size != mask.shape:
                raise ValueError(f"{mask.shape} on an image of {plane.size}")
            regions[plane.uid].add_mask(mask, text)
        except ValueError as error:
            yield text, f"frame {k}: {error}"


def _group(group: Dataset, shared: Dataset, sequence: str) -> Dataset:
    """The functional group of one frame, or of all of them (PS3.3 C.7.6.16)."""
    return (group.get(sequence) or shared.get(sequence) or [Dataset()])[0]


def _plane_of_frame(group: Dataset, shared: Dataset, planes: Mapping[str, Plane]) -> Plane:
    """Raises ValueError where the image is not there, or the frame lies elsewhere than the image it names."""
    position = _group(group, shared, "PlanePositionSequence").get("ImagePositionPatient")
    axes = _group(group, shared, "PlaneOrientationSequence").get("ImageOrientationPatient")

    def apart(plane: Plane) -> bool:
        place = plane.place
        return bool(place) and (
            (bool(position) and not np.allclose(list(position), place.position, atol=NEAR))
            or (bool(axes) and not np.allclose(list(axes), [*place.across, *place.down], atol=0.01))
        )

    sources = [
        str(image.get("ReferencedSOPInstanceUID"))
        for derivation in group.get("DerivationImageSequence") or []
        for image in derivation.get("SourceImageSequence") or []
    ]
    if not sources and position:
        plane = next((plane for plane in planes.values() if plane.place and not apart(plane)), None)
    else:
        plane = next((planes[uid] for uid in sources if uid in planes), None)
    if plane is None:
        raise ValueError("its image is not in this folder")
    if apart(plane):
        raise ValueError("lies elsewhere than its image")
    return plane


# RTSTRUCT


def _structures(dataset: Dataset) -> dict[int, tuple[str, str]]:
    """ROI Number → (name in the source, phrase), of structures that have contours."""
    drawn = {int(roi.ReferencedROINumber) for roi in dataset.ROIContourSequence if roi.get("ContourSequence")}
    names = {int(roi.ROINumber): str(roi.get("ROIName") or "") for roi in dataset.StructureSetROISequence}
    return {number: (name, _said(name)) for number, name in names.items() if name and number in drawn}


def _add_contours(
    dataset: Dataset, names: Mapping[int, tuple[str, str]], planes: Mapping[str, Plane], regions: Mapping[str, Regions]
) -> Iterator[tuple[str, str]]:
    """Adds the regions of one RTSTRUCT; yields (name, why) of contours that cannot be used. A structure on an image of
    which one contour is wrong is left out there: the contour might be a hole."""
    defined = {int(roi.ROINumber): roi for roi in dataset.StructureSetROISequence}
    for roi in dataset.ROIContourSequence:
        number = int(roi.ReferencedROINumber)
        if not roi.get("ContourSequence"):
            continue
        if number not in names:
            yield f"ROI {number}", "has no name"
            continue
        text, rings, wrong = names[number][0], {}, set()
        try:
            _check_frame_of_reference(defined[number].get("ReferencedFrameOfReferenceUID"), planes)
            for contour in roi.ContourSequence:
                uid, ring, why = _ring(contour, planes)
                rings.setdefault(uid, []).append(ring)
                if why:
                    wrong.add(uid)
                    yield text, why
        except ValueError as error:
            yield text, reason(error)
            continue
        for uid in rings.keys() - wrong:
            mask = fill(rings[uid], planes[uid].size)
            regions[uid].add_mask(mask, text)
            if not mask.any():
                yield text, "a contour that holds no pixel's centre"


def _ring(contour: Dataset, planes: Mapping[str, Plane]) -> tuple[str, np.ndarray, str]:
    """(image, (P, 2) pixels x, y, what is wrong or "")."""
    images = contour.get("ContourImageSequence")
    uid = str(images[0].get("ReferencedSOPInstanceUID")) if images else ""
    nothing = np.zeros((0, 2))
    kind = str(contour.get("ContourGeometricType"))
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        return uid, nothing, f"a contour of type {kind}, not CLOSED_PLANAR"
    values = np.array(contour.get("ContourData") or [], np.float64).reshape(-1)
    if len(values) < 9 or len(values) % 3 or not np.isfinite(values).all():
        return uid, nothing, "a contour needs three points or more of three finite numbers"
    points = values.reshape(-1, 3)
    placed = {plane.uid: plane.place for plane in planes.values() if plane.place and uid in ("", plane.uid)}
    if not placed:
        return uid, nothing, "the image of a contour is not in this folder, or does not say where it lies"
    uid = min(placed, key=lambda one: np.abs(placed[one].pixels(points)[1]).max())
    ring, off = placed[uid].pixels(points)
    far = np.abs(off).max()
    return uid, ring, f"a contour lies up to {far:.1f} mm off its image" if far > NEAR else ""


def fill(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels with their centre inside the rings, each (P, 2) x, y, by the even-odd rule. A ring inside
    another is a hole."""
    height, width = size
    flips = np.zeros((height, width + 1), np.int32)
    for ring in rings:
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, 0), strict=True):
            low, high = np.clip(np.ceil(sorted((y1, y2))), 0, height).astype(int)
            if low < high:  # an edge from one row of centres to another; each row that it crosses changes sides there
                rows = np.arange(low, high)
                crossings = x1 + (rows - y1) * ((x2 - x1) / (y2 - y1))
                np.add.at(flips, (rows, np.clip(np.ceil(crossings), 0, width).astype(int)), 1)
    return np.cumsum(flips, 1)[:, :width] % 2 == 1
