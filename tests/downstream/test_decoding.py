"""How answers are decoded and kept: options, beams, sampling, sections, studies of several images, and killed runs."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import predict as program
from downstream.answer_parts import AnswerParts
from downstream.answerer import Answerer, load_answerer
from downstream.brain_qa import build_questions
from downstream.data import extent_mm, pixels_of, question_of
from downstream.decoding import Decoding, answered, choose, log_probabilities, options_of
from downstream.embedded import load_base
from downstream.predict import answer_batch, plan_batches, predict, read_samples
from downstream.prompts import REPORT_QUESTION
from downstream.samples import ReportSample, VQASample, read_predictions
from downstream.sources import open_source, read_table
from downstream.train import TrainConfig, build_vlm
from eval.bench import answering
from grounding.labels import load_label_tree
from grounding.store import open_store
from grounding.types import RegionSet, RegionTokens, save_region_tokens, stack_region_tokens

ROOT = Path(__file__).resolve().parents[2]


def random_tokens(regions: RegionSet, seed: int) -> RegionTokens:
    """Region tokens of annotated regions with random features and label vectors."""
    n, rng = len(regions), np.random.default_rng(seed)
    return RegionTokens(
        features=torch.tensor(rng.standard_normal((1, n, 8)), dtype=torch.float32),
        boxes=torch.from_numpy(regions.boxes)[None],
        scores=torch.ones(1, n),
        labels=[list(regions.labels)],
        label_vectors=torch.tensor(rng.standard_normal((1, n, 12)), dtype=torch.float32),
        levels=torch.zeros(1, n, dtype=torch.int64),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.fixture(scope="module")
def data(brain_store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "store").symlink_to(brain_store)
    build_questions(brain_store, folder, seed=0, n_questions=20, n_reports=4)
    store = open_store(brain_store)
    tokens = stack_region_tokens([random_tokens(store[k].regions, k) for k in range(len(store))])
    vocabulary = {"brain/lesion": torch.zeros(12)}
    save_region_tokens(folder / "tokens.safetensors", store.image_ids, tokens, {"checkpoint": "detector"}, vocabulary)
    return folder


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    """A bridge on the tiny random model, not trained: how it decodes does not depend on what it knows."""
    folder, table = tmp_path_factory.mktemp("bridge") / "checkpoint", read_table(data / "tokens.safetensors")
    config = TrainConfig(data, data / "tokens.safetensors", data / "tokens.safetensors", folder, base="tiny", k=6)
    vlm = build_vlm(config, load_base("tiny"), load_label_tree(), table)
    vlm.save(folder, {"route": "tokens", "k": 6, "max_answer": 40, "steps": 0})
    return folder


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return load_answerer(checkpoint)


@pytest.fixture(scope="module")
def source(data):
    return open_source("predicted", {"predicted": read_table(data / "tokens.safetensors")}, {})


def arguments(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [f"checkpoint={checkpoint}", f"data={data}", f"predicted={data}/tokens.safetensors", f"out={out}", *more]


def prompts_of(answerer: Answerer, data: Path, source, number: int) -> list:
    store = open_store(data / "store")
    prompts = []
    for sample in read_samples(data, ("vqa",), number):
        record = store.by_id(sample.image_id)
        about = (record.image_id, extent_mm(record), "mri", [pixels_of(record)])
        prompts.append(answerer.prompt(question_of(sample), source, *about))
    return prompts


@pytest.mark.parametrize(
    ("question", "given", "options"),
    [
        ("Is there a lesion?", (), ("yes", "no")),
        ("Does the left insula contain a lesion?", (), ("yes", "no")),
        ("Is it in the left or in the right half?", (), ()),
        ("Where is the lesion?", (), ()),
        ("Where is it?", ("left", "right", "left"), ("left", "right")),
        ("What is shown? Options: A: lung; B: heart; C: both lungs", (), ("lung", "heart", "both lungs")),
        ("Which organ? (A) the liver (B) the spleen", (), ("the liver", "the spleen")),
        ("Is vitamin A: a vitamin?", (), ("yes", "no")),
    ],
)
def test_options_come_from_the_sample_or_the_question(question, given, options):
    assert options_of(question, given) == options


def test_the_probability_of_an_answer_is_that_of_its_tokens_one_by_one(answerer, data, source):
    """Teacher forcing in one padded batch, against a prompt at a time and a token at a time."""
    prompts = prompts_of(answerer, data, source, 3)
    texts = ["yes", "no lesion", "left insula"]
    rows = [answered(prompt, answerer.base, text) for prompt, text in zip(prompts, texts, strict=True)]
    values = log_probabilities(answerer.vlm, answerer.base, rows)
    for prompt, text, value in zip(prompts, texts, values, strict=True):
        total, said = 0.0, []
        ids = answerer.base.tokenizer(text)["input_ids"] + [answerer.base.tokenizer.eos_token_id]
        for token in ids:
            so_far = dataclasses.replace(
                prompt,
                input_ids=prompt.input_ids + said,
                attention_mask=prompt.attention_mask + [1] * len(said),
            )
            batch = program_batch(answerer, so_far)
            with torch.no_grad():
                logits = answerer.vlm(batch.slots, **batch.inputs).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            said.append(token)
        assert value == pytest.approx(total, abs=1e-3)


def program_batch(answerer: Answerer, prompt):
    from downstream.prompts import collate

    return collate([prompt], answerer.base.tokenizer.pad_token_id)


def test_a_chosen_answer_is_the_likeliest_option(answerer, data, source):
    prompts = prompts_of(answerer, data, source, 4)
    options = [("left", "right", "both"), ("yes", "no"), ("no", "yes"), ("a", "a long option of many words")]
    chosen = choose(answerer.vlm, answerer.base, prompts, options)
    for row, names in zip(chosen, options, strict=True):
        assert list(row) == list(names) and sum(row.values()) == pytest.approx(1)
    apart = [choose(answerer.vlm, answerer.base, [p], [o])[0] for p, o in zip(prompts, options, strict=True)]
    for row, alone in zip(chosen, apart, strict=True):
        assert row == pytest.approx(alone, abs=1e-5)
    first = [answered(prompts[0], answerer.base, text) for text in options[0]]
    values = np.exp(log_probabilities(answerer.vlm, answerer.base, first))
    assert list(chosen[0].values()) == pytest.approx(list(values / values.sum()), abs=1e-5)
    said = answerer.answers(prompts, [options[0], (), (), ()])
    assert said[0] == (max(chosen[0], key=chosen[0].get), pytest.approx(chosen[0], abs=1e-5))
    assert all(probabilities is None for _, probabilities in said[1:])


def test_closed_questions_get_one_of_their_options(checkpoint, data, tmp_path):
    program.main(arguments(checkpoint, data, tmp_path, "tasks=vqa", "closed=true"))
    samples = read_samples(data, ("vqa",))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    closed = [row for row, sample in zip(rows, samples, strict=True) if sample.answer_type == "closed"]
    assert closed and all(row["prediction"] == max(row["options"], key=row["options"].get) for row in closed)
    assert {tuple(row["options"]) for row in closed} == {("yes", "no")}
    others = [row for row, sample in zip(rows, samples, strict=True) if sample.answer_type == "open"]
    assert others and not any("options" in row for row in others)
    assert len(read_predictions(tmp_path / "predictions.jsonl")) == len(samples)


def test_options_of_the_sample_are_read(data, tmp_path):
    line = json.loads((data / "questions.jsonl").read_text().splitlines()[0])
    rows = [line | {"options": {"A": "left", "B": "right"}}, line | {"options": ["x", "y"], "images": ["a", "b"]}, line]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_samples(tmp_path, ("vqa",))
    assert (first.options, second.options, third.options) == (("left", "right"), ("x", "y"), ())
    assert (second.images, third.images) == (("a", "b"), ())


def test_beams_say_the_same_for_a_batch_and_for_its_prompts_alone(answerer, data, source):
    prompts = prompts_of(answerer, data, source, 4)
    beams = dataclasses.replace(answerer, decoding=Decoding(beams=4))
    texts = beams.generate(prompts, 6)
    assert texts == [beams.generate([prompt], 6)[0] for prompt in prompts]
    assert texts == answerer.generate(prompts, 6, num_beams=4)
    assert texts != answerer.generate(prompts, 6)


def test_samples_depend_on_the_seed_alone(answerer, data, source):
    store, samples = open_store(data / "store"), read_samples(data, ("vqa",), 6)

    def said(seed: int, temperature: float = 1.5) -> list[str]:
        decoding = Decoding(temperature=temperature, top_p=0.95, seed=seed)
        rows = predict(dataclasses.replace(answerer, decoding=decoding), store, samples, source, 3)
        return [row.prediction for row in rows]

    first = said(0)
    torch.rand(7)
    state = torch.get_rng_state()
    assert said(0) == first != said(1)
    assert torch.equal(torch.get_rng_state(), state)  # and it leaves the others' random numbers alone


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["beams=2", "temperature=1"], "beams=2 and temperature=1 exclude each other"),
        (["top_p=0.5"], "top_p=0.5 is for sampling; give a temperature"),
        (["beams=0"], "beams must be 1 or more"),
        (["sections=impression,findings"], "known, in this order: findings, impression"),
        (["batch_size=0"], "batch_size=0; it must be positive"),
    ],
)
def test_decoding_that_makes_no_sense_is_refused(keys, says, checkpoint, data, tmp_path):
    with pytest.raises(SystemExit, match=says):
        program.main(arguments(checkpoint, data, tmp_path / "out", *keys))
    assert not (tmp_path / "out").exists()


def test_a_report_is_written_section_by_section(answerer, data, source):
    """Findings are what follows "Findings:"; the impression is what follows them and "Impression:"."""
    store, samples = open_store(data / "store"), read_samples(data, ("report",), 2)
    whole = dataclasses.replace(answerer, decoding=Decoding(sections=("findings", "impression")), max_answer=12)
    prompts = [
        whole.prompt(REPORT_QUESTION, source, s.images[0], None, "mri", [pixels_of(store.by_id(s.images[0]))])
        for s in samples
    ]
    texts = whole.reports(prompts)
    for text, prompt in zip(texts, prompts, strict=True):
        findings = continued(answerer, prompt, "Findings:")
        head = f"Findings: {findings}" if findings else ""
        impression = continued(answerer, prompt, f"{head} Impression:".strip())
        expected = f"{head} Impression: {impression}".strip() if impression else head
        assert text == expected
    assert any(text.startswith("Findings: ") for text in texts)


def continued(answerer: Answerer, prompt, begun: str) -> str:
    """Greedy, token by token without a cache, up to the end token, a section's name, or 12 tokens."""
    tokenizer, said = answerer.base.tokenizer, []
    ids = prompt.input_ids + tokenizer(begun, add_special_tokens=False)["input_ids"]
    placeholders = [answerer.base.region_token_id, answerer.vlm.image_token_id]
    for _ in range(12):
        longer = dataclasses.replace(
            prompt,
            input_ids=ids + said,
            attention_mask=prompt.attention_mask + [1] * (len(ids) + len(said) - len(prompt.input_ids)),
        )
        batch = program_batch(answerer, longer)
        with torch.no_grad():
            logits = answerer.vlm(batch.slots, **batch.inputs).logits[0, -1]
        logits[placeholders] = -math.inf
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).split("Findings:")[0].split("Impression:")[0].strip()


