"""Which pairs of region and phrase count as negatives, and what the contrast makes of them."""

import pytest
import torch

from grounding.boxes import pairwise_iou
from grounding.contrast import APART, Pairs, background_boxes, foreign, info_nce, pairs, siblings
from grounding.data import PhraseTarget, sibling_groups
from grounding.labels import load_label_tree
from grounding.losses import Targets
from grounding.model import MODALITIES

TREE = load_label_tree()
LABELS = ("chest/lung", "chest/lung/left_lung", "chest/lung/right_lung", "abdomen/liver", "abdomen/kidney")
LABELS += ("skin/skin_lesion",)
PHRASES = [PhraseTarget((TREE.phrase(label),), label) for label in LABELS]
LUNG, LEFT, RIGHT, LIVER, KIDNEY, SKIN = range(len(LABELS))


def batch(named: list[list[int]], labelled: list[int], modality: str = "ct") -> Targets:
    """One image with a region for each of ``named``, its phrases, side by side; the source labels ``labelled``."""
    n, v = len(named), len(PHRASES)
    positive = torch.zeros(1, n, v, dtype=torch.bool)
    for k, phrases in enumerate(named):
        positive[0, k, phrases] = True
    known = torch.zeros(1, v, dtype=torch.bool)
    known[0, labelled] = True
    boxes = torch.tensor([[[k / n, 0.0, (k + 1) / n, 1.0] for k in range(n)]])
    return Targets(
        boxes=boxes,
        jittered=boxes,
        valid=torch.ones(1, n, dtype=torch.bool),
        positive=positive,
        known=known,
        masks=torch.zeros(1, n, 4, 4),
        has_mask=torch.zeros(1, n, dtype=torch.bool),
        modality=torch.tensor([MODALITIES.index(modality)]),
        narrower=torch.zeros(0, 2, dtype=torch.long),
        siblings=sibling_groups(PHRASES, TREE),
    )


def truth(targets: Targets, background: torch.Tensor | None = None) -> Pairs:
    boxes = torch.zeros(1, 0, 4) if background is None else background
    return pairs(targets, boxes, foreign(PHRASES, TREE), siblings(PHRASES, TREE))


def gradient(found: Pairs, hardness: float = 1.0) -> torch.Tensor:
    """(R, V) of both directions, all logits being equal."""
    logits = torch.zeros(found.positive.flatten(0, 1).shape, requires_grad=True)
    flat = Pairs(*(x.flatten(0, 1) for x in (found.positive, found.negative, found.hard)))
    torch.stack(list(info_nce(logits, flat, hardness).values())).sum().backward()
    return logits.grad


def test_a_phrase_that_nobody_labelled_here_gives_no_gradient():
    """A CT of a source of livers: nobody knows where its kidneys are, so no region is pushed away from "kidney"."""
    grad = gradient(truth(batch([[LIVER], [LUNG, LEFT]], labelled=[LIVER, LUNG])))
    assert grad[0, KIDNEY] == 0 and grad[1, KIDNEY] == 0
    assert grad[0, LUNG] > 0 and grad[1, LIVER] > 0 and grad[0, LIVER] < 0
    labelled_too = gradient(truth(batch([[LIVER], [LUNG, LEFT]], labelled=[LIVER, LUNG, KIDNEY])))
    assert labelled_too[0, KIDNEY] > 0 and labelled_too[1, KIDNEY] > 0


def test_what_cannot_be_there_is_a_negative_whoever_labelled_it():
    found = truth(batch([[LIVER], [LUNG, LEFT]], labelled=[]))
    assert found.negative[0, 0].nonzero().flatten().tolist() == [SKIN]  # no CT shows it
    assert found.negative[0, 1].nonzero().flatten().tolist() == [RIGHT, SKIN]  # a left lung is no right lung


def test_broader_phrases_are_positives_that_do_not_compete():
    found = truth(batch([[LUNG, LEFT], [LIVER]], labelled=[LUNG, LEFT, RIGHT, LIVER]))
    grad = gradient(found)
    assert grad[0, LUNG] < 0 and grad[0, LEFT] < 0
    logits = torch.zeros(2, len(PHRASES))
    flat = Pairs(*(x[0] for x in (found.positive, found.negative, found.hard)))
    before = info_nce(logits, flat, 1.0)["region_to_phrase"]
    logits[0, LUNG] = 5.0
    assert info_nce(logits, flat, 1.0)["region_to_phrase"] < before


def test_siblings_are_harder():
    found = truth(batch([[LUNG, LEFT], [LIVER]], labelled=list(range(len(PHRASES)))))
    assert found.hard[0, 0].nonzero().flatten().tolist() == [RIGHT]
    assert found.hard[0, 1].nonzero().flatten().tolist() == [KIDNEY]
    plain, harder = gradient(found), gradient(found, hardness=4.0)
    assert plain[0, RIGHT] == pytest.approx(plain[0, KIDNEY].item())
    assert harder[0, RIGHT] > 2 * harder[0, KIDNEY] > 0
    assert harder[0, RIGHT] > plain[0, RIGHT]


def test_background_boxes_are_negatives_of_what_they_do_not_show_and_is_labelled():
    boxes = background_boxes(1, 200, torch.Generator().manual_seed(0))
    assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[..., 2:] > boxes[..., :2]).all()
    targets = batch([[LIVER], [LUNG, LEFT]], labelled=[LIVER, LUNG, LEFT])
    found = truth(targets, boxes)
    assert not found.positive[0, 2:].any()
    far = (pairwise_iou(boxes[0], targets.boxes[0, :1]) < APART)[:, 0]
    assert 0 < far.sum() < 200
    assert torch.equal(found.negative[0, 2:, LIVER], far)
    assert not found.negative[0, 2:, KIDNEY].any() and found.negative[0, 2:, SKIN].all()


def test_a_batch_with_nothing_to_contrast_has_no_loss_and_no_gradient():
    grad = gradient(truth(batch([[LIVER]], labelled=[])).__class__(*(torch.zeros(1, 1, 6).bool() for _ in range(3))))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_siblings_of_the_tree():
    rows = siblings(PHRASES, TREE)
    assert torch.equal(rows, rows.T)
    assert rows[LEFT, RIGHT] and rows[LIVER, KIDNEY] and not rows[LUNG, LEFT] and not rows[LIVER, LUNG]
    values = [PhraseTarget((f"{x} lesion",), "brain/lesion", ("brightness", x)) for x in ("bright", "dark")]
    assert siblings(values, TREE).tolist() == [[False, True], [True, False]]
