"""What an answer or a sentence is worth without its regions: causal scores, and the command that writes them down."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bridges.projector import ProjectorConfig
from bridges.region_vlm import BridgeConfig, RegionVLM
from bridges.routes import empty
from downstream import evidence, train
from downstream.answerer import Answerer, load_answerer
from downstream.brain_qa import build_questions
from downstream.causal import Fixed, Masked, Said, score, why, why_lines, without
from downstream.citations import cite, sentence_of_characters, split_report
from downstream.data import TrainingData
from downstream.decoding import answered, token_log_probabilities
from downstream.embedded import tiny_base
from downstream.predict import predict, read_samples
from downstream.prompts import Prompt, build_prompt, collate, report_text
from downstream.samples import read_predictions, write_samples
from downstream.sources import open_source, read_table
from downstream.train import label_words, step_loss
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import (
    NOT_FOUND_LEVEL,
    RegionSet,
    RegionTokens,
    save_region_tokens,
    stack_region_tokens,
    write_regions,
)

TREE = load_label_tree()
LEFT, RIGHT = "brain/insula/left_insula/lesion", "brain/insula/right_insula/lesion"
THALAMUS = "brain/thalamus/right_thalamus/lesion"
PLACE = "brain/insula/left_insula"


def tokens(labels: list[str], missing: int = 0, seed: int = 0) -> RegionTokens:
    """Region tokens of one image, random but for the labels; the last `missing` were looked for and not found."""
    n, rng = len(labels), np.random.default_rng(seed)
    found = torch.arange(n) < n - missing
    corners = np.sort(rng.random((n, 2, 2)), 1).transpose(0, 1, 2).reshape(n, 4)
    vectors = np.array([np.random.default_rng(list(label.encode())).standard_normal(12) for label in labels])
    return RegionTokens(
        features=torch.tensor(rng.standard_normal((1, n, 8)), dtype=torch.float32) * found[None, :, None],
        boxes=torch.tensor(corners, dtype=torch.float32)[None] * found[None, :, None],
        scores=torch.where(found, 0.9, 0.07)[None],
        labels=[list(labels)],
        label_vectors=torch.tensor(vectors, dtype=torch.float32).reshape(1, n, 12),
        levels=torch.where(found, 0, NOT_FOUND_LEVEL)[None],
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[{"phrase": "lesion", "label": "brain/lesion", "presence": 0.9}]],
    )


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    """A tiny bridge that was trained to name the side that the lesion's label tells, among other regions."""
    torch.manual_seed(0)
    base = tiny_base()
    samples = [(tokens([label, "brain", PLACE], seed=seed), side) for seed in range(4) for label, side in SIDES]
    projector = ProjectorConfig(feature_dim=8, label_dim=12, width=64, scale=0.1)
    config = BridgeConfig("tiny", base.fingerprint, base.region_token_id, projector, lora_layers=None)
    vlm = RegionVLM(base.model, config).train()
    every = stack_region_tokens([s for s, _ in samples])
    vlm.projector.fit(every, label_words(base, TREE, every))
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for step in range(90):
        gone = [k for k in range(3) if (step + k) % 3 == 0]  # each region is away at times, so that it can be missed
        slots = [(without(s, gone), "unknown" if 0 in gone else side) for s, side in samples]
        prompts = [build_prompt(base, QUESTION, s, "tokens", TREE, answer=side, images=[IMAGE]) for s, side in slots]
        step_loss(vlm, collate(prompts, base.tokenizer.pad_token_id)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Answerer(vlm.eval(), base, TREE, route="tokens", k=3, max_answer=32, hash="tiny")


SIDES = ((LEFT, "left"), (RIGHT, "right"))
QUESTION = "On which side is the lesion?"
IMAGE = np.zeros((40, 50), np.uint8)


def maker(answerer: Answerer):
    return lambda slots: answerer.prompt(QUESTION, Fixed(slots), "image", None, "mri", [IMAGE])


def log_probabilities(answerer: Answerer, *prompts: Prompt) -> list[list[float]]:
    return token_log_probabilities(answerer.vlm, answerer.base, prompts)


@pytest.mark.parametrize(("label", "side"), SIDES)
def test_the_region_that_an_answer_comes_from_has_the_largest_drop(answerer, label, side):
    slots = tokens([label, "brain", PLACE], seed=9)
    assert answerer.generate([maker(answerer)(slots)], 8) == [side]
    reasons = why(answerer, QUESTION, side, slots, maker(answerer), "mri")
    first = reasons["regions"][0]
    assert (first["region"], first["named"], first["found"]) == (0, True, True)
    likely = reasons["confidence"], reasons["with_named_only"]
    assert min(likely) > 10 * max(reasons["without_named"], reasons["without_regions"])
    assert first["drop"] > 3 > 1 > max(abs(row["drop"]) for row in reasons["regions"][1:])
    assert first["drop"] == pytest.approx(math.log(reasons["confidence"] / first["confidence"]), abs=1e-6)
    lines = why_lines(reasons)
    assert len(lines) == 4 and "insula lesion" in lines[1]


def test_teacher_forcing_gives_what_one_token_after_another_does(answerer):
    slots = tokens([LEFT, "brain", RIGHT], missing=1)
    prompt = maker(answerer)(slots)
    whole = answered(prompt, answerer.base, "left insula")
    (values,) = log_probabilities(answerer, whole)
    assert len(values) == len("left insula") + 1  # a byte a token, and the end
    for t, value in enumerate(values):
        part = dataclasses.replace(whole, **ahead(whole, t + 1))
        assert log_probabilities(answerer, part)[0][-1] == pytest.approx(value, abs=1e-4)
    longer = answered(maker(answerer)(tokens([RIGHT, LEFT, PLACE])), answerer.base, "a much longer answer than that")
    assert log_probabilities(answerer, longer, whole)[1] == pytest.approx(values, abs=1e-4)


def ahead(prompt, n: int) -> dict:
    """The fields of a prompt with the first n tokens of its answer alone."""
    cut = len(prompt.answer_ids) - n
    end = len(prompt.input_ids) - cut
    return {
        "input_ids": prompt.input_ids[:end],
        "attention_mask": prompt.attention_mask[:end],
        "answer_ids": prompt.answer_ids[:n],
    }


def test_masking_leaves_the_other_regions_as_they_are(answerer):
    slots = tokens([LEFT, "brain", RIGHT], missing=1)
    masked = without(slots, [1])
    assert masked.valid.tolist() == [[True, False, True]] and masked.labels == slots.labels
    assert torch.equal(masked.features[0, 0], slots.features[0, 0]) and not masked.boxes[0, 1].any()
    assert torch.equal(slots.valid, torch.ones(1, 3, dtype=torch.bool))
    nothing, none = (maker(answerer)(x) for x in (without(slots, range(3)), empty(slots)))
    assert nothing.attention_mask == none.attention_mask
    a, b = (log_probabilities(answerer, answered(p, answerer.base, "left"))[0] for p in (nothing, none))
    assert a == b


def test_sentences_are_scored_apart_and_citations_not_at_all(answerer):
    slots = tokens([LEFT, "brain", RIGHT])
    text = "A lesion in the left insula [r0]. No more."
    said = Said(slots, maker(answerer), text, True, [Masked({0}), Masked()])
    (scores,) = score(answerer, [said], batch_size=3)
    assert scores.tokens == [len("A lesion in the left insula."), len("No more.")]
    assert set(scores.totals) == {Masked(x) for x in ((), (0,), (1,), (2,), (1, 2), (0, 1, 2))}
    values = log_probabilities(answerer, answered(maker(answerer)(slots), answerer.base, text))[0]
    owners = sentence_of_characters(text)
    for part in (0, 1):
        expected = sum(v for v, owner in zip(values[:-1], owners, strict=True) if owner == part)
        assert scores.totals[Masked()][part] == pytest.approx(expected, abs=1e-4)
        assert 0 < scores.confidence(part) <= 1


def test_a_prompt_without_regions_has_nothing_to_drop(answerer):
    reasons = why(answerer, QUESTION, "left", empty(tokens([LEFT])), maker(answerer))
    assert reasons["regions"] == [] and reasons["without_named"] is None
    assert reasons["confidence"] == reasons["without_regions"]


def test_route_text_loses_the_words_of_the_region(answerer):
    written = dataclasses.replace(answerer, route="text")
    slots = tokens([LEFT, THALAMUS])
    prompt = written.prompt(QUESTION, Fixed(without(slots, [0])), "image", None, "mri", [IMAGE])
    text = answerer.base.tokenizer.decode(prompt.input_ids)
    assert "right thalamus lesion" in text and "insula" not in text


# The command


@pytest.fixture(scope="module")
def run(brain_store, tmp_path_factory) -> Path:
    """data, a tiny checkpoint, and predictions of it whose reports are the references with citations: what a bridge
    that has learned to cite would write."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "store").symlink_to(brain_store)
    build_questions(brain_store, folder, seed=0, n_questions=12, n_reports=6)
    store = open_store(brain_store)
    rows = [tokens_of(store[k].regions, k) for k in range(len(store))]
    vocabulary = {"brain/lesion": torch.zeros(12)}
    meta, stacked = {"checkpoint": "detector"}, stack_region_tokens(rows)
    save_region_tokens(folder / "tokens.safetensors", store.image_ids, stacked, meta, vocabulary)
    write_regions(folder / "regions.jsonl", {i: store.by_id(i).regions for i in store.image_ids})
    settings = ["base=tiny", "steps=2", "batch_size=2", "warmup=1", "max_answer=700", "k=6", "precision=fp32"]
    files = [f"data={folder}", f"predicted={folder}/tokens.safetensors", f"annotated={folder}/tokens.safetensors"]
    train.main([*files, *settings, f"out={folder / 'bridge'}"])
    answerer = load_answerer(folder / "bridge" / "checkpoint")
    samples = read_samples(folder, ("vqa", "report"))
    table = read_table(folder / "tokens.safetensors")
    rows = predict(answerer, store, samples, open_source("predicted", {"predicted": table}, {}))
    write_samples(folder / "predictions.jsonl", [as_learned(*pair, table) for pair in zip(rows, samples, strict=True)])
    return folder


def tokens_of(regions: RegionSet, seed: int) -> RegionTokens:
    made = tokens(regions.labels, seed=seed)
    queries = [[{"phrase": "brain lesion", "label": "brain/lesion", "presence": 0.2}]]
    return dataclasses.replace(made, boxes=torch.from_numpy(regions.boxes)[None], queries=queries)


def as_learned(row, sample, table):
    if row.task == "vqa":
        return dataclasses.replace(row, prediction=sample.answer)
    source = open_source("predicted", {"predicted": table}, {})
    slots = source.slots(sample.images[0], frozenset(), TREE, 6)
    text = report_text(sample).replace(sample.findings, cite(sample.findings, slots, TREE), 1)
    text, sentences = split_report(text, slots)
    return dataclasses.replace(row, prediction=text, sentences=sentences)


def command(run: Path, out: Path, *more: str) -> None:
    evidence.main([f"predictions={run}/predictions.jsonl", f"data={run}", f"out={out}", *more])


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evidence.jsonl").read_text().splitlines()]


def test_the_ledger_needs_no_model(run, tmp_path):
    command(run, tmp_path, f"regions={run}/regions.jsonl")
    rows = read_predictions(run / "predictions.jsonl")
    lines = lines_of(tmp_path)
    assert len(lines) == sum(1 if row.task == "vqa" else len(row.sentences) for row in rows)
    assert all("drops" not in line and line["detector"] == "detector" for line in lines)
    cited = [line for line in lines if line["support"] == "cited"]
    assert cited and all(region["agrees"] and "mask" in region for line in cited for region in line["regions"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["citations"]["precision"]["value"] == 1.0 and scores["causal"] is None
    assert sum(n for row in scores["support"].values() for n in row.values()) == len(lines)


def test_confidence_with_and_without_each_region(run, tmp_path):
    checkpoint = (f"checkpoint={run}/bridge/checkpoint", f"predicted={run}/tokens.safetensors")
    command(run, tmp_path, *checkpoint, "limit=4", "batch_size=16")
    lines = lines_of(tmp_path)
    assert len({line["sample_id"] for line in lines}) == 8
    for line in lines:
        numbers = [line["confidence"], line["confidence_without_regions"], *(row["drop"] for row in line["drops"])]
        assert all(map(math.isfinite, numbers)) and 0 < line["confidence"] <= 1
        assert (line["drop"] is None) == (not line["rests_on"])
        if len(line["rests_on"]) == 1:
            (mine,) = (row for row in line["drops"] if row["region"] == line["rests_on"][0])
            assert line["drop"] == mine["drop"] and mine["label"] == line["regions"][0]["label"]
    rested = [line for line in lines if line["task"] == "report" and line["rests_on"]]
    scores = json.loads((tmp_path / "scores.json").read_text())["causal"]["report"]
    assert scores["cited"]["n"] == len(rested)
    assert scores["cited"]["value"] == pytest.approx(np.mean([line["drop"] for line in rested]))
    assert json.loads((tmp_path / "run.json").read_text())["lines"] == len(lines)


def test_answers_are_trained_with_citations_where_that_is_asked_for(run):
    files = {"data": run, "predicted": run / "tokens.safetensors", "annotated": run / "tokens.safetensors"}
    tables = {kind: read_table(files[kind]) for kind in ("predicted", "annotated")}
    base = tiny_base()
    for asked in (False, True):
        fixed = {"base": "tiny", "k": 6, "align_steps": 0, "max_answer": 700, "region_dropout": 0.0}
        config = train.TrainConfig(**files, out=run, **fixed, cite_answers=asked)
        data = TrainingData(config, base, TREE, tables)
        rows = [row for number in range(3) for row in data.batch(number).labels]
        said = [base.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in rows]
        answers = [text for text in said if not text.startswith("Findings")]
        assert any("[r" in text for text in answers) == asked
        assert "no" in answers  # what is absent cites nothing


def test_errors_name_the_thing(run, tmp_path):
    checkpoint, predicted = f"checkpoint={run}/bridge/checkpoint", f"predicted={run}/tokens.safetensors"
    with pytest.raises(SystemExit, match="needs the regions of the prompts; give predicted=PATH"):
        command(run, tmp_path / "out", checkpoint)
    with pytest.raises(SystemExit, match="and this source gives 0"):
        command(run, tmp_path / "out", checkpoint, predicted, "source=empty")
    rows = read_predictions(run / "predictions.jsonl")
    for name, changed, message in (
        ("model", {"model_hash": "other"}, "was answered by model other, the checkpoint is"),
        ("sample", {"sample_id": "nobody"}, "sample nobody is not in"),
    ):
        write_samples(tmp_path / f"{name}.jsonl", [dataclasses.replace(rows[0], **changed)])
        with pytest.raises(SystemExit, match=message):
            command(run, tmp_path / "out", checkpoint, predicted, f"predictions={tmp_path}/{name}.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_score_what_one_does(run, launch, tmp_path):
    arguments = [f"predictions={run}/predictions.jsonl", f"data={run}", "limit=3"]
    arguments += [f"checkpoint={run}/bridge/checkpoint", f"predicted={run}/tokens.safetensors"]
    evidence.main([*arguments, f"out={tmp_path / 'one'}"])
    launch("ddp", "downstream.evidence", *arguments, f"out={tmp_path / 'two'}")
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    assert [line["text"] for line in one] == [line["text"] for line in two]
    assert [line["confidence"] for line in one] == pytest.approx([line["confidence"] for line in two], abs=1e-5)
