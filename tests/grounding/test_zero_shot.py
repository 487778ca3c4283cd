"""Zero-shot detectors of transformers as grounders, on tiny random checkpoints of every family, saved and loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grounding.chunks import phrase_scores
from grounding.detect import load_grounder
from grounding.images import ImageError
from grounding.model import CheckpointError
from grounding.phrases import PhraseError
from grounding.types import RegionSet, load_region_tokens, read_regions
from grounding.zero_shot import FAMILIES, ZeroShotGrounder, is_zero_shot, load_zero_shot
from grounding.zero_shot_families import forward, pixel_inputs, text_inputs
from tests.grounding.detectors import build_detector, picture

ROOT = Path(__file__).resolve().parents[2]
ASKED = ["left lung", "lesion", "lung", "pleural effusion"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = build_detector(family, tmp_path_factory.mktemp(family))
        return built[family]

    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def grounder(request, folders) -> ZeroShotGrounder:
    loaded = load_grounder(folders(request.param))
    assert isinstance(loaded, ZeroShotGrounder) and loaded.detector.family == request.param
    return loaded


def same(a, b, atol=1e-4):
    assert a.candidates.labels == b.candidates.labels
    assert np.allclose(a.candidates.boxes, b.candidates.boxes, atol=atol)
    assert np.allclose(a.candidates.scores, b.candidates.scores, atol=atol)
    assert torch.allclose(a.tokens.features, b.tokens.features, atol=10 * atol)


def test_images_of_different_size_are_seen_as_each_alone(grounder):
    images, asked = [picture(80, 120), picture(64, 64, 1)[..., 0]], grounder.resolve(ASKED, "xray")
    together = grounder.detect(images, asked, "xray")
    for image, detection in zip(images, together, strict=True):
        same(grounder.detect([image], asked, "xray")[0], detection)
        assert len(detection.candidates) and detection.candidates.image_size == image.shape[:2]
        assert [query["phrase"] for query in detection.candidates.queries] == ASKED
        tokens, n = detection.tokens, detection.tokens.valid.shape[1]
        assert tokens.features.shape == (1, n, grounder.config.region_width)
        assert tokens.label_vectors.shape == (1, n, grounder.config.width)


def test_every_image_has_its_own_phrases(grounder):
    images = [picture(96, 96), picture(96, 96, 1), picture(96, 96, 2)]
    lists = [[("left lung", None), ("a long one about nothing much", None)], [("cyst", None)], []]
    together = grounder.detect_each(images, lists)
    for image, phrases, detection in zip(images, lists, together, strict=True):
        same(grounder.detect_each([image], [phrases])[0], detection)
        assert set(detection.candidates.labels) <= {text for text, _ in phrases}


def test_a_given_box_has_the_feature_of_its_query(grounder):
    image = picture(80, 120)
    phrases = [("left lung", None), ("cyst", None)]
    sight = grounder._look([image], [[text for text, _ in phrases]])[0]
    sides = sight.boxes[:, 2:] - sight.boxes[:, :2]
    rows = (sides.min(1).values > 0.01).nonzero()[[2, 0, 1], 0]  # OWLv2 has queries in the padding, all at the edge
    boxes = sight.boxes[rows].numpy()
    given = RegionSet(boxes, ["left lung", "cyst", "left lung"], (80, 120))
    tokens = grounder.given([image], [given])[0]
    # regions come most important first: all equal here, so in their order, free phrases before places
    order = [tokens.boxes[0].tolist().index(box.tolist()) for box in torch.from_numpy(boxes)]
    assert torch.allclose(tokens.features[0][order], sight.features[rows], atol=1e-4)


def test_long_lists_go_in_parts_and_each_phrase_is_scored_once(grounder):
    many = 16 if grounder.detector.family.endswith("dino") else 4
    phrases = [
        f"finding {k} of {name}" for k in range(many) for name in ("the liver", "bone", "skin", "retina", "colon")
    ]
    image = picture(96, 96)
    sight = grounder._look([image], [phrases])[0]
    assert sight.scores.shape[1] == len(phrases) and (sight.scores.max(0).values > 0).all()
    if grounder.detector.family.startswith("owl"):
        alone = torch.cat([grounder._look([image], [[phrase]])[0].scores for phrase in phrases], 1)
        assert torch.allclose(alone, sight.scores, atol=1e-5)  # phrases do not see each other
        return
    passes = len(sight.boxes) // grounder.detector.model.config.num_queries
    assert passes > 1 and ((sight.scores > 0).sum(0) == len(sight.boxes) // passes).all()


def test_logits_are_those_of_transformers(grounder):
    """Against the model's own forward pass with inputs as its documentation makes them."""
    detector, image = grounder.detector, picture(96, 96)
    pixels, _ = pixel_inputs(detector, [image])
    text = text_inputs(detector, [ASKED])
    model, tokenizer = detector.model, detector.tokenizer
    with torch.no_grad():
        levels, features = forward(model, pixels, text.tensors)
        ours = phrase_scores(levels[0].logits[0], text.columns[0])
        if detector.family.endswith("dino"):
            inputs = tokenizer(". ".join(ASKED) + ".", return_tensors="pt")
            out = model(**inputs, pixel_values=pixels["pixel_values"])
            words = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
            ends = [k for k, word in enumerate(words) if word == "."]
            spans = [range(a + 1, b) for a, b in zip([0, *ends], ends, strict=False)]
            theirs = torch.stack([out.logits[0, :, list(span)].sigmoid().mean(1) for span in spans], 1)
            boxes, own = out.pred_boxes, out.last_hidden_state
        elif detector.family.startswith("owl"):
            out = model(**tokenizer(ASKED, padding=True, return_tensors="pt"), pixel_values=pixels["pixel_values"])
            theirs, boxes, own = out.logits[0].sigmoid(), out.pred_boxes, out.class_embeds
        else:
            classes = tokenizer(ASKED, padding=True, return_tensors="pt")
            task = tokenizer([f"Detect {', '.join(ASKED)}."], padding=True, return_tensors="pt")
            out = model(
                pixel_values=pixels["pixel_values"],
                classes_input_ids=classes["input_ids"],
                classes_attention_mask=classes["attention_mask"],
                tasks_input_ids=task["input_ids"],
                tasks_attention_mask=task["attention_mask"],
                classes_structure=torch.tensor([len(ASKED)]),
                output_hidden_states=True,
            )
            theirs, boxes = out.decoder_class_logits[0].sigmoid(), out.decoder_coord_logits
            own = out.decoder_hidden_states[-1]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(levels[0].boxes_cxcywh, boxes, atol=1e-5) and torch.allclose(features, own, atol=1e-4)


