"""A box drawn in DICOM of every pixel form is found where it was drawn. Written by other code than the reader's."""

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from grounding.images import ImageError, read_image

RAMP = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)
BLUE, RED = (20, 30, 60), (200, 60, 40)


def item_table(entries, first, bits, values):
    item = Dataset()
    item.LUTDescriptor = [entries, first, bits]
    item.add_new("LUTData", "OW", np.asarray(values, "<u2").tobytes())
    return item


def test_box_in_monochrome1(scene, check_box, dicom):
    check_box(read_image(dicom(scene(900, 100, np.uint16), PhotometricInterpretation="MONOCHROME1")).pixels)


def test_box_in_signed_values_with_rescale(scene, check_box, dicom):
    stored = scene(-1000, 40, np.int16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -24, "WindowCenter": 40, "WindowWidth": 400, "Modality": "CT"}
    image = read_image(dicom(stored, **tags))
    check_box(image.pixels)
    assert image.pixels[10, 20] == 138  # 56 HU


def test_box_in_twelve_bits_of_sixteen(scene, check_box, dicom):
    stored = scene(50, 3000, np.uint16) | 0xF000  # overlay bits in the unused part are no value
    check_box(read_image(dicom(stored, BitsStored=12, HighBit=11)).pixels)


def test_box_through_a_voi_lookup_table(scene, check_box, dicom):
    table = item_table(4096, 0, 16, np.linspace(65535, 0, 4096))  # turns the greys over
    check_box(read_image(dicom(scene(4000, 100, np.uint16), VOILUTSequence=[table])).pixels)


