"""Fine-tuning zero-shot detectors: the loss is transformers' own, absences count only where they are known, and what is
saved is a checkpoint of transformers."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from grounding.boxes import cxcywh
from grounding.data import phrase_targets
from grounding.detect import load_grounder
from grounding.images import read_image
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.zero_shot import FAMILIES, load_zero_shot
from grounding.zero_shot_families import Level, forward, load_detector, pixel_inputs, text_inputs
from grounding.zero_shot_train import (
    DetectorLoss,
    Example,
    Truth,
    _backward,
    build_example,
    build_truth,
    columns_in_use,
    save_detector,
    set_loss,
    weighted,
)
from tests.grounding.detectors import build_detector, grounding_dino, picture

KEYS = ("batch_size=2", "calibration=4", "warmup=2", "lr=2e-3", "trunk_lr=2e-4")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return grounding_dino(tmp_path_factory.mktemp("dino"), auxiliary_loss=True)


def example(boxes, positive, known, phrases) -> Example:
    sample = SimpleNamespace(image_id="x", image=b"")
    return Example(sample, phrases, torch.tensor(positive), torch.tensor(known), torch.tensor(boxes))  # type: ignore[arg-type]


def test_with_all_known_the_loss_is_that_of_transformers(dino):
    """On the decoder's layers; its encoder term is another on purpose (see `_proposals`)."""
    from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss
    from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps, build_text_mask

    detector = load_detector(dino)
    model = detector.model.train()
    pixels, share = pixel_inputs(detector, [picture(96, 96)])
    text = text_inputs(detector, [["left lung", "lesion", "heart"]])
    torch.manual_seed(0)
    levels, _ = forward(model, pixels, text.tensors)
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.3, 0.9, 0.8]])
    own = example(boxes.tolist(), [[True, False, False], [False, False, True]], [True] * 3, [])
    used = columns_in_use(text.tensors, text.columns, levels[0].logits.shape[-1])
    truth = build_truth(own, text.columns[0], used[0], share[0])
    ours = weighted(set_loss(levels[:-1], [truth], model.config, 2.0))
    config = copy.deepcopy(model.config)
    config.two_stage = False
    layers = list(reversed(levels[1:-1])) + [levels[0]]
    theirs, _, _ = GroundingDinoForObjectDetectionLoss(
        levels[0].logits,
        [{"class_labels": torch.tensor([0, 2]), "boxes": cxcywh(boxes)}],
        torch.device("cpu"),
        levels[0].boxes_cxcywh,
        config,
        build_label_maps(levels[0].logits, text.tensors["input_ids"]),
        build_text_mask(levels[0].logits, text.tensors["attention_mask"]),
        outputs_class=torch.stack([level.logits for level in layers]),
        outputs_coord=torch.stack([level.boxes_cxcywh for level in layers]),
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_only_known_absences_are_learned():
    """Phrase 0 names the region, 1 is labelled exhaustively, 2 is not."""
    logits = torch.zeros(1, 5, 3, requires_grad=True)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]] + [[0.1, 0.1, 0.1, 0.1]] * 4])
    maps = torch.tensor([[1.0, 0.0, 0.0]])
    truth = Truth(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), maps, torch.tensor([False, True, False]))
    set_loss([Level(logits, boxes)], [truth], SimpleNamespace(), 1.0)["loss_ce"].backward()
    gradient = logits.grad[0]
    assert gradient[0, 0] < 0 and (gradient[1:, 0] == 0).all()  # learned where it is, silent elsewhere
    assert (gradient[:, 1] > 0).all() and (gradient[:, 2] == 0).all()


