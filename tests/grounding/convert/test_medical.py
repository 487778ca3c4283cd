import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from grounding.convert.medical import biomedparse, imed361m, medsam, samed2d
from grounding.convert.record import AnnotationError
from tests.grounding.convert.builders import collect_with_reasons, label, save

SIZE = (30, 40)
INSIDE = np.s_[6:12, 8:20]
BOX = [8 / 40, 6 / 30, 20 / 40, 12 / 30]


def mask(where=INSIDE, size=SIZE, value=255):
    pixels = np.zeros(size, np.uint8)
    pixels[where] = value
    return pixels


# BiomedParse


def test_biomedparse_names(tmp_path):
    for name in ("covid_1_X-Ray_chest", "covid_12_X-Ray_chest", "a_MRI-FLAIR_brain", "b_OCT_retinal", "nameless"):
        save(tmp_path / f"set/train/{name}.png", mask())
    save(tmp_path / "set/train_mask/covid_1_X-Ray_chest_left+lung.png", mask(value=1))
    save(tmp_path / "set/train_mask/covid_1_X-Ray_chest_COVID-19+infection.png", np.repeat(mask()[..., None], 3, 2))
    save(tmp_path / "set/train_mask/covid_12_X-Ray_chest_heart.png", mask(size=(40, 30)))
    save(tmp_path / "set/train_mask/a_MRI-FLAIR_brain_glioma.png", mask(np.s_[0:0]))
    save(tmp_path / "set/train_mask/gone_CT_lung_nodule.png", mask())
    samples, skipped = collect_with_reasons(biomedparse(tmp_path, "set", "CC0"))
    found = {sample.image_id: sample for sample in samples}
    first = found["set/set/train/covid_1_X-Ray_chest"]
    assert sorted(first.regions.texts) == ["COVID-19 infection", "left lung"] and first.modality == "xray"
    np.testing.assert_allclose(first.regions.boxes, [BOX, BOX], atol=1e-6)
    assert set(first.labelled) == {label("left lung"), label("COVID-19 infection")}
    wrong = found["set/set/train/covid_12_X-Ray_chest"]
    assert len(wrong.regions) == 0 and wrong.labelled == ()
    empty = found["set/set/train/a_MRI-FLAIR_brain"]
    assert len(empty.regions) == 0 and empty.labelled == (label("glioma"),) and empty.modality == "mri"
    assert len(found) == 3
    assert [key for key, _ in skipped] == [
        "set/train/b_OCT_retinal.png",
        "set/train/covid_12_X-Ray_chest",
        "set/train/nameless.png",
        "set/train_mask/gone_CT_lung_nodule.png",
    ]


