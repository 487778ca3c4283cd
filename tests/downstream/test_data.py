"""What a bridge is trained on: lists of the regions of a prompt, questions and reports, by any route and source."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridges.routes import pick
from downstream import predict, train
from downstream.brain_qa import build_questions, describe, lesions_of
from downstream.data import TrainingData, answer_of, list_regions
from downstream.embedded import tiny_base
from downstream.prompts import IGNORED, tokens_of
from downstream.samples import ReportSample, read_predictions, write_samples
from downstream.sources import read_table
from downstream.train import TrainConfig
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import RegionTokens, save_region_tokens, stack_region_tokens

TREE = load_label_tree()


def as_tokens(regions) -> RegionTokens:
    n = len(regions)
    return RegionTokens(
        features=torch.zeros(1, n, 2),
        boxes=torch.tensor(regions.boxes)[None],
        scores=torch.ones(1, n),
        labels=[list(regions.labels)],
        label_vectors=torch.zeros(1, n, 2),
        levels=torch.zeros(1, n, dtype=torch.long),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.fixture(scope="module")
def with_lesion(brain_store):
    store = open_store(brain_store)
    return next(s for s in (store[k] for k in range(len(store))) if len(lesions_of(s.regions)) == 1)


def test_a_lesion_is_listed_first_with_its_size_and_looks(with_lesion):
    slots = pick(as_tokens(with_lesion.regions), 0, [], TREE, 8, {})
    first = list_regions(slots, with_lesion, TREE)[0]
    (lesion,) = lesions_of(with_lesion.regions, with_lesion.spacing)
    assert first == f"{TREE.phrase(with_lesion.regions.labels[lesion.index])}, {describe(lesion)}"


def test_a_false_lesion_is_listed_by_its_label_alone(with_lesion):
    tokens = as_tokens(with_lesion.regions)
    k = lesions_of(with_lesion.regions)[0].index
    tokens.boxes[0, k] = torch.tensor([0.0, 0.0, 0.02, 0.02])
    first = list_regions(pick(tokens, 0, [], TREE, 8, {}), with_lesion, TREE)[0]
    assert first == TREE.phrase(with_lesion.regions.labels[k])


def test_no_region_makes_no_list(with_lesion):
    nothing = as_tokens(with_lesion.regions.select([]))
    assert list_regions(pick(nothing, 0, [], TREE, 8, {}), with_lesion, TREE) == []


@pytest.fixture(scope="module")
def folder(brain_store, tmp_path_factory) -> Path:
    """Questions and reports of the brain store; its annotated regions as tokens, the predicted ones without lesions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "store").symlink_to(brain_store)
    build_questions(brain_store, folder, seed=0, n_questions=40)
    store = open_store(brain_store)
    annotated = [as_tokens(store[k].regions) for k in range(len(store))]
    for name, rows in (("annotated", annotated), ("predicted", [without_lesions(row) for row in annotated])):
        path = folder / f"{name}.safetensors"
        save_region_tokens(path, store.image_ids, stack_region_tokens(rows), {}, {"brain/lesion": torch.zeros(2)})
    return folder


def without_lesions(tokens: RegionTokens) -> RegionTokens:
    kept = [label in TREE.nodes and not TREE.is_finding(label) for label in tokens.labels[0]]
    return replace(tokens, valid=torch.tensor([kept]))


def training(folder: Path, base=None, **settings) -> TrainingData:
    paths = {"data": folder, "predicted": folder / "predicted.safetensors"}
    paths |= {"annotated": folder / "annotated.safetensors", "out": folder / "out"}
    rates = {"annotated_share": 0.0, "region_dropout": 0.0, "feature_dropout": 0.0}
    config = TrainConfig(**paths, **({"max_answer": 700, "align_steps": 0, "k": 8} | rates | settings))
    tables = {kind: read_table(paths[kind]) for kind in ("predicted", "annotated")}
    return TrainingData(config, base or tiny_base(), TREE, tables)


