"""Images + phrases → regions, region tokens and COCO results, with a trained MedGLIP.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m grounding.predict \
        checkpoint=runs/grounder store=data/test/store out=runs/regions overlays=20

With configs/accelerate/ddp.yaml several processes share the images; a run that was killed goes on where it was.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs import ConfigError, load_config, save_run_info
from grounding.box_masks import Segmenter, add_masks, load_sam
from grounding.detect import REGIONS, Detection, Grounder, PhraseError, load_grounder
from grounding.given import read_given
from grounding.images import ImageError, read_image
from grounding.model import CheckpointError
from grounding.overlay import overlay
from grounding.shards import Blocks, Row, merge, write_block
from grounding.store import Store, StoreError, open_store
from grounding.types import GroundingSample, RegionError, RegionSet
from grounding.zero_shot import ZeroShotGrounder


@dataclass(frozen=True)
class PredictConfig:
    """``regions``: "predicted", "annotated" (the store's own), or "file:PATH" of a regions.jsonl or COCO json.
    ``tiles`` > 1: large images are looked at in overlapping tiles, too, that many along the longer side. ``overlays``:
    pictures of that many images, evenly over the store, with what was found and what is annotated. ``masks``: folder or
    hub id of a SAM-family model that makes the masks of what is predicted from its boxes."""

    checkpoint: Path
    store: Path
    out: Path
    regions: str = "predicted"
    batch_size: int = 16
    seed: int = 0
    tiles: int = 1
    overlays: int = 0
    masks: str | None = None

    def __post_init__(self):
        if self.regions not in ("predicted", "annotated") and not self.regions.startswith("file:"):
            raise ValueError(f"regions={self.regions!r}; known: predicted, annotated, file:PATH")
        if self.batch_size < 1 or self.tiles < 1 or self.overlays < 0:
            raise ValueError("batch_size and tiles must be positive, overlays not negative")


def predict(
    grounder: Grounder,
    samples: Sequence[GroundingSample],
    config: PredictConfig,
    given: dict[str, RegionSet] | None,
    sam: Segmenter | None = None,
) -> list[Row]:
    """Regions and tokens of one batch. ``given``: the regions of ``config.regions`` = "file:PATH", else None."""
    images = [read_image(sample.image).pixels for sample in samples]
    if config.regions == "predicted":
        found = [(d.candidates, d.found, d.tokens) for d in _detections(grounder, images, samples, config)]
        if sam is not None:
            rows = zip(images, found, strict=True)
            found = [(add_masks(every, x, sam), add_masks(sure, x, sam), tokens) for x, (every, sure, tokens) in rows]
    else:
        regions = [_annotated(s, grounder) if given is None else _given(s, given) for s in samples]
        found = list(zip(regions, regions, grounder.given(images, regions), strict=True))
    return [Row(sample, *row, _digest(sample)) for sample, row in zip(samples, found, strict=True)]


def _detections(
    grounder: Grounder, images: Sequence[np.ndarray], samples: Sequence[GroundingSample], config: PredictConfig
) -> list[Detection]:
    if isinstance(grounder, ZeroShotGrounder) and not grounder.tuned:  # looks for what occurs in this kind of image
        return grounder.detect_each(images, [grounder.vocabulary(sample.modality) for sample in samples])
    more: dict[str, Any] = {"tiles": config.tiles} if config.tiles > 1 else {}
    return grounder.detect(images, **more)


def _annotated(sample: GroundingSample, grounder: Grounder) -> RegionSet:
    """The store's own regions; a finding that the source labels exhaustively and that is not there was looked for."""
    names = {label: text for text, label in grounder.vocabulary()}
    queries = [{"phrase": names[x], "label": x, "presence": 0.0} for x in names if x in sample.labelled]
    return dataclasses.replace(sample.regions, queries=queries)


def _given(sample: GroundingSample, given: dict[str, RegionSet]) -> RegionSet:
    return given.get(sample.image_id) or RegionSet(np.zeros((0, 4)), [], sample.regions.image_size)


def _digest(sample: GroundingSample) -> str:
    content = sample.image if isinstance(sample.image, bytes) else Path(sample.image).read_bytes()
    return hashlib.sha256(content).hexdigest()


def blocks_of(grounder: Grounder, store: Store, config: PredictConfig) -> Blocks:
    """The blocks of a run; their key holds all that a prediction depends on."""
    given = Path(config.regions[5:]).read_bytes() if config.regions.startswith("file:") else b""
    sizes = [(file.name, file.stat().st_size) for file in sorted(store.folder.glob("*.arrow"))]
    settings = [config.regions, config.batch_size, config.tiles, config.masks]
    about = [grounder.hash, *settings, grounder.config.vocabulary, sizes, store.image_ids]
    content = json.dumps(about).encode() + given
    return Blocks(config.out, hashlib.sha256(content).hexdigest()[:16], len(store), config.batch_size)


def fill(
    grounder: Grounder, store: Store, config: PredictConfig, blocks: Blocks, numbers: Sequence[int], quiet: bool = False
) -> None:
    """Predicts the blocks ``numbers`` and draws the overlays of their images."""
    given = read_given(Path(config.regions[5:]), store) if config.regions.startswith("file:") else None
    sam = load_sam(config.masks) if config.masks else None
    drawn = set(np.linspace(0, len(store) - 1, min(config.overlays, len(store))).round().astype(int).tolist())
    images = sum(len(blocks.ranges[number]) for number in numbers)
    with tqdm(total=images, desc=f"regions ({config.regions[:9]})", disable=quiet, mininterval=2) as bar:
        for number in numbers:
            rows: list[Row] = []
            places = blocks.ranges[number]
            for start in range(0, len(places), config.batch_size):
                batch = places[start : start + config.batch_size]
                rows += predict(grounder, [store[k] for k in batch], config, given, sam)
                bar.update(len(batch))
            for k in drawn.intersection(places):
                _draw(rows[k - places.start], config.out / "overlays", k, grounder, config.regions == "annotated")
            write_block(blocks.path(number), rows)


def _draw(row: Row, folder: Path, number: int, grounder: Grounder, annotated: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", row.sample.image_id)[-80:]
    truth = None if annotated else row.sample.regions
    overlay(read_image(row.sample.image).pixels, row.found, folder / f"{number:06d}-{name}.png", grounder.tree, truth)


def finish(grounder: Grounder, store: Store, config: PredictConfig, blocks: Blocks) -> None:
    """regions.jsonl, region_tokens.safetensors, coco_results.json and coco_truth.json in ``config.out``."""
    digests = [bytes.fromhex(digest) for block in blocks.read() for digest in block.text("digests")]
    meta = {
        "checkpoint": grounder.hash,
        "phrases": hashlib.sha256("\n".join(grounder.config.vocabulary).encode()).hexdigest()[:16],
        "regions": config.regions,
        "budget": REGIONS,
        "images": hashlib.sha256(b"".join(digests)).hexdigest()[:16],
    }
    merge(blocks, store, meta, grounder.label_table())
    save_run_info(config, config.out, **meta)
    blocks.remove()


def write_predictions(grounder: Grounder, store: Store, config: PredictConfig) -> dict[str, RegionSet]:
    """The whole prediction in this process; returns the candidates, image by image. See ``finish`` for the files."""
    _check_images(store)
    blocks = blocks_of(grounder, store, config)
    fill(grounder, store, config, blocks, blocks.pending())
    sets = (regions for block in blocks.read() for regions in block.candidates())
    candidates = dict(zip(store.image_ids, sets, strict=True))
    finish(grounder, store, config, blocks)
    return candidates


def _check_images(store: Store) -> None:
    if not len(store):
        raise StoreError(f"{store.folder}: the store holds no image; build it from sources that have some")


def run(config: PredictConfig) -> None:
    """As one of the processes that ``accelerate launch`` started."""
    from grounding.training_state import setup

    store = open_store(config.store)
    _check_images(store)
    accelerator = setup(config.batch_size, config.seed)
    grounder = load_grounder(config.checkpoint)
    blocks = blocks_of(grounder, store, config)
    pending = blocks.pending()
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    own = pending[accelerator.process_index :: accelerator.num_processes]
    fill(grounder, store, config, blocks, own, quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(grounder, store, config, blocks)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    try:
        run(load_config(PredictConfig, options.config, options.overrides))
    except (ConfigError, StoreError, CheckpointError, RegionError, PhraseError, ImageError, OSError) as error:
        sys.exit(f"grounding.predict: {error}")


if __name__ == "__main__":
    main()
