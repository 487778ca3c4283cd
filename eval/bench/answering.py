"""What region tokens cost at the answer, and what batches save: our prediction program against itself.

    python -m eval.bench.answering --checkpoint-tokens runs/demo/tokens/checkpoint \
        --checkpoint-none runs/demo/none/checkpoint --data runs/demo/data/test \
        --predicted runs/demo/regions/test-predicted/region_tokens.safetensors [--out answering.json]

- cost: answers of one forced length (`--answer` tokens) with 16 regions in the prompt, against the route `none` twice:
  with as many masked slots, as it is trained, and without any slot. Seconds of `generate`, and peak memory.
- batches: the same questions, of mixed length, in batches of 32 and one by one, each until its end token; and whether
  the answers are the same.

Each measurement is a process of its own, so that its memory is its own; the contestants take turns, and the table has
the medians of the rounds. Seconds are those of the clock; those of the processor stand beside them, since other
programs on the machine weigh less on them.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import write_atomic
from eval.bench.grounding.children import BenchError, run
from eval.bench.grounding.report import machine

TARGETS = {"time": 1.10, "memory": 1.05, "batched": 3.0}

COST = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from downstream.answerer import load_answerer
from downstream.data import extent_mm, pixels_of
from downstream.predict import read_samples
from downstream.sources import open_source, read_table
from eval.bench.grounding.children import high_water
from grounding.store import open_store
checkpoint, data, predicted, slots, length, size, questions, out = sys.argv[1:]
data, length, size = Path(data), int(length), int(size)
answerer, store = replace(load_answerer(checkpoint), k=int(slots)), open_store(data / "store")
source = open_source("predicted", {"predicted": read_table(predicted)}, {})
prompts = []
for sample in read_samples(data, ("vqa",), int(questions)):
    record = store.by_id(sample.image_id)
    about = (record.image_id, extent_mm(record), record.modality or None, [pixels_of(record)])
    prompts.append(answerer.prompt(sample.question, source, *about))
answerer.generate(prompts[:size], length, min_new_tokens=length)  # what happens once
seconds, processor = 0.0, time.process_time()
for start in range(0, len(prompts), size):
    began = time.perf_counter()
    answerer.generate(prompts[start : start + size], length, min_new_tokens=length)
    seconds += time.perf_counter() - began
regions = sum(int(prompt.regions.valid.sum()) for prompt in prompts) / len(prompts)
tokens = sum(map(sum, (prompt.attention_mask for prompt in prompts))) / len(prompts)
processor = time.process_time() - processor
found = {"seconds": seconds / len(prompts), "cpu_seconds": processor / len(prompts), "peak_mb": high_water()}
json.dump(found | {"regions": regions, "prompt_tokens": tokens}, open(out, "w"))
"""

BATCHES = """
import json, sys, time
from pathlib import Path
from downstream.answerer import load_answerer
from downstream.predict import predict, read_samples
from downstream.sources import open_source, read_table
from eval.bench.grounding.children import high_water
from grounding.store import open_store
checkpoint, data, predicted, size, questions, out = sys.argv[1:]
data, size = Path(data), int(size)
answerer, store = load_answerer(checkpoint), open_store(data / "store")
source = open_source("predicted", {"predicted": read_table(predicted)}, {})
samples = read_samples(data, ("vqa",), int(questions))
predict(answerer, store, samples[:2], source, size)  # what happens once
began, processor = time.perf_counter(), time.process_time()
rows = predict(answerer, store, samples, source, size)
seconds, processor = (time.perf_counter() - began) / len(rows), (time.process_time() - processor) / len(rows)
lengths = [len(sample.question) for sample in samples]
found = {"seconds": seconds, "cpu_seconds": processor, "peak_mb": high_water()}
found["answers"] = [row.prediction for row in rows]
json.dump(found | {"characters": [min(lengths), max(lengths)]}, open(out, "w"))
"""


