"""The model card of a bridge, in the layout of the Hugging Face hub, written by the training program beside it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bridges.region_vlm import BridgeConfig, checkpoint_hash, read_checkpoint
from configs import write_atomic
from downstream.samples import ReportSample, VQASample
from grounding.model_card import data_section, files_table, number, table
from grounding.store import open_store

SETTINGS = (
    *("route", "source", "k", "names", "presence", "cite_answers", "align_steps", "projector_steps", "batch_size"),
    *("pack", "accumulation", "processes", "lr", "bridge_lr", "weight_decay", "warmup", "clip", "seed", "bf16"),
    *(
        "lora_r",
        "lora_layers",
        "lora_kind",
        "lora_targets",
        "four_bit",
        "max_answer",
        "annotated_share",
        "region_dropout",
        "feature_dropout",
    ),
    *("blank_image", "limit"),
)
READS = {
    "none": "It sees the image alone, no region.",
    "text": "The regions stand in the question, written out.",
    "overlay": "The regions are drawn on the image.",
    "crop": "The regions are cut out, as further images.",
    "tokens": "Each region is one token: its feature, box, label, score and level, projected.",
}


def write_bridge_card(
    out: Path,
    training: Mapping[str, Any],
    samples: Sequence[VQASample | ReportSample],
    detectors: Mapping[str, str | None],
    evaluations: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """`out`/checkpoint/README.md of a training in `out`, whose run.json is written. `training`: its settings and facts;
    `samples`: what it was trained on; `detectors`: region-token file → hash of what found them; `evaluations`: rows of
    `downstream.validation.Validation`."""
    checkpoint = out / "checkpoint"
    config, settings = read_checkpoint(checkpoint)
    stores = {"Trained on": open_store(Path(training["data"]) / "store")}
    if training["val"] is not None:
        stores["Judged on"] = open_store(Path(training["val"]) / "store")
    parts = [
        _head(config, sorted({sample.modality for sample in samples if sample.modality})),
        "# Med-GLIP bridge: answers and reports that rest on regions",
        f"LoRA adapter, region projector and image projector for the base model `{config.base}` (weights "
        f"`{config.fingerprint}`), which is not in this folder. An image, up to {training['k']} regions of a grounding "
        f"model and a question go in; an answer or a report comes out. {READS[training['route']]}",
        "## Intended use",
        "Research only. Not a medical device; not validated for any clinical decision. It answers questions of the "
        "kinds below, about images like those it was trained on; answers about others are guesses. Regions should "
        "come from the detector that it was trained with.",
        "    python -m downstream.predict checkpoint=CHECKPOINT data=DATA predicted=REGION_TOKENS out=OUT",
        "## Training data",
        *(data_section(role, store) for role, store in stores.items()),
        table(("questions and reports", "samples"), _kinds(samples)),
        table(("regions", "detector"), [(name, f"`{found or 'not stated'}`") for name, found in detectors.items()]),
        "## Training",
        table(("setting", "value"), [("steps", settings["steps"]), *((x, _cell(training[x])) for x in SETTINGS)]),
        "## Evaluation during training",
        *_evaluations(evaluations or [], settings["steps"]),
        "## Files",
        files_table({"checkpoint (adapter and bridge)": checkpoint_hash(checkpoint)}, stores, out),
    ]
    write_atomic(checkpoint / "README.md", "\n\n".join(parts) + "\n")


def _head(config: BridgeConfig, modalities: Sequence[str]) -> str:
    """The hub's metadata; the licence is the base model's and the data's."""
    about: dict[str, Any] = {"library_name": "med-glip", "pipeline_tag": "image-text-to-text"}
    if config.base not in ("embedded", "tiny"):
        about["base_model"] = config.base
    about |= {"license": "other", "license_name": "see-base-model-and-training-data"}
    about["tags"] = ["medical", "visual-question-answering", "lora", "research-only", *modalities]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def _kinds(samples: Sequence[VQASample | ReportSample]) -> list[tuple[str, str]]:
    kinds = Counter("reports" if isinstance(s, ReportSample) else s.question_type or s.answer_type for s in samples)
    return [(name, f"{count:,}") for name, count in sorted(kinds.items())]


def _evaluations(rows: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    if not rows:
        return ["None. `downstream.predict` on a held-out folder and `medglip score` say how good it is."]
    lines = []
    for row in rows:
        span = "-" if row["ci95"] is None else " to ".join(map(number, row["ci95"]))
        kept = "kept" if row["step"] + 1 == steps else ""
        lines.append((row["step"] + 1, number(row["value"]), span, row["n"], kept))
    told = f"{rows[0]['metric']} of what it generates for samples that it was not trained on; the weights with the "
    told += "highest value are kept, which makes that value too high: judge on other samples."
    return [told, table(("after steps", rows[0]["metric"], "95 %", "n", ""), lines)]


def _cell(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value
