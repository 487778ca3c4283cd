"""Going on from a checkpoint: its weights as a start, its vocabulary kept, and what of it was lost."""

import dataclasses
import json
from pathlib import Path

import torch
from tqdm import tqdm

from configs import write_atomic
from eval.grounding import scores_by_source
from eval.records import RegionFiles
from eval.types import Score
from grounding.data import Stores
from grounding.detect import load_grounder
from grounding.images import read_image
from grounding.labels import LabelTree
from grounding.model import CheckpointError, MedGLIP, MedGLIPConfig, load_checkpoint
from grounding.store import Store

JUDGED = ("AP50", "acc@0.5")


def start_from(model: MedGLIP, init: Path, tree: LabelTree) -> None:
    """Gives ``model`` the weights of the checkpoint ``init``.

    Raises CheckpointError naming the label that this tree does not have, or the tensor that has another shape.
    """
    old = load_checkpoint(init)
    check_labels(old.config, init, tree)
    if old.config.text_encoder != model.config.text_encoder:
        raise CheckpointError(
            f"{init}: its phrases are encoded by {old.config.text_encoder!r}, this run's by "
            f"{model.config.text_encoder!r}; give text_encoder={old.config.text_encoder}"
        )
    mine, theirs = model.state_dict(), {k: v for k, v in old.state_dict().items() if k != "familiar"}
    for name in sorted((mine.keys() | theirs.keys()) - {"familiar"}):
        here, there = (tuple(x[name].shape) if name in x else None for x in (mine, theirs))
        if here != there:
            raise CheckpointError(
                f"{init}: tensor {name} is {_shape(there)} there and {_shape(here)} here; {_remedy(old.config, model)}"
            )
    with torch.no_grad():
        for name, tensor in theirs.items():
            mine[name].copy_(tensor)


def check_labels(config: MedGLIPConfig, folder: Path, tree: LabelTree) -> None:
    """Raises CheckpointError where a checkpoint's labels are of another label tree; free phrases are of none."""
    unknown = [x for x in config.vocabulary if x not in tree.nodes and x not in config.phrases]
    if unknown:
        raise CheckpointError(
            f"{folder}: its label {unknown[0]!r} is not in this label tree (nor are {len(unknown) - 1} others); use "
            "the configs/labels.yaml that it was trained with"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "×".join(map(str, shape)) or "a number"


def _remedy(old: MedGLIPConfig, model: MedGLIP) -> str:
    """The settings of the two that differ, if there are any."""
    names = ("trunk", "width", "fusion", "adapters", "mask_head", "region_width", "prototypes", "prompt_tokens")
    differ = [name for name in names if getattr(old, name) != getattr(model.config, name)]
    return "give " + " ".join(f"{name}={getattr(old, name)}" for name in differ) if differ else "train a new one"


def widened(config: MedGLIPConfig, old: MedGLIPConfig, tree: LabelTree) -> MedGLIPConfig:
    """``config`` with all that ``old`` could find: who fine-tunes does not mean to unlearn."""
    labels = {*config.vocabulary, *old.vocabulary}
    ordered = [x for x in tree.ids if x in labels]
    most = {x: max(n, config.most_boxes.get(x, 0)) for x, n in old.most_boxes.items()}
    return dataclasses.replace(
        config,
        vocabulary=(*ordered, *sorted(labels - set(ordered))),
        phrases=tuple(dict.fromkeys((*config.phrases, *old.phrases))),
        modalities=tuple(sorted({*config.modalities, *old.modalities})),
        most_boxes=config.most_boxes | most,
    )


def keep_thresholds(new: MedGLIPConfig, old: MedGLIPConfig, shown: set[str]) -> MedGLIPConfig:
    """The old threshold of each label that the calibration images did not show."""
    kept = {label: limit for label, limit in old.thresholds.items() if label not in shown}
    return dataclasses.replace(new, thresholds=new.thresholds | kept)


def write_forgetting(out: Path, init: Path, store: Store | Stores, rows: list[int]) -> dict[str, dict]:
    """``out``/forgetting.json: by old source, how well ``init`` and the checkpoint in ``out`` find what is annotated in
    those ``rows`` of ``store``; returned, too."""
    before, after = (scores_of(folder, store, rows) for folder in (init, out))
    report = {
        source: {"images": before[source]["images"], **{name: _change(before, after, source, name) for name in JUDGED}}
        for source in before
    }
    write_atomic(out / "forgetting.json", json.dumps({"init": str(init), "sources": report}, indent=1))
    return report


def _change(before: dict, after: dict, source: str, name: str) -> dict:
    one, two = before[source][name], after[source][name]
    return {
        "before": one.value,
        "before_ci95": one.ci95,
        "after": two.value,
        "after_ci95": two.ci95,
        "change": None if one.value is None or two.value is None else round(two.value - one.value, 4),
    }


def scores_of(checkpoint: Path, store: Store | Stores, rows: list[int]) -> dict[str, dict[str, Score | int]]:
    """Source → scores of a checkpoint on those images, and how many they are."""
    grounder = load_grounder(checkpoint)
    samples = [store[k] for k in rows]
    said = {}
    for sample in tqdm(samples, desc=f"old sources with {checkpoint.name}", mininterval=2):
        known = sample.modality in grounder.config.modalities
        (found,) = grounder.detect([read_image(sample.image).pixels], modality=sample.modality if known else None)
        said[sample.image_id] = found.candidates
    columns = {name: {s.image_id: getattr(s, key) for s in samples} for name, key in COLUMNS.items()}
    scores = scores_by_source(RegionFiles(said, **columns))
    counts = {source: sum(s.source == source for s in samples) for source in scores}
    return {source: {"images": counts[source], **scores[source]} for source in scores}


COLUMNS = {
    "references": "regions",
    "patients": "patient_id",
    "sources": "source",
    "modalities": "modality",
    "labelled": "labelled",
}