def labels_of(batch) -> set[str]:
    return {label for row in batch.slots.labels for label in row if label}


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("route", ["overlay", "crop"])
def test_pictured_routes_train_on_the_same_samples(folder, route, pack):
    none, pictured = (training(folder, route=r, pack=pack, align_steps=1) for r in ("none", route))
    for step in range(3):
        a, b = none.batch(step), pictured.batch(step)
        assert not b.slots.valid.any()
        longer = b.inputs["input_ids"].shape[1] - a.inputs["input_ids"].shape[1]
        assert longer == 0 if route == "overlay" and step == 0 else longer >= 0
        assert len(b.inputs["pixel_values"]) > len(a.inputs["pixel_values"]) or route == "overlay"


def test_a_control_source_takes_the_predicted_regions_place_in_training(folder):
    own = training(folder)
    before = [own.batch(step) for step in range(3)]
    oracle_file = f"file:{folder / 'annotated.safetensors'}"
    for name in ("shuffled", "random", "empty", "jittered:0.3", oracle_file):
        data, again = training(folder, source=name), training(folder, source=name)
        batches = [data.batch(step) for step in range(3)]
        assert any(not torch.equal(a.slots.boxes, b.slots.boxes) for a, b in zip(batches, before, strict=True))
        assert all(torch.equal(a.slots.boxes, again.batch(step).slots.boxes) for step, a in enumerate(batches))
        if name != oracle_file:  # the same samples; with lesions in the prompt, reports cite them
            assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, before, strict=True))
    assert any(TREE.is_finding(label) for batch in batches for label in labels_of(batch))
    oracle = training(folder, source="empty", annotated_share=1.0).batch(0)
    assert oracle.slots.valid.any()


def test_regions_beyond_the_budget_are_counted(folder):
    few, many = training(folder, k=2), training(folder, k=64)
    few.batch(0)
    many.batch(0)
    assert few.beyond_budget > 0 and many.beyond_budget == 0 and not few.dropped


def with_reports(folder: Path, out: Path, *studies: tuple[str, ...]) -> Path:
    """A folder of one report a study about the images of `folder`."""
    out.mkdir()
    for name in ("store", "predicted.safetensors", "annotated.safetensors"):
        (out / name).symlink_to(folder / name)
    said = "There is a lesion in the left insula."
    reports = [ReportSample(f"s{i}", f"p{i}", ids, "mri", None, said, "One lesion.") for i, ids in enumerate(studies)]
    write_samples(out / "reports.jsonl", reports)
    write_samples(out / "questions.jsonl", [])
    return out


@pytest.mark.parametrize("pack", [1, 2])
def test_a_report_is_about_all_images_of_its_study(folder, tmp_path, pack):
    a, b, c = open_store(folder / "store").image_ids[:3]
    data = training(with_reports(folder, tmp_path / "two", (a, b), (b, c)), pack=pack, batch_size=2, k=12)
    batch = data.batch(0)
    assert len(batch.inputs["pixel_values"]) == 4 and batch.slots.valid.shape == (2, 12)
    text = data.base.tokenizer.decode(batch.inputs["input_ids"][0])
    assert "Image 1: " in text and "Image 2: " in text


def test_images_of_a_study_that_are_not_there(folder, tmp_path, caplog):
    a, b = open_store(folder / "store").image_ids[:2]
    data = training(with_reports(folder, tmp_path / "part", (a, "gone"), (a, b)), batch_size=2)
    assert "1 images of 1 studies are not in the store; trained without them" in caplog.messages
    assert sorted(map(len, data.images)) == [1, 2] and len(data.batch(0).inputs["pixel_values"]) == 3
    with pytest.raises(ValueError, match="study 's0': none of its 2 images is in the store"):
        training(with_reports(folder, tmp_path / "none", ("gone", "lost")))


