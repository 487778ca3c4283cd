"""Calibration on held-out images, on a tiny random model."""

import numpy as np
import pytest
import torch

from grounding.calibrate import calibrate
from grounding.decode import presence_of
from grounding.labels import load_label_tree
from grounding.model import MODALITIES, MedGLIPConfig, build_model
from grounding.store import open_store

TREE = load_label_tree()
LABELS = ("brain", "brain/lesion", "brain/insula/left_insula", "brain/insula/right_insula")


@pytest.fixture(scope="module")
def samples(brain_store):
    return list(open_store(brain_store))


def calibrated(samples, *modalities):
    config = MedGLIPConfig(
        trunk="tiny", image_size=64, width=32, region_width=24, vocabulary=LABELS,
        phrases=tuple(map(TREE.phrase, LABELS)), modalities=modalities,
    )  # fmt: skip
    return calibrate(build_model(config, seed=0).eval(), samples)[0]


def test_labels_have_offsets_where_there_are_several_modalities(samples):
    one, several = calibrated(samples, "mri"), calibrated(samples, "mri", "ct")
    assert one.presence_offsets == {} and set(several.presence_offsets) <= set(LABELS)
    shares = {
        x: np.mean([any(x == y or x in TREE.broader(y) for y in s.regions.labels) for s in samples]) for x in LABELS
    }
    often, seldom = max(shares, key=shares.get), min(shares, key=shares.get)
    assert several.presence_offsets[often] > several.presence_offsets[seldom]
    assert one.thresholds == several.thresholds


def test_a_random_presence_head_comes_out_at_the_shares_of_the_labels(samples):
    """A head that knows nothing is calibrated where it says how often a label occurs, drawn to the mean of all."""
    config = calibrated(samples, "mri", "ct")
    mri = torch.eye(len(MODALITIES))[MODALITIES.index("mri")]
    said = presence_of(torch.zeros(len(LABELS)), LABELS, mri, config, TREE)
    assert ((said > 0) & (said < 1)).all() and said.max() > said.min()


def test_presence_is_zero_where_a_label_does_not_occur():
    config = MedGLIPConfig(modalities=("mri", "xray"), presence_offsets={"brain": 1.0})
    kinds = torch.zeros(len(MODALITIES))
    kinds[MODALITIES.index("xray")], kinds[MODALITIES.index("mri")] = 0.75, 0.25
    labels = ["chest/lung/left_lung", "brain/glioma", "a free phrase", None]
    p = presence_of(torch.full((4,), 20.0), labels, kinds, config, TREE)
    lung = sum(float(kinds[MODALITIES.index(m)]) for m in TREE.modalities(labels[0]))
    glioma = sum(float(kinds[MODALITIES.index(m)]) for m in TREE.modalities(labels[1]))
    assert p.tolist() == pytest.approx([lung, glioma, 1, 1], abs=1e-6) and lung > glioma
    alone = MedGLIPConfig(modalities=("mri",))
    assert presence_of(torch.tensor([0.0]), ["chest/lung/left_lung"], kinds, alone, TREE).tolist() == [0.5]
