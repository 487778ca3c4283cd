"""Does the answer follow the phrase? What a grounding checkpoint makes of phrases, measured on a store.

    python -m grounding.probe checkpoint=runs/real/grounder store=runs/real/val out=runs/real/probe

Three questions: (a) swapped: of two phrases that both have boxes in an image, does the top box of each lie on its own?
(b) presence: are phrases that are there told from those that are not, and are the probabilities right? (c) synonyms:
does another name of a label find the same box? Writes probe.json and probe.png. About as long as prediction takes.

Dimension key: V phrases, N boxes.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info, write_atomic
from eval.presence import Estimate, auroc, expected_calibration_error, reliability, share
from grounding.boxes import pairwise_iou
from grounding.detect import Grounder, load_grounder
from grounding.images import ImageError, read_image
from grounding.labels import LabelTree
from grounding.model import CheckpointError
from grounding.phrases import PhraseError
from grounding.store import StoreError, open_store
from grounding.types import GroundingSample, RegionSet


@dataclass(frozen=True)
class ProbeConfig:
    """``images``: so many of the store, evenly; 0 for all. ``synonyms``: of a label at most, evenly over its list."""

    checkpoint: Path
    store: Path
    out: Path
    images: int = 0
    synonyms: int = 8
    seed: int = 0

    def __post_init__(self):
        if min(self.images, self.synonyms) < 0:
            raise ValueError("images and synonyms must not be negative; 0 images are all, 0 synonyms none")


@dataclass
class Presence:
    """One phrase of one image: its probability, whether it is ``there``, and why that is known: "labelled" (it is
    there, or its source annotates it exhaustively) or "modality" (it does not occur in images of this kind)."""

    image: str
    modality: str
    label: str
    probability: float
    there: bool
    known: str


@dataclass
class Tally:
    """What the images gave: presences; (image, pair, kind, right) of swapped phrases; (image, label, synonym, same)."""

    presences: list[Presence] = field(default_factory=list)
    swaps: list[tuple[str, tuple[str, str], str, bool]] = field(default_factory=list)
    synonyms: list[tuple[str, str, str, bool]] = field(default_factory=list)


def probe(grounder: Grounder, samples: Iterable[GroundingSample], synonyms: int) -> Tally:
    """Looks at each image once, for the vocabulary and for synonyms of what is there."""
    tally, tree, vocabulary = Tally(), grounder.tree, grounder.vocabulary()
    for sample in samples:
        own = {label: boxes for _, label in vocabulary if len(boxes := boxes_of(str(label), sample.regions, tree))}
        others = [(name, label) for label in own for name in other_names(str(label), tree, synonyms)]
        (tops,) = grounder.top_boxes([read_image(sample.image).pixels], [*vocabulary, *others])
        best = dict(zip(zip(tops.labels, tops.texts or [], strict=True), torch.from_numpy(tops.boxes), strict=True))
        said = {label: text for text, label in vocabulary}
        _add_presences(tally, sample, tops.queries[: len(vocabulary)], set(own), tree)
        for a, b in itertools.combinations(own, 2):
            if kind := related(a, b, tree):
                right = all(_follows(best.get((x, said[x])), own[x], own[y]) for x, y in ((a, b), (b, a)))
                tally.swaps.append((sample.image_id, (said[a], said[b]), kind, right))
        for name, label in others:
            mine, canonical = best.get((label, name)), best.get((label, said[label]))
            if canonical is not None:
                same = mine is not None and float(pairwise_iou(mine[None], canonical[None])) >= 0.5
                tally.synonyms.append((sample.image_id, label, name, same))
    return tally


def boxes_of(label: str, regions: RegionSet, tree: LabelTree) -> torch.Tensor:
    """(N, 4) boxes of a label or of narrower ones."""
    rows = [k for k, x in enumerate(regions.labels) if x == label or (x in tree.nodes and label in tree.broader(x))]
    return torch.from_numpy(regions.boxes[rows])


def other_names(label: str, tree: LabelTree, most: int) -> list[str]:
    """At most ``most`` synonyms, evenly over the list; those that mean another label, too, are left out."""
    if label not in tree.nodes or not most:
        return []
    names = [name for name in dict.fromkeys(tree.synonyms(label)) if tree.find(name) == label]
    places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [names[k] for k in places]


def related(a: str, b: str, tree: LabelTree) -> str | None:
    """ "siblings": two of one place (left and right lung, red and white blood cells); "image": any other two of an
    image; None where one is the other said more narrowly, since both then name the same box."""
    if a not in tree.nodes or b not in tree.nodes:
        return "image"
    if a in tree.broader(b) or b in tree.broader(a):
        return None
    return "siblings" if tree.parent(a) == tree.parent(b) else "image"


def _follows(top: torch.Tensor | None, own: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether a top box (4,) overlaps a box of its own phrase, and more than any of the other phrase's."""
    if top is None:
        return False
    mine, theirs = (float(pairwise_iou(top[None], boxes).max()) for boxes in (own, others))
    return mine > theirs