def test_biomedparse_with_broken_files(tmp_path):
    for name in ("a_CT_lung", "b_CT_lung"):
        save(tmp_path / f"test/{name}.png", mask())
        save(tmp_path / f"test_mask/{name}_nodule.png", mask())
        save(tmp_path / f"test_mask/{name}_left+lung.png", mask())
    (tmp_path / "test_mask/a_CT_lung_nodule.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "test/b_CT_lung.png").write_bytes(b"")
    samples, skipped = collect_with_reasons(biomedparse(tmp_path, "set", "CC0"))
    assert len(samples) == 1 and samples[0].regions.texts == ["left lung"]
    assert samples[0].labelled == (label("left lung"),)
    assert len(skipped) == 2 and "a_CT_lung_nodule.png" in skipped[0][1]
    with pytest.raises(AnnotationError, match="train_mask"):
        collect_with_reasons(biomedparse(tmp_path / "test", "set", "CC0"))


# IMed-361M

CLASSES = {"0": "background", "1": "spleen", "2": "kidney_right", "3": "adrenal_gland_left"}


def imed(root, name="ABD_001_100", matrix=None, size=SIZE, classes=CLASSES, stated=None, **more):
    """One image and its label, as scipy writes it."""
    if matrix is None:
        stack = np.stack([mask(size=size), np.zeros(size), mask(np.s_[0:3, 0:4], size)]).reshape(3, -1)
        matrix = sparse.csr_matrix(stack.astype(np.uint8))
    shape = stated or (3, *size, 1)
    file = f"label/x___{name}.{shape}.npz"
    save(root / f"image/{name}.png", mask(size=SIZE))
    (root / "label").mkdir(exist_ok=True)
    if isinstance(matrix, bytes):
        (root / file).write_bytes(matrix)
    else:
        sparse.save_npz(root / file, matrix)
    entry = {"image": f"image/{name}.png", "label": file, "imask": f"imask/x___{name}.npy"}
    about = {"name": "BTCV", "modality": {"0": "ct"}, "labels": classes, "training": [entry], "test": []}
    (root / "dataset.json").write_text(json.dumps(about | more))
    return root / file


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix, sparse.csr_array])
def test_imed_masks_are_rows_without_background(tmp_path, kind):
    stack = np.stack([mask(), np.zeros(SIZE), mask(np.s_[0:3, 0:4])]).reshape(3, -1).astype(np.uint8)
    imed(tmp_path / "BTCV", matrix=kind(stack))
    samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
    assert not skipped and len(samples) == 1
    sample = samples[0]
    assert sample.regions.texts == ["spleen", "adrenal_gland_left"]
    assert sample.regions.labels == [label("spleen"), label("left adrenal gland")]
    np.testing.assert_allclose(sample.regions.boxes, [BOX, [0, 0, 0.1, 0.1]], atol=1e-6)
    assert sample.labelled == (label("spleen"), label("right kidney"), label("left adrenal gland"))
    assert (sample.image_id, sample.patient_id, sample.frame) == (
        "set/BTCV/image/ABD_001_100",
        "set/BTCV/image/ABD_001",
        100,
    )


def test_imed_entries_are_all_accounted_for(tmp_path):
    test = [{"image": "image/gone.png", "label": "label/gone.npz"}, 5, {"image": "../../x.png", "label": 7}]
    imed(tmp_path, test=test)
    samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
    assert len(samples) == 1
    assert [key for key, _ in skipped] == [f"dataset.json:test[{k}]" for k in range(3)]


def test_imed_masks_of_a_transposed_or_other_image_are_refused(tmp_path):
    for folder, more in {
        "a": {"size": SIZE[::-1]},  # the same number of pixels, the other way round
        "b": {"size": (30, 41)},
        "c": {"classes": {"0": "background", "1": "spleen"}},
        "d": {"modality": {"0": "pet"}},
    }.items():
        imed(tmp_path / folder, **more)
    samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
    assert not samples and len(skipped) == 4
    assert "30 x 40 on an image of 40 x 30" in skipped[0][1] and "3 masks" in skipped[2][1]


