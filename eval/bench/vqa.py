"""The whole VQA harness on many answers: seconds and peak memory of each protocol, and of all in one.

    python -m eval.bench.vqa [--answers 100000] [--patients 5000] [--out scores.json]

Questions and answers are synthetic, drawn with a seed from the label tree's names in the shares that VQA-RAD has (60 %
closed), with modality, organ, question type and patient, so that every slice and interval is computed. Each protocol
runs in a process of its own, so that its memory is its own; "harness" is all protocols, priors and the text-only
baseline in one. CPU seconds are what the machine needs when nothing else runs on it.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.priors import answer_prior, text_only_baseline
from eval.vqa import vqa_accuracy
from eval.vqa_protocols import PROTOCOLS
from grounding.labels import load_label_tree

KINDS = ("presence", "position", "size", "modality", "organ", "count", "abnormality")
MODALITIES = ("CT", "MRI", "X-Ray", "Ultrasound")
ORGANS = ("brain", "chest", "abdomen", "neck", "pelvis")
QUESTIONS = (
    "is there a {}?",
    "is the {} normal on this image?",
    "where is the {}?",
    "what is seen near the {}?",
    "how large is the {}?",
    "which side of the {} is affected?",
)

Rows = list[dict[str, Any]]
NAMES = ("strict", *PROTOCOLS, "priors", "text-only")


def draw(answers: int, patients: int, seed: int) -> tuple[dict[str, str], Rows]:
    """Predictions and reference rows."""
    rng = random.Random(seed)
    tree = load_label_tree()
    names = [tree.phrase(id) for id in tree.ids]
    predictions, rows = {}, []
    for k in range(answers):
        closed = rng.random() < 0.6
        answer = rng.choice(("yes", "no")) if closed else rng.choice((*names, f"{rng.randrange(2, 90)} mm", "2"))
        predictions[f"q{k:07d}"] = _said(rng, answer, names)
        rows.append(
            {
                "sample_id": f"q{k:07d}",
                "patient_id": f"p{rng.randrange(patients):06d}",
                "question": rng.choice(QUESTIONS).format(rng.choice(names)),
                "answer": answer,
                "answer_type": "closed" if closed else "open",
                "question_type": rng.choice(KINDS),
                "modality": rng.choice(MODALITIES),
                "organ": rng.choice(ORGANS),
            }
        )
    return predictions, rows


def _said(rng: random.Random, answer: str, names: list[str]) -> str:
    """Right about half the time; now and then a sentence, as a chatty model gives it."""
    text = answer if rng.random() < 0.5 else rng.choice(("yes", "no", *rng.choices(names, k=6)))
    if rng.random() < 0.3:
        text = f"The image shows {text}, {rng.choice(names)} and no other abnormality of the {rng.choice(names)}."
    return text


def tasks(predictions: dict[str, str], rows: Rows) -> dict[str, Callable[[], Any]]:
    train, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return {
        "strict": lambda: vqa_accuracy(predictions, rows),
        **{name: (lambda protocol=protocol: protocol(predictions, rows)) for name, protocol in PROTOCOLS.items()},
        "priors": lambda: answer_prior(rows),
        "text-only": lambda: text_only_baseline(train, test),
    }


def measure(name: str, answers: int, patients: int, seed: int) -> dict[str, float]:
    """Seconds of one task, or of all ("harness"), and the process's peak memory, the drawn rows in it."""
    todo = tasks(*draw(answers, patients, seed))
    began, worked = time.perf_counter(), time.process_time()
    kept = [todo[one]() for one in (NAMES if name == "harness" else (name,))]
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, "results": len(kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--patients", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.answers, options.patients, options.seed)))
        return
    sizes = ["--answers", str(options.answers), "--patients", str(options.patients), "--seed", str(options.seed)]
    results = {}
    print(
        f"{options.answers:,} answers, {options.patients:,} patients\n{'':14}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}"
    )
    for name in (*NAMES, "harness"):
        command = [sys.executable, "-m", "eval.bench.vqa", "--one", name, *sizes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"eval.bench.vqa: {name}: {done.stderr.strip().splitlines()[-1]}")
        row = results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:14}{row['seconds']:9.1f}{row['cpu_seconds']:9.1f}{row['peak_mb']:9.0f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"sizes": sizes, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