@pytest.mark.parametrize("pack", [1, 3])
def test_prompts_that_are_too_long_are_told_fewer_regions(folder, caplog, pack):
    base = tiny_base()
    settings = {"route": "tokens", "names": True, "annotated_share": 1.0, "pack": pack, "batch_size": 4}
    whole = training(folder, base, **settings)
    longest = 1 + max(int(whole.batch(step).inputs["position_ids"].max()) for step in range(2))
    base.model.config.text_config.max_position_embeddings = longest - 40
    data = training(folder, base, **settings)
    batches = [data.batch(step) for step in range(2)]
    assert data.dropped.prompts and data.dropped.regions >= data.dropped.prompts and data.dropped.turns == 0
    assert all(batch.inputs["position_ids"].max() < longest - 40 for batch in batches)
    assert sum("longer than the model's context" in message for message in caplog.messages) == 1


def said(batch, base) -> list[str]:
    return [base.tokenizer.decode(row[row != IGNORED], skip_special_tokens=True) for row in batch.labels]


def last_said(batch, base) -> list[str]:
    """Of each row its last answer: where regions are listed, the list."""
    last = (batch.labels != IGNORED) & (batch.part == batch.part.max(1, keepdim=True).values)
    return [
        base.tokenizer.decode(row[own], skip_special_tokens=True) for row, own in zip(batch.labels, last, strict=True)
    ]


@pytest.mark.parametrize("pack", [1, 2])
def test_a_list_ends_before_it_is_longer_than_an_answer_may_be(folder, pack):
    base, one = tiny_base(), {"annotated_share": 1.0, "align_steps": 1, "pack": pack, "batch_size": 4}
    whole, short = (last_said(training(folder, base, max_answer=most, **one).batch(0), base) for most in (700, 60))
    lengths = [[len(tokens_of(base, text)) for text in lists] for lists in (whole, short)]
    assert min(lengths[0]) > 60 >= max(lengths[1])
    named = {TREE.phrase(label) for label in TREE.nodes}
    assert all(text == "none" or text.split(";")[0].split(",")[0] in named for text in short)


def test_answers_that_are_too_long_are_left_out_and_told(folder, caplog):
    base = tiny_base()
    whole = training(folder, base, max_answer=700)
    short = training(folder, base, max_answer=100)
    kept = [sample for sample in whole.samples if len(tokens_of(base, answer_of(sample))) <= 100]
    assert short.samples == kept and 0 < len(kept) < len(whole.samples)
    (told,) = [message for message in caplog.messages if "max_answer" in message]
    assert f"{len(whole.samples) - len(kept)} of {len(whole.samples)} answers have more than max_answer=100" in told
    with pytest.raises(ValueError, match="keeps them"):
        training(folder, base, max_answer=1)


def test_citations_that_make_an_answer_too_long_are_left_away(folder):
    base = tiny_base()
    whole = training(folder, base, annotated_share=1.0)
    report = max((s for s in whole.samples if isinstance(s, ReportSample)), key=lambda s: len(answer_of(s)))
    short = training(folder, base, annotated_share=1.0, max_answer=len(tokens_of(base, answer_of(report))))
    epoch = len(whole.samples) // whole.config.batch_size
    full, cut = ([text for step in range(epoch) for text in said(data.batch(step), base)] for data in (whole, short))
    assert answer_of(report) in cut and answer_of(report) not in full
    assert any("[r" in text for text in full)


@pytest.mark.parametrize("route", ["overlay", "crop"])
def test_the_commands_train_a_pictured_route_and_ask_it(folder, tmp_path, route):
    files = [f"data={folder}", *(f"{kind}={folder}/{kind}.safetensors" for kind in ("predicted", "annotated"))]
    out = tmp_path / "run"
    few = ["base=tiny", "steps=2", "align_steps=1", "batch_size=2", "max_answer=700", "lora_r=4", "precision=fp32"]
    train.main([*files, f"out={out}", f"route={route}", "source=jittered:0.1", "presence=true", *few])
    asked = [f"checkpoint={out}/checkpoint", f"out={tmp_path}/answers", "source=random", "limit=2", "tasks=vqa"]
    predict.main([*files, *asked])
    rows = read_predictions(tmp_path / "answers" / "predictions.jsonl")
    assert len(rows) == 2 and all(len(row.evidence["regions"]) > 0 for row in rows)