def npz(**members):
    """An npz file with members written byte by byte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array=None, shape=None, dtype="<i4", allow_pickle=False):
    """The bytes of an npy file; with `shape`, a header that claims it and a few zeros."""
    buffer = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=allow_pickle)
        return buffer.getvalue()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(64)


class Armed:
    """Pickled by hand; unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_in_an_npz_are_not_opened(tmp_path):
    trap = tmp_path / "sprung"
    payload = np.empty(1, object)
    payload[0] = Armed(trap)
    good = {"format": npy(np.array(b"csr")), "shape": npy(np.array([3, 1200])), "indices": npy(np.zeros(0, np.int32))}
    raw = npz(**good, indptr=npy(np.zeros(4, np.int32)), data=npy(payload, allow_pickle=True))
    imed(tmp_path / "a", matrix=raw)
    imed(tmp_path / "b", matrix=pickle.dumps(payload))
    samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
    assert not samples and "pickled" in skipped[0][1] and len(skipped) == 2
    assert not trap.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": npy(shape=(10**12,), dtype="|u1")},
        {"data": npy(shape=(10**9, 10**9, 10**9))},
        {"data": npy(shape=(17,))},
        {"indices": npy(np.array([0, 5_000_000], np.int32))},
        {"indices": npy(np.array([0, -7], np.int32))},
        {"indptr": npy(np.array([0, 9, 1, 2], np.int32))},
        {"indptr": npy(np.array([0, 1, 2, 2_000_000_000], np.int32))},
        {"indptr": npy(np.array([0, 9, 1, 2], np.uint64))},
        {"indices": npy(np.array([0, 5.5]))},
        {"indices": npy(np.array([[0, 5]], np.int32))},
        {"data": npy(np.array(["a", "b"]))},
        {"shape": npy(np.array([3, 10**15]))},
        {"shape": npy(np.array([10**15, 1200]))},
        {"shape": npy(np.array(7))},
        {"format": npy(np.array(b"dia"))},
        {"format": npy(np.array(b"__class__"))},
        {"format": npy(np.zeros((2, 2)))},
        {"data": b"no array"},
        {"data": None},
        {"format": None},
        {"indices": None},
        {"format": npy(np.array(b"coo"))},
        {"format": npy(np.array(b"coo")), "coords": npy(np.array(3))},
        {"format": npy(np.array(b"coo")), "row": npy(np.array([0, 3])), "col": npy(np.array([0, 0]))},
    ],
)
def test_hostile_npz_files_are_refused(tmp_path, changes):
    members = {
        "format": npy(np.array(b"csr")),
        "shape": npy(np.array([3, 1200])),
        "data": npy(np.ones(2, np.uint8)),
        "indices": npy(np.array([0, 5], np.int32)),
        "indptr": npy(np.array([0, 1, 2, 2], np.int32)),
    }
    imed(tmp_path, matrix=npz(**members))
    assert len(collect_with_reasons(imed361m(tmp_path, "set", "CC0"))[0]) == 1
    members = {name: content for name, content in (members | changes).items() if content is not None}
    imed(tmp_path, matrix=npz(**members))
    samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
    assert not samples and len(skipped) == 1


