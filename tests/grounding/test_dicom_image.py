"""DICOM as it comes: every pixel form is written here by other code than the reader's, and read back."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
)

from grounding.images import WINDOWS, ImageError, preset_limits, read_image

RAMP = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)


def test_dicom_rescale_and_window_follow_the_standard(dicom):
    stored = np.array([[0, 924, 1024, 1025, 1223, 4000]], np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [100, 40], "WindowWidth": [200, 400]}
    image = read_image(dicom(stored, Modality="CT", PixelSpacing=[0.5, 0.7], **tags))
    # PS3.3 C.11.2.1.2.1 with c = 100, w = 200: 0 HU is black, 199 HU is white.
    assert image.pixels.tolist() == [[0, 0, 0, 1, 255, 255]]
    assert image.modality == "ct" and image.spacing == (0.5, 0.7)


def test_dicom_window_functions(dicom):
    stored = np.array([[0, 100, 200]], np.uint16)
    window = {"WindowCenter": 100, "WindowWidth": 200}
    exact = read_image(dicom(stored, VOILUTFunction="LINEAR_EXACT", **window)).pixels
    assert exact.tolist() == [[0, 128, 255]]
    sigmoid = read_image(dicom(stored, VOILUTFunction="SIGMOID", **window)).pixels
    assert sigmoid.tolist() == [[30, 128, 225]]


def test_dicom_without_a_window_uses_percentiles_and_skips_padding(dicom):
    stored = np.linspace(0, 1000, 10_000).astype(np.int16).reshape(100, 100)
    stored[:50] = -2000
    pixels = read_image(dicom(stored, PixelPaddingValue=-2000, Modality="MR")).pixels
    assert pixels[0, 0] == 0 and pixels[50, 0] == 0 and pixels[99, 99] == 255 and abs(int(pixels[75, 0]) - 127) <= 2


def test_monochrome1_is_inverted(dicom):
    stored = np.array([[0, 255]], np.uint8)
    tags = {"WindowCenter": 128, "WindowWidth": 256, "Modality": "DX", "ImagerPixelSpacing": [0.1, 0.2]}
    image = read_image(dicom(stored, PhotometricInterpretation="MONOCHROME1", **tags))
    assert image.pixels.tolist() == [[255, 0]]
    assert image.modality == "xray" and image.spacing == (0.1, 0.2)


def test_dicom_voi_lookup_table(dicom):
    item = Dataset()
    item.LUTDescriptor = [4, 0, 16]
    item.add_new("LUTData", "OW", np.array([0, 65535, 0, 32768], "<u2").tobytes())
    path = dicom(np.arange(4, dtype=np.uint16).reshape(1, 4), VOILUTSequence=[item])
    assert read_image(path).pixels.tolist() == [[0, 255, 0, 128]]


def test_dicom_colour(dicom):
    stored = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "ES"}
    image = read_image(dicom(stored, **tags))
    assert (image.pixels == stored).all() and image.modality == "endoscopy"


def test_a_frame_of_a_dicom_is_chosen(dicom):
    stored = np.stack([RAMP, RAMP + 1])
    path = dicom(stored, NumberOfFrames=2, WindowCenter=128, WindowWidth=256, Modality="US")
    assert (read_image(f"{path}@frame:1").pixels == RAMP + 1).all()
    with pytest.raises(ImageError, match="holds 2 frames; choose one"):
        read_image(path)
    with pytest.raises(ImageError, match="frame 2 does not exist; choose one from 0 to 1"):
        read_image(f"{path}@frame:2")


def test_enhanced_dicom_keeps_spacing_and_window_per_frame(dicom):
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
    path = dicom(stored, NumberOfFrames=2, **groups)
    first, second = (read_image(f"{path}@frame:{index}") for index in (0, 1))
    assert first.pixels.tolist() == [[0, 255]] and second.pixels.tolist() == [[0, 127]]
    assert first.spacing == (0.8, 0.9)


def test_dicom_bytes_and_old_files_without_preamble(tmp_path, dicom):
    path = dicom(RAMP, WindowCenter=128, WindowWidth=256)
    assert (read_image(path.read_bytes()).pixels == RAMP).all()
    bare = pydicom.dcmread(path)
    bare.file_meta = FileMetaDataset()
    bare.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True)
    assert (read_image(tmp_path / "bare.dcm").pixels == RAMP).all()


def test_truncated_and_undecodable_dicom(tmp_path, dicom):
    path = dicom(np.zeros((32, 32), np.uint16))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ImageError, match=r"a.dcm: cannot be decoded"):
        read_image(path)
    dataset = pydicom.dcmread(dicom(RAMP, name="b.dcm"))
    dataset.PixelData = pydicom.encaps.encapsulate([b"not a codestream"])
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(tmp_path / "b.dcm")
    with pytest.raises(ImageError, match=r"b.dcm: its compressed frame is not JPEG 2000") as caught:
        read_image(tmp_path / "b.dcm")
    assert "\n" not in str(caught.value)


# Windows


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_chosen_by_organ(window, dicom):
    center, width, source = WINDOWS[window]
    low, high = preset_limits(window)
    assert source.startswith("https://") and (low + high) / 2 == center and high - low == width
    stored = (np.array([[low - 10, low, center, high, high + 10]]) + 2000).astype(np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -2000, "WindowCenter": 5000, "WindowWidth": 10, "Modality": "CT"}
    path = dicom(stored, **tags)
    shown = read_image(path, window=window).pixels[0].astype(int)
    assert np.abs(shown - [0, 0, 128, 255, 255]).max() <= 4  # low and center may be halves
    assert (read_image(path).pixels == 0).all()  # the file's own window


def test_windows_that_do_not_fit(dicom):
    path = dicom(RAMP, Modality="MR")
    with pytest.raises(ImageError, match="unknown window 'lungs'; choose one of brain, .*lung, "):
        read_image(path, window="lungs")
    with pytest.raises(ImageError, match="a.dcm: a window is for CT, and this is mri; leave it out"):
        read_image(path, window="lung")


def test_padding_may_be_a_range(dicom):
    stored = np.linspace(0, 1000, 10_000).astype(np.int16).reshape(100, 100)
    stored[:25], stored[25:50] = -2000, -1900
    pixels = read_image(dicom(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1900)).pixels
    assert pixels[50, 0] == 0 and abs(int(pixels[75, 0]) - 127) <= 2


def test_a_slope_of_zero_is_an_empty_field(dicom):
    tags = {"RescaleSlope": 0, "RescaleIntercept": 0, "WindowCenter": 128, "WindowWidth": 256}
    assert (read_image(dicom(RAMP, **tags)).pixels == RAMP).all()


# Files that claim too much


def test_sizes_that_a_file_only_claims(dicom):
    path = dicom(RAMP, NumberOfFrames=10**9)
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(f"{path}@frame:1")
    dataset = pydicom.dcmread(path)
    dataset.Rows = dataset.Columns = 65535
    dataset.save_as(path)
    with pytest.raises(ImageError, match="65535 x 65535 is more than 128,000,000 pixels"):
        read_image(path)
    dataset.Rows = 0
    dataset.save_as(path)
    with pytest.raises(ImageError, match="65535 x 0 holds no pixel"):
        read_image(path)


def test_deflated_data_of_a_thousandfold_size(monkeypatch, dicom):
    monkeypatch.setattr("grounding.dicom_image.MAX_BYTES", 2**20)
    path = dicom(np.zeros((2000, 1000), np.uint8), TransferSyntaxUID=DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 10_000
    with pytest.raises(ImageError, match="deflated data of more than 1,048,576 bytes"):
        read_image(path)
