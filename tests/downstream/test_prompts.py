"""Prompts, citations and the files of samples."""

import itertools

import numpy as np
import pytest
import torch

from bridges.routes import NO_IMAGE, empty
from downstream.citations import cite, split_report
from downstream.embedded import tiny_base
from downstream.predict import evidence_of
from downstream.prompts import IGNORED, build_prompt, collate, report_text
from downstream.samples import Prediction, ReportSample, VQASample, read_predictions, read_questions, write_samples
from grounding.labels import load_label_tree
from grounding.types import RegionTokens

TREE = load_label_tree()
LEFT, RIGHT = "brain/insula/left_insula/lesion", "brain/insula/right_insula/lesion"


def slots(*labels: str, free: int = 1, missing: tuple[str, ...] = ()) -> RegionTokens:
    """Found labels, then labels that were not found, then free slots."""
    n, found, valid = len(labels) + len(missing) + free, len(labels), len(labels) + len(missing)
    boxes = torch.zeros(1, n, 4)
    boxes[0, :found] = torch.tensor([0.1, 0.2, 0.3, 0.5])
    return RegionTokens(
        features=torch.zeros(1, n, 8),
        boxes=boxes,
        scores=torch.full((1, n), 0.5),
        labels=[[*labels, *missing, *[""] * free]],
        label_vectors=torch.zeros(1, n, 6),
        levels=torch.tensor([[0] * found + [3] * len(missing) + [0] * free]),
        valid=torch.arange(n)[None] < valid,
        queries=[[{"phrase": "lesion", "label": "brain/lesion", "presence": 0.9}]],
    )


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def test_routes_none_and_tokens_have_the_same_length_and_layout(base):
    none, tokens = (build_prompt(base, "Where?", slots(LEFT), route, TREE) for route in ("none", "tokens"))
    assert none.input_ids == tokens.input_ids
    assert sum(tokens.attention_mask) - sum(none.attention_mask) == 1
    text = base.tokenizer.decode(none.input_ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith("Where?<|im_end|>\n<|im_start|>assistant\n")
    assert none.input_ids.count(base.region_token_id) == 2


def test_route_text_writes_the_regions_out(base):
    prompt = build_prompt(base, "Where?", slots(LEFT), "text", TREE, extent_mm=(100.0, 100.0))
    assert "Regions: left insula lesion 30 mm at 10,20,30,50. Where?" in base.tokenizer.decode(prompt.input_ids)
    assert prompt.input_ids.count(base.region_token_id) == 0 and prompt.slots.valid.shape == (1, 0)
    nothing = build_prompt(base, "Where?", empty(slots(LEFT)), "text", TREE)
    assert "Regions" not in base.tokenizer.decode(nothing.input_ids)


def test_a_batch_is_padded_on_the_left_and_positions_skip_what_is_masked(base):
    prompts = [
        build_prompt(base, question, slots(LEFT), "tokens", TREE, answer=answer)
        for question, answer in (("Where?", "left insula"), ("Is there a lesion?", "no"))
    ]
    batch = collate(prompts, base.tokenizer.pad_token_id)
    mask, positions = batch.inputs["attention_mask"], batch.inputs["position_ids"]
    for row in range(2):
        attended = positions[row][mask[row] == 1]
        assert attended.tolist() == list(range(len(attended)))
    assert batch.labels[1, -3:].tolist() == prompts[1].answer_ids and (batch.labels[1, :-3] == IGNORED).all()
    assert (batch.inputs["input_ids"][:, -3:] == batch.labels[:, -3:]).all()


def test_what_cannot_be_asked_or_trained_is_refused(base):
    with pytest.raises(ValueError, match="empty question"):
        build_prompt(base, " ", slots(LEFT), "tokens", TREE)
    with pytest.raises(ValueError, match="more than max_answer=4"):
        build_prompt(base, "Where?", slots(LEFT), "tokens", TREE, answer="left insula", max_answer=4)


def test_sentences_cite_the_slot_that_holds_their_finding():
    text = "A lesion in the right insula. A 10 mm lesion in the left insula. A lesion in the left thalamus."
    cited = cite(text, slots(LEFT, RIGHT), TREE)
    assert cited == (
        "A lesion in the right insula [r1]. A 10 mm lesion in the left insula [r0]. A lesion in the left thalamus."
    )
    assert cite("Two lesions: a lesion in the left insula. A lesion in the left insula.", slots(LEFT, LEFT), TREE) == (
        "Two lesions: a lesion in the left insula [r0]. A lesion in the left insula [r1]."
    )
    assert cite("No lesion is seen.", slots(LEFT), TREE) == "No lesion is seen."


def test_citations_resolve_or_are_dropped_and_counted():
    said = "Findings: A lesion in the left insula [r0]. Another [r7] one [r1]. Impression: Two lesions."
    text, sentences = split_report(said, slots(LEFT, missing=(RIGHT,)))
    assert text == "Findings: A lesion in the left insula [r0]. Another one. Impression: Two lesions."
    assert sentences == [
        {"text": "Findings: A lesion in the left insula.", "region_ids": [0], "dropped": 0},
        {"text": "Another one.", "region_ids": [], "dropped": 2},
        {"text": "Impression: Two lesions.", "region_ids": [], "dropped": 0},
    ]


def test_evidence_keeps_the_numbers_of_the_prompt():
    evidence = evidence_of(slots(LEFT, RIGHT, missing=("brain",)), (10, 20))
    assert evidence.labels == [LEFT, RIGHT] and evidence.image_size == (10, 20)
    assert evidence.queries == [{"phrase": "lesion", "label": "brain/lesion", "presence": 0.9}]


def test_reports_leave_out_absent_sections():
    report = ReportSample("s", "p", ("i",), "mri", None, "No lesion is seen.", None)
    assert report_text(report) == "Findings: No lesion is seen."
    with pytest.raises(ValueError, match="absent is None"):
        ReportSample("s", "p", ("i",), "mri", "", None, None)


def test_samples_come_back_as_they_were(tmp_path):
    question = VQASample("q1", "i", "p", "i", "mri", "Où est la lésion ?", "left", "open", "side", "boxes")
    write_samples(tmp_path / "questions.jsonl", [question])
    assert read_questions(tmp_path / "questions.jsonl") == [question]
    prediction = Prediction("q1", "vqa", "left", {"regions": []}, None, "d", "m")
    write_samples(tmp_path / "predictions.jsonl", [prediction])
    assert read_predictions(tmp_path / "predictions.jsonl") == [prediction]
    (tmp_path / "questions.jsonl").write_text('{"sample_id": "q1"}\n')
    with pytest.raises(ValueError, match=r"questions.jsonl, line 1: not a VQASample: .*image_id"):
        read_questions(tmp_path / "questions.jsonl")


def test_names_follow_their_regions_and_nothing_follows_a_free_slot(base):
    given = slots(LEFT, "brain/insula", missing=(RIGHT,))
    prompt = build_prompt(base, "Where?", given, "tokens", TREE, extent_mm=(100.0, 100.0), names=True)
    text = base.tokenizer.decode(prompt.input_ids)
    token = base.region_token
    assert f"{token}left insula lesion 30 mm; {token}insula; {token}no right insula lesion; {token}Where?" in text
    attended = [m for t, m in zip(prompt.input_ids, prompt.attention_mask, strict=False) if t == base.region_token_id]
    assert attended == [1, 1, 1, 0]
    none = build_prompt(base, "Where?", given, "none", TREE, extent_mm=(100.0, 100.0), names=True)
    assert "insula" not in base.tokenizer.decode(none.input_ids)


RNG = np.random.default_rng(0)
WIDE, TALL = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((60, 90), (80, 50)))


