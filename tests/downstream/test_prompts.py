"""Prompts, citations and the files of samples."""

import pytest
import torch

from bridges.routes import empty
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