def test_a_section_ends_where_the_next_begins(answerer, data, source, monkeypatch):
    """The model goes on to the impression by itself: what it says there is not taken for findings."""
    from downstream.decoding import write_sections

    heard = []

    def generate(prompts, **settings):
        heard.append([answerer.base.tokenizer.decode(prompt.input_ids) for prompt in prompts])
        assert settings["stop_strings"] == ["Findings:", "Impression:"]
        return ["one lesion. Impression: dropped" if len(heard) == 1 else "normal."]

    prompt = prompts_of(answerer, data, source, 1)
    assert write_sections(generate, prompt, answerer.base, ("findings", "impression")) == [
        "Findings: one lesion. Impression: normal."
    ]
    assert heard[1][0].endswith("Findings: one lesion. Impression:")


def test_a_study_of_several_images_is_one_prompt(answerer, data, source):
    store = open_store(data / "store")
    a, b = store.image_ids[:2]
    report = ReportSample("study", "p", (a, b), "mri", None, "Findings.", None)
    question = VQASample(**dataclasses.asdict(read_samples(data, ("vqa",), 1)[0]) | {"image_id": a, "images": (a, b)})
    for sample in (report, question):
        (row,) = predict(answerer, store, [sample], source)
        evidence = RegionSet.from_dict(row.evidence)
        assert {attributes["image"] for attributes in evidence.attributes} == {a, b}
        truth = {image: store.by_id(image).regions for image in (a, b)}
        for box, label, attributes in zip(evidence.boxes, evidence.labels, evidence.attributes, strict=True):
            own = truth[attributes["image"]]
            near = np.abs(own.boxes - box).max(1) < 1e-5
            assert label in [own.labels[k] for k in np.nonzero(near)[0]]
    alone, both = (
        len(answerer.prompt("?", source, ids, [None] * len(ids), "mri", pixels(store, ids)).input_ids)
        for ids in ([a], [a, b])
    )
    assert both > alone + answerer.base.image_tokens - 1


