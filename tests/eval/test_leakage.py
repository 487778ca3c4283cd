"""The audit names what two sets share, however the picture was changed, and nothing that they do not share."""

import json
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import eval.duplicates
from eval.bench.leakage import SAME_PICTURE, split
from eval.bench.real_images import SETS, read_items
from eval.duplicates import KEEP, near_duplicates
from eval.fingerprint import T, fingerprint, read_picture
from eval.leakage import (
    KINDS,
    NEIGHBOUR,
    Images,
    LeakageError,
    audit,
    audit_questions,
    flagged,
    images_of_questions,
    report,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real images of ../shared/data")


def picture(seed, size=(240, 200)):
    """A smooth random scene with some sharp-edged blobs, as RGB; `size` is width, height."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(24, 28)).astype(np.float32)
    scene = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) * 30 + 110
    rows, columns = np.mgrid[: size[1], : size[0]]
    for _ in range(8):
        y, x, radius = rng.uniform(0, size[1]), rng.uniform(0, size[0]), rng.uniform(6, 20)
        scene = scene + rng.uniform(-60, 60) * ((rows - y) ** 2 + (columns - x) ** 2 < radius**2)
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8)).convert("RGB")


def eye(seed):
    """A bright disc on black with vessels: the outline is the same in all of them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:256, :256]
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 110**2
    scene = 150.0 + 0 * rows
    for _ in range(12):
        angle, offset, bend = rng.uniform(0, np.pi), rng.uniform(-90, 90), rng.uniform(-0.004, 0.004)
        along = (rows - 128) * np.cos(angle) + (columns - 128) * np.sin(angle)
        across = (rows - 128) * np.sin(angle) - (columns - 128) * np.cos(angle) - offset - bend * along**2
        scene -= 40 * np.exp(-(across**2) / 18)
    return Image.fromarray((scene * disc).clip(0, 255).astype(np.uint8))


def images(pictures, name="a", patients=None, studies=None, frames=None):
    """Columns of a dict id → PIL image."""
    prints = [fingerprint(np.asarray(item)) for item in pictures.values()]
    nothing = [None] * len(prints)
    return Images(
        name=name,
        ids=list(pictures),
        patients=patients or nothing,
        studies=studies or nothing,
        frames=frames or nothing,
        pixels=[item.pixels for item in prints],
        thumbnails=np.array([item.thumbnail for item in prints], np.uint8).reshape(-1, T, T),
    )


def named(name, seeds, make=picture):
    return {f"{name}{seed}": make(seed) for seed in seeds}


def shuffled(columns, seed=0):
    order = np.random.default_rng(seed).permutation(len(columns)).tolist()
    taken = {f.name: [getattr(columns, f.name)[k] for k in order] for f in fields(Images) if f.name != "name"}
    return replace(columns, **{**taken, "thumbnails": columns.thumbnails[order]})


def jpeg(image, quality):
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


# Fingerprints


def test_equal_pixels_have_equal_hashes_and_one_other_pixel_has_not():
    pixels = np.asarray(picture(0))
    other = pixels.copy()
    other[5, 7, 1] ^= 1
    grey = pixels[..., 0]
    assert fingerprint(pixels).pixels == fingerprint(np.asfortranarray(pixels)).pixels
    assert fingerprint(other).pixels != fingerprint(pixels).pixels
    assert fingerprint(np.repeat(grey[..., None], 3, 2)).pixels == fingerprint(grey).pixels
    assert fingerprint(np.zeros((4, 9), np.uint8)).pixels != fingerprint(np.zeros((9, 4), np.uint8)).pixels
    assert len(fingerprint(grey).pixels) == 16 and fingerprint(grey).thumbnail.shape == (T, T)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_other_pixels_than_an_image_has_are_refused(pixels):
    with pytest.raises(ValueError, match="give uint8"):
        fingerprint(pixels)


def test_a_thumbnail_hardly_changes_with_the_size_of_the_image():
    small, large = (fingerprint(np.asarray(picture(3).resize(size))).thumbnail for size in ((150, 300), (900, 500)))
    assert np.abs(small.astype(int) - large).mean() < 2


