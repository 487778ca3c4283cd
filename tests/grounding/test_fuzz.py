"""Broken files by the thousand: nothing but ValueError or OSError comes out of a reader, in little time and memory.

`pytest -m slow tests/grounding/test_fuzz.py` runs all of them; a run names the mutant at which it failed.
"""

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

pytestmark = pytest.mark.filterwarnings("ignore:Expected explicit VR")  # in a file that pydicom ships
ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS, MAX_MEMORY = 5, 2_000_000_000  # of processor time for a file; resident, of the whole process
FEW = {"dicom": 80, "nifti": 60, "picture": 40, "voc": 40, "coco": 40, "yolo": 40}
FORMS = ("ct", "x", "rgb", "ybr", "palette", "frames", "deflated", "rle", "jpeg", "jpeg2000")
MANY = {"dicom": 4000, "nifti": 3000, "picture": 1000, "voc": 1500, "coco": 1500, "yolo": 1500}


def run(folder, counts, seed=0, files=(), seconds=MAX_SECONDS, timeout=280):
    task = {"folder": str(folder), "counts": counts, "seed": seed, "files": [str(name) for name in files]}
    command = [sys.executable, str(Path(__file__).with_name("fuzzing.py")), json.dumps(task | {"seconds": seconds})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs at {(folder / 'at').read_text()}")
    assert done.returncode == 0, f"crashed at {(folder / 'at').read_text()}: {done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["failures"], "\n".join(result["failures"][:20])
    assert result["memory"] < MAX_MEMORY
    return result


# What is mutated


@pytest.fixture
def originals(tmp_path, dicom, scene):
    """tmp_path with a folder of valid files for every reader."""
    (tmp_path / "dicom").mkdir()
    write_dicoms(tmp_path / "dicom", dicom, scene)
    (tmp_path / "nifti").mkdir()
    write_niftis(tmp_path / "nifti")
    (tmp_path / "picture").mkdir()
    write_pictures(tmp_path / "picture", scene)
    write_voc(tmp_path / "voc" / "source", scene)
    write_coco(tmp_path / "coco" / "source", scene)
    write_yolo(tmp_path / "yolo" / "source", scene)
    return tmp_path


def write_dicoms(folder, dicom, scene):
    grey, deep, colour = scene(10, 200), scene(100, 3000, np.uint16), scene((1, 2, 3), (200, 100, 50))
    item = Dataset()
    item.LUTDescriptor = [256, 0, 16]
    item.add_new("LUTData", "OW", np.arange(256, dtype="<u2").tobytes())
    ct = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400, "Modality": "CT"}
    rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    colours = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in ("Red", "Green", "Blue")}
    colours |= {f"{name}PaletteColorLookupTableData": bytes(range(256)) for name in ("Red", "Green", "Blue")}
    group = Dataset()
    group.WindowCenter, group.WindowWidth = 40, 400
    frames = [Dataset(), Dataset()]
    for frame in frames:
        frame.FrameVOILUTSequence = [group]
    forms = {
        "ct": (deep, ct),
        "x": (grey, {"PhotometricInterpretation": "MONOCHROME1", "VOILUTSequence": [item]}),
        "rgb": (colour, rgb),
        "ybr": (colour, rgb | {"PhotometricInterpretation": "YBR_FULL"}),
        "palette": (grey, colours | {"PhotometricInterpretation": "PALETTE COLOR"}),
        "frames": (np.stack([grey, grey]), {"NumberOfFrames": 2, "PerFrameFunctionalGroupsSequence": frames}),
        "deflated": (deep, ct | {"TransferSyntaxUID": DeflatedExplicitVRLittleEndian}),
        "rle": (np.stack([deep, deep]), {"NumberOfFrames": 2}),
        "jpeg": (grey, {}),
        "jpeg2000": (deep, {}),
    }
    for name, (stored, tags) in forms.items():
        dicom(stored, f"dicom/{name}.dcm", **tags)
    dataset = pydicom.dcmread(folder / "rle.dcm")
    dataset.compress(RLELossless)
    dataset.save_as(folder / "rle.dcm")
    for name, syntax, codec, options in (
        ("jpeg", JPEGBaseline8Bit, "JPEG", {}),
        ("jpeg2000", JPEG2000Lossless, "JPEG2000", {"no_jp2": True}),
    ):
        dataset, buffer = pydicom.dcmread(folder / f"{name}.dcm"), io.BytesIO()
        Image.fromarray(forms[name][0]).save(buffer, codec, **options)
        dataset.PixelData, dataset.file_meta.TransferSyntaxUID = encapsulate([buffer.getvalue()]), syntax
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(folder / f"{name}.dcm")
    for path in Path(pydicom.__path__[0], "data", "test_files").glob("*.dcm"):
        if path.stat().st_size < 20_000 and "PixelData" in pydicom.dcmread(path, force=True):
            (folder / path.name).write_bytes(path.read_bytes())