def pixels(store, ids) -> list[np.ndarray]:
    return [pixels_of(store.by_id(image_id)) for image_id in ids]


def test_batches_hold_each_sample_once_by_kind_and_length(data):
    samples = read_samples(data, ("vqa", "report"))
    batches = plan_batches(samples, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    for batch in batches:
        assert len({isinstance(samples[i], VQASample) for i in batch}) == 1
        lengths = [len(question_of(samples[i])) for i in batch]
        assert lengths == sorted(lengths) and len(batch) <= 3


def test_a_stopped_run_goes_on_and_answers_nothing_twice(checkpoint, data, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    keys = ("batch_size=4", "temperature=1.2", "seed=3")
    program.main(arguments(checkpoint, data, whole, *keys))
    answered_now: list[str] = []
    monkeypatch.setattr(program, "answer_batch", counting(answered_now, stop_after=3))
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments(checkpoint, data, halves, *keys))
    (folder,) = halves.glob("parts-*")
    (part,) = folder.glob("rank-*.jsonl")
    part.write_bytes(part.read_bytes() + b'{"batch": 3, "predict')  # as if it was killed while it wrote
    assert not (halves / "predictions.jsonl").exists() and len(answered_now) == 3 * 4
    monkeypatch.setattr(program, "answer_batch", counting(answered_now, stop_after=1000))
    program.main(arguments(checkpoint, data, halves, *keys))
    assert len(answered_now) == len(set(answered_now)) == len(read_samples(data, ("vqa", "report")))
    assert (halves / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert not list(halves.glob("parts-*"))


def counting(answered_now: list[str], stop_after: int):
    calls = []

    def count(answerer, store, samples, source):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        answered_now.extend(getattr(s, "sample_id", None) or s.study_id for s in samples)
        return answer_batch(answerer, store, samples, source)

    return count


def test_parts_of_other_settings_are_not_taken(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "answer_batch", counting([], stop_after=1))
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments(checkpoint, data, tmp_path, "tasks=vqa", "source=empty", "batch_size=8"))
    monkeypatch.undo()
    program.main(arguments(checkpoint, data, tmp_path, "tasks=vqa", "batch_size=8"))
    assert all(row.evidence["regions"] for row in read_predictions(tmp_path / "predictions.jsonl"))
    assert not list(tmp_path.glob("parts-*"))


def test_files_of_several_processes_are_merged_in_the_order_of_the_samples(tmp_path, answerer, data, source):
    samples = read_samples(data, ("vqa",), 10)
    rows = predict(answerer, open_store(data / "store"), samples, source)
    batches = plan_batches(samples, 3)
    parts = AnswerParts(tmp_path, "key")
    for number, indices in enumerate(batches):
        parts.add(number % 2, number, [rows[i] for i in indices], {"beyond_budget": 2})
    assert parts.done() == set(range(len(batches))) and len(list(parts.folder.iterdir())) == 2
    _, counts = parts.merge(batches)
    assert counts == {"beyond_budget": 2 * len(batches)}
    assert read_predictions(tmp_path / "predictions.jsonl") == rows


def test_blank_images_are_what_the_model_sees(checkpoint, data, tmp_path, monkeypatch):
    """Grey, of the images' own size, with their regions. (The tiny model is all but blind: its answers do not tell.)"""
    seen: list[np.ndarray] = []
    asked = Answerer.prompt

    def prompt(self, question, source, image_id, extent, modality, images):
        seen.extend(images)
        return asked(self, question, source, image_id, extent, modality, images)

    monkeypatch.setattr(Answerer, "prompt", prompt)
    for name in ("false", "true"):
        program.main(arguments(checkpoint, data, tmp_path / name, "limit=2", f"blank_image={name}"))
    real, blank = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [pixels.shape for pixels in real] == [pixels.shape for pixels in blank]
    assert all(pixels.std() > 0 for pixels in real) and all((pixels == 128).all() for pixels in blank)
    rows = [read_predictions(tmp_path / name / "predictions.jsonl") for name in ("false", "true")]
    assert [row.evidence for row in rows[0]] == [row.evidence for row in rows[1]]


@pytest.mark.slow
def test_kill_9_loses_at_most_a_batch(checkpoint, data, tmp_path):
    command = [sys.executable, "-m", "downstream.predict", *arguments(checkpoint, data, tmp_path / "killed")]
    command += ["batch_size=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not any((tmp_path / "killed").glob("parts-*/rank-0.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = (tmp_path / "killed").glob("parts-*/rank-0.jsonl")
    kept = part.read_bytes().count(b"\n")
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    total = len(read_samples(data, ("vqa", "report")))
    assert f"{kept} of {total} batches were answered before this run" in again.stdout
    program.main(arguments(checkpoint, data, tmp_path / "whole", "batch_size=1"))
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_two_processes_say_what_one_says(checkpoint, data, launch, tmp_path):
    keys = ("batch_size=4", "temperature=1.2")
    program.main(arguments(checkpoint, data, tmp_path / "one", *keys))
    launch("ddp", "downstream.predict", *arguments(checkpoint, data, tmp_path / "two", *keys))
    one, two = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_the_benchmark_measures_both_routes(checkpoint, data, tmp_path):
    """On the tiny model its numbers mean nothing; that they are there, and what was compared, can be seen."""
    out, parts = tmp_path / "answering.json", {"checkpoint-tokens": checkpoint, "checkpoint-none": checkpoint}
    parts |= {"data": data, "predicted": data / "tokens.safetensors", "out": out}
    parts |= {"rounds": 1, "questions": 4, "answer": 3, "batch-size": 2, "regions": 5}
    answering.main([word for key, value in parts.items() for word in (f"--{key}", str(value))])
    found = json.loads(out.read_text())
    cost, batches = found["cost"], found["batches"]
    assert cost["tokens"]["regions"] == 5 and cost["none, no slots"]["regions"] == 0
    assert cost["tokens"]["prompt_tokens"] == cost["none, no slots"]["prompt_tokens"] + 5
    assert min(row[key] for row in cost.values() for key in ("seconds", "peak_mb")) > 0
    assert batches["questions"] == 4 and batches["equal answers"] == 1 and batches["faster"] > 0
