"""Images + phrases → regions, region tokens and COCO results, with a trained MedGLIP.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m grounding.predict \
        --config configs/grounding/predict.yaml checkpoint=runs/grounder store=data/test/store out=runs/regions
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info, write_atomic
from grounding.detect import REGIONS, Grounder, PhraseError, load_grounder
from grounding.images import ImageError, read_image
from grounding.model import CheckpointError
from grounding.store import Store, StoreError, open_store
from grounding.types import (
    GroundingSample,
    RegionError,
    RegionSet,
    RegionTokens,
    read_regions,
    save_region_tokens,
    stack_region_tokens,
    write_regions,
)


@dataclass(frozen=True)
class PredictConfig:
    """``regions``: "predicted", "annotated" (the store's own), or "file:PATH" of a regions.jsonl."""

    checkpoint: Path
    store: Path
    out: Path
    regions: str = "predicted"
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.regions not in ("predicted", "annotated") and not self.regions.startswith("file:"):
            raise ValueError(f"regions={self.regions!r}; known: predicted, annotated, file:PATH")


def predict(
    grounder: Grounder, store: Store, config: PredictConfig, quiet: bool = False
) -> Iterator[tuple[GroundingSample, RegionSet, RegionSet, RegionTokens]]:
    """(sample, candidates, found, tokens) of every image of a store."""
    given = read_regions(Path(config.regions[5:])) if config.regions.startswith("file:") else None
    starts = range(0, len(store), config.batch_size)
    for start in tqdm(starts, desc=f"regions ({config.regions[:9]})", disable=quiet, mininterval=2):
        samples = [store[k] for k in range(start, min(start + config.batch_size, len(store)))]
        images = [read_image(sample.image).pixels for sample in samples]
        if config.regions == "predicted":
            for sample, d in zip(samples, grounder.detect(images), strict=True):
                yield sample, d.candidates, d.found, d.tokens
            continue
        regions = [_annotated(s, grounder) if given is None else _given(s, given) for s in samples]
        yield from zip(samples, regions, regions, grounder.given(images, regions), strict=True)


def _annotated(sample: GroundingSample, grounder: Grounder) -> RegionSet:
    """The store's own regions; a finding that the source labels exhaustively and that is not there was looked for."""
    looked_for = [label for label in grounder.config.vocabulary if label in sample.labelled]
    queries = [{"phrase": grounder.tree.phrase(x), "label": x, "presence": 0.0} for x in looked_for]
    return dataclasses.replace(sample.regions, queries=queries)


def _given(sample: GroundingSample, given: dict[str, RegionSet]) -> RegionSet:
    return given.get(sample.image_id) or RegionSet(np.zeros((0, 4)), [], sample.regions.image_size)


def write_predictions(grounder: Grounder, store: Store, config: PredictConfig) -> dict[str, RegionSet]:
    """regions.jsonl, region_tokens.safetensors, coco_results.json and coco_truth.json in ``config.out``; returns the
    candidates, image by image."""
    rows = list(predict(grounder, store, config))
    ids = [sample.image_id for sample, *_ in rows]
    meta = {
        "checkpoint": grounder.hash,
        "phrases": hashlib.sha256("\n".join(grounder.config.vocabulary).encode()).hexdigest()[:16],
        "regions": config.regions,
        "budget": REGIONS,
        "images": hashlib.sha256(b"".join(hashlib.sha256(_bytes(s)).digest() for s, *_ in rows)).hexdigest()[:16],
    }
    write_regions(config.out / "regions.jsonl", {s.image_id: found for s, _, found, _ in rows})
    tokens = stack_region_tokens([row[3] for row in rows])
    save_region_tokens(config.out / "region_tokens.safetensors", ids, tokens, meta, grounder.label_table())
    write_coco(config.out, [(sample, candidates) for sample, candidates, *_ in rows])
    save_run_info(config, config.out, **meta)
    return {sample.image_id: candidates for sample, candidates, *_ in rows}


def _bytes(sample: GroundingSample) -> bytes:
    return sample.image if isinstance(sample.image, bytes) else Path(sample.image).read_bytes()


def write_coco(out: Path, rows: Sequence[tuple[GroundingSample, RegionSet]]) -> None:
    """coco_results.json and coco_truth.json; ids count from 1, since id 0 counts as "no match" in COCO evaluation."""
    labels = sorted({label for sample, found in rows for label in (*sample.regions.labels, *found.labels)})
    categories = {label: k for k, label in enumerate(labels, 1)}
    images, annotations, results = [], [], []
    for number, (sample, found) in enumerate(rows, 1):
        height, width = sample.regions.image_size
        about = {"patient_id": sample.patient_id, "source": sample.source, "labelled": list(sample.labelled)}
        images.append({"id": number, "file_name": sample.image_id, "height": height, "width": width, **about})
        for annotation in sample.regions.to_coco(number, categories):
            size = annotation["bbox"][2] * annotation["bbox"][3]
            annotations.append(annotation | {"id": len(annotations) + 1, "area": size, "iscrowd": 0})
        results += found.to_coco(number, categories)
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": label} for label, k in categories.items()],
    }
    write_atomic(out / "coco_truth.json", json.dumps(truth))
    write_atomic(out / "coco_results.json", json.dumps(results))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(PredictConfig, options.config, options.overrides)
        write_predictions(load_grounder(config.checkpoint), open_store(config.store), config)
    except (ConfigError, StoreError, CheckpointError, RegionError, PhraseError, ImageError, OSError) as error:
        sys.exit(f"grounding.predict: {error}")


if __name__ == "__main__":
    main()