def of_route(base, route, given, **settings):
    return build_prompt(base, "Where?", given, route, TREE, (100.0, 100.0), images=[WIDE], **settings)


def pixels(prompt) -> torch.Tensor:
    return prompt.images["pixel_values"]


@pytest.mark.parametrize("given", [slots(LEFT, RIGHT, free=2), slots(LEFT, missing=(RIGHT,))])
def test_none_overlay_and_tokens_have_equal_budgets(base, given):
    none, overlay, tokens = (of_route(base, route, given) for route in ("none", "overlay", "tokens"))
    assert none.input_ids == overlay.input_ids == tokens.input_ids
    assert none.attention_mask == overlay.attention_mask != tokens.attention_mask
    assert pixels(none).shape == pixels(overlay).shape and torch.equal(pixels(none), pixels(tokens))
    assert not torch.equal(pixels(none), pixels(overlay)) and not overlay.slots.valid.any()


@pytest.mark.parametrize("route", ["text", "overlay", "crop", "tokens"])
def test_without_regions_each_route_is_route_none(base, route):
    none, other = of_route(base, "none", slots(LEFT)), of_route(base, route, empty(slots(LEFT)))
    region = base.region_token_id
    assert [t for t in other.input_ids if t != region] == [t for t in none.input_ids if t != region]
    assert torch.equal(pixels(other), pixels(none)) and not other.regions.valid.any()