def measure(
    contestants: Mapping[str, Sequence[Any]], code: str, rounds: int, work: Path, threads: int
) -> dict[str, list[dict[str, Any]]]:
    """What `code` answers for each contestant's arguments, round by round; they take turns. Raises BenchError."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, arguments in contestants.items():
            answer = work / "answer.json"
            run(["-c", code, *map(str, arguments), str(answer)], work / "child.log", threads)
            found[name].append(json.loads(answer.read_text()))
    return found


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each number, over the rounds."""
    numbers = [key for key, value in rounds[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(row[key] for row in rounds) for key in numbers}


def cost(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Medians of the routes, and seconds and memory of `tokens` over both kinds of `none`."""
    rest = (options.answer, options.batch_size, options.questions)
    given = (options.data, options.predicted)
    contestants = {
        "none": (options.checkpoint_none, *given, options.regions, *rest),
        "none, no slots": (options.checkpoint_none, *given, 0, *rest),
        "tokens": (options.checkpoint_tokens, *given, options.regions, *rest),
    }
    found = measure(contestants, COST, options.rounds, work, options.threads)
    table = {name: medians(rows) for name, rows in found.items()}
    for name in ("none", "none, no slots"):
        for key, number in (("time", "seconds"), ("processor time", "cpu_seconds"), ("memory", "peak_mb")):
            table["tokens"][f"{key} over {name}"] = table["tokens"][number] / table[name][number]
    return table


def batches(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Medians of 32 at a time and one by one, how much faster the former is, and the share of equal answers."""
    given = (options.checkpoint_tokens, options.data, options.predicted)
    contestants = {f"{size} at a time": (*given, size, options.questions) for size in (1, 32)}
    found = measure(contestants, BATCHES, options.rounds, work, options.threads)
    one, many = (found[name] for name in contestants)
    table: dict[str, Any] = {name: medians(rows) for name, rows in found.items()}
    pairs = list(zip(one[0]["answers"], many[0]["answers"], strict=True))
    return table | {
        "faster": medians(one)["seconds"] / medians(many)["seconds"],
        "less processor time": medians(one)["cpu_seconds"] / medians(many)["cpu_seconds"],
        "equal answers": sum(a == b for a, b in pairs) / len(pairs),
        "questions": len(pairs),
        "characters": one[0]["characters"],
    }


def as_text(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    routes, sizes = result["cost"], result["batches"]
    lines = [f"answers of {options.answer} tokens, {options.batch_size} at a time, medians of {options.rounds} rounds"]
    lines += [
        f"  {name}: {row['seconds']:.3f} s an answer ({row['cpu_seconds']:.3f} s of processor), "
        f"{row['peak_mb']:,.0f} MB, {row['prompt_tokens']:.0f} prompt tokens, {row['regions']:.1f} regions"
        for name, row in routes.items()
    ]
    for name in ("none", "none, no slots"):
        time, memory = (routes["tokens"][f"{key} over {name}"] for key in ("time", "memory"))
        lines.append(
            f"tokens over {name}: {time:.2f} x the time (wanted: at most {TARGETS['time']:g}), "
            f"{memory:.3f} x the memory (at most {TARGETS['memory']:g})"
        )
    low, high = sizes["characters"]
    lines += [f"{sizes['questions']} questions of {low} to {high} characters, each until its answer ends"]
    for name in ("1 at a time", "32 at a time"):
        row = sizes[name]
        lines.append(f"  {name}: {row['seconds']:.3f} s a question ({row['cpu_seconds']:.3f} s of processor)")
    lines += [
        f"batches of 32 over one by one: {sizes['faster']:.1f} x as fast (wanted: at least {TARGETS['batched']:g}), "
        f"{100 * sizes['equal answers']:.0f} % of the answers equal"
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-tokens", type=Path, required=True)
    parser.add_argument("--checkpoint-none", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with store/ and questions.jsonl")
    parser.add_argument("--predicted", type=Path, required=True, help="region tokens of the store")
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer, where it is forced")
    parser.add_argument("--batch-size", type=int, default=8, help="where the length is forced")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result: dict[str, Any] = {"cost": cost(options, Path(folder)), "batches": batches(options, Path(folder))}
    except BenchError as error:
        sys.exit(f"eval.bench.answering: {error}")
    result |= {"machine": machine(), "threads": options.threads, "targets": TARGETS}
    print(as_text(result, options))
    if options.out:
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