def test_an_example_asks_what_is_there_and_what_is_known_to_be_absent(brain_store, dino):
    store, tree = open_store(brain_store), load_label_tree()
    targets = [target for target in phrase_targets(store, tree) if target.attribute is None]
    detector = load_detector(dino)
    for k in range(6):
        sample = store[k]
        one = build_example(sample, targets, tree, detector, f"0/{k}")
        assert one.positive.shape == (len(sample.regions), len(one.phrases)) and one.positive.any(1).all()
        absent = ~one.positive.any(0)
        assert one.known[absent].all() and absent.any()
        for name, label in zip(one.positive, sample.regions.labels, strict=True):
            said = {tree.find(one.phrases[v], modality="mri") for v in name.nonzero()[:, 0].tolist()}
            assert said <= {label, *tree.broader(label)}
    assert build_example(sample, targets, tree, detector, "7").phrases != one.phrases


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss_and_reach_every_part(family, tmp_path, brain_store):
    store, tree = open_store(brain_store), load_label_tree()
    targets = [target for target in phrase_targets(store, tree) if target.attribute is None]
    detector = load_detector(build_detector(family, tmp_path))
    batch = [build_example(store[k], targets, tree, detector, f"0/{k}") for k in range(2)]
    model = DetectorLoss(detector.model, False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config, accelerator, losses = SimpleNamespace(batch_size=2), Accelerator(cpu=True), []
    for step in range(6):
        optimizer.zero_grad()
        losses.append(weighted(_backward(accelerator, config, model, detector, step, batch)).item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    still = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    heads = {"class_head", "box_head", "class_embed", "bbox_embed", "decoder", "encoder", "language_backbone"}
    assert not still & heads


def test_a_batch_in_parts_has_the_gradient_of_the_whole(brain_store, dino):
    store, tree = open_store(brain_store), load_label_tree()
    targets = [target for target in phrase_targets(store, tree) if target.attribute is None]
    gradients = []
    for size in (1, 2):
        detector = load_detector(dino)
        batch = [build_example(store[k], targets, tree, detector, f"0/{k}") for k in range(2)]
        model = DetectorLoss(detector.model, False)  # eval: dropout draws differ
        _backward(Accelerator(cpu=True), SimpleNamespace(batch_size=size), model, detector, 0, batch)
        gradients.append(detector.model.model.text_projection.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def curve(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(dino, brain_store, launch, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    launch("cpu", "grounding.train", f"detector={dino}", f"store={brain_store}", f"out={out}", *KEYS, "steps=8")
    return out


def test_the_command_writes_a_checkpoint_of_transformers(trained, brain_store, tmp_path):
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    assert len(curve(trained)) == 8 and np.mean(curve(trained)[-3:]) < np.mean(curve(trained)[:3])
    AutoModelForZeroShotObjectDetection.from_pretrained(trained)
    AutoProcessor.from_pretrained(trained)
    grounder = load_grounder(trained)
    assert grounder.tuned and "brain/lesion" in grounder.config.vocabulary and grounder.config.modalities == ("mri",)
    image = read_image(open_store(brain_store)[0].image).pixels
    found = grounder.detect([image], grounder.resolve(["lesion"]))[0]
    assert [query["label"] for query in found.candidates.queries] == ["brain/lesion"]
    save_detector(tmp_path, grounder.detector, grounder.config)
    again = load_zero_shot(tmp_path, "cpu")
    assert again.config == grounder.config
    a, b = (one.detect([image])[0] for one in (grounder, again))
    assert np.array_equal(a.candidates.boxes, b.candidates.boxes) and a.candidates.labels == b.candidates.labels
    assert np.array_equal(a.candidates.scores, b.candidates.scores)
    assert torch.equal(a.tokens.features, b.tokens.features)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_losses(trained, dino, brain_store, launch, tmp_path):
    common = (f"detector={dino}", f"store={brain_store}", *KEYS, "steps=8")
    launch("cpu", "grounding.train", *common, f"out={tmp_path}", "save_every=4")
    assert curve(tmp_path) == curve(trained)
    shutil.move(tmp_path / "checkpoints" / "step-8", tmp_path / "later")
    launch("cpu", "grounding.train", *common, f"out={tmp_path}", "save_every=4")
    assert curve(tmp_path) == curve(trained)


@pytest.mark.slow
def test_two_processes(dino, brain_store, launch, tmp_path):
    launch("ddp", "grounding.train", f"detector={dino}", f"store={brain_store}", f"out={tmp_path}", *KEYS, "steps=6")
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2
    assert np.mean(curve(tmp_path)[-2:]) < np.mean(curve(tmp_path)[:2])
    load_zero_shot(tmp_path, "cpu")
