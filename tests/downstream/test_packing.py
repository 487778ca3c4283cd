"""Several questions in one row: each has the loss that it has in a row of its own."""

import numpy as np
import pytest
import torch

from bridges.projector import ProjectorConfig
from bridges.region_vlm import BridgeConfig, RegionVLM
from bridges.routes import ROUTES
from downstream.embedded import tiny_base
from downstream.packing import pack
from downstream.prompts import build_prompt, collate
from downstream.train import step_loss
from grounding.labels import load_label_tree
from grounding.types import RegionTokens

TREE = load_label_tree()
LABELS = ["brain/insula/left_insula/lesion", "brain/insula", ""]
ASKED = [("Where is it?", "left insula"), ("Where is the largest?", "left insula"), ("Write a report.", "One lesion.")]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def vlm(base):
    torch.manual_seed(0)
    projector = ProjectorConfig(
        feature_dim=8, label_dim=6, width=base.model.config.get_text_config().hidden_size, scale=1
    )
    return RegionVLM(base.model, BridgeConfig(base.name, base.fingerprint, base.region_token_id, projector)).eval()


def group(base, route, seed, asked=ASKED, names=False):
    """Prompts about one image with two regions and a free slot."""
    random_ = torch.Generator().manual_seed(seed)
    corner = torch.rand(1, 3, 2, generator=random_) / 2
    slots = RegionTokens(
        features=torch.randn(1, 3, 8, generator=random_),
        boxes=torch.cat([corner, corner + 0.3], -1),
        scores=torch.rand(1, 3, generator=random_),
        labels=[LABELS],
        label_vectors=torch.randn(1, 3, 6, generator=random_),
        levels=torch.zeros(1, 3, dtype=torch.long),
        valid=torch.tensor([[True, True, False]]),
        queries=[[]],
    )
    picture = [np.random.default_rng(seed).integers(0, 255, (40, 50), np.uint8)]
    return [
        build_prompt(base, question, slots, route, TREE, (100.0, 100.0), answer, images=picture, names=names)
        for question, answer in asked
    ]


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_packed_row_has_the_loss_of_its_questions_alone(base, vlm, route, names):
    groups = [group(base, route, 1, names=names), group(base, route, 2, ASKED[:1], names=names)]
    pad = base.tokenizer.pad_token_id
    with torch.no_grad():
        packed = step_loss(vlm, pack(groups, pad))
        alone = step_loss(vlm, collate([prompt for rows in groups for prompt in rows], pad))
    assert packed.item() == pytest.approx(alone.item(), abs=1e-5)


def test_no_question_sees_another(base, vlm):
    def losses(asked):
        batch = pack([group(base, "tokens", 1, asked)], base.tokenizer.pad_token_id)
        with torch.no_grad():
            logits = vlm(batch.slots, **batch.inputs, logits_to_keep=batch.keep).logits
        return logits[batch.part == len(asked)]

    others = [("Is there a lesion in the left hemisphere?", "no"), ("How many?", "three or four"), ASKED[2]]
    assert torch.allclose(losses(ASKED), losses(others), atol=1e-5)


def test_the_image_and_its_regions_stand_there_once(base):
    batch = pack([group(base, "tokens", 1)], base.tokenizer.pad_token_id)
    ids = batch.inputs["input_ids"]
    assert (ids == base.region_token_id).sum() == 3 and len(batch.inputs["pixel_values"]) == 1
    assert ids.shape[1] < sum(len(prompt.input_ids) for prompt in group(base, "tokens", 1))


def test_gradients_are_those_of_the_questions_alone(base, vlm):
    def gradient(batch):
        vlm.zero_grad()
        step_loss(vlm, batch).backward()
        return torch.cat([p.grad.flatten() for p in vlm.projector.parameters()])

    rows, pad = group(base, "tokens", 3), base.tokenizer.pad_token_id
    assert torch.allclose(gradient(pack([rows], pad)), gradient(collate(rows, pad)), atol=1e-5)