def test_crops_are_further_images(base):
    given = slots(*[LEFT, RIGHT] * 4, missing=("brain",))
    none, crop = of_route(base, "none", given), of_route(base, "crop", given)
    assert len(pixels(none)) == 1 and len(pixels(crop)) == 5
    image = base.tokenizer.convert_tokens_to_ids(base.image_token)
    assert crop.input_ids.count(image) == 5 * none.input_ids.count(image)
    assert torch.equal(pixels(crop)[:1], pixels(none)) and not crop.slots.valid.any()
    first = build_prompt(base, "Where?", given, "crop", TREE, images=[WIDE], named=[RIGHT])
    given.boxes[0, 1] = torch.tensor([0.6, 0.6, 0.9, 0.9])  # of the first RIGHT
    moved = build_prompt(base, "Where?", given, "crop", TREE, images=[WIDE], named=[RIGHT])
    assert [torch.equal(a, b) for a, b in zip(pixels(first), pixels(moved), strict=True)] == [True, False] + [True] * 3


@pytest.mark.parametrize(
    ("route", "legend"),
    [
        ("overlay", "{r}orange r0: left insula lesion 30 mm; {r}blue r1: insula; {r}no right insula lesion; {r}Where?"),
        ("crop", "{r}image 2: left insula lesion 30 mm; {r}image 3: insula; {r}no right insula lesion; {r}Where?"),
    ],
)
def test_names_are_a_legend_of_the_pictures(base, route, legend):
    given = slots(LEFT, "brain/insula", missing=(RIGHT,))
    prompt = of_route(base, route, given, names=True)
    assert legend.format(r=base.region_token) in base.tokenizer.decode(prompt.input_ids)
    shown = [m for t, m in zip(prompt.input_ids, prompt.attention_mask, strict=True) if t == base.region_token_id]
    assert shown == [0] * 4


@pytest.mark.parametrize("route", ["overlay", "crop"])
def test_routes_that_draw_need_the_image(base, route):
    with pytest.raises(ValueError, match="shows regions as pictures"):
        build_prompt(base, "Where?", slots(LEFT), route, TREE)


def test_the_probability_of_what_was_not_found_is_told_where_it_is_asked_for(base):
    given = slots("brain/insula", missing=(RIGHT,))
    told = "looked for right insula lesion: not found (p 0.50)"
    for route, settings in (("text", {}), ("tokens", {"names": True})):
        plain, asked = of_route(base, route, given, **settings), of_route(base, route, given, presence=True, **settings)
        assert "no right insula lesion" in base.tokenizer.decode(plain.input_ids)
        assert told in base.tokenizer.decode(asked.input_ids)


@pytest.mark.parametrize("route", ["text", "overlay", "crop", "tokens"])
def test_what_a_prompt_tells_can_be_cited_by_any_route(base, route):
    prompt = of_route(base, route, slots(LEFT, RIGHT))
    assert evidence_of(prompt.regions, (60, 90)).labels == [LEFT, RIGHT]
    assert prompt.image_of_slot == [0, 0, NO_IMAGE]
    assert not of_route(base, "none", slots(LEFT, RIGHT)).regions.valid.any()


