"""What the tests of image readers share: a picture with a bright rectangle, how it is found again, and DICOM files."""

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SIZE, BOX = (40, 60), (10, 5, 34, 15)  # (H, W) and xyxy in pixels


@pytest.fixture
def scene():
    """scene(low, high, dtype): a rectangle of value or colour `high` on `low`."""

    def paint(low, high, dtype=np.uint8):
        x1, y1, x2, y2 = BOX
        image = np.empty((*SIZE, *np.shape(low)), dtype)
        image[:] = low
        image[y1:y2, x1:x2] = high
        return image

    return paint


def bright(grey):
    """xyxy in pixels of what is brighter than the middle."""
    rows, columns = np.nonzero(grey > (float(grey.min()) + float(grey.max())) / 2)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.fixture
def check_box():
    """check_box(pixels, xyxy, (H, W)): the rectangle is where its normalised box says, in the image as read and
    (through the letterbox) in the network input; and the letterbox brings the box back."""
    from grounding.images import to_pixel_values

    def check(pixels, expected=BOX, size=SIZE):
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == size
        sides = np.array([*size[::-1], *size[::-1]], np.float32)
        box = np.array(expected, np.float32) / sides
        assert np.allclose(bright(pixels if pixels.ndim == 2 else pixels.mean(2)) / sides, box)
        values, letterbox = to_pixel_values(pixels, 120)
        assert np.abs(bright(values[0].numpy()) / 120 - letterbox.apply(box)).max() < 1 / 120
        assert np.abs(letterbox.invert(letterbox.apply(box)) - box).max() < 1e-6

    return check


@pytest.fixture
def dicom(tmp_path):
    """dicom(stored, name, **tags): the path of a small file with the given stored values and tags."""

    def write(stored, name="a.dcm", **tags):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = tags.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        dataset.Rows, dataset.Columns = (
            stored.shape[-2:] if tags.get("SamplesPerPixel", 1) == 1 else stored.shape[-3:-1]
        )
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = stored.dtype.itemsize * 8
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(stored.dtype.kind == "i")
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        dataset.PixelData = stored.tobytes()
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    return write