def test_damaged_npz_files_never_raise_anything_else(tmp_path):
    path = imed(tmp_path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        raw = bytearray(whole)
        for place in random.integers(0, len(raw), 4):
            raw[place] = random.integers(256)
        path.write_bytes(raw[: random.integers(1, len(raw) + 1)] if random.random() < 0.3 else raw)
        samples, skipped = collect_with_reasons(imed361m(tmp_path, "set", "CC0"))
        assert len(samples) + len(skipped) >= 1


@pytest.mark.parametrize("text", ["[]", "{}", '{"labels": {"0": "background"}}', "{", '{"labels": {"1": ["x"]}}'])
def test_imed_without_a_usable_dataset_json(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(AnnotationError, match="dataset.json"):
        collect_with_reasons(imed361m(tmp_path, "set", "CC0"))


# SA-Med2D-20M


def test_samed2d_masks_name_their_class_by_number(tmp_path):
    image = "images/ct_00--AbdomenCT1K--Case_00011--x_0040.png"
    masks = [f"masks/ct_00--AbdomenCT1K--Case_00011--x_0040--{one}.png" for one in ("0000_000", "0003_001", "0009_000")]
    save(tmp_path / image, np.repeat(mask()[..., None], 3, 2))
    for name in masks:
        save(tmp_path / name, mask())
    others = {
        "images/pet_00--autoPET--p1--z_0001.png": [],
        "images/odd.png": [],
        "images/ct_00--AbdomenCT1K--Case_00011--x_0041.png": [],
        "images/x_ray--sz_cxr--c1--x_0000.png": "masks",
    }
    save(tmp_path / "images/pet_00--autoPET--p1--z_0001.png", mask())
    save(tmp_path / "images/x_ray--sz_cxr--c1--x_0000.png", mask())
    listed = {image: [*masks, masks[0].replace("_000.", "_002.")]} | others
    (tmp_path / "SAMed2D_v1.json").write_text(json.dumps(listed))
    classes = {"AbdomenCT1K": {"liver": "0", "kidney_left": 3}, "other": {"heart": 9}}
    (tmp_path / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(classes))
    samples, skipped = collect_with_reasons(samed2d(tmp_path, "set", "CC0"))
    assert len(samples) == 1 and samples[0].regions.texts == ["liver", "kidney_left"]
    assert samples[0].regions.labels == [label("liver"), label("left kidney")]
    np.testing.assert_allclose(samples[0].regions.boxes, [BOX, BOX], atol=1e-6)
    assert samples[0].patient_id == "set/AbdomenCT1K/Case_00011" and samples[0].frame == 40
    assert samples[0].labelled == () and samples[0].modality == "ct"
    assert len(skipped) == 6 and {key for key, _ in skipped} == set(listed)


# MedSAM


def test_medsam_volumes(tmp_path):
    images = np.stack([mask(value=100 + 20 * k) for k in range(3)])
    labels = np.stack([mask(value=1), mask(value=2), mask(np.s_[0:3, 0:4], value=7)])
    (tmp_path / "MedSAM_train").mkdir()
    np.savez_compressed(tmp_path / "MedSAM_train/CT_Abd_a_1.npz", imgs=images, gts=labels, spacing=(0.5, 0.7, 5.0))
    samples, skipped = collect_with_reasons(medsam(tmp_path, "set", "CC0", "1:liver,2:right kidney,3:spleen"))
    assert [sample.regions.texts for sample in samples] == [["liver"], ["right kidney"], []]
    np.testing.assert_allclose(samples[0].regions.boxes, [BOX], atol=1e-6)
    assert {sample.labelled for sample in samples} == {(label("liver"), label("right kidney"))}
    assert [sample.frame for sample in samples] == [0, 1, 2] and samples[0].modality == "ct"
    assert samples[0].spacing == (0.7, 0.5)  # row before column; the file has x before y
    assert {sample.study_id for sample in samples} == {"set/MedSAM_train/CT_Abd_a_1"}
    assert (np.asarray(Image.open(io.BytesIO(samples[1].image))) == images[1]).all()
    assert skipped == [("MedSAM_train/CT_Abd_a_1:2", "value 7 has no name; give labels=7:...")]


def test_medsam_pictures(tmp_path):
    colour = np.stack([mask(), mask() // 2, mask() // 3], -1)
    np.savez_compressed(tmp_path / "Dermoscopy_Skin_1.npz", imgs=colour, gts=mask(value=1))
    samples, skipped = collect_with_reasons(medsam(tmp_path, "set", "CC0", "1:skin lesion"))
    assert not skipped and samples[0].image_id == "set/Dermoscopy_Skin_1" and samples[0].modality == "dermoscopy"
    assert (np.asarray(Image.open(io.BytesIO(samples[0].image))) == colour).all()
    assert samples[0].frame is None and samples[0].study_id is None


@pytest.mark.parametrize(
    "members",
    [
        {"imgs": npy(mask())},
        {"imgs": npy(mask()), "gts": npy(mask(size=(40, 30)))},
        {"imgs": npy(mask().astype(float) * 300), "gts": npy(mask())},
        {"imgs": npy(np.full(SIZE, np.nan)), "gts": npy(mask())},
        {"imgs": npy(mask()), "gts": npy(mask() * 0.5)},
        {"imgs": npy(np.zeros((2, 30, 40, 4), np.uint8)), "gts": npy(np.zeros((2, 30, 40), np.uint8))},
        {"imgs": npy(np.zeros((0, 30, 40), np.uint8)), "gts": npy(np.zeros((0, 30, 40), np.uint8))},
        {"imgs": npy(shape=(100_000, 512, 512), dtype="|u1"), "gts": npy(mask())},
        {"imgs": npy(mask()), "gts": npy(np.array([[None]], object), allow_pickle=True)},
    ],
)
def test_medsam_files_that_do_not_fit_are_refused(tmp_path, members):
    (tmp_path / "CT_x_1.npz").write_bytes(npz(**members))
    samples, skipped = collect_with_reasons(medsam(tmp_path, "set", "CC0", "1:liver"))
    assert not samples and len(skipped) == 1


def test_medsam_needs_words_for_its_numbers(tmp_path):
    for labels in ("", "liver", "1:", "x:liver"):
        with pytest.raises(AnnotationError, match="1:liver"):
            collect_with_reasons(medsam(tmp_path, "set", "CC0", labels))
