"""Merge a trained bridge's LoRA into its base model, and write both with the processor, as plain transformers loads it.

    python -m downstream.export --checkpoint runs/text/checkpoint --out runs/text/merged

The result answers by the routes `none` and `text` without this package, with `AutoModelForImageTextToText` and
`AutoProcessor`. Route `tokens` needs the checkpoint itself, since its region projector is no part of the model. (The
tower of the base "embedded" is this package's own: its export loads after `import grounding.efficientnet`.)
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from bridges.region_vlm import RegionVLM, read_checkpoint
from downstream.base import BaseModelError
from downstream.embedded import load_base


def export(checkpoint: Path, out: Path) -> None:
    """Write the merged model of `checkpoint`, in float32, and its processor to `out`, which appears whole or not at all
    and replaces an older one.

    Raises CheckpointError or BaseModelError where one of them cannot be used, ValueError for a base in 4 bits.
    """
    config, _ = read_checkpoint(checkpoint)
    if config.four_bit:
        raise ValueError(f"{checkpoint}: LoRA does not merge exactly into 4-bit weights; train with four_bit=false")
    base = load_base(config.base)
    model = RegionVLM.load(checkpoint, base.model, base.fingerprint).merge()
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        model.save_pretrained(part)
        base.save_processor(part)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that downstream.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.out)
    except (BaseModelError, ValueError, OSError) as error:
        sys.exit(f"downstream.export: {error}")


if __name__ == "__main__":
    main()
