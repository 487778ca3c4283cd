import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from grounding.convert.record import AnnotationError
from grounding.convert.volumes import nifti_volumes
from tests.grounding.convert.builders import collect_with_reasons, label

SHAPE, SPACING = (20, 24, 16), (1.0, 2.0, 3.0)  # I, J, K of a volume in RAS+
INSIDE = np.s_[4:9, 6:13, 3:11]
AFFINE = nib.affines.from_matvec(np.diag(SPACING), (10, -20, 5))


def painted(value=1, dtype=np.int16, background=0, where=INSIDE):
    voxels = np.full(SHAPE, background, dtype)
    voxels[where] = value
    return voxels


def save(path, voxels, axes="RAS", affine=AFFINE):
    """Writes a volume that is given in RAS order; the file holds it with other axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), path)


def msd(root, labels=None, modality=None, **more):
    about = {
        "name": "Liver",
        "modality": modality or {"0": "CT"},
        "labels": labels or {"0": "background", "1": "liver"},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(about | more))
    return root


def read(root, layout="msd", **options):
    return collect_with_reasons(nifti_volumes(root, "set", "CC0", layout, **options))


def pixels(sample):
    return np.asarray(Image.open(io.BytesIO(sample.image)))


# Worked out by hand from the display convention: both axes of a slice run against I, J, K.
BOXES = {
    "axial": ((24, 20), [11 / 20, 11 / 24, 16 / 20, 18 / 24], range(3, 11), (2.0, 1.0)),
    "coronal": ((16, 20), [11 / 20, 5 / 16, 16 / 20, 13 / 16], range(6, 13), (3.0, 1.0)),
    "sagittal": ((16, 24), [11 / 24, 5 / 16, 18 / 24, 13 / 16], range(4, 9), (3.0, 2.0)),
}


@pytest.mark.parametrize("plane", BOXES)
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "IAL"])
def test_a_painted_box_comes_out_at_its_place_in_every_plane(tmp_path, plane, axes):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii.gz", painted(200, background=-1000), axes)
    save(root / "labelsTr/a.nii.gz", painted(1, np.uint8), axes)
    samples, skipped = read(root, plane=plane)
    size, box, frames, spacing = BOXES[plane]
    assert not skipped and [sample.frame for sample in samples] == list(frames)
    for sample in samples:
        assert sample.regions.image_size == size and sample.regions.texts == ["liver"]
        np.testing.assert_allclose(sample.regions.boxes, [box], atol=1e-6)
        assert sample.spacing == pytest.approx(spacing) and sample.study_id == sample.patient_id == "set/a"
        x1, y1, x2, y2 = np.rint(np.array(box) * [*size[::-1], *size[::-1]]).astype(int)
        bright = np.zeros(size, bool)
        bright[y1:y2, x1:x2] = True
        assert ((pixels(sample) > 128) == bright).all()


def test_labels_with_other_axes_than_the_image_are_brought_to_it(tmp_path):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii.gz", painted(200), "RAS")
    save(root / "labelsTr/a.nii.gz", painted(1, np.float64), "LPI")
    samples, skipped = read(root)
    assert not skipped and len(samples) == 8
    np.testing.assert_allclose(samples[0].regions.boxes, [BOXES["axial"][1]], atol=1e-6)


@pytest.mark.parametrize(
    ("voxels", "affine", "why"),
    [
        (painted(), nib.affines.from_matvec(np.diag(SPACING), (10, -20, 25)), "20.0 mm from the image"),
        (painted(), nib.affines.from_matvec(np.diag((1.0, 2.0, 3.3)), (10, -20, 5)), "mm from the image"),
        (painted()[:-1], AFFINE, r"\(19, 24, 16\) on an image of \(20, 24, 16\)"),
        (painted(0.5, np.float32), AFFINE, "not whole numbers"),
        (painted(np.nan, np.float32), AFFINE, "not whole numbers"),
    ],
)
def test_labels_on_another_grid_or_of_fractions_are_refused(tmp_path, voxels, affine, why):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii.gz", painted(200))
    save(root / "labelsTr/a.nii.gz", voxels, affine=affine)
    samples, skipped = read(root)
    assert not samples and [key for key, _ in skipped] == ["imagesTr/a.nii.gz"]
    assert re.search(why, skipped[0][1])


def test_decathlon_files_are_all_accounted_for(tmp_path):
    listed = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ("a", "gone")]
    root = msd(tmp_path / "Task03_Liver", {"0": "background", "1": "liver", "2": "cancer"}, training=[*listed, 7])
    two = painted()
    two[0, 0, 3] = 2
    save(root / "imagesTr/a.nii.gz", painted(200))
    save(root / "labelsTr/a.nii.gz", two)
    save(root / "imagesTr/unlabelled.nii.gz", painted(200))
    save(root / "labelsTr/orphan.nii.gz", painted())
    save(root / "imagesTr/broken.nii.gz", painted(200))
    save(root / "labelsTr/broken.nii.gz", painted())
    whole = (root / "imagesTr/broken.nii.gz").read_bytes()
    (root / "imagesTr/broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    save(root / "imagesTr/zero.nii.gz", painted(200))
    save(root / "labelsTr/zero.nii.gz", painted(0))
    (root / "imagesTr/._a.nii.gz").write_bytes(b"\0\5\26\7 left by macOS")
    save(root / "imagesTs/test.nii.gz", painted(200))  # without a folder labelsTs: not for training
    samples, skipped = read(root)
    assert {sample.patient_id for sample in samples} == {"set/a"} and len(samples) == 8
    assert dict(skipped).keys() == {
        "imagesTr/unlabelled.nii.gz",
        "labelsTr/orphan.nii.gz",
        "imagesTr/broken.nii.gz",
        "imagesTr/zero.nii.gz",
        "imagesTr/gone.nii.gz",
        "dataset.json: training[2]",
    }
    assert samples[0].regions.texts == ["liver", "cancer"]
    assert samples[0].labelled == (
        label("liver"),
        label("liver tumour"),
    )
    assert all(sample.labelled == samples[0].labelled and sample.licence == "CC0" for sample in samples)
    assert samples[0].image_id == "set/a/axial0003"


def test_the_window_of_ct_is_that_of_the_organ(tmp_path):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii.gz", painted(40, background=-200))
    save(root / "labelsTr/a.nii.gz", painted())
    grey = {window: read(root, window=window)[0][0] for window in ("", "abdomen", "lung")}
    assert grey[""].image == grey["abdomen"].image
    assert set(np.unique(pixels(grey["abdomen"]))) == {0, 121}  # -150 to 250
    assert set(np.unique(pixels(grey["lung"]))) == {196, 236}  # -1350 to 150


def test_steps_and_empty_slices(tmp_path):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii.gz", painted(200))
    save(root / "labelsTr/a.nii.gz", painted())
    samples, _ = read(root, skip_empty="false")
    assert [sample.frame for sample in samples] == list(range(16))
    assert [len(sample.regions) for sample in samples] == [0] * 3 + [1] * 8 + [0] * 5
    assert all(len(sample.labelled) == 1 for sample in samples)
    assert [sample.frame for sample in read(root, step="5")[0]] == [5, 10]


def test_values_without_a_name_and_voxels_that_nobody_labelled(tmp_path):
    labels = {"background": 0, "liver": 1, "whole": [1, 2], "ignore": 3}  # nnU-Net's order
    root = msd(tmp_path, labels, modality={"0": "MRI"})
    voxels = painted()
    voxels[0, 0, 3:6], voxels[1, 1, 4], voxels[2, 2, 5] = 2, 3, 9
    save(root / "imagesTr/a.nii.gz", painted(200))
    save(root / "labelsTr/a.nii.gz", voxels)
    samples, skipped = read(root)
    assert skipped == [("imagesTr/a.nii.gz", "a.nii.gz: values without a name: 9")]
    assert [sample.modality for sample in samples] == ["mri"] * 8
    assert samples[0].regions.texts == ["liver", "whole"] and len(samples[0].labelled) == 2
    assert samples[1].labelled == () and len(samples[2].labelled) == 2
    assert samples[0].regions.boxes[1].tolist() == pytest.approx([11 / 20, 11 / 24, 1, 1])


def test_every_volume_of_a_4d_file_and_every_channel_file_gives_samples(tmp_path):
    modality = {"0": "FLAIR", "1": "T1w"}
    root = msd(tmp_path / "a", {"0": "background", "1": "edema"}, modality, name="BRATS")
    stacked = np.stack([painted(900), painted(500, background=100)], -1)
    stacked[4, 6, :, 1] = 300
    (root / "imagesTr").mkdir()
    nib.save(nib.Nifti1Image(stacked, AFFINE), root / "imagesTr/BRATS_001.nii.gz")
    save(root / "labelsTr/BRATS_001.nii.gz", painted())
    four, skipped = read(root, plane="coronal")
    assert not skipped and [sample.image_id for sample in four[::7]] == [
        "set/BRATS_001/FLAIR/coronal0006",
        "set/BRATS_001/T1w/coronal0006",
    ]
    assert four[0].image != four[7].image and four[0].study_id == four[7].study_id

    root = msd(tmp_path / "b", {"background": 0, "edema": 1}, modality, name="BRATS")
    for channel in (0, 1, 5):
        save(root / f"imagesTr/BRATS_001_{channel:04d}.nii.gz", stacked[..., channel % 2])
    save(root / "labelsTr/BRATS_001.nii.gz", painted())
    files, skipped = read(root, plane="coronal")
    assert [one.image for one in files] == [one.image for one in four]
    assert skipped == [("imagesTr/BRATS_001_0005.nii.gz", "dataset.json has no channel 5")]


def test_amos_tells_ct_from_mri_by_the_number(tmp_path):
    labels = {"0": "background", "8": "arota", "3": "left kidney", "9": "postcava"}
    root = msd(tmp_path / "amos22", labels, name="AMOS")
    for folder, number in (("Tr", "0004"), ("Va", "0500"), ("Tr", "0507")):
        save(root / f"images{folder}/amos_{number}.nii.gz", painted(200))
        save(root / f"labels{folder}/amos_{number}.nii.gz", painted(8))
    samples, skipped = read(root, "amos")
    assert not skipped
    found = {sample.patient_id: sample.modality for sample in samples}
    assert found == {"set/amos_0004": "ct", "set/amos_0500": "ct", "set/amos_0507": "mri"}
    assert samples[0].regions.texts == ["arota"]
    assert samples[0].regions.labels == [label("aorta")]
    assert len(samples[0].labelled) == 3


def test_totalsegmentator_masks_one_by_one(tmp_path):
    save(tmp_path / "s0001/ct.nii.gz", painted(200))
    save(tmp_path / "s0001/segmentations/lung_upper_lobe_left.nii.gz", painted(1, np.uint8))
    save(tmp_path / "s0001/segmentations/vertebrae_L1.nii.gz", painted(1, np.uint8, where=np.s_[5:6, 7:8, 3:5]))
    save(tmp_path / "s0001/segmentations/kidney_right.nii.gz", painted(0, np.uint8))
    save(tmp_path / "s0001/segmentations/spleen.nii.gz", painted(1, np.uint8)[1:])
    (tmp_path / "s0001/segmentations/liver.nii.gz").write_bytes(b"")
    save(tmp_path / "s0002/mri.nii.gz", painted(200))
    save(tmp_path / "s0003/segmentations/liver.nii.gz", painted())
    samples, skipped = read(tmp_path, "totalsegmentator")
    assert len(samples) == 8 and samples[0].regions.texts == ["lung_upper_lobe_left", "vertebrae_L1"]
    assert samples[0].regions.labels == [label("left upper lobe"), label("L1 vertebra")]
    assert set(samples[0].labelled) == {*samples[0].regions.labels, label("right kidney")}
    assert [key for key, _ in skipped] == ["s0001/ct.nii.gz"] * 2 + ["s0002/mri.nii.gz", "s0003/segmentations"]
    assert "liver.nii.gz" in skipped[0][1] and "spleen.nii.gz" in skipped[1][1]


@pytest.mark.parametrize(
    ("case", "files", "enhancing", "patient"),
    [
        ("BraTS20_Training_001", ["_t1", "_t1ce", "_t2", "_flair"], 4, "BraTS20_Training_001"),
        ("BraTS-GLI-00005-001", ["-t1n", "-t1c", "-t2w", "-t2f"], 3, "BraTS-GLI-00005"),
    ],
)
def test_brats_of_both_namings(tmp_path, case, files, enhancing, patient):
    labels = painted(2)
    labels[4:6, 6, 3], labels[8, 12, 3], labels[0, 0, 3] = 1, enhancing, 7 - enhancing
    for suffix in files:
        save(tmp_path / case / f"{case}{suffix}.nii.gz", painted(200))
    save(tmp_path / case / f"{case}{files[0][0]}seg.nii.gz", labels)
    samples, skipped = read(tmp_path, "brats")
    assert len(samples) == 4 * 8 and {sample.patient_id for sample in samples} == {f"set/{patient}"}
    assert {sample.study_id for sample in samples} == {f"set/{case}"}
    assert len({sample.image_id for sample in samples}) == 32 and {sample.modality for sample in samples} == {"mri"}
    first = [sample for sample in samples if sample.frame == 3][0]
    assert set(first.regions.texts) == {"edema", "necrotic tumour core", "enhancing tumour", "whole tumour"}
    whole = first.regions.boxes[first.regions.texts.index("whole tumour")]
    assert label("glioma") in first.regions.labels
    assert whole.tolist() == pytest.approx(BOXES["axial"][1])
    assert [why for _, why in skipped] == [f"{case}{files[0][0]}seg.nii.gz: values without a name: {7 - enhancing}"] * 4


def test_the_one_brats_label_file_with_another_name_and_a_case_without_labels(tmp_path):
    save(tmp_path / "BraTS20_Training_355/BraTS20_Training_355_t1.nii", painted(200))
    save(tmp_path / "BraTS20_Training_355/W39_1998.09.19_Segm.nii", painted(4))
    save(tmp_path / "BraTS20_Validation_001/BraTS20_Validation_001_t1.nii", painted(200))
    samples, skipped = read(tmp_path, "brats")
    assert len(samples) == 8
    assert [key for key, _ in skipped] == ["BraTS20_Validation_001/BraTS20_Validation_001_t1.nii"]


def test_btcv_pairs(tmp_path):
    save(tmp_path / "Training/img/img0001.nii.gz", painted(200), "LAS")
    save(tmp_path / "Training/label/label0001.nii.gz", painted(3), "LAS")
    save(tmp_path / "Training/img/img0002.nii.gz", painted(200))
    save(tmp_path / "Training/label/label0003.nii.gz", painted(3))
    samples, skipped = read(tmp_path, "btcv")
    assert len(samples) == 8 and samples[0].regions.texts == ["left kidney"] and len(samples[0].labelled) == 13
    np.testing.assert_allclose(samples[0].regions.boxes, [BOXES["axial"][1]], atol=1e-6)
    assert dict(skipped).keys() == {"Training/img/img0002.nii.gz", "Training/label/label0003.nii.gz"}


def test_a_finding_is_one_region_a_piece_and_a_structure_one_region(tmp_path):
    labels = {"0": "background", "1": "lesion in the brain", "2": "brain"}
    root = msd(tmp_path, labels, {"0": "MRI"}, name="x")
    for value in (1, 2):
        two = painted(value)
        two[15:18, 20:22, 3:11] = value
        save(root / f"imagesTr/{value}.nii.gz", painted(200))
        save(root / f"labelsTr/{value}.nii.gz", two)
    samples, _ = read(root)
    assert {len(sample.regions) for sample in samples if sample.patient_id == "set/1"} == {2}
    assert {len(sample.regions) for sample in samples if sample.patient_id == "set/2"} == {1}


def test_a_header_that_claims_a_giant_is_refused_unread(tmp_path):
    root = msd(tmp_path)
    save(root / "imagesTr/a.nii", painted(200))
    save(root / "labelsTr/a.nii", painted())
    raw = bytearray((root / "imagesTr/a.nii").read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (root / "imagesTr/a.nii").write_bytes(raw)
    samples, skipped = read(root)
    assert not samples and "voxels" in skipped[0][1]


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_never_raise_anything_else(tmp_path, seed):
    root, random = msd(tmp_path), np.random.default_rng(seed)
    save(root / "imagesTr/a.nii", painted(200))
    save(root / "labelsTr/a.nii", painted())
    path = root / ("imagesTr/a.nii" if seed % 2 else "labelsTr/a.nii")
    raw = bytearray(path.read_bytes())
    for place in random.integers(0, 352, 6):
        raw[place] = random.integers(256)
    path.write_bytes(raw[: len(raw) if seed % 3 else int(random.integers(len(raw)))])
    samples, skipped = read(root)
    assert samples or skipped


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layout": "nope"}, "layout=nope: unknown; give one of msd"),
        ({"plane": "oblique"}, "axial"),
        ({"window": "foot"}, "abdomen"),
        ({"step": "0"}, "1 or more"),
        ({"skip_empty": "maybe"}, "true"),
        ({}, "imagesTr"),
    ],
)
def test_wrong_options_and_folders_say_what_is_right(tmp_path, options, why):
    msd(tmp_path)
    with pytest.raises(AnnotationError, match=why):
        read(tmp_path, **options)


@pytest.mark.parametrize("labels", [[], {"1": "x", "y": {}}, {"liver": "spleen"}, {"0": "background"}])
def test_a_dataset_json_without_usable_labels_is_named(tmp_path, labels):
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": labels}))
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    with pytest.raises(AnnotationError, match="dataset.json"):
        read(tmp_path)
