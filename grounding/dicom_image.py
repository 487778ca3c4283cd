"""The pixels of one DICOM frame, as they are displayed.

Stored values -> rescale or modality LUT -> window or VOI LUT -> 8 bits, MONOCHROME1 turned over; colour from RGB, YBR
and palettes. Rows and columns stay as stored: DICOM keeps no display orientation apart from them. Section numbers are
those of https://dicom.nema.org/medical/dicom/current/output/chtml/part03/PS3.3.html.

Uncompressed, deflated and RLE files need nothing more than pydicom; JPEG and JPEG 2000 of 8 bits (JPEG 2000: one
channel up to 16) decode with Pillow. `pip install 'med-glip[dicom]'` adds lossless JPEG, JPEG-LS, deeper JPEG 2000 and
HTJ2K. Lossy JPEG of 12 bits decodes with pylibjpeg-libjpeg alone, which is under the GPL: the user may add it.
"""

import io
import struct
import subprocess
import sys
import zlib
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import get_decoder, pixel_array

from grounding.pixels import (
    PERCENTILES,
    ImageError,
    MedicalImage,
    check_size,
    choose_frame,
    grey_if_equal,
    thin,
    to_uint8,
)

MAX_BYTES = 1_000_000_000  # of a file, and of what a deflated one holds
DEFLATED = b"1.2.840.10008.1.2.1.99"
# C.7.3.1.1.1. DMS is dermoscopy proper; older files carry it as XC, a photograph.
MODALITIES = {
    "MR": "mri",
    "CT": "ct",
    "CR": "xray",
    "DX": "xray",
    "MG": "xray",
    "RF": "xray",
    "XA": "xray",
    "US": "ultrasound",
    "OP": "fundus",
    "ES": "endoscopy",
    "DMS": "dermoscopy",
    "XC": "dermoscopy",
    "SM": "microscopy",
    "GM": "microscopy",
}
# (implicit VR, little endian) -> the transfer syntax of a file that names none
ENCODINGS = {
    (True, True): pydicom.uid.ImplicitVRLittleEndian,
    (False, True): pydicom.uid.ExplicitVRLittleEndian,
    (False, False): pydicom.uid.ExplicitVRBigEndian,
}
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GDCM_SECONDS = 60
GDCM_PROGRAM = """
import io, sys, numpy, pydicom
dataset = pydicom.dcmread(io.BytesIO(sys.stdin.buffer.read()), force=True)
numpy.save(sys.stdout.buffer, pydicom.pixels.pixel_array(dataset, index=0, decoding_plugin="gdcm"))
"""
# Markers of JPEG and JPEG-LS that are followed by the size of the picture: all of FFC0-FFCF but DHT, JPG and DAC.
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def read_dicom(stream: BinaryIO, index: int | None, limits: tuple[float, float] | None) -> MedicalImage:
    """Decode a frame. `limits`: (low, high) HU to show instead of the file's own window; CT only.

    Raises ImageError, or nearly anything on a broken file.
    """
    dataset = _parse(stream)
    if "Rows" not in dataset or "Columns" not in dataset or not any(keyword in dataset for keyword in PIXEL_KEYWORDS):
        raise ImageError("DICOM without pixels (a report, a plan or a broken file); give an image object")
    check_size(int(dataset.Columns), int(dataset.Rows))
    frame = choose_frame(index, int(dataset.get("NumberOfFrames") or 1))
    modality = MODALITIES.get(str(dataset.get("Modality", "")))
    if limits is not None and modality != "ct":
        raise ImageError(f"a window is for CT, and this is {modality or 'of another modality'}; leave it out")
    return MedicalImage(_pixels(dataset, frame, limits), _spacing(dataset, frame), modality)