def _add_presences(tally: Tally, sample: GroundingSample, queries: list[dict], own: set, tree: LabelTree) -> None:
    for query in queries:
        label = query["label"]
        foreign = label in tree.nodes and sample.modality not in tree.modalities(label)
        if label in own or label in sample.labelled or foreign:
            known = "labelled" if label in own or not foreign else "modality"
            row = (sample.image_id, sample.modality, label, query["presence"], label in own, known)
            tally.presences.append(Presence(*row))


def summary(tally: Tally, seed: int) -> dict[str, Any]:
    """JSON: ``swapped``, ``presence`` and ``synonyms``, each value with its interval over images."""
    there = [row for row in tally.presences if row.there]
    labelled = [row for row in tally.presences if row.known == "labelled"]
    other = [row for row in tally.presences if row.known == "modality"]
    modalities = sorted({row.modality for row in labelled})
    columns = _columns(labelled)
    return {
        "swapped": {
            "all": _shares(tally.swaps, lambda row: "all pairs", seed),
            "by_kind": _shares(tally.swaps, lambda row: row[2], seed),
            "by_pair": _shares(tally.swaps, lambda row: " / ".join(row[1]), seed),
        },
        "presence": {
            "auroc_other_modality": _plain(auroc(*_columns([*there, *other]), seed=seed)),
            "auroc_same_modality": _plain(auroc(*columns, seed=seed)),
            "auroc_same_modality_by_modality": {
                m: _plain(auroc(*_columns([row for row in labelled if row.modality == m]), seed=seed))
                for m in modalities
            },
            "ece": _plain(expected_calibration_error(*columns, seed=seed)),
            "ece_with_other_modalities": _plain(expected_calibration_error(*_columns(tally.presences), seed=seed)),
            "reliability": reliability(*columns, seed=seed),
        },
        "synonyms": {
            "all": _shares(tally.synonyms, lambda row: "all synonyms", seed),
            "by_label": _shares(tally.synonyms, lambda row: row[1], seed),
            "by_synonym": _shares(tally.synonyms, lambda row: f"{row[1]}: {row[2]}", seed),
        },
    }


def _columns(rows: list[Presence]) -> tuple[list[float], list[bool], list[str]]:
    return [row.probability for row in rows], [row.there for row in rows], [row.image for row in rows]


def _shares(rows: list[tuple], group: Callable[[tuple], str], seed: int) -> dict[str, dict]:
    """Group → share of rows that end in True; groups in sorted order."""
    groups = sorted({group(row) for row in rows})
    own = {name: [row for row in rows if group(row) == name] for name in groups}
    return {name: _plain(share([r[-1] for r in some], [r[0] for r in some], seed=seed)) for name, some in own.items()}


