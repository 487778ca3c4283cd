"""Phrase lists in several texts: nothing split, nothing lost, and a score from exactly a phrase's own tokens."""

import random

import pytest
import torch

from grounding.chunks import anchored, anchored_packs, caption, pack, phrase_scores, spoken, token_spans
from grounding.phrases import PhraseError

PHRASES = ["lung", "left lung", "lung opacity in the left lung", "1.5 cm nodule?", "Øedema", "lung"]


@pytest.fixture(scope="module")
def tokenizer():
    from tests.grounding.detectors import wordpiece

    return wordpiece()


def test_a_span_holds_the_tokens_of_its_phrase_and_no_others(tokenizer):
    text = caption(PHRASES)
    encoded = tokenizer(text.text, return_offsets_mapping=True)
    spans = token_spans(encoded["offset_mapping"], text.spans)
    for phrase, span in zip(PHRASES, spans, strict=True):
        alone = tokenizer(spoken(phrase), add_special_tokens=False)["input_ids"]
        assert [encoded["input_ids"][k] for k in span] == alone
    every = [k for span in spans for k in span]
    assert len(every) == len(set(every))  # "lung" shares no token with "left lung", nor with "lung" again
    stops = [k for k, id_ in enumerate(encoded["input_ids"]) if id_ == tokenizer.convert_tokens_to_ids(".")]
    assert len(stops) == len(PHRASES) and not set(stops) & set(every)


@pytest.mark.parametrize("seed", range(30))
def test_packs_hold_every_phrase_once_in_few_and_even_packs(seed):
    drawn = random.Random(seed)
    lengths = [drawn.randint(1, 12) for _ in range(drawn.randint(1, 80))]
    limit = drawn.randint(12, 60)
    packs = pack(lengths, limit)
    sums = [sum(lengths[k] for k in rows) for rows in packs]
    assert [k for rows in packs for k in rows] == list(range(len(lengths)))
    assert max(sums) <= limit
    greedy, room = 1, limit
    for length in lengths:
        if length > room:
            greedy, room = greedy + 1, limit
        room -= length
    assert len(packs) == greedy
    if len(packs) > 1:  # no smaller limit gives as few packs
        assert len(pack(lengths, max(sums) - 1)) > len(packs) or max(sums) == max(lengths)


def test_the_first_phrases_open_every_pack():
    assert anchored_packs(["a", "b", "c"], [2, 2, 2], 6) == [[0, 1, 2]]
    assert anchored_packs(list("abcdef"), [1, 1, 4, 4, 4, 4], 10) == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert anchored_packs(["a b c", "d e"], [4, 3], 5) == [[0], [1]]  # no room for any


@pytest.mark.parametrize(
    ("phrase", "says"), [("a long one", "has 9 tokens and this model reads 8"), ("?.", "no words")]
)
def test_a_phrase_that_cannot_be_read_is_named(phrase, says):
    with pytest.raises(PhraseError, match=says):
        anchored_packs(["lung", phrase], [2, 9], 8)


def test_passes_are_moved_as_far_as_their_anchors_agree():
    torch.manual_seed(0)
    logits = torch.randn(20, 5)
    lifted = [logits.sigmoid(), (logits + 0.8).sigmoid(), (logits - 0.3).sigmoid()]
    first, second, third = anchored(lifted, 3)
    assert torch.allclose(first, second, atol=1e-4) and torch.allclose(second, third, atol=1e-4)
    assert torch.allclose(first, (logits + (0.8 - 0.3) / 3).sigmoid(), atol=1e-4)
    for passes, anchors in ((lifted[:1], 3), (lifted, 1)):
        assert all(torch.equal(a, b) for a, b in zip(anchored(passes, anchors), passes, strict=True))
    apart = torch.tensor([0.5, -0.5, 0.02, 0.0, 0.0])  # one anchor up, one down: no shift of the pass
    moved = anchored([logits.sigmoid(), (logits + apart).sigmoid()], 3)
    assert torch.allclose(moved[1], (logits + apart).sigmoid(), atol=1e-5)


def test_a_score_is_the_mean_over_its_own_columns():
    logits = torch.tensor([[0.0, 5.0, -5.0, 2.0]])
    scores = phrase_scores(logits, ((1,), (0, 3)))
    assert scores[0].tolist() == pytest.approx([0.993307, (0.5 + 0.880797) / 2], abs=1e-6)
    assert phrase_scores(logits, ()).shape == (1, 0)
