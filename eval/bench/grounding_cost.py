"""What a phrase costs, and a training step: MedGLIP beside Grounding DINO of transformers, on the same trunk.

    python -m eval.bench.grounding_cost [--phrases 198] [--rounds 3] [--out cost.json]

- phrases: an image with 198 phrases against one with a single phrase, MedGLIP on its small trunk (EfficientNet-Lite0,
  256 pixels) and on Swin-T at 480.
- passes: 198 phrases on a Swin-T trunk at 480 pixels, MedGLIP's one pass against as many passes of Grounding DINO
  as its 256 text tokens make it take.
- step: one training step (forward, backward, optimiser) on the same trunk, images and batch: seconds and peak memory.

Weights are random (a pass costs the same), images are synthetic noise, phrases are those of the label tree. Each
measurement is a process of its own, so that its memory is its own; times are the least of alternating rounds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import write_atomic
from eval.bench.grounding.children import BenchError, run
from eval.bench.grounding.report import machine
from grounding.labels import load_label_tree

SMALL, LARGE = 256, 480  # pixels
BATCH, STEPS = 2, 4
TARGETS = {"phrases": 1.2, "passes": 8.0, "step time": 0.5, "step memory": 0.5}

SWIN = """
import sys, torch
from transformers import SwinBackbone, SwinConfig
torch.manual_seed(0)
config = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
SwinBackbone(config).save_pretrained(sys.argv[1])
"""

# Text vectors of MedGLIP are cached by text, as in use; Grounding DINO reads the prompt again in every pass.
MEDGLIP = """
import json, sys, time, torch
from eval.bench.grounding.children import high_water
from grounding.model import MedGLIPConfig, build_model
from grounding.text import PhraseEncoder
trunk, size, phrases, rounds, out = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3])), *sys.argv[4:]
model = build_model(MedGLIPConfig(trunk=trunk, image_size=size, phrases=tuple(phrases)), 0).eval()
encoder, pixels = PhraseEncoder(), torch.randn(1, 3, size, size)
encoder.encode(phrases)
seconds = {1: [], len(phrases): []}
with torch.inference_mode():
    for k in range(int(rounds) + 1):
        for count in seconds:
            began = time.perf_counter()
            model(pixels, encoder.encode(phrases[:count]))
            if k:
                seconds[count].append(time.perf_counter() - began)
one, many = map(min, seconds.values())
json.dump({"one_s": one, "many_s": many, "peak_mb": high_water()}, open(out, "w"))
"""

DINO = """
import json, sys, time, torch
from transformers import AutoTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
from eval.bench.grounding.children import high_water
from eval.bench.grounding.query_detectors import text_encoder
trunk, size, phrases, rounds, out = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3])), *sys.argv[4:]
torch.manual_seed(0)
backbone = SwinConfig.from_pretrained(trunk, out_features=["stage2", "stage3", "stage4"])
model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone)).eval()
tokenizer = AutoTokenizer.from_pretrained(text_encoder())  # the vocabulary is BERT's, as Grounding DINO's
prompts = [""]
for phrase in phrases:
    longer = prompts[-1] + phrase.lower() + ". "
    if len(tokenizer(longer).input_ids) > model.config.max_text_len:
        prompts.append(phrase.lower() + ". ")
    else:
        prompts[-1] = longer
pixels, seconds = torch.randn(1, 3, size, size), {1: [], len(phrases): []}
with torch.inference_mode():
    for k in range(int(rounds) + 1):
        for count, texts in ((1, [phrases[0].lower() + "."]), (len(phrases), prompts)):
            began = time.perf_counter()
            for text in texts:
                model(pixel_values=pixels, **tokenizer(text, return_tensors="pt"))
            if k:
                seconds[count].append(time.perf_counter() - began)
one, many = map(min, seconds.values())
json.dump({"one_s": one, "many_s": many, "passes": len(prompts), "peak_mb": high_water()}, open(out, "w"))
"""

DINO_STEP = """
import json, sys, time, torch
from pathlib import Path
from transformers import AutoTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
from eval.bench.grounding.children import high_water
from eval.bench.grounding.data import collate, read_examples
from eval.bench.grounding.query_detectors import labels, text_encoder
trunk, size, data, batch, steps, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
torch.manual_seed(0)
backbone = SwinConfig.from_pretrained(trunk, out_features=["stage2", "stage3", "stage4"])
model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone)).train()
examples, seconds = read_examples(data), []
names = sorted({label for example in examples for label in example.labels})
classes = {name: k for k, name in enumerate(names)}
prompt = ". ".join(name.rsplit("/")[-1].replace("_", " ") for name in names) + "."
text = AutoTokenizer.from_pretrained(text_encoder())([prompt] * int(batch), return_tensors="pt")
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
for k in range(int(steps)):
    began = time.perf_counter()
    rows = collate([examples[(k * int(batch) + j) % len(examples)] for j in range(int(batch))], classes, size)
    loss = model(pixel_values=rows.pixel_values, **text, labels=labels(rows)).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    seconds.append(time.perf_counter() - began)
