"""NIfTI volumes with label maps → slices, in the layouts of the Medical Segmentation Decathlon and nnU-Net, AMOS,
TotalSegmentator, BraTS and BTCV (`volume_layouts.LAYOUTS`).

Image and labels are brought to RAS+ first, so that a slice looks as in radiology whatever the file's order of axes is;
they must then lie on the same grid. Dimension key: I, J, K a volume in RAS+; H, W a slice of it as displayed.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from PIL import Image
from scipy import ndimage

from grounding.convert.record import AnnotationError, Item, Regions, Skipped, find_labels, finish
from grounding.convert.tables import skip
from grounding.convert.volume_layouts import LAYOUTS, Label, Volume, spoken
from grounding.images import MAX_VOXELS, PLANES, slice_spacing, slice_volume
from grounding.labels import load_label_tree
from grounding.pixels import MAX_PIXELS, WINDOWS, preset_limits, to_uint8, window_limits
from grounding.types import GroundingSample

MOST_PIECES = 200  # of one finding in one slice


@dataclass(frozen=True)
class Cut:
    """How volumes are cut: every `step`-th slice along `plane`."""

    plane: str
    window: str
    skip_empty: bool
    step: int


def nifti_volumes(
    root: Path,
    source: str,
    licence: str,
    layout: str,
    plane: str = "axial",
    window: str = "",
    skip_empty: str = "true",
    step: str = "1",
) -> Iterator[Item]:
    """Volumes of one of `LAYOUTS`, cut into slices of `plane` (axial, coronal, sagittal); one item is one image file.

    `window`: one of `grounding.pixels.WINDOWS`, for CT (the layout's own where it is not given); other modalities take
    percentiles of the volume. `skip_empty`: "true" leaves out slices without a region. `step`: 5 keeps every fifth
    slice. A finding is one region for each connected piece in a slice, a structure is one region a slice. Every volume
    of a 4-D file gives samples of its own. `frame` is the index along the plane's axis in RAS+. Labels that lie on
    another grid than the image, or cannot be read, are left out of the regions and of `labelled`.
    Raises AnnotationError for an option or a folder that is not as described.
    """
    _check_option("layout", layout, LAYOUTS)
    _check_option("plane", plane, PLANES)
    _check_option("window", window, ("", *WINDOWS))
    _check_option("skip_empty", skip_empty, ("true", "false"))
    if not step.isdecimal() or int(step) < 1:
        raise AnnotationError(f"step={step}: give a whole number of 1 or more")
    cut = Cut(plane, window, skip_empty == "true", int(step))
    for found in LAYOUTS[layout](Path(root)):
        if isinstance(found, Skipped):
            yield skip(found.key, found.why)
        else:
            yield Item(found.key, partial(_read, found, cut, source, licence))


def _check_option(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise AnnotationError(f"{name}={value}: unknown; give one of {', '.join(filter(None, known))}")


@dataclass(frozen=True)
class Grid:
    """A NIfTI file of which the header was read. shape: (I, J, K), affine: (4, 4), both of the volume in RAS+."""

    image: nib.Nifti1Pair
    shape: tuple[int, int, int]
    channels: int
    orientation: np.ndarray
    affine: np.ndarray

    def voxels(self, channel: int = 0) -> np.ndarray:
        """(I, J, K) of one channel, as stored or scaled; only that channel is read."""
        proxy = self.image.dataobj
        values = np.asanyarray(proxy[..., channel] if len(proxy.shape) == 4 else proxy)
        # In one piece: numpy would otherwise copy the whole volume for every slice that is taken from it.
        return np.ascontiguousarray(apply_orientation(values, self.orientation))


def open_grid(path: Path) -> Grid:
    """Reads a header. Raises ValueError where it is not that of a grey volume, or one of more than MAX_VOXELS; nibabel
    may raise anything."""
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError("not a NIfTI file")
    shape, rest = image.shape[:3], image.shape[3:]
    if len(shape) != 3 or min(shape) < 1 or len(rest) > 1 or image.get_data_dtype().kind not in "biuf":
        raise ValueError(f"{image.get_data_dtype()} of shape {image.shape} is not a grey volume")
    if math.prod(shape) > MAX_VOXELS or math.prod(sorted(shape)[1:]) > MAX_PIXELS:
        raise ValueError(f"{shape} is more than {MAX_VOXELS:,} voxels, or more than {MAX_PIXELS:,} in a slice")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise ValueError("the affine does not say how the axes lie")
    orientation = io_orientation(image.affine)
    affine = image.affine @ inv_ornt_aff(orientation, shape)
    sides = tuple(shape[axis] for axis in np.argsort(orientation[:, 0]))
    return Grid(image, sides, rest[0] if rest else 1, orientation, affine)


def _read(volume: Volume, cut: Cut, source: str, licence: str) -> Iterator[GroundingSample | Skipped]:
    try:
        yield from _slices(volume, cut, source, licence)
    except (ValueError, OSError):
        raise
    except Exception as error:  # on a broken file nibabel raises nearly anything
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error


def _slices(volume: Volume, cut: Cut, source: str, licence: str) -> Iterator[GroundingSample | Skipped]:
    grid = open_grid(volume.image)
    if grid.channels != len(volume.channels):
        raise ValueError(f"holds {grid.channels} volumes, where the source names {len(volume.channels)}")
    names = {text: volume.words.get(text.lower(), spoken(text)) for _, table in volume.labels for _, text in table}
    axis = PLANES[cut.plane]
    columns, rows = (side for k, side in enumerate(grid.shape) if k != axis)
    modality = volume.channels[0][1]  # of all channels: sequences of one examination
    slices = {index: Regions((rows, columns), names, modality) for index in range(0, grid.shape[axis], cut.step)}
    unlabelled, left_out = _add_labels(volume, grid, slices, cut.plane)
    yield from (Skipped(volume.key, why) for why in left_out.values())
    labelled = find_labels((phrase for text, phrase in names.items() if text not in left_out), modality)
    found = {index: regions.done() for index, regions in slices.items()}
    kept = [index for index in slices if len(found[index]) or not cut.skip_empty]
    if not kept:
        yield Skipped(volume.key, "no slice of it holds a region")
    for channel, (name, modality) in enumerate(volume.channels):
        voxels = grid.voxels(channel) if kept else np.zeros(0)
        low, high = _limits(voxels, modality, cut.window or volume.window)
        folder = "/".join(filter(None, (source, volume.case, name)))
        for index in kept:
            sample = GroundingSample(
                image_id=f"{folder}/{cut.plane}{index:04d}",
                patient_id=f"{source}/{volume.patient}",
                source=source,
                modality=modality,
                image=png(to_uint8(slice_volume(voxels, cut.plane, index), low, high)),
                regions=found[index],
                labelled=() if index in unlabelled else labelled,
                spacing=slice_spacing(tuple(voxel_sizes(grid.affine)), cut.plane),
                study_id=f"{source}/{volume.case}",
                frame=index,
                licence=licence,
            )
            yield from finish(sample, slices[index], f"{volume.key}@{cut.plane}:{index}")


def _add_labels(
    volume: Volume, grid: Grid, slices: Mapping[int, Regions], plane: str
) -> tuple[set[int], dict[str, str]]:
    """Adds the regions of all label files. → the slices with voxels that nobody labelled, and by class (or file) why it
    (or values of it) are left out. Raises ValueError where none of the files can be used."""
    unlabelled: set[int] = set()
    left_out: dict[str, str] = {}
    for path, table in volume.labels:
        try:
            labels = _label_voxels(path, grid)
        except Exception as error:  # one broken mask of a hundred must not lose the others
            left_out |= {text: f"{path.name}: {error}" for _, text in table}
            continue
        nameless: set[int] = set()
        for index, values in _add_slices(labels, table, slices, plane):
            unlabelled.update([index] if values.intersection(volume.ignore) else [])
            nameless |= values.difference(volume.ignore)
        if nameless:
            some = ", ".join(map(str, sorted(nameless)[:5])) + (", ..." if len(nameless) > 5 else "")
            left_out[path.name] = f"{path.name}: values without a name: {some}"
    if all(text in left_out for _, table in volume.labels for _, text in table):
        raise ValueError("; ".join(dict.fromkeys(left_out.values())))
    return unlabelled, left_out


def _add_slices(
    labels: np.ndarray, table: tuple[Label, ...], slices: Mapping[int, Regions], plane: str
) -> Iterator[tuple[int, set[int]]]:
    """Adds the regions of one label volume (I, J, K), and yields each slice with the values that have no name."""
    known = {0, *(value for values, _ in table for value in values)}
    filled = labels.any(tuple(axis for axis in range(3) if axis != PLANES[plane]))
    for index, regions in slices.items():
        if filled[index]:
            values = slice_volume(labels, plane, index)
            present = set(np.unique(values).tolist())
            for wanted, text in table:
                if present.intersection(wanted):
                    for mask in pieces(np.isin(values, wanted), regions.names[text]):
                        regions.add_mask(mask, text)
            yield index, present - known


def pieces(mask: np.ndarray, phrase: str) -> list[np.ndarray]:
    """(H, W) bool → the masks of its regions: each connected piece of a finding, since a box around two metastases is
    neither; all of a structure, or of what the label tree does not know."""
    tree = load_label_tree()
    label = tree.find(phrase)
    if label is None or not tree.is_finding(label):
        return [mask]
    numbered, count = ndimage.label(mask, np.ones((3, 3)))
    if count > MOST_PIECES:  # noise, not lesions
        return [mask]
    return [numbered == number for number in range(1, count + 1)]


def _label_voxels(path: Path, grid: Grid) -> np.ndarray:
    """(I, J, K) whole numbers. Raises ValueError where the file lies on another grid than `grid`."""
    other = open_grid(path)
    if other.shape != grid.shape or other.channels != 1:
        raise ValueError(f"labels of {other.shape} on an image of {grid.shape}")
    corners = np.array(list(product(*((0, side - 1) for side in grid.shape))))
    apart = np.abs(apply_affine(grid.affine, corners) - apply_affine(other.affine, corners)).max()
    if apart > min(voxel_sizes(grid.affine)) / 2:
        raise ValueError(f"labels lie up to {apart:.1f} mm from the image")
    voxels = other.voxels()
    if voxels.dtype.kind != "f":
        return voxels
    whole = np.nan_to_num(voxels, nan=0.5, posinf=0.5, neginf=0.5)
    if (whole != np.rint(whole)).any() or np.abs(whole).max() > 65535:
        raise ValueError("label values are not whole numbers; were they interpolated?")
    return whole.astype(np.int32)


def _limits(voxels: np.ndarray, modality: str, window: str) -> tuple[float, float]:
    """The values that become black and white."""
    return preset_limits(window) if modality == "ct" else window_limits(voxels)


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) → the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
