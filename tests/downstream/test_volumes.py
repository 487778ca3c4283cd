"""Volumes as slices, regions linked from slice to slice, and ``medglip ask`` and ``report`` on a whole volume."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from downstream.tracks import Track, best_slice, join_slices, link
from downstream.volumes import check_readable, is_volume, read_volume
from grounding.images import ImageError, read_image
from grounding.labels import load_label_tree
from grounding.types import NOT_FOUND_LEVEL, RegionTokens

TREE = load_label_tree()
LESION, LEFT = "brain/lesion", "brain/insula/left_insula/lesion"


def region_tokens(regions: list[tuple], missing: list[tuple] = ()) -> RegionTokens:
    """Of one slice. regions: (label, score, box); missing: (label, presence)."""
    rows = [*regions, *((label, presence, (0, 0, 0, 0)) for label, presence in missing)]
    n, levels = len(rows), [0] * len(regions) + [NOT_FOUND_LEVEL] * len(missing)
    return RegionTokens(
        features=torch.arange(n, dtype=torch.float32).reshape(1, n, 1),
        boxes=torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(1, n, 4),
        scores=torch.tensor([[row[1] for row in rows]]).reshape(1, n),
        labels=[[row[0] for row in rows]],
        label_vectors=torch.zeros(1, n, 2),
        levels=torch.tensor([levels]).reshape(1, n),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[{"phrase": label, "label": label, "presence": score} for label, score, *_ in rows]],
    )


def box(x: float, size: float = 0.2) -> tuple:
    return (x, 0.4, x + size, 0.4 + size)


def test_a_region_is_followed_through_the_slices():
    """Two lesions that move a little, and a place: three tracks, however the regions of a slice are ordered."""
    rows = []
    for k in range(6):
        regions = [
            (LESION, 0.5 + 0.05 * k, box(0.1 + 0.01 * k)),
            (LESION, 0.6, box(0.6)),
            ("brain", 0.9, box(0.05, 0.5)),
        ]
        rows.append(region_tokens(regions[:: -1 if k % 2 else 1]))
    joined = join_slices(rows, list(range(6)), TREE)
    assert [(track.label, track.first, track.last) for track in joined.tracks] == [
        ("brain", 0, 5),
        (LESION, 0, 5),
        (LESION, 0, 5),
    ]
    moving = next(track for track in joined.tracks if track.label == LESION and track.best == 5)
    assert moving.weight == pytest.approx(sum(0.5 + 0.05 * k for k in range(6)))
    place = joined.tracks.index(moving)
    assert joined.tokens.boxes[0, place].tolist() == pytest.approx(box(0.15))
    assert joined.tokens.scores[0, place] == pytest.approx(0.75)


def test_what_lies_elsewhere_or_is_called_otherwise_is_not_the_same():
    apart = [region_tokens([(LESION, 0.9, box(0.1))]), region_tokens([(LESION, 0.9, box(0.35))])]
    assert len(link(apart, [0, 1], TREE)) == 2
    places = [
        region_tokens([("brain/insula/left_insula", 0.9, box(0.1))]),
        region_tokens([("brain/insula/right_insula", 0.9, box(0.1))]),
    ]
    assert len(link(places, [0, 1], TREE)) == 2


def test_a_finding_may_change_its_place_and_be_missed_on_one_slice():
    """Its label is that with the most score; after two slices without it, it is another one."""
    labels = [LESION, LEFT, LEFT, None, LEFT, None, None, LEFT]
    rows = [region_tokens([(label, 0.5, box(0.1))] if label else []) for label in labels]
    joined = join_slices(rows, list(range(8)), TREE)
    assert [(track.label, track.first, track.last) for track in joined.tracks] == [(LEFT, 0, 4), (LEFT, 7, 7)]


def test_one_region_of_a_slice_is_joined_to_one_before():
    """Two lesions grow into one: it goes on as the one that it overlaps more; the other ends."""
    rows = [
        region_tokens([(LESION, 0.9, box(0.1)), (LESION, 0.8, box(0.3))]),
        region_tokens([(LESION, 0.9, (0.1, 0.4, 0.42, 0.6))]),
    ]
    chains = link(rows, [0, 1], TREE)
    assert sorted(map(len, chains)) == [1, 2] and [(0, 0), (1, 0)] in chains


def test_what_is_on_one_thin_slice_is_left_out():
    rows = [region_tokens([(LESION, 0.9, box(0.1))]), region_tokens([]), region_tokens([])]
    assert not join_slices(rows, [0, 1, 2], TREE, step=1.0).tracks
    assert len(join_slices(rows, [0, 1, 2], TREE, step=5.0).tracks) == 1
    assert len(join_slices(rows, [0, 1, 2], TREE).tracks) == 1


def test_not_found_is_what_no_slice_shows():
    other = "brain/insula/right_insula/lesion"
    rows = [
        region_tokens([], [(LESION, 0.1), (other, 0.2)]),
        region_tokens([(LEFT, 0.9, box(0.1))], [(other, 0.3)]),
        region_tokens([(LEFT, 0.8, box(0.1))], [(other, 0.1)]),
    ]
    tokens = join_slices(rows, [0, 1, 2], TREE).tokens
    assert tokens.labels == [[LEFT, other]] and tokens.levels.tolist() == [[0, NOT_FOUND_LEVEL]]
    assert tokens.scores[0, 1] == pytest.approx(0.3)
    presence = {query["label"]: query["presence"] for query in tokens.queries[0]}
    assert presence == pytest.approx({LESION: 0.1, other: 0.3, LEFT: 0.9})
    nothing = join_slices([region_tokens([])], [0], TREE).tokens
    assert nothing.valid.shape == (1, 0)


def test_the_slice_shown_is_the_one_of_what_is_asked():
    tracks = [
        Track("brain", 0, 9, 4, 9.0),
        Track(LEFT, 6, 8, 7, 2.0),
        Track("brain/insula/right_insula/lesion", 1, 5, 2, 3.0),
    ]
    assert best_slice(tracks, frozenset(), TREE, 10) == 2
    assert best_slice(tracks, frozenset({LEFT}), TREE, 10) == 7
    assert best_slice(tracks, frozenset({"brain"}), TREE, 10) == 4
    assert best_slice(tracks[:1], frozenset(), TREE, 10) == 4
    assert best_slice([], frozenset(), TREE, 10) == 5


# Files


def head(shape: tuple[int, int, int]) -> np.ndarray:
    """A synthetic volume without any symmetry, RAS+."""
    i, j, k = np.indices(shape)
    return (100 + 3 * i + 5 * j + 7 * k + (i * j) % 13).astype(np.float32) * (i > 1)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_a_nifti_volume_is_its_slices(plane, signs, tmp_path):
    path = tmp_path / "head.nii.gz"
    stored = head((9, 8, 7))[:: signs[0], :: signs[1], :: signs[2]]
    nib.save(nib.Nifti1Image(stored, np.diag([2.0 * signs[0], 3.0 * signs[1], 4.0 * signs[2], 1.0])), path)
    volume = read_volume(f"{path}@{plane}" if plane != "axial" else path)
    count = {"sagittal": 9, "coronal": 8, "axial": 7}[plane]
    assert len(volume.slices) == count and volume.step == {"sagittal": 2.0, "coronal": 3.0, "axial": 4.0}[plane]
    for k in range(count):
        one = read_image(f"{path}@{plane}:{k}")
        assert np.array_equal(volume.slices[k], one.pixels) and volume.spacing == one.spacing
    assert is_volume(path) and not is_volume(f"{path}@axial:3") and not is_volume("slice.png")


def write_slice(path: Path, pixels: np.ndarray, place: float, series: str, number: int = 1) -> None:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SOPClassUID, data.SOPInstanceUID = data.file_meta.MediaStorageSOPClassUID, generate_uid()
    data.SeriesInstanceUID, data.InstanceNumber = series, number
    data.Modality, data.PatientName, data.PatientID = "MR", "Secret^Patient", "SECRET-ID"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelSpacing, data.WindowCenter, data.WindowWidth = [1.5, 1.5], 300, 600
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, place], [1, 0, 0, 0, 1, 0]
    data.PixelData = pixels.astype(np.uint16).tobytes()
    data.save_as(path, enforce_file_format=True)


@pytest.fixture
def series(tmp_path) -> Path:
    """Five slices whose file names and numbers are in another order than their places, and a file that is no image."""
    folder, uid = tmp_path / "series", generate_uid()
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for name, place in zip("ebdac", range(5), strict=True):
        write_slice(folder / f"{name}.dcm", np.full((6, 8), 100 * place), 2.5 * place, uid, 9 - place)
    return folder


def test_a_dicom_series_is_ordered_by_place(series):
    volume = read_volume(series)
    assert volume.slices.shape == (5, 6, 8) and volume.step == 2.5
    assert volume.spacing == (1.5, 1.5) and volume.modality == "mri"
    means = volume.slices.reshape(5, -1).mean(1)
    assert (np.diff(means) > 0).all()


def test_what_is_no_volume_is_one_line(series, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no DICOM image in this folder; give the folder of one series"):
        read_volume(tmp_path / "empty")
    with pytest.raises(ImageError, match="leave @coronal out"):
        read_volume(f"{series}@coronal")
    other = shutil.copytree(series, tmp_path / "mixed")
    write_slice(other / "x.dcm", np.zeros((6, 8)), 20, generate_uid())
    with pytest.raises(ImageError, match="holds 2 series; give a folder for each"):
        check_readable(other)
    twice = shutil.copytree(series, tmp_path / "twice")
    shutil.copy(twice / "a.dcm", twice / "copy.dcm")
    with pytest.raises(ImageError, match="several images at one place"):
        read_volume(twice)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"this is no volume")
    with pytest.raises(ImageError, match="broken.nii.gz"):
        read_volume(broken)
    with pytest.raises(ImageError, match="missing.nii.gz: no such file"):
        check_readable(tmp_path / "missing.nii.gz")
