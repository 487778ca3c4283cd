"""Slices of NIfTI volumes: orientation, windows, and headers that lie."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from grounding.images import (
    ImageError,
    read_image,
    slice_spacing,
    slice_volume,
    to_uint8,
    window_limits,
)

SHAPE, ZOOMS = (5, 6, 7), (1.0, 2.0, 3.0)


@pytest.fixture
def phantom():
    """RAS+ volume with one bright voxel toward the patient's left, front and top."""
    volume = np.full(SHAPE, 10.0, np.float32)
    volume[1, 4, 6] = 100
    return volume


def write_nifti(tmp_path, volume, orientation="RAS", name="v.nii.gz"):
    """The same anatomy stored in another voxel order."""
    image = nib.Nifti1Image(volume, np.diag([*ZOOMS, 1.0]))
    codes = nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), codes))
    nib.save(image, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "PIR", "SRA"])
def test_nifti_shows_left_on_the_right_whatever_the_voxel_order(tmp_path, phantom, orientation):
    path = write_nifti(tmp_path, phantom, orientation)
    axial = read_image(f"{path}@axial:6")
    assert axial.pixels.shape == (6, 5) and axial.spacing == (2.0, 1.0)
    assert np.argwhere(axial.pixels == 255).tolist() == [[1, 3]]  # near the front (top), on the image's right
    coronal = read_image(f"{path}@coronal:4")
    assert coronal.pixels.shape == (7, 5) and coronal.spacing == (3.0, 1.0)
    assert np.argwhere(coronal.pixels == 255).tolist() == [[0, 3]]
    sagittal = read_image(f"{path}@sagittal:1")
    assert sagittal.pixels.shape == (7, 6) and sagittal.spacing == (3.0, 2.0)
    assert np.argwhere(sagittal.pixels == 255).tolist() == [[0, 1]]  # the top, toward the image's left


# RAS+ voxels of a bright cuboid, and its box in each displayed plane: rows and columns both run downwards.
VOLUME, LOW, HIGH = (30, 40, 50), (4, 6, 20), (12, 30, 45)
CUBOID_BOXES = {
    "axial": ((40, 30), (30 - 12, 40 - 30, 30 - 4, 40 - 6)),
    "coronal": ((50, 30), (30 - 12, 50 - 45, 30 - 4, 50 - 20)),
    "sagittal": ((50, 40), (40 - 30, 50 - 45, 40 - 6, 50 - 20)),
}


