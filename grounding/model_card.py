"""A model card in the layout of the Hugging Face hub, written by the training program from what it did."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from configs import write_atomic
from grounding.labels import LabelTree
from grounding.model import MedGLIPConfig, checkpoint_hash
from grounding.store import Store

MOST_LABELS = 400  # rows of the table; config.json has them all


def write_model_card(
    out: Path,
    config: MedGLIPConfig,
    stores: Mapping[str, Store],
    training: Mapping[str, object],
    tree: LabelTree,
    forgetting: Mapping[str, Mapping] | None = None,
) -> None:
    """``out``/README.md of the checkpoint in ``out``. ``stores``: what it was trained on, by role; ``training``: name →
    value of each setting to show; ``forgetting``: as `grounding.fine_tune.write_forgetting` returns it."""
    parts = [
        _head(config),
        "# MedGLIP: a grounding model for medical images",
        "Images and phrases in; boxes, masks, scores and region features out. A phrase's score does not depend on the "
        "other phrases.",
        "## Intended use",
        "Research only. Not a medical device; not validated for any clinical decision. It knows "
        f"{', '.join(config.modalities)} and the labels below, and answers about others are guesses.",
        "## Training data",
        *(data_section(role, store) for role, store in stores.items()),
        "## Training",
        "The last `calibration` images of each of these stores set thresholds and probabilities; nothing is trained "
        "on them.",
        table(("setting", "value"), training.items()),
        *_forgetting(forgetting),
        "## Labels",
        _labels(config, tree),
        "## Files",
        files_table({"checkpoint (weights and configuration)": checkpoint_hash(out)}, stores, out),
    ]
    write_atomic(out / "README.md", "\n\n".join(parts) + "\n")


def _head(config: MedGLIPConfig) -> str:
    """The hub's metadata. The licence is the data's, and of several sources no single one."""
    about = {
        "library_name": "med-glip",
        "pipeline_tag": "zero-shot-object-detection",
        "license": "other",
        "license_name": "see-training-data",
        "tags": ["medical", "grounding", "research-only", *config.modalities],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def data_section(role: str, store: Store) -> str:
    """Images and licences by source, as the store has them."""
    images, licences = Counter(store.column("source")), {}
    for source, licence in zip(store.column("source"), store.column("licence"), strict=True):
        licences.setdefault(source, Counter())[licence or "not stated"] += 1
    rows = [(name, f"{count:,}", "; ".join(licences[name])) for name, count in sorted(images.items())]
    return f"{role}: {len(store):,} images, {store.regions:,} regions.\n\n" + table(
        ("source", "images", "licence"), rows
    )


def _forgetting(report: Mapping[str, Mapping] | None) -> list[str]:
    if not report:
        return []
    rows = [(name, row["images"], *(number(row["AP50"][key]) for key in CHANGE)) for name, row in report.items()]
    return ["## Old sources, AP50 before and after", table(("source", "images", *CHANGE), rows)]


CHANGE = ("before", "after", "change")


def _labels(config: MedGLIPConfig, tree: LabelTree) -> str:
    """Each label with the score from which on it counts as found."""
    rows = []
    for label in config.vocabulary[:MOST_LABELS]:
        phrase = tree.phrase(label) if label in tree.nodes else label
        rows.append((f"`{label}`", phrase, number(config.thresholds.get(label))))
    rest = len(config.vocabulary) - len(rows)
    return table(("label", "phrase", "threshold"), rows) + (f"\n\nand {rest} more, in config.json." if rest > 0 else "")


def files_table(hashes: Mapping[str, str], stores: Mapping[str, Store], out: Path) -> str:
    """What identifies the weights (`hashes`: what → hash) and what they were made from; `out` holds the run.json."""
    rows = [*hashes.items()]
    rows += [(f"{role}: store.json", digest(store.folder / "store.json")) for role, store in stores.items()]
    run = json.loads((out / "run.json").read_text())
    rows += [("code", run["git_commit"] or "not a git checkout")]
    rows += [(name, version) for name, version in run["versions"].items() if version]
    return table(("what", "hash or version"), [(name, f"`{value}`") for name, value in rows])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def table(head: Sequence[str], rows) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