def write_niftis(folder):
    volume = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    for number, dtype in enumerate((np.int16, np.float32, np.uint8, np.float64)):
        kind = (nib.Nifti1Image, nib.Nifti2Image)[number % 2]
        image = kind(volume.astype(dtype), np.diag([-1.0, 2, 3, 1]))
        image.header.set_slope_inter(2, -1)
        nib.save(image, folder / f"{number}.nii")


def write_pictures(folder, scene):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "tiff", "bmp"):
        Image.fromarray(scene((1, 2, 3), (200, 100, 50))).save(folder / f"colour.{suffix}", exif=exif)
    Image.fromarray(scene(100, 3000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(scene(10, 200)).save(
        folder / "pages.tiff", save_all=True, append_images=[Image.fromarray(scene(1, 2))], compression="tiff_lzw"
    )


def write_voc(folder, scene):
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        Image.fromarray(scene(10, 200)).save(folder / "images" / f"{name}.png")
        box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>34</xmax><ymax>15</ymax></bndbox>"
        objects = f"<object><name>lung</name><difficult>0</difficult>{box}</object>" * 2
        size = "<size><width>60</width><height>40</height><depth>1</depth></size>"
        text = f'<?xml version="1.0"?><annotation><filename>{name}.png</filename>{size}{objects}</annotation>'
        (folder / "images" / f"{name}.xml").write_text(text)


def write_coco(folder, scene):
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        Image.fromarray(scene(10, 200)).save(folder / "images" / f"{name}.png")
    shapes = [
        {"bbox": [10, 5, 24, 10], "area": 240},
        {"bbox": [10, 5, 24, 10], "segmentation": [[10, 5, 34, 5, 34, 15, 10.5, 15]]},
        {"bbox": [0, 0, 2, 40], "segmentation": {"size": [40, 60], "counts": [0, 80, 2320]}, "iscrowd": 1},
        {"bbox": [0, 0, 2, 40], "segmentation": {"size": [40, 60], "counts": "0`2`X2"}, "attributes": {"a": "b"}},
    ]
    data = {
        "info": {},
        "images": [{"id": k, "file_name": f"{name}.png", "width": 60, "height": 40} for k, name in enumerate("ab")],
        "categories": [{"id": 1, "name": "lung"}, {"id": 2, "name": "heart"}],
        "annotations": [{"id": k, "image_id": k % 2, "category_id": 1} | shape for k, shape in enumerate(shapes)],
    }
    (folder / "instances.json").write_text(json.dumps(data))


def write_yolo(folder, scene):
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "data.yaml").write_text("names: [lung, heart]\nnc: 2\n")
    for name in "ab":
        Image.fromarray(scene(10, 200)).save(folder / "images" / f"{name}.png")
        (folder / "labels" / f"{name}.txt").write_text("0 0.3 0.25 0.4 0.25\n1 0.1 0.1 0.5 0.1 0.5 0.5\n")


# Tests


def test_the_originals_are_read(originals):
    """Were they refused, their mutants would show nothing."""
    from grounding.convert.coco import coco
    from grounding.convert.voc import voc
    from grounding.convert.yolo import yolo
    from grounding.images import read_image
    from grounding.types import GroundingSample

    plain = [path for path in (originals / "dicom").glob("[a-z]*.dcm") if path.stem in FORMS]
    assert len(plain) == len(FORMS)
    for path in [*plain, *(originals / "picture").iterdir()]:
        several = path.stem in ("frames", "rle", "pages")
        read_image(f"{path}@frame:1" if several else path)
    for path in (originals / "nifti").iterdir():
        read_image(f"{path}@axial:1")
    for name, convert, count in (("voc", voc, 4), ("coco", coco, 4), ("yolo", yolo, 4)):
        rows = [row for item in convert(originals / name / "source", "s", "CC0", "xray") for row in item.read()]
        assert all(isinstance(row, GroundingSample) for row in rows) and len(rows) == 2
        assert sum(len(row.regions) for row in rows) == count


def test_three_hundred_broken_files(originals):
    result = run(originals, FEW)
    assert sum(result["counts"].values()) == sum(FEW.values()) == 300


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1])
def test_twelve_thousand_broken_files(originals, seed):
    result = run(originals, MANY, seed, timeout=3500)
    print(result)
    assert sum(result["counts"].values()) >= 12_000
    for kind in MANY:  # not all mutants are beyond reading
        assert result["counts"][f"{kind} read"] > 100