def _plain(estimate: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def table(result: dict[str, Any]) -> str:
    """The figures as text, a line each."""
    presence, swapped, synonyms = result["presence"], result["swapped"], result["synonyms"]
    rows = [(f"top box follows the phrase: {name}", row) for part in swapped.values() for name, row in part.items()]
    rows += [
        ("is it there, phrases of another modality: AUROC", presence["auroc_other_modality"]),
        ("is it there, absent in the same modality: AUROC", presence["auroc_same_modality"]),
    ]
    by_modality = presence["auroc_same_modality_by_modality"]
    rows += [(f"  {name}", row) for name, row in by_modality.items() if row["value"] is not None]
    rows += [
        ("expected calibration error, same modality", presence["ece"]),
        ("expected calibration error, with other modalities", presence["ece_with_other_modalities"]),
    ]
    rows += [(f"synonym finds the same box: {n}", row) for n, row in (synonyms["all"] | synonyms["by_label"]).items()]
    wide = max(len(name) for name, _ in rows)
    head = f"{'':<{wide}}  {'value':>6}  {'95 % interval':<15} {'n':>6} {'images':>6}"
    return "\n".join([head, *(_line(f"{name:<{wide}}", row) for name, row in rows)])


def _line(name: str, row: dict[str, Any]) -> str:
    value = "none" if row["value"] is None else f"{row['value']:.3f}"
    interval = "" if row["ci95"] is None else f"{row['ci95'][0]:.3f} – {row['ci95'][1]:.3f}"
    return f"{name}  {value:>6}  {interval:<15} {row['n']:>6} {row['images']:>6}"


def draw(result: dict[str, Any], path: Path) -> None:
    """The reliability curve with its intervals, and the shares of swapped pairs that are right."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in result["presence"]["reliability"] if row["present"] is not None]
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    if rows:
        x, y = [row["probability"] for row in rows], np.array([row["present"] for row in rows])
        ends = np.array([row["ci95"] or (row["present"], row["present"]) for row in rows])
        bars = np.abs(ends.T - y)
        left.errorbar(x, y, yerr=bars, fmt="o-", color="#0072b2", capsize=3, markersize=4)
        for row in rows:
            left.annotate(
                str(row["n"]), (row["probability"], row["present"]), (4, -9), textcoords="offset points", fontsize=7
            )
    ece = result["presence"]["ece"]["value"]
    title = "no phrase is known to be there or not" if ece is None else f"same modality, ECE {ece:.3f}"
    left.set(
        xlabel="probability of presence",
        ylabel="share that is there",
        title=title,
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    pairs = result["swapped"]["by_pair"]
    names = sorted(pairs, key=lambda name: -pairs[name]["n"])[:15][::-1]
    values = [pairs[name]["value"] for name in names]
    right.barh(names, values, color="#56b4e9")
    right.axvline(0.9, color="0.4", linestyle="--", linewidth=1)
    right.tick_params(axis="y", labelsize=7)
    right.set(xlim=(0, 1), xlabel="both phrases on their own box", title="phrases swapped in the image")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), format="png")


def run(config: ProbeConfig) -> dict[str, Any]:
    """Raises CheckpointError for another program's detector: it has no top box a phrase."""
    store, grounder = open_store(config.store), load_grounder(config.checkpoint)
    if type(grounder) is not Grounder:
        raise CheckpointError(f"{config.checkpoint}: not a MedGLIP checkpoint; the probe knows only these")
    count = min(config.images or len(store), len(store))
    places = np.linspace(0, len(store) - 1, count).round().astype(int).tolist() if count else []
    samples = (store[k] for k in tqdm(places, desc="probe", mininterval=2))
    result = summary(probe(grounder, samples, config.synonyms), config.seed)
    result |= {"checkpoint": grounder.hash, "store": str(config.store), "images": count}
    write_atomic(config.out / "probe.json", json.dumps(result, indent=1) + "\n")
    draw(result, config.out / "probe.png")
    save_run_info(config, config.out, checkpoint=grounder.hash)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        print(table(run(load_config(ProbeConfig, options.config, options.overrides))))
    except (ConfigError, StoreError, CheckpointError, PhraseError, ImageError, OSError) as error:
        sys.exit(f"grounding.probe: {error}")


if __name__ == "__main__":
    main()