json.dump({"step_s": min(seconds[1:]), "peak_mb": high_water()}, open(out, "w"))
"""


def child(code: str, arguments: list[Any], work: Path, threads: int) -> dict[str, float]:
    """Runs `code` with the arguments and the file to answer in. Raises BenchError."""
    answer = work / "answer.json"
    run(["-c", code, *map(str, arguments), str(answer)], work / "child.log", threads)
    return json.loads(answer.read_text())


def phrase_cost(swin: Path, phrases: Path, rounds: int, work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Seconds an image with one and with all phrases, of each model and trunk."""
    return {
        "medglip, EfficientNet-Lite0": child(MEDGLIP, ["embedded", SMALL, phrases, rounds], work, threads),
        "medglip, Swin-T": child(MEDGLIP, [swin, LARGE, phrases, rounds], work, threads),
        "grounding-dino, Swin-T": child(DINO, [swin, LARGE, phrases, rounds], work, threads),
    }


def step_cost(swin: Path, work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of training on the same images: MedGLIP by grounding.train, which also holds its
    calibration at the end."""
    draw_images(work / "images", 16)
    store, data, out = work / "store", work / "parquet", work / "grounder"
    program = ["-m", "downstream.cli", "data"]
    source = f"coco:{work / 'images'}?modality=ct&name=synthetic&licence=none"
    run([*program, "build", "--source", source, "--out", str(store)], work / "build.log", threads)
    run([*program, "export", str(store), str(data)], work / "build.log", threads)
    settings = [f"store={store}", f"out={out}", f"trunk={swin}", f"image_size={LARGE}", f"batch_size={BATCH}"]
    trained = run(["-m", "grounding.train", *settings, f"steps={STEPS}", "calibration=2"], work / "train.log", threads)
    log = [json.loads(line)["seconds"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    return {
        "medglip, Swin-T": {"step_s": min(log[1:]), "peak_mb": trained.peak_mb},
        "grounding-dino, Swin-T": child(DINO_STEP, [swin, LARGE, data, BATCH, STEPS], work, threads),
    }


def draw_images(folder: Path, count: int) -> None:
    """Synthetic CT-like noise with two rectangles, as a COCO folder."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        pixels = rng.integers(0, 90, (LARGE, LARGE), np.uint8)
        for category in (1, 2):
            x, y, width, height = (int(v) for v in (*rng.integers(0, 240, 2), *rng.integers(60, 200, 2)))
            pixels[y : y + height, x : x + width] += 60 * category
            ring = [x, y, x + width, y, x + width, y + height, x, y + height]
            row = {"image_id": number, "category_id": category, "bbox": [x, y, width, height], "segmentation": [ring]}
            annotations.append({**row, "id": len(annotations) + 1, "area": width * height, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": LARGE, "width": LARGE})
    categories = [{"id": 1, "name": "liver"}, {"id": 2, "name": "kidney"}]
    write_atomic(
        folder / "annotations.json",
        json.dumps({"images": images, "annotations": annotations, "categories": categories}),
    )


def ratios(phrases: dict[str, dict[str, float]], step: dict[str, dict[str, float]]) -> dict[str, float]:
    """The numbers that TARGETS speaks of."""
    ours, theirs = phrases["medglip, Swin-T"], phrases["grounding-dino, Swin-T"]
    trained, other = step["medglip, Swin-T"], step["grounding-dino, Swin-T"]
    return {
        "phrases": phrases["medglip, EfficientNet-Lite0"]["many_s"] / phrases["medglip, EfficientNet-Lite0"]["one_s"],
        "passes": theirs["many_s"] / ours["many_s"],
        "step time": trained["step_s"] / other["step_s"],
        "step memory": trained["peak_mb"] / other["peak_mb"],
    }


def as_text(result: dict[str, Any]) -> str:
    count, found = result["phrases_asked"], result["ratios"]
    lines = [
        f"{name}: 1 phrase {row['one_s']:.3f} s, {count} phrases in {row.get('passes', 1)} passes "
        f"{row['many_s']:.3f} s ({row['many_s'] / row['one_s']:.2f} x), "
        f"{row['peak_mb']:,.0f} MB"
        for name, row in result["phrases"].items()
    ]
    lines += [
        f"{name}: training step of {BATCH} at {LARGE} pixels {row['step_s']:.2f} s, {row['peak_mb']:,.0f} MB"
        for name, row in result["step"].items()
    ]
    lines += [
        f"{count} phrases over 1, medglip: {found['phrases']:.2f} x (wanted: at most {TARGETS['phrases']:g})",
        f"{count} phrases, grounding-dino over medglip: {found['passes']:.1f} x (at least {TARGETS['passes']:g})",
        f"training step, medglip over grounding-dino: {found['step time']:.2f} x the time, {found['step memory']:.2f} "
        f"x the memory (at most {TARGETS['step time']:g} and {TARGETS['step memory']:g})",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phrases", type=int, default=198)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    tree = load_label_tree()
    texts = list(dict.fromkeys(tree.phrase(label) for label in tree.ids))[: options.phrases]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        swin, phrases = work / "swin", work / "phrases.json"
        phrases.write_text(json.dumps(texts))
        try:
            run(["-c", SWIN, str(swin)], work / "child.log", options.threads)
            cost = phrase_cost(swin, phrases, options.rounds, work, options.threads)
            step = step_cost(swin, work, options.threads)
        except BenchError as error:
            sys.exit(f"eval.bench.grounding_cost: {error}")
    result = {"phrases_asked": len(texts), "phrases": cost, "step": step, "ratios": ratios(cost, step)}
    result |= {"machine": machine(), "threads": options.threads}
    print(as_text(result))
    if options.out:
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