# Near-duplicates

CHANGES = {
    "half": lambda image: image.resize((120, 100)),
    "other aspect": lambda image: image.resize((400, 130), Image.Resampling.LANCZOS),
    "jpeg": lambda image: jpeg(image, 30),
    **{f"turned {way.name}": lambda image, way=way: image.transpose(way) for way in Image.Transpose},
    "gamma": lambda image: image.point([round(255 * (v / 255) ** 0.75) for v in range(256)] * 3),
    "contrast": lambda image: image.point([min(255, round((v - 128) * 0.8 + 138)) for v in range(256)] * 3),
    "crop": lambda image: image.crop((8, 4, 235, 192)),
    "border": lambda image: ImageOps.expand(image, (10, 3, 5, 8)),
    "letterbox": lambda image: ImageOps.pad(image, (400, 200)),
    "together": lambda image: ImageOps.mirror(jpeg(image.crop((5, 5, 238, 198)).resize((150, 150)), 50)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_named_with_its_original_and_no_other(change):
    originals = named("", range(10))
    a, b = images(originals), images({key: CHANGES[change](image) for key, image in originals.items()}, "b")
    leaks = audit(a, b)
    assert [(leak.id_a, leak.id_b) for leak in leaks] == [(key, key) for key in originals]
    assert {leak.kind for leak in leaks} == {"near-duplicate"}


def test_sets_that_share_nothing_have_no_leak():
    assert audit(images(named("a", range(20))), images(named("b", range(20, 40)))) == []
    assert audit(images(named("a", range(12), eye))) == []


def test_eyes_are_told_apart_by_their_vessels_and_known_again_when_mirrored():
    eyes = named("e", range(10), eye)
    other = {f"m{key}": ImageOps.mirror(image) for key, image in list(eyes.items())[:4]} | named(
        "o", range(20, 26), eye
    )
    assert {(leak.id_a, leak.id_b) for leak in audit(images(eyes), images(other, "b"))} == {
        (f"e{k}", f"me{k}") for k in range(4)
    }


def test_an_image_with_nothing_on_it_matches_by_pixels_only():
    def empty(level, dot=0):
        pixels = np.full((80, 90), level, np.uint8)
        pixels[3 : 3 + dot, 4 : 4 + dot] = 255
        return Image.fromarray(pixels)

    a = images({"black": empty(0), "grey": empty(90), "dot": empty(0, 3)})
    b = images({"black again": empty(0), "lighter": empty(91), "dot again": empty(2, 3)}, "b")
    assert [(leak.kind, leak.id_a, leak.id_b) for leak in audit(a, b)] == [("pixels", "black", "black again")]


def test_which_set_comes_first_makes_no_difference_to_the_pairs():
    originals = named("a", range(8))
    b = images({f"b{k}": change(originals[f"a{k % 8}"]) for k, change in enumerate(CHANGES.values())}, "b")
    a = images(originals)
    there = {(leak.id_a, leak.id_b, leak.detail) for leak in audit(a, b)}
    assert there == {(leak.id_b, leak.id_a, leak.detail) for leak in audit(b, a)}
    assert len(there) == len(CHANGES)


def test_neither_the_order_of_rows_nor_the_size_of_blocks_changes_anything(monkeypatch):
    pictures = named("a", range(14)) | {f"again{k}": CHANGES["jpeg"](picture(k)) for k in range(5)}
    groups = [f"p{k % 9}" for k in range(len(pictures))]
    frames = [k * 4 % 37 for k in range(len(pictures))]
    a = images(pictures, "a", groups, groups, frames)
    b = images(named("b", range(8, 16)), "b", groups[:8], groups[:8], frames[3:11])
    expected = audit(a, b), audit(a)
    assert {leak.kind for leaks in expected for leak in leaks} == set(KINDS)
    assert (audit(shuffled(a), shuffled(b, 1)), audit(shuffled(a, 2))) == expected
    for name, value in {"BLOCK": 5, "CHUNK": 3, "BATCH": 2}.items():
        monkeypatch.setattr(eval.duplicates, name, value)
    assert (audit(a, b), audit(a)) == expected


def test_more_copies_than_are_checked_of_an_image_are_all_flagged():
    rng = np.random.default_rng(0)
    pixels = np.asarray(picture(0)).astype(int)
    copies = {f"c{k}": Image.fromarray((pixels + rng.integers(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8))
              for k in range(3 * KEEP)}  # fmt: skip
    leaks = audit(images(named("a", range(3))), images(copies, "b"))
    assert flagged(leaks) == set(copies) and {leak.id_a for leak in leaks} == {"a0"}


def test_no_images_are_no_error():
    nothing, some = images({}), images(named("a", range(3)))
    assert audit(nothing, some) == audit(some, nothing) == audit(nothing) == []
    assert [len(column) for column in near_duplicates(nothing.thumbnails)] == [0, 0, 0]


# Patients, studies, frames


def rows(*items, name="a", first=0):
    """(id, patient, study, frame) each, all of different pictures."""
    pictures = {item[0]: picture(first + k, (60, 60)) for k, item in enumerate(items)}
    return images(pictures, name, *([item[k] for item in items] for k in (1, 2, 3)))


def test_a_patient_and_a_study_are_named_and_none_is_nobody():
    a = rows(("a1", "p1", "s1", None), ("a2", None, None, None), ("a3", "p3", None, None))
    b = rows(("b1", "p1", "s1", None), ("b2", None, None, None), ("b3", "p3", "s1", None), name="b", first=50)
    assert [(leak.kind, leak.id_a, leak.id_b) for leak in audit(a, b)] == [
        ("study", "a1", "b1"),
        ("study", "a1", "b3"),
        ("patient", "a1", "b1"),
        ("patient", "a3", "b3"),
    ]


def test_a_neighbour_is_the_nearest_frame_of_the_study():
    a = rows(("a10", "p", "s", 10), ("a30", "p", "s", 30), ("a31", "p", "t", 31))
    b = rows(
        ("near", "p", "s", 30 + NEIGHBOUR), ("far", "p", "s", 31 + NEIGHBOUR), ("low", "p", "s", 1), name="b", first=9
    )
    leaks = audit(a, b)
    assert {(leak.id_a, leak.id_b) for leak in leaks if leak.kind == "neighbour"} == {("a30", "near"), ("a10", "low")}
    partners = {(leak.id_a, leak.id_b) for leak in leaks}
    assert partners == {("a30", "near"), ("a30", "far"), ("a10", "low")}  # one partner for study and patient as well
    assert [leak.kind for leak in leaks if leak.id_b == "near"] == ["neighbour", "study", "patient"]


def test_a_volume_in_both_sets_is_a_row_a_slice_not_a_pair_of_slices():
    a = rows(*((f"a{k}", "p", "s", k) for k in range(30)))
    leaks = audit(a, rows(*((f"b{k}", "p", "s", k) for k in range(30)), name="b", first=100))
    assert len(leaks) == 3 * 30 and flagged(leaks) == {f"b{k}" for k in range(30)}


def test_within_one_set_an_image_is_not_its_own_leak():
    a = rows(("x", "p", "s", 1), ("y", "p", "s", 2), ("z", "q", None, None))
    assert {(leak.kind, leak.id_a, leak.id_b) for leak in audit(a)} == {
        (kind, "x", "y") for kind in ("neighbour", "study", "patient")
    }


def test_the_report_counts_an_image_once_and_names_no_patient():
    secret = "DOE-JOHN-1970"
    a = rows(("a1", secret, secret, 1), ("a|2", "q", None, None))
    b = replace(a, name="b", ids=["b1", "b2"])
    leaks = audit(a, b)
    text = report(leaks)
    assert [leak.kind for leak in leaks if leak.id_b == "b1"] == list(KINDS)
    assert f"| all | | {len(leaks)} | 2 | 2 |" in text and secret not in text
    assert "No leak" in report([])


def test_columns_of_unequal_length_are_refused():
    a = rows(("a1", "p", "s", 1))
    with pytest.raises(LeakageError, match="1 ids but 2 patients"):
        replace(a, patients=["p", "q"])
    with pytest.raises(LeakageError, match="thumbnails are"):
        replace(a, thumbnails=np.zeros((1, 32, 32), np.uint8))


# Questions


@pytest.fixture
def question_folder(tmp_path):
    for k in range(6):
        picture(k).save(tmp_path / f"q{k}.png")
    CHANGES["together"](picture(0)).save(tmp_path / "renamed.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return tmp_path


def test_every_question_about_a_training_image_is_named(question_folder):
    """VQA-RAD's own json: ids are numbers, and answers may be."""
    names = ["q0.png", "q0.png", "q3.png", "renamed.jpg", "q4.png"]
    questions = [{"qid": k, "image_name": name, "question": "?", "answer": k} for k, name in enumerate(names)]
    (question_folder / "test.json").write_text(json.dumps(questions))
    train = images({"t0": picture(0), "t1": picture(1), "t3": picture(3)})
    asked = images_of_questions(question_folder / "test.json", question_folder)
    leaks = audit_questions(train, asked)
    assert flagged(leaks) == {"0", "1", "2", "3"} and asked.unread == {}
    assert {leak.id_a for leak in leaks if leak.id_b == "3"} == {"t0"} and "renamed.jpg" in leaks[-1].detail


def test_json_lines_are_audited_by_patient_where_the_image_is_not_there(question_folder):
    lines = [
        {"sample_id": "same", "image_id": "i1", "image": "q1.png", "question": "a\u2028b"},
        {"sample_id": "patient", "image_id": "i9", "image": "gone.png", "patient_id": "p1"},
        {"sample_id": "broken", "image_id": "i8", "image": "broken.png"},
        {"sample_id": "clean", "image_id": "i5", "image": "q5.png", "patient_id": "p5"},
        {"study_id": "report", "images": ["q4.png", "q1.png"], "patient_id": "p6", "findings": "none"},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (question_folder / "test.jsonl").write_text(text, encoding="utf-8")
    train = images({"t1": picture(1)}, "train", ["p1"])
    asked = images_of_questions(question_folder / "test.jsonl", question_folder)
    assert set(asked.unread) == {"i9", "i8"}
    found = {(leak.kind, leak.id_b) for leak in audit_questions(train, asked)}
    assert {("pixels", "same"), ("patient", "patient"), ("pixels", "report")} <= found
    assert {sample for _, sample in found} == {"same", "patient", "report"}


@pytest.mark.parametrize("text", ["", "[]", "[1]", '{"question": "?"}', '{"sample_id": 1}\n{', "[" * 100_000, "\xff"])
def test_a_file_that_holds_no_questions_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "q.json").write_text(text, encoding="latin-1")
    with pytest.raises(LeakageError, match="q.json") as error:
        images_of_questions(tmp_path / "q.json", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(LeakageError, match="none.json"):
        images_of_questions(tmp_path / "none.json", tmp_path)


# Real images


@real
@pytest.mark.parametrize("name", SETS)
def test_real_images_are_found_again_and_told_apart(name):
    twice = frozenset().union(*SAME_PICTURE)
    items = [item for item in read_items(DATA) if item.id.startswith(f"{name}/") and item.id not in twice]
    seen: dict[str, object] = {}
    for item in items:  # one image a patient: slices of one volume are the same picture, and should be
        seen.setdefault(item.patient, item)
    chosen = list(seen.values())[-8:]
    pictures = {item.id: Image.fromarray(read_picture(item.path)) for item in chosen}
    changed = {key: jpeg(ImageOps.flip(image).resize((300, 260)).convert("RGB"), 40) for key, image in pictures.items()}
    leaks = audit(images(pictures), images(changed, "b"))
    assert sorted((leak.id_a, leak.id_b) for leak in leaks) == sorted((key, key) for key in pictures)


@real
def test_no_patient_of_the_measurement_is_on_both_sides():
    train, test, neighbours = split(read_items(DATA), np.random.default_rng(0))
    assert not {item.patient for item in train} & {item.patient for item in test}
    kept = {item.id for item in train}
    assert all(a.id in kept and b.id not in kept and abs(a.frame - b.frame) <= NEIGHBOUR for a, b in neighbours)
    assert len(neighbours) > 30 and len(test) > 500