def test_several_images_have_their_regions_behind_their_numbers(base):
    given, token = slots(LEFT, "brain/insula", RIGHT, free=1), base.region_token

    def decoded(route, **settings):
        extents, images = [(100.0, 100.0), (50.0, 50.0)], [WIDE, TALL]
        prompt = build_prompt(
            base, "Where?", given, route, TREE, extents, images=images, image_of_slot=[0, 0, 1, NO_IMAGE], **settings
        )
        return prompt, base.tokenizer.decode(prompt.input_ids)

    tokens, text = decoded("tokens")
    assert f"Image 1: {token}{token}Image 2: {token}{token}Where?" in text and tokens.image_of_slot == [0, 0, 1, -1]
    named = f"Image 1: {token}left insula lesion 30 mm; {token}insula; Image 2: {token}right insula lesion 15 mm; "
    assert named in decoded("tokens", names=True)[1]
    assert "right insula lesion 15 mm at 10,20,30,50 in image 2" in decoded("text")[1]
    none, overlay, crop = (decoded(route)[0] for route in ("none", "overlay", "crop"))
    assert none.input_ids == tokens.input_ids == overlay.input_ids
    assert torch.equal(pixels(none), pixels(tokens)) and len(pixels(none)) == 2 and len(pixels(crop)) == 5
    assert [torch.equal(a, b) for a, b in zip(pixels(none), pixels(overlay), strict=True)] == [False, False]


HISTORY = [("Is there a lesion?", "yes"), ("How many?", "two")]


def test_what_was_said_before_stands_before_the_question(base):
    prompt = of_route(base, "tokens", slots(LEFT), history=HISTORY)
    said = "Question: Is there a lesion? Answer: yes\nQuestion: How many? Answer: two\nQuestion: Where?<|im_end|>"
    assert said in base.tokenizer.decode(prompt.input_ids)
    assert "Question" not in base.tokenizer.decode(of_route(base, "tokens", slots(LEFT)).input_ids)


@pytest.fixture
def short():
    """The tiny model with a context as long as one says."""
    base = tiny_base()

    def of(context: int):
        base.model.config.text_config.max_position_embeddings = context
        return base

    return of


def attended(prompt) -> int:
    return sum(prompt.attention_mask)


@pytest.mark.parametrize("route", ["text", "crop", "tokens"])
def test_a_prompt_that_is_too_long_loses_regions_before_history(short, route):
    given = slots(LEFT, "brain/insula", RIGHT, missing=("brain",))
    settings = {"named": [RIGHT], "history": HISTORY, "names": route != "text", "max_answer": 20}
    whole = of_route(short(4096), route, given, **settings)
    bare = of_route(short(4096), route, empty(given), **settings)
    question = of_route(short(4096), route, empty(given), max_answer=20)
    assert not whole.dropped
    labels = []
    for context in range(attended(whole) + 20, attended(question) + 19, -5):
        prompt = of_route(short(context), route, given, **settings)
        text = short(context).tokenizer.decode(prompt.input_ids)
        assert attended(prompt) <= context - 20
        assert text.endswith("Where?<|im_end|>\n<|im_start|>assistant\n")
        told = [label for label in prompt.regions.labels[0] if label]
        assert prompt.dropped.regions == 4 - len(told) and prompt.dropped.turns == 2 - text.count("Answer")
        assert not prompt.dropped.turns or not told  # regions first
        if context < attended(bare) + 20:
            assert prompt.dropped.turns == 2 or (prompt.dropped.turns and "How many?" in text)  # the oldest first
        labels.append(told)
    assert [label for label, _ in itertools.groupby(labels)] == [
        [LEFT, "brain/insula", RIGHT, "brain"],
        [LEFT, "brain/insula", RIGHT],
        [LEFT, RIGHT],
        [RIGHT],
        [],
    ]
    with pytest.raises(ValueError, match="take a base model with a longer context"):
        of_route(short(attended(question) + 19), route, given, **settings)


def test_masked_slots_cost_nothing_and_are_not_dropped(short):
    given = slots(LEFT, RIGHT)
    length = attended(of_route(short(4096), "overlay", given))
    prompt = of_route(short(length + 20), "overlay", given, history=HISTORY, max_answer=20)
    assert prompt.dropped.regions == 0 and prompt.dropped.turns == 2
    assert evidence_of(prompt.regions, (60, 90)).labels == [LEFT, RIGHT]


def test_an_answer_that_is_trained_needs_no_more_room_than_it_takes(short):
    given = slots(LEFT)
    length = attended(of_route(short(4096), "tokens", given, answer="left insula"))
    assert not of_route(short(length), "tokens", given, answer="left insula").dropped
    assert of_route(short(length - 1), "tokens", given, answer="left insula").dropped.regions == 1