def png_claiming(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10**7)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + data


def nifti_claiming(shape, offset=352, dtype=np.float64):
    header = nib.Nifti1Header()
    header.set_sform(np.diag([-1.0, 1, 1, 1]), code=1)
    header["dim"][: 1 + len(shape)] = [len(shape), *shape]
    header.set_data_dtype(dtype)
    header["vox_offset"], header["magic"] = offset, b"n+1"
    return header.binaryblock + b"\0" * 4


def test_bombs_are_refused_without_unpacking_them(tmp_path, dicom, scene):
    zeros = gzip.compress(bytes(2**24)) * 64  # a gigabyte in a megabyte
    huge = dicom(scene(1, 2), "huge.dcm")
    dataset = pydicom.dcmread(huge)
    dataset.Rows = dataset.Columns = 65535
    dataset.save_as(huge)
    endless = dicom(scene(1, 2), "endless.dcm", NumberOfFrames=10**9)
    bombs = {
        "bomb.png": png_claiming(60_000, 60_000),
        "renamed.dcm": png_claiming(60_000, 60_000),
        "wide.nii.gz": gzip.compress(nifti_claiming((32767, 32767, 100))) + zeros,
        "late.nii.gz": gzip.compress(nifti_claiming((5, 5, 5), offset=9e8)) + zeros,
        "empty.nii.gz": b"",
        "empty.dcm": b"",
        "text.jpg": b"no picture",
        "zeros.nii.gz": zeros,
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = [*bombs, "loop.png", "huge.dcm"]
    files = [tmp_path / name for name in names] + [f"{endless}@frame:999999999", f"{tmp_path}/wide.nii.gz@axial:5"]
    result = run(tmp_path, {}, files=files)
    assert result["counts"] == {"file refused": len(files)}
    assert result["memory"] < 600_000_000 and result["slowest"] < 2


@pytest.mark.slow
def test_the_largest_images_allowed_fit_the_memory(tmp_path, dicom):
    """8000 x 8000 pixels, and 600 million voxels."""
    deep = (np.arange(64_000_000, dtype=np.uint32) // 977).astype(np.uint16).reshape(8000, 8000)
    Image.fromarray(deep).save(tmp_path / "deep.png", compress_level=1)
    Image.fromarray((deep >> 8).astype(np.uint8)).convert("LA").save(tmp_path / "alpha.png", compress_level=1)
    dicom(deep, "plain.dcm", RescaleSlope=2, RescaleIntercept=-5, PixelPaddingValue=7)
    dataset = pydicom.dcmread(dicom(deep[:4000], "rle.dcm"))
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    with gzip.open(tmp_path / "v.nii.gz", "wb", compresslevel=1) as file:
        file.write(nifti_claiming((512, 512, 2288), dtype=np.int16))
        for k in range(2288):
            file.write(np.full((512, 512), k, np.int16).tobytes())
    files = [tmp_path / name for name in ("deep.png", "alpha.png", "plain.dcm", "rle.dcm")]
    for name in [*files, f"{tmp_path}/v.nii.gz@sagittal:9"]:
        result = run(tmp_path, {}, files=[name], seconds=200)
        print(Path(str(name)).name, f"{result['memory'] / 1e9:.2f} GB, {result['slowest']:.1f} s")
        assert result["counts"] == {"file read": 1}
