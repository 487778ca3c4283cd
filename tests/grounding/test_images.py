"""Pictures, the letterbox, and files that cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from grounding.images import (
    ImageError,
    Letterbox,
    read_image,
    to_pixel_values,
)

RAMP = (np.arange(12, dtype=np.uint8) * 20).reshape(3, 4)
BLUE, RED = (20, 30, 60), (200, 60, 40)


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


# The box survives every form of picture

# EXIF 2.32, tag 0x0112: which side of the picture the stored row 0 and column 0 are.
FIRST_ROW_AND_COLUMN = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(upright, orientation):
    sides = FIRST_ROW_AND_COLUMN[orientation]
    stored = upright if sides[0] in ("top", "bottom") else np.swapaxes(upright, 0, 1)
    steps = [-1 if side in ("bottom", "right") else 1 for side in sides]
    return np.ascontiguousarray(stored[:: steps[0], :: steps[1]])


@pytest.mark.parametrize("orientation", FIRST_ROW_AND_COLUMN)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_box_in_every_exif_orientation(tmp_path, orientation, suffix, scene, check_box):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, f"a.{suffix}", as_stored(scene(BLUE, RED), orientation), exif=exif)
    check_box(read_image(path).pixels)
    assert (read_image(path.read_bytes()).pixels == read_image(path).pixels).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_exif_does_not_know_is_none(tmp_path, orientation, scene, check_box):
    exif = Image.Exif()
    exif[0x0112] = orientation
    check_box(read_image(save(tmp_path, "a.jpg", scene(10, 200), exif=exif)).pixels)


def test_broken_exif_does_not_hide_the_picture(tmp_path, scene, check_box):
    path = save(tmp_path, "a.jpg", scene(10, 200), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    check_box(read_image(path).pixels)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize(("low", "high"), [(100, 3000), (1000, 1010), (0, 65535)])
def test_box_in_sixteen_bits(tmp_path, name, low, high, scene, check_box):
    check_box(read_image(save(tmp_path, name, scene(low, high, np.uint16))).pixels)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_box_in_deep_tiff(tmp_path, dtype, scene, check_box):
    check_box(read_image(save(tmp_path, "a.tiff", scene(-5, 7, dtype))).pixels)


def test_box_in_a_page_of_a_tiff(tmp_path, scene, check_box):
    path = tmp_path / "pages.tiff"
    pages = [Image.fromarray(page) for page in (RAMP, scene(10, 200), scene(BLUE, RED))]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    check_box(read_image(f"{path}@frame:1").pixels)
    check_box(read_image(f"{path}@frame:2").pixels)


def test_box_in_one_bit_palette_alpha_and_print_colours(tmp_path, scene, check_box):
    Image.fromarray(scene(0, 255)).convert("1").save(tmp_path / "one.png")
    Image.fromarray(scene(0, 255)).convert("1").save(tmp_path / "one.tiff", compression="group4")
    Image.fromarray(scene(BLUE, RED)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.fromarray(scene(BLUE, RED)).convert("CMYK").save(tmp_path / "print.jpg", quality=98)
    alpha = Image.fromarray(np.dstack([np.full((40, 60, 3), 255, np.uint8), scene(30, 255)]))
    alpha.save(tmp_path / "alpha.png")
    alpha.convert("LA").save(tmp_path / "grey_alpha.png")
    for name in ("one.png", "one.tiff", "palette.png", "print.jpg", "alpha.png", "grey_alpha.png"):
        check_box(read_image(tmp_path / name).pixels)
    assert np.abs(read_image(tmp_path / "print.jpg").pixels[10, 20].astype(int) - RED).max() < 6


def test_a_picture_has_no_window(tmp_path):
    path = save(tmp_path, "a.png", RAMP)
    with pytest.raises(ImageError, match=r"a.png: a picture holds no Hounsfield units; leave the window out"):
        read_image(path, window="brain")
    with pytest.raises(ImageError, match=r"unknown window 'Brain'; choose one of brain, subdural"):
        read_image(path, window="Brain")


def test_a_picture_called_dicom_is_read(tmp_path, scene, check_box):
    check_box(read_image(save(tmp_path, "a.dcm", scene(10, 200), format="PNG")).pixels)


def test_a_name_with_an_at_sign_is_a_name(tmp_path):
    assert (read_image(save(tmp_path, "scan@axial:3", RAMP, format="PNG")).pixels == RAMP).all()


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
        ("bomb.png", bomb(), r"bomb.png: .*more than 128,000,000 pixels; crop or downsample"),
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


def test_choices_that_do_not_fit_the_file(tmp_path):
    path = save(tmp_path, "a.png", RAMP)
    with pytest.raises(ImageError, match="@axial chooses a slice of a NIfTI volume"):
        read_image(f"{path}@axial:1")
    with pytest.raises(ImageError, match="frame 1 does not exist"):
        read_image(f"{path}@frame:1")


def test_a_tiff_that_chains_pages_for_ever(tmp_path, monkeypatch):
    """Counted in full, the 60,000 pages of a 7 MB file take half a minute."""
    monkeypatch.setattr("grounding.images.MAX_PAGES", 300)
    data = bytearray(save(tmp_path, "a.tiff", RAMP).read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    page, first = data[start:end], len(data)
    for k in range(400):
        data += page + struct.pack("<I", first + (len(page) + 4) * (k + 1))
    struct.pack_into("<I", data, end, first)
    (tmp_path / "a.tiff").write_bytes(data)
    with pytest.raises(ImageError, match=r"holds more than 300 pages; split it first"):
        read_image(tmp_path / "a.tiff")


def test_loops_of_links_and_odd_names(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    for path in (tmp_path / "a.png", f"{tmp_path}/a.png@frame:0", tmp_path / "folder" / "folder" / "a.png"):
        with pytest.raises(ImageError, match="no such file|cannot be opened"):
            read_image(path)
    for name in ("x" * 5000, "nul\0.png", "v.nii.gz@axial:" + "9" * 5000):
        with pytest.raises(ImageError, match="no such file|cannot be opened"):
            read_image(f"{tmp_path}/{name}")