@pytest.mark.parametrize("family", ["grounding-dino", "owlv2", "owlvit", "omdet-turbo"])
def test_boxes_come_back_to_the_image(family, folders):
    """A box of the network input, through what the image processor did to the picture: found by its bright corner."""
    detector = load_zero_shot(folders(family), "cpu").detector
    image = np.zeros((60, 120, 3), np.uint8)
    image[30:, 60:] = 255
    pixels, share = pixel_inputs(detector, [image])
    values = pixels["pixel_values"][0, 0]
    rows, columns = (values > (values.min() + values.max()) / 2).nonzero(as_tuple=True)
    corner = torch.tensor([columns.min() / values.shape[1], rows.min() / values.shape[0]])
    end = torch.tensor([(columns.max() + 1) / values.shape[1], (rows.max() + 1) / values.shape[0]])
    assert torch.allclose(corner / share[0], torch.tensor([0.5, 0.5]), atol=0.03)
    if family != "owlv2":  # its padding is grey, which counts as bright here
        assert torch.allclose(end / share[0], torch.ones(2), atol=0.03)


def test_without_a_vocabulary_the_label_tree_speaks(folders):
    grounder = load_zero_shot(folders("owlv2"), "cpu")
    fundus = {label for _, label in grounder.vocabulary("fundus")}
    assert fundus and all("fundus" in grounder.tree.modalities(label) for label in fundus)
    queries = grounder.detect([picture(64, 64)], None, "fundus")[0].candidates.queries
    assert {query["label"] for query in queries} == fundus
    assert set(grounder.label_table()) >= fundus


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "no phrase was given"),
        (["?."], "no words|empty phrase"),
        (["very " * 300 + "long"], "tokens and this"),
    ],
)
def test_phrases_that_cannot_be_read_are_named(grounder, asked, says):
    with pytest.raises(PhraseError, match=says):
        grounder.detect([picture(64, 64)], grounder.resolve(asked) if asked else [])


def test_wrong_pixels_modality_and_tiles_are_named(grounder):
    with pytest.raises(ImageError, match="image 0: float64"):
        grounder.detect([np.zeros((8, 8))])
    with pytest.raises(PhraseError, match="'pet' is not a modality"):
        grounder.detect([picture(8, 8)], None, "pet")
    with pytest.raises(PhraseError, match="give tiles=1"):
        grounder.detect([picture(8, 8)], None, "ct", tiles=2)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (700, 500)])
def test_images_of_odd_sizes(size, folders):
    grounder = load_zero_shot(folders("grounding-dino"), "cpu")
    found = grounder.detect([picture(*size)], grounder.resolve(["lesion"]))[0]
    assert found.candidates.image_size == size


def test_what_is_no_detector(tmp_path, folders):
    assert not is_zero_shot(tmp_path) and not is_zero_shot(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "config.json").write_text(json.dumps({"trunk": "tiny"}))
    assert not is_zero_shot(tmp_path)
    broken = shutil.copytree(folders("grounding-dino"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be loaded as a detector"):
        load_zero_shot(broken)
    tuned = shutil.copytree(folders("grounding-dino"), tmp_path / "tuned")
    (tuned / "medglip.json").write_text(json.dumps({"vocabulary": [], "phrases": ["x"], "modalities": ["mri"]}))
    with pytest.raises(CheckpointError, match="vocabulary and phrases must not be empty"):
        load_zero_shot(tuned)


def test_prediction_through_the_command(folders, brain_store, tmp_path):
    folder = shutil.copytree(folders("mm-grounding-dino"), tmp_path / "detector")
    settings = {"vocabulary": ["brain/lesion", "brain/frontal_lobe"], "phrases": ["lesion"], "modalities": ["mri"]}
    (folder / "medglip.json").write_text(json.dumps(settings | {"thresholds": {"brain/lesion": 0.02}}))
    out = tmp_path / "regions"
    command = [sys.executable, "-m", "grounding.predict", f"checkpoint={folder}", f"store={brain_store}", f"out={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    ids, tokens, _, vocabulary = load_region_tokens(out / "region_tokens.safetensors")
    assert len(ids) == len(tokens) == 24 and tokens.features.shape[2] == 32
    assert {"brain/lesion", "brain/frontal_lobe", "brain/frontal_lobe/lesion"} <= set(vocabulary)
    assert all(len(row.queries) == 2 for row in read_regions(out / "regions.jsonl").values())
    assert json.loads((out / "coco_results.json").read_text())