def write_cuboid(tmp_path, orientation, name, dtype=np.int16):
    """In another voxel order, with an affine that is turned by 20 degrees about the superior axis."""
    volume = np.full(VOLUME, 100, dtype)
    volume[tuple(slice(*ends) for ends in zip(LOW, HIGH, strict=True))] = 900
    turn, affine = np.deg2rad(20), np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    affine[:3, :3] *= (0.8, 0.9, 2.5)
    codes = nib.orientations.axcodes2ornt(orientation)
    order = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), codes)
    image = nib.Nifti1Image(volume, affine).as_reoriented(order)
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    nib.save(image, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("plane", CUBOID_BOXES)
@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPI", "PSR", "IRA"])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_box_in_a_turned_volume(tmp_path, monkeypatch, plane, orientation, name, check_box):
    monkeypatch.setattr("grounding.images.SLAB", 5000)  # several slabs
    size, box = CUBOID_BOXES[plane]
    image = read_image(f"{write_cuboid(tmp_path, orientation, name)}@{plane}:{24 if plane == 'axial' else 10}")
    check_box(image.pixels, box, size)
    zooms = {"axial": (0.9, 0.8), "coronal": (2.5, 0.8), "sagittal": (2.5, 0.9)}
    assert image.spacing == pytest.approx(zooms[plane], rel=1e-5)


def test_nifti_scaling_big_endian_and_nifti_2(tmp_path):
    volume = np.zeros((6, 5, 4), np.int16)
    volume[2, 3, 1] = 10
    for number, kind in enumerate((nib.Nifti1Image, nib.Nifti2Image)):
        image = kind(volume, np.eye(4))
        image.header.set_slope_inter(2, -5)
        nib.save(image, tmp_path / f"{number}.nii.gz")
        swapped = kind(volume.astype(">i2"), np.eye(4), header=image.header.as_byteswapped(">"))
        nib.save(swapped, tmp_path / f"{number}.nii")
        for name in (f"{number}.nii.gz", f"{number}.nii"):
            pixels = read_image(f"{tmp_path}/{name}@axial:1").pixels
            assert np.argwhere(pixels > 128).tolist() == [[5 - 1 - 3, 6 - 1 - 2]]


def test_nifti_through_a_window(tmp_path):
    volume = np.zeros((4, 4, 4), np.int16)
    volume[0], volume[1], volume[2], volume[3] = -1350, -600, 150, 1000
    path = write_nifti(tmp_path, volume)
    lung = read_image(f"{path}@axial:1", window="lung").pixels
    assert lung[0].tolist() == [255, 255, 128, 0]
    assert read_image(f"{path}@axial:1", window="bone").pixels[0].tolist() == [212, 92, 0, 0]


def test_nifti_is_told_by_content(tmp_path, phantom):
    plain = write_nifti(tmp_path, phantom, name="v.nii")
    packed = write_nifti(tmp_path, phantom, name="w.nii.gz")
    expected = read_image(f"{plain}@axial:6").pixels
    plain.rename(tmp_path / "plain.nii.gz")
    packed.rename(tmp_path / "packed.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        assert (read_image(f"{tmp_path}/{name}@axial:6").pixels == expected).all()
    Image.new("L", (4, 3)).save(tmp_path / "picture.nii.gz", "PNG")
    with pytest.raises(ImageError, match=r"picture.nii.gz: not a NIfTI volume"):
        read_image(tmp_path / "picture.nii.gz")


def test_nifti_window_leaves_out_the_background(tmp_path):
    volume = np.zeros((10, 10, 10), np.int16)
    volume[5:] = np.linspace(100, 200, 500).reshape(5, 10, 10)
    pixels = read_image(f"{write_nifti(tmp_path, volume, name='v.nii')}@sagittal:7").pixels
    assert 100 < pixels.mean() < 155


def test_slice_functions_agree_with_the_phantom(phantom):
    assert np.argwhere(slice_volume(phantom, "axial", 6) == 100).tolist() == [[1, 3]]
    assert slice_spacing(ZOOMS, "axial") == (2.0, 1.0)
    assert slice_spacing(ZOOMS, "coronal") == (3.0, 1.0)
    assert slice_spacing(ZOOMS, "sagittal") == (3.0, 2.0)


def test_windows_of_masks_and_of_nothing():
    mask = np.array([0, 500], np.uint16)
    assert to_uint8(mask, *window_limits(mask)).tolist() == [0, 255]
    nothing = np.array([0, np.nan])
    assert to_uint8(nothing, *window_limits(nothing)).tolist() == [0, 0]


# Bad input


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", r"v.nii.gz: a volume; choose a slice, for example v.nii.gz@axial:3"),
        ("@axial:7", r"axial slice 7 does not exist; choose one from 0 to 6"),
        ("@coronal:-1", r"coronal slice -1 does not exist; choose one from 0 to 5"),
        ("@oblique:1", r"unknown choice 'oblique'; use axial, coronal, sagittal or frame"),
    ],
)
def test_nifti_slices_that_cannot_be(tmp_path, phantom, choice, message):
    path = write_nifti(tmp_path, phantom)
    with pytest.raises(ImageError, match=message):
        read_image(f"{path}{choice}")


def test_a_series_of_volumes_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), np.eye(4)), tmp_path / "t.nii")
    with pytest.raises(ImageError, match="not one grey volume; split it"):
        read_image(f"{tmp_path}/t.nii@axial:1")


FLIPPED = np.diag([-1.0, 1, 1, 1])


def nifti_claiming(shape, offset=352, datatype=16, bits=32, affine=FLIPPED):
    """A header alone. The first axis runs to the left, so that the volume has to be turned."""
    header = nib.Nifti1Header()
    header.set_sform(affine, code=1)
    header["dim"][: 1 + len(shape)] = [len(shape), *shape]
    header["datatype"], header["bitpix"], header["vox_offset"], header["magic"] = datatype, bits, offset, b"n+1"
    return header.binaryblock + b"\0" * 4


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (nifti_claiming((32767, 32767, 32767)), r"more than 600,000,000 voxels"),
        (nifti_claiming((32767, 9000, 1)), r"32767 x 9000 is more than 128,000,000 pixels"),
        (nifti_claiming((500, 500, 500)), r"cannot be decoded"),  # no voxel follows
        (nifti_claiming((4, 4, 4), offset=1e11), r"voxels start at byte 99999997952"),
        (nifti_claiming((4, 4, 4), datatype=128, bits=24), r"not one grey volume"),
        (nifti_claiming((4, 4, 4), datatype=32, bits=64), r"not one grey volume"),
        (nifti_claiming((4, 4, 0)), r"4 x 0 holds no pixel"),
        (nifti_claiming((4, 4, 4), affine=np.zeros((4, 4))), r"its affine has no direction"),
        (nifti_claiming((4, 4, 4), affine=np.full((4, 4), np.nan)), r"cannot be decoded"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_nifti_headers_that_claim_what_is_not_there(tmp_path, header, message, packed):
    path = tmp_path / "v.nii"
    path.write_bytes(gzip.compress(header) if packed else header)
    with pytest.raises(ImageError, match=message):
        read_image(f"{path}@axial:0")