def _parse(stream: BinaryIO) -> Dataset:
    size = stream.seek(0, 2)
    if size > MAX_BYTES:
        raise ImageError(f"a file of {size:,} bytes is more than {MAX_BYTES:,}; split it into single frames first")
    _check_inflated(stream)
    stream.seek(0)
    dataset = pydicom.dcmread(stream, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ENCODINGS[dataset.original_encoding]
    return dataset


def _check_inflated(stream: BinaryIO) -> None:
    """Deflated data can grow a thousandfold, and pydicom inflates it in one piece."""
    stream.seek(0)
    read_preamble(stream, force=True)
    read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    start = stream.tell()
    stream.seek(0)
    if DEFLATED not in stream.read(start):
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    left, piece = MAX_BYTES, stream.read()
    while piece and left > 0:
        left -= len(inflater.decompress(piece, 2**24))
        piece = inflater.unconsumed_tail
    if left <= 0:
        raise ImageError(f"deflated data of more than {MAX_BYTES:,} bytes; convert the file with gdcmconv --raw")


def _pixels(dataset: Dataset, frame: int, limits: tuple[float, float] | None) -> np.ndarray:
    raw = _decode_frame(dataset, frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return grey_if_equal(_palette_colours(dataset, raw))
    if raw.ndim == 3:
        return grey_if_equal(raw if raw.dtype == np.uint8 else to_uint8(raw, 0, 2 ** int(dataset.BitsStored) - 1))
    pixels = _grey(dataset, frame, raw, limits)
    return 255 - pixels if dataset.PhotometricInterpretation == "MONOCHROME1" else pixels


# Stored values


def _decode_frame(dataset: Dataset, frame: int) -> np.ndarray:
    """Stored values (H, W) or RGB (H, W, 3); YBR colour is converted by pydicom."""
    if str(dataset.PhotometricInterpretation).startswith("YBR_PARTIAL"):
        raise ImageError(f"{dataset.PhotometricInterpretation} colour is not read; convert the file to RGB")
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return pixel_array(dataset, index=frame)
    _keep_frame(dataset, frame)
    return _decompress(dataset)


def _decompress(dataset: Dataset) -> np.ndarray:
    """The only frame of `dataset`, by the first of pydicom's plugins that can. GDCM comes last, and apart: some broken
    files make it end the whole process."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        plugins = get_decoder(syntax).available_plugins
    except NotImplementedError:
        plugins = ()
    reason = "no decoder is installed"
    for plugin in [name for name in plugins if name != "gdcm"]:
        try:
            return pixel_array(dataset, index=0, decoding_plugin=plugin)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[-1].strip()
    if plugins == ("gdcm",):
        return _decompress_apart(dataset)
    remedy = "pip install 'med-glip[dicom]', or convert the file with gdcmconv --raw"
    raise ImageError(f"{syntax.name} data cannot be decoded ({reason}); {remedy}")


def _decompress_apart(dataset: Dataset) -> np.ndarray:
    """By GDCM in a process of its own, which takes about half a second."""
    frame, file = Dataset(), io.BytesIO()
    frame.update({tag: dataset[tag] for tag in dataset.keys() if tag.group == 0x0028})  # noqa: SIM118
    frame.PixelData, frame.file_meta = dataset.PixelData, dataset.file_meta
    frame["PixelData"].VR, frame["PixelData"].is_undefined_length = "OB", True
    frame.save_as(file, implicit_vr=False, little_endian=True)
    command = [sys.executable, "-c", GDCM_PROGRAM]
    try:
        done = subprocess.run(command, input=file.getvalue(), capture_output=True, timeout=GDCM_SECONDS, check=True)
    except subprocess.SubprocessError:
        raise ImageError("its compressed frame is broken; export it again") from None
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


def _keep_frame(dataset: Dataset, frame: int) -> None:
    """Leave only this frame in compressed `dataset`, after a look at the size that its own header states: a decoder
    would reserve memory for that one, whatever Rows and Columns say."""
    table = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        table = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
        del dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    count = int(dataset.get("NumberOfFrames") or 1)
    data = get_frame(dataset.PixelData, frame, number_of_frames=count, extended_offsets=table)
    expected = (int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel))
    size = _stated_size(data, dataset.file_meta.TransferSyntaxUID) or expected
    if size != expected:
        stated, said = (" x ".join(map(str, sides)) for sides in (size, expected))
        raise ImageError(f"its compressed frame is {stated}, its header says {said}; export it again")
    dataset.PixelData = encapsulate([data])
    dataset.NumberOfFrames = 1


def _stated_size(data: bytes, syntax: pydicom.uid.UID) -> tuple[int, int, int] | None:
    """(width, height, channels) that a compressed frame states; RLE states none. Raises ImageError where it should."""
    if syntax == pydicom.uid.RLELossless:
        return None
    size = _jpeg_2000_size(data) if syntax in pydicom.uid.JPEG2000TransferSyntaxes else _jpeg_size(data)
    if size is None:
        raise ImageError(f"its compressed frame is not {syntax.name}; export it again")
    return size


def _jpeg_2000_size(data: bytes) -> tuple[int, int, int] | None:
    """ITU-T T.800 A.5.1, and I.4 for the boxes that may be around it."""
    at = 0
    while data[at : at + 4] != b"\xff\x4f\xff\x51":
        step = 8 if data[at + 4 : at + 8] == b"jp2c" else int.from_bytes(data[at : at + 4])
        if step < 8 or at + 42 > len(data):
            return None
        at += step
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    return right - left, bottom - top, struct.unpack_from(">H", data, at + 40)[0]


def _jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """JPEG: ITU-T T.81 B.2.2. JPEG-LS: T.87 C.2.2."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in FRAME_MARKERS:
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            return width, height, channels
        # A marker may be preceded by any number of FF.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


# Colour


def _palette_colours(dataset: Dataset, raw: np.ndarray) -> np.ndarray:
    """Stored values (H, W) -> uint8 (H, W, 3) (C.7.6.3.1.5)."""
    out = np.empty((*raw.shape, 3), np.uint8)
    for channel, name in enumerate(("Red", "Green", "Blue")):
        entries, first, _ = (int(part) for part in dataset[f"{name}PaletteColorLookupTableDescriptor"].value)
        entries = entries or 65536
        data = dataset.get(f"{name}PaletteColorLookupTableData")
        if data is not None:
            table = _words(dataset, data, len(data) >= 2 * entries)[:entries]
        else:
            data = dataset[f"Segmented{name}PaletteColorLookupTableData"].value
            table = _expand(_words(dataset, data, dataset.RedPaletteColorLookupTableDescriptor[2] > 8), entries)
        # Some writers put 8-bit colours into 16-bit words.
        table = table >> 8 if table.max() > 255 else table
        out[..., channel] = _look_up(raw, table, first)
    return out


def _expand(segments: np.ndarray, entries: int) -> np.ndarray:
    """A segmented table (C.7.9.2): 0, n, n values; or 1, n, the value that n steps lead to. At most `entries`."""
    table: list[float] = []
    at = 0
    while at + 2 < len(segments) and len(table) < entries:
        code, length = int(segments[at]), int(segments[at + 1])
        if code == 0:
            table.extend(segments[at + 2 : at + 2 + length].tolist())
            at += 2 + length
        elif code == 1 and table:
            table.extend(np.linspace(table[-1], int(segments[at + 2]), length + 1)[1:].tolist())
            at += 3
        else:
            raise ImageError("a colour palette in segments that repeat others is not read; convert the file to RGB")
    return np.rint(table[:entries]).astype(np.int64)


def _words(dataset: Dataset, data: bytes, wide: bool) -> np.ndarray:
    """Bytes of a lookup table -> its values. They follow the file's byte order."""
    if not wide:
        return np.frombuffer(data, np.uint8).astype(np.int64)
    order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
    return np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").astype(np.int64)


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """`first` is the value of the table's first entry; what lies beyond its ends takes the end (C.11.1.1.1)."""
    if not len(table):
        raise ImageError("an empty lookup table; export it again")
    if first > 32767 and values.min() < 0:  # the sign is lost where the descriptor is read as unsigned
        first -= 65536
    place = np.clip(np.asarray(values, np.float32) - first, 0, len(table) - 1)
    return table[np.rint(place, out=place).astype(np.int32)]


# Grey


def _grey(dataset: Dataset, frame: int, raw: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Stored values (H, W) -> uint8: rescale, then `limits`, else the file's LUT or window, else percentiles."""
    values = _rescale(dataset, frame, raw)
    if limits is not None:
        return to_uint8(values, *limits)
    voi = _frame_group(dataset, frame, "FrameVOILUTSequence", "WindowCenter")
    if dataset.get("VOILUTSequence"):
        table, first, bits = _table(dataset, dataset.VOILUTSequence[0])
        return to_uint8(_look_up(values, table, first), 0, 2**bits - 1)
    center, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if center is not None and width is not None and width > 1:
        return _window(values, center, width, str(voi.get("VOILUTFunction") or "LINEAR"))
    return to_uint8(values, *_percentile_limits(values, _padding(dataset, raw)))


def _rescale(dataset: Dataset, frame: int, raw: np.ndarray) -> np.ndarray:
    """C.11.1. A slope of 0, which would leave nothing, is an empty field that someone filled."""
    group = _frame_group(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    if group.get("ModalityLUTSequence"):
        table, first, _ = _table(dataset, group.ModalityLUTSequence[0])
        return _look_up(raw, table, first)
    slope, intercept = _first(group.get("RescaleSlope")), _first(group.get("RescaleIntercept"))
    if slope is None or intercept is None or (slope, intercept) == (1, 0):
        return raw
    if not np.isfinite([slope, intercept]).all():
        raise ImageError("its rescale slope or intercept is not a number; export it again")
    return raw * np.float64(slope or 1) + intercept


def _table(dataset: Dataset, item: Dataset) -> tuple[np.ndarray, int, int]:
    """(values, first value mapped, bits of a value) of a modality or VOI LUT (C.11.1.1, C.11.2.1.1)."""
    entries, first, bits = (int(part) for part in item.LUTDescriptor)
    data, entries = item.LUTData, entries or 65536
    if isinstance(data, bytes):
        data = _words(dataset, data, bits > 8 or len(data) >= 2 * entries)
    if not 1 <= bits <= 16:
        raise ImageError(f"a lookup table of {bits} bits; export it again")
    return np.atleast_1d(np.asarray(data, np.int64))[:entries], first, bits


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """C.11.2.1.2 and C.11.2.1.3: LINEAR counts whole values, LINEAR_EXACT is continuous, SIGMOID is soft."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return to_uint8(1 / (1 + np.exp(-4 * (values.astype(np.float32) - center) / width)), 0, 1)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return to_uint8(values, center - width / 2, center + width / 2)


def _padding(dataset: Dataset, raw: np.ndarray) -> np.ndarray | None:
    """(H, W) where `raw` is padding (C.7.5.1.1.2), None without any."""
    ends = [dataset.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [int(end) for end in ends if end is not None]
    return (raw >= min(ends)) & (raw <= max(ends)) if ends else None


def _percentile_limits(values: np.ndarray, padding: np.ndarray | None) -> tuple[float, float]:
    """Padding is not tissue: as values it would set the window."""
    known = values if padding is None or padding.all() else values[~padding]
    known = thin(known)
    known = known[np.isfinite(known)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, PERCENTILES)
    return (float(low), float(high)) if low < high else (float(known.min()), float(known.max()))


# Tags


def _spacing(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    """(row, column) in mm; a projection without PixelSpacing states it at the detector."""
    measures = _frame_group(dataset, frame, "PixelMeasuresSequence", "PixelSpacing")
    spacing = measures.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    if not spacing or len(spacing) != 2 or not all(0 < side < 1e4 for side in spacing):
        return None
    return float(spacing[0]), float(spacing[1])


def _frame_group(dataset: Dataset, frame: int, sequence: str, keyword: str) -> Dataset:
    """The data set that holds `keyword`: the file itself, or in an enhanced file the item of this or of all frames."""
    if keyword in dataset:
        return dataset
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*frames[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        if group.get(sequence):
            return group[sequence][0]
    return dataset


def _first(value: object) -> float | None:
    """A window may come with alternatives; the first is the default one."""
    if value is None or value == "":
        return None
    return float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
