"""The tables of the comparison in Markdown, and what it ran on."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.bench.grounding.scores import SIX, Scores, mean_over, ratio
from eval.grounding import METRICS
from eval.table import as_markdown
from eval.types import Score

OPEN_VOCABULARY = ("grounding-dino",)
CLOSED_SET = "fcos"


def tables(scores: Mapping[str, Scores], costs: Mapping[str, Mapping[str, float]]) -> str:
    """Means with cost, every source, and the ratios that the project promises."""
    return "\n".join([_means(scores, costs), _by_source(scores), *_ratios(scores)])


def groups(scores: Mapping[str, Scores]) -> dict[str, list[str]]:
    """What means are taken over: the six sources (those of them that there are) and all."""
    every = sorted({name for each in scores.values() for name in each.sources})
    return {"six": [name for name in SIX if name in every], "all": every}


def _means(scores: Mapping[str, Scores], costs: Mapping[str, Mapping[str, float]]) -> str:
    head = ["contestant", "mean over", *METRICS, "steps", "training s", "s an image", "training MB", "prediction MB"]
    rows = []
    for name, found in scores.items():
        cost = costs[name]
        for group, sources in groups(scores).items():
            cells = [cell(mean_over(found, sources, metric)) for metric in METRICS]
            numbers = [f"{cost['steps']:,.0f}", f"{cost['train_s']:,.0f}", f"{cost['image_s']:.3f}"]
            numbers += [f"{cost['train_mb']:,.0f}", f"{cost['predict_mb']:,.0f}"]
            rows.append([name, f"{group} ({len(sources)})", *cells, *(numbers if group == "six" else [""] * 5)])
    return as_markdown("Means over sources", head, rows)


def _by_source(scores: Mapping[str, Scores]) -> str:
    rows = [
        [source, name, *(cell(found.sources[source][metric]) for metric in METRICS)]
        for source in groups(scores)["all"]
        for name, found in scores.items()
        if source in found.sources
    ]
    return as_markdown("By source", ["source", "contestant", *METRICS], rows)


def _ratios(scores: Mapping[str, Scores]) -> list[str]:
    if "medglip" not in scores:
        return []
    chosen, rows = groups(scores), []
    for peer in (name for name in scores if name != "medglip"):
        kind = {CLOSED_SET: "closed set"} | dict.fromkeys(OPEN_VOCABULARY, "open vocabulary")
        of = {f"mean of {len(chosen['six'])}": chosen["six"], **{name: [name] for name in chosen["all"]}}
        cells = [cell(ratio(scores["medglip"], scores[peer], sources, "AP50")) for sources in of.values()]
        rows.append([f"{peer} ({kind.get(peer, 'closed set')})", *cells])
    head = ["AP50 of medglip over that of", f"mean of {len(chosen['six'])}", *chosen["all"]]
    return [as_markdown("Ratios", head, rows)]


def cell(score: Score) -> str:
    return "-" if score.value is None else str(score)


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GB, and the versions that matter."""
    packages = ("torch", "transformers", "faster-coco-eval", "numpy")
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int((_first("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _first(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def notes(settings: Mapping[str, Any], counts: Mapping[str, Sequence[int]]) -> str:
    """What the numbers were measured on, a line each."""
    host = machine()
    parts = ", ".join(
        f"{name} {images:,} images, {patients:,} patients"
        for name, (images, patients) in counts.items()
        if name != "few"
    )
    return "\n".join(
        [
            f"- {settings['minutes']:g} minutes of training each, {settings['threads']} threads at most, seed "
            f"{settings['seed']}, trunk {settings['trunk']}, {settings['image_size']} pixels; {parts}.",
            f"- {host['processor']}, {host['cores']} cores, {host['memory_gb']} GB; Python {host['python']}, torch "
            f"{host['torch']}, transformers {host['transformers']}.",
            "- Intervals: 95 %, 500 bootstrap resamples of patients within each source, the same for all contestants.",
            "- A prediction counts only in the images whose source annotates its label. Dice needs masks.",
            "- s an image: what one more image takes the prediction program, reading and writing included. MB: VmHWM.",
            "",
        ]
    )