def test_box_through_a_modality_lookup_table(scene, check_box, dicom):
    table = item_table(256, 0, 16, np.arange(256) ** 2 // 2)
    path = dicom(scene(10, 200, np.uint8), ModalityLUTSequence=[table], WindowCenter=10000, WindowWidth=20000)
    check_box(read_image(path).pixels)


def test_an_eight_bit_lookup_table_may_have_more_than_256_entries(dicom):
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 8]
    item.add_new("LUTData", "OW", (np.arange(4096) // 16).astype(np.uint8).tobytes())
    stored = np.array([[0, 300, 2048, 4095]], np.uint16)
    assert read_image(dicom(stored, VOILUTSequence=[item])).pixels.tolist() == [[0, 18, 128, 255]]


def test_a_lookup_table_may_start_below_zero(dicom):
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000, "VOILUTSequence": [item_table(3, 65536 - 1, 16, [0, 1, 2])]}
    tags["VOILUTSequence"][0].LUTData = np.array([0, 32768, 65535], "<u2").tobytes()
    pixels = read_image(dicom(np.array([[0, 999, 1000, 1001, 2000]], np.uint16), **tags)).pixels
    assert pixels.tolist() == [[0, 0, 128, 255, 255]]


def palette(entries, bits, colours, prefix=""):
    """Tags of a palette whose entry k has colours[k]."""
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [entries, 0, bits]
        tags[f"{prefix}{name}PaletteColorLookupTableData"] = colours[channel]
    return tags


@pytest.mark.parametrize("bits", [8, 16])
def test_box_in_a_palette(bits, scene, check_box, dicom):
    table = np.zeros((3, 256), np.uint16)
    table[:, 7], table[:, 9] = np.array(BLUE) << (bits - 8), np.array(RED) << (bits - 8)
    data = [channel.astype(f"<u{bits // 8}").tobytes() for channel in table]
    pixels = read_image(dicom(scene(7, 9, np.uint8), **palette(256, bits, data))).pixels
    check_box(pixels)
    assert (pixels == scene(BLUE, RED, np.uint8)).all()


def test_box_in_a_palette_of_segments(scene, check_box, dicom):
    # 128 times one colour, then a straight line of 128 steps to the other
    data = [
        np.array([0, 1, low << 8, 1, 127, low << 8, 1, 128, high << 8], "<u2").tobytes()
        for low, high in zip(BLUE, RED, strict=True)
    ]
    pixels = read_image(dicom(scene(7, 255, np.uint8), **palette(256, 16, data, "Segmented"))).pixels
    check_box(pixels)
    assert (pixels == scene(BLUE, RED, np.uint8)).all()


COLOUR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_box_in_rgb(planar, syntax, scene, check_box, dicom):
    image = scene(BLUE, RED, np.uint8)
    path = dicom(image, **COLOUR | {"PlanarConfiguration": planar, "TransferSyntaxUID": syntax})
    dataset = pydicom.dcmread(path)
    dataset.PixelData = (image if planar == 0 else np.moveaxis(image, 2, 0)).tobytes()
    dataset.save_as(path)
    pixels = read_image(path).pixels
    check_box(pixels)
    assert (pixels == image).all()


def to_ybr(image):
    """PS3.3 C.7.6.3.1.2."""
    red, green, blue = np.moveaxis(image.astype(float), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    blueness = -0.1687 * red - 0.3313 * green + 0.5 * blue + 128
    redness = 0.5 * red - 0.4187 * green - 0.0813 * blue + 128
    return np.stack([luma, blueness, redness], -1).round().astype(np.uint8)


def test_box_in_ybr_full(scene, check_box, dicom):
    image = scene(BLUE, RED, np.uint8)
    pixels = read_image(dicom(to_ybr(image), **COLOUR | {"PhotometricInterpretation": "YBR_FULL"})).pixels
    check_box(pixels)
    assert np.abs(pixels.astype(int) - image).max() <= 2


def test_box_in_ybr_full_422(scene, check_box, dicom):
    image = scene(BLUE, RED, np.uint8)
    pairs = to_ybr(image).reshape(40, 30, 2, 3)
    stored = np.concatenate([pairs[..., 0], pairs[:, :, 0, 1:]], -1)  # Y Y B R of two neighbours
    path = dicom(to_ybr(image), **COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"})
    dataset = pydicom.dcmread(path)
    dataset.PixelData = stored.tobytes()
    dataset.save_as(path)
    check_box(read_image(path).pixels)


def test_colour_of_sixteen_bits_is_scaled_by_its_depth(scene, check_box, dicom):
    stored = scene((0, 1000, 2000), (4095, 2000, 3000), np.uint16)
    pixels = read_image(dicom(stored, BitsStored=12, HighBit=11, **COLOUR)).pixels
    check_box(pixels)
    assert pixels[10, 20].tolist() == [255, 125, 187]


def test_box_in_a_frame_of_several(scene, check_box, dicom):
    stored = np.stack([np.full((40, 60), 5, np.uint16), scene(5, 50, np.uint16), scene(50, 5, np.uint16)])
    check_box(read_image(f"{dicom(stored, NumberOfFrames=3)}@frame:1").pixels)


def test_box_in_one_bit(scene, check_box, dicom):
    path = dicom(scene(0, 1, np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = np.packbits(scene(0, 1, np.uint8), bitorder="little").tobytes()
    dataset.save_as(path)
    check_box(read_image(path).pixels)


def test_box_in_floats(scene, check_box, dicom):
    path = dicom(scene(0, 1, np.uint32))
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.FloatPixelData = scene(-0.5, 0.75, np.float32).tobytes()
    dataset.save_as(path)
    check_box(read_image(path).pixels)


def test_box_in_big_endian(scene, check_box, dicom):
    path = dicom(scene(100, 900, ">u2"), TransferSyntaxUID=ExplicitVRBigEndian)
    check_box(read_image(path).pixels)


# Compressed transfer syntaxes


def encapsulated(dicom, stored, syntax, frames, **tags):
    """`frames` are what a codec made of `stored`."""
    path = dicom(stored, **tags)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


def coded(pixels, name, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("frames", [1, 3])
def test_box_in_rle(frames, scene, check_box, dicom):
    stored = np.stack([scene(100, 900, np.int16)] * frames)
    stored[: frames - 1] = 100
    path = dicom(stored if frames > 1 else stored[0], NumberOfFrames=frames)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    check_box(read_image(f"{path}@frame:{frames - 1}").pixels)


def test_box_in_jpeg(scene, check_box, dicom):
    image = scene(BLUE, RED, np.uint8)
    tags = COLOUR | {"PhotometricInterpretation": "YBR_FULL_422"}
    data = coded(image, "JPEG", quality=98, subsampling=0)
    pixels = read_image(encapsulated(dicom, image, JPEGBaseline8Bit, [data], **tags)).pixels
    check_box(pixels)
    assert np.abs(pixels[10, 20].astype(int) - RED).max() < 6


def test_box_in_jpeg_2000(scene, check_box, dicom):
    stored = scene(100, 900, np.uint16)
    data = coded(stored, "JPEG2000", no_jp2=True, irreversible=False)
    check_box(read_image(encapsulated(dicom, stored, JPEG2000Lossless, [data])).pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_box_in_jpeg_ls(dtype, scene, check_box, dicom):
    pytest.importorskip("jpeg_ls", reason="pyjpegls is not installed (pip install 'med-glip[dicom]')")
    path = dicom(scene(10, 200, dtype))
    dataset = pydicom.dcmread(path)
    dataset.compress(JPEGLSLossless)
    dataset.save_as(path)
    check_box(read_image(path).pixels)


def test_box_in_lossless_jpeg(scene, check_box, dicom):
    gdcm = pytest.importorskip("gdcm", reason="GDCM is not installed (pip install 'med-glip[dicom]')")
    path = dicom(scene(100, 900, np.uint16))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    check_box(read_image(path).pixels)


def test_a_frame_that_ends_gdcms_process_is_only_broken():
    pytest.importorskip("gdcm", reason="GDCM is not installed (pip install 'med-glip[dicom]')")
    with open(pydicom.__path__[0] + "/data/test_files/SC_rgb_jpeg_gdcm.dcm", "rb") as file:
        data = bytearray(file.read())
    data[data.index(b"\xff\xd8") + 38] = 0  # GDCM calls abort() at this
    with pytest.raises(ImageError, match="its compressed frame is broken; export it again"):
        read_image(bytes(data))


SHIPPED = {
    "MR_small_RLE.dcm": "MR_small.dcm",
    "MR_small_bigendian.dcm": "MR_small.dcm",
    "MR_small_jp2klossless.dcm": "MR_small.dcm",
    "MR_small_jpeg_ls_lossless.dcm": "MR_small.dcm",
    "SC_rgb_jpeg_gdcm.dcm": "SC_rgb_rle.dcm",  # lossless JPEG
    "SC_rgb_rle_16bit.dcm": "SC_rgb_rle.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm": "SC_rgb_rle.dcm",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_other_programs_files_agree_with_their_plain_copy(name):
    """pydicom ships these; GDCM and DCMTK wrote them."""
    folder = pydicom.__path__[0] + "/data/test_files/"
    try:
        pixels = read_image(folder + name).pixels
    except ImageError as error:
        if "no decoder is installed" not in str(error):
            raise
        pytest.skip("no decoder for it (pip install 'med-glip[dicom]')")
    plain = read_image(folder + SHIPPED[name]).pixels
    difference = np.abs(pixels.astype(int) - plain)
    assert difference.mean() < 4 if "+cy" in name else difference.max() <= 1  # that one is lossy


@pytest.mark.parametrize(("kind", "syntax"), [("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGBaseline8Bit)])
def test_a_compressed_frame_larger_than_the_header_says(kind, syntax, scene, dicom):
    data = bytearray(coded(scene(10, 200, np.uint8), kind, **({"no_jp2": True} if kind == "JPEG2000" else {})))
    if kind == "JPEG2000":
        data[8:16] = struct.pack(">2I", 60_000, 60_000)
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">2H", 60_000, 60_000)
    path = encapsulated(dicom, scene(10, 200, np.uint8), syntax, [bytes(data)])
    with pytest.raises(ImageError, match="compressed frame is 60000 x 60000 x 1, its header says 60 x 40 x 1"):
        read_image(path)


def test_palette_segments_that_never_end(dicom):
    long = np.array([0, 1, 9] + [1, 65535, 9] * 3000, "<u2").tobytes()
    tags = palette(256, 16, [long] * 3, "Segmented")
    assert read_image(dicom(RAMP, **tags)).pixels.shape == (3, 4)
    again = np.array([0, 1, 9, 2, 1, 0, 0], "<u2").tobytes()
    with pytest.raises(ImageError, match="a colour palette in segments that repeat others"):
        read_image(dicom(RAMP, **palette(256, 16, [again] * 3, "Segmented")))
