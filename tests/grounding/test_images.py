import io
import struct
import zlib

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from grounding.images import (
    ImageError,
    Letterbox,
    read_image,
    slice_spacing,
    slice_volume,
    to_pixel_values,
    to_uint8,
    window_limits,
)

RAMP = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)


def save(tmp_path, name, pixels, **options):
    path = tmp_path / name
    Image.fromarray(pixels).save(path, **options)
    return path


# Pictures


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_grey_pictures_keep_every_value(tmp_path, suffix):
    image = read_image(save(tmp_path, f"a.{suffix}", RAMP))
    assert image.pixels.dtype == np.uint8 and (image.pixels == RAMP).all()
    assert image.spacing is None and image.modality is None


def test_bytes_and_text_paths_are_read_alike(tmp_path):
    path = save(tmp_path, "a.png", RAMP)
    assert (read_image(path.read_bytes()).pixels == read_image(str(path)).pixels).all()


def test_colour_stays_and_grey_in_rgb_becomes_grey(tmp_path):
    colour = np.stack([RAMP, RAMP // 2, RAMP], -1)
    assert (read_image(save(tmp_path, "c.png", colour)).pixels == colour).all()
    assert (read_image(save(tmp_path, "g.png", np.stack([RAMP] * 3, -1))).pixels == RAMP).all()


def test_palette_and_transparency(tmp_path):
    palette = Image.fromarray(RAMP).convert("P")
    palette.save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png").pixels == RAMP).all()
    rgba = np.stack([RAMP] * 3 + [np.full_like(RAMP, 255)], -1)
    rgba[0, :, 3] = 0
    pixels = read_image(save(tmp_path, "t.png", rgba)).pixels
    assert (pixels[0] == 0).all() and (pixels[1:] == RAMP[1:]).all()


def test_one_bit_becomes_black_and_white(tmp_path):
    Image.fromarray(RAMP > 100).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png").pixels == (RAMP > 100) * 255).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_are_scaled_by_percentiles(tmp_path, name):
    deep = np.linspace(1000, 3000, 10_000).astype(np.uint16).reshape(100, 100)
    deep[0, 0] = 65535  # one hot pixel must not darken the rest
    pixels = read_image(save(tmp_path, name, deep)).pixels
    assert pixels[0, 0] == 255 and pixels[99, 99] == 255 and pixels[0, 1] == 0
    assert abs(int(pixels[50, 0]) - 127) <= 2


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; to be turned by 90 degrees clockwise
    path = save(tmp_path, "e.png", RAMP, exif=exif)
    assert (read_image(path).pixels == np.rot90(RAMP, -1)).all()


def test_jpeg(tmp_path):
    flat = np.full((16, 24), 100, np.uint8)
    pixels = read_image(save(tmp_path, "a.jpg", flat, quality=95)).pixels
    assert pixels.shape == (16, 24) and abs(int(pixels.mean()) - 100) <= 1


def test_a_page_of_a_tiff_is_chosen(tmp_path):
    path = tmp_path / "pages.tiff"
    Image.fromarray(RAMP).save(path, save_all=True, append_images=[Image.fromarray(RAMP + 1)])
    assert (read_image(f"{path}@frame:1").pixels == RAMP + 1).all()
    with pytest.raises(ImageError, match="holds 2 frames; choose one, for example FILE@frame:1"):
        read_image(path)


def test_a_name_with_an_at_sign_is_a_name(tmp_path):
    assert (read_image(save(tmp_path, "scan@axial:3", RAMP, format="PNG")).pixels == RAMP).all()


# DICOM


def dicom(tmp_path, stored, name="a.dcm", **tags):
    """A small file with the given stored values and tags."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = stored.shape[-2:] if tags.get("SamplesPerPixel", 1) == 1 else stored.shape[-3:-1]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = stored.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.PixelData = stored.tobytes()
    dataset.save_as(tmp_path / name, enforce_file_format=True)
    return tmp_path / name


def test_dicom_rescale_and_window_follow_the_standard(tmp_path):
    stored = np.array([[0, 924, 1024, 1025, 1223, 4000]], np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [100, 40], "WindowWidth": [200, 400]}
    image = read_image(dicom(tmp_path, stored, Modality="CT", PixelSpacing=[0.5, 0.7], **tags))
    # PS3.3 C.11.2.1.2.1 with c = 100, w = 200: 0 HU is black, 199 HU is white.
    assert image.pixels.tolist() == [[0, 0, 0, 1, 255, 255]]
    assert image.modality == "ct" and image.spacing == (0.5, 0.7)


def test_dicom_window_functions(tmp_path):
    stored = np.array([[0, 100, 200]], np.uint16)
    window = {"WindowCenter": 100, "WindowWidth": 200}
    exact = read_image(dicom(tmp_path, stored, VOILUTFunction="LINEAR_EXACT", **window)).pixels
    assert exact.tolist() == [[0, 128, 255]]
    sigmoid = read_image(dicom(tmp_path, stored, VOILUTFunction="SIGMOID", **window)).pixels
    assert sigmoid.tolist() == [[30, 128, 225]]


def test_dicom_without_a_window_uses_percentiles_and_skips_padding(tmp_path):
    stored = np.linspace(0, 1000, 10_000).astype(np.int16).reshape(100, 100)
    stored[:50] = -2000
    pixels = read_image(dicom(tmp_path, stored, PixelPaddingValue=-2000, Modality="MR")).pixels
    assert pixels[0, 0] == 0 and pixels[50, 0] == 0 and pixels[99, 99] == 255 and abs(int(pixels[75, 0]) - 127) <= 2


def test_monochrome1_is_inverted(tmp_path):
    stored = np.array([[0, 255]], np.uint8)
    tags = {"WindowCenter": 128, "WindowWidth": 256, "Modality": "DX", "ImagerPixelSpacing": [0.1, 0.2]}
    image = read_image(dicom(tmp_path, stored, PhotometricInterpretation="MONOCHROME1", **tags))
    assert image.pixels.tolist() == [[255, 0]]
    assert image.modality == "xray" and image.spacing == (0.1, 0.2)


def test_dicom_voi_lookup_table(tmp_path):
    item = Dataset()
    item.LUTDescriptor = [4, 0, 16]
    item.add_new("LUTData", "OW", np.array([0, 65535, 0, 32768], "<u2").tobytes())
    path = dicom(tmp_path, np.arange(4, dtype=np.uint16).reshape(1, 4), VOILUTSequence=[item])
    assert read_image(path).pixels.tolist() == [[0, 255, 0, 128]]


def test_dicom_colour(tmp_path):
    stored = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "ES"}
    image = read_image(dicom(tmp_path, stored, **tags))
    assert (image.pixels == stored).all() and image.modality == "endoscopy"


def test_a_frame_of_a_dicom_is_chosen(tmp_path):
    stored = np.stack([RAMP, RAMP + 1])
    path = dicom(tmp_path, stored, NumberOfFrames=2, WindowCenter=128, WindowWidth=256, Modality="US")
    assert (read_image(f"{path}@frame:1").pixels == RAMP + 1).all()
    with pytest.raises(ImageError, match="holds 2 frames; choose one"):
        read_image(path)
    with pytest.raises(ImageError, match="frame 2 does not exist; choose one from 0 to 1"):
        read_image(f"{path}@frame:2")


def test_enhanced_dicom_keeps_spacing_and_window_per_frame(tmp_path):
    shared, measures, frames = Dataset(), Dataset(), []
    measures.PixelSpacing = [0.8, 0.9]
    shared.PixelMeasuresSequence = [measures]
    for center in (64, 128):
        voi, group = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 2 * center
        group.FrameVOILUTSequence = [voi]
        frames.append(group)
    stored = np.array([[[0, 127]], [[0, 127]]], np.uint8)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    path = dicom(tmp_path, stored, NumberOfFrames=2, **groups)
    first, second = (read_image(f"{path}@frame:{index}") for index in (0, 1))
    assert first.pixels.tolist() == [[0, 255]] and second.pixels.tolist() == [[0, 127]]
    assert first.spacing == (0.8, 0.9)


def test_dicom_bytes_and_old_files_without_preamble(tmp_path):
    path = dicom(tmp_path, RAMP, WindowCenter=128, WindowWidth=256)
    assert (read_image(path.read_bytes()).pixels == RAMP).all()
    bare = pydicom.dcmread(path)
    bare.file_meta = FileMetaDataset()
    bare.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True)
    assert (read_image(tmp_path / "bare.dcm").pixels == RAMP).all()


# NIfTI

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


# Network input


@pytest.mark.parametrize("size", [(100, 300), (300, 100), (64, 64), (1, 500), (333, 77)])
def test_letterbox_round_trip(size):
    box = Letterbox.fit(size, 192)
    boxes = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    assert np.abs(box.invert(box.apply(boxes)) - boxes).max() < 1e-4 * max(1, max(size) / min(size) / 192)
    whole = box.apply(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    top, left, height, width = box.content
    assert torch.allclose(whole * 192, torch.tensor([[left, top, left + width, top + height]]).float())


def test_pixel_values_put_the_image_where_the_box_says():
    white = np.full((50, 100), 255, np.uint8)
    values, box = to_pixel_values(white, 64)
    assert values.shape == (3, 64, 64) and values.dtype == torch.float32
    assert box.content == (16, 0, 32, 64)
    black = -0.485 / 0.229
    assert values[0, 15, 0] == pytest.approx(black, abs=1e-5) and values[0, 48, 63] == pytest.approx(black, abs=1e-5)
    assert values[2, 16:48].min() == pytest.approx((1 - 0.406) / 0.225, abs=1e-5)


def test_grey_and_colour_give_the_same_values():
    grey, _ = to_pixel_values(RAMP, 32)
    colour, _ = to_pixel_values(np.stack([RAMP] * 3, -1), 32)
    assert torch.equal(grey, colour)


# Bad input


def bomb():
    """A PNG that claims 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + data


def truncated():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:1500]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("zero.png", b"", r"zero.png: empty file \(0 bytes\)"),
        ("text.png", b"hello", r"text.png: not an image this program reads; use PNG"),
        ("bomb.png", bomb(), r"bomb.png: .*more than 64,000,000 pixels; crop or downsample"),
        ("cut.png", truncated(), r"cut.png: cannot be decoded \(.*truncated"),
        ("cut.nii.gz", b"\x1f\x8b\x08\0garbage", r"cut.nii.gz: cannot be decoded"),
        ("text.dcm", b"hello", r"text.dcm: DICOM without pixels"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_empty_bytes(tmp_path):
    with pytest.raises(ImageError, match=r"absent.png: no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"absent.nii.gz: no such file"):
        read_image(f"{tmp_path}/absent.nii.gz@axial:3")
    with pytest.raises(ImageError, match=r"is a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"image bytes: empty"):
        read_image(b"")


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


def test_choices_that_do_not_fit_the_file(tmp_path):
    path = save(tmp_path, "a.png", RAMP)
    with pytest.raises(ImageError, match="@axial chooses a slice of a NIfTI volume"):
        read_image(f"{path}@axial:1")
    with pytest.raises(ImageError, match="frame 1 does not exist"):
        read_image(f"{path}@frame:1")


def test_truncated_and_undecodable_dicom(tmp_path):
    path = dicom(tmp_path, np.zeros((32, 32), np.uint16))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ImageError, match=r"a.dcm: cannot be decoded"):
        read_image(path)
    dataset = pydicom.dcmread(dicom(tmp_path, RAMP, name="b.dcm"))
    dataset.PixelData = pydicom.encaps.encapsulate([b"not a codestream"])
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(tmp_path / "b.dcm")
    with pytest.raises(ImageError, match=r"b.dcm: .*(decode|decoder)") as caught:
        read_image(tmp_path / "b.dcm")
    assert "\n" not in str(caught.value)
