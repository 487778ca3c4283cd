"""Region tokens of images that were looked at before, on disk, so that a further question costs no look at the image.

A file's name is the hash of all that its content depends on: pixels, checkpoint, phrase list, modality, this package's
version. It holds no name of a file or patient; the folder `regions` of the cache may be deleted at any time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from configs import cache_dir
from grounding.detect import Grounder
from grounding.types import RegionError, RegionTokens, load_region_tokens, save_region_tokens

FORMAT = 1


@dataclass(frozen=True)
class Remembered:
    """`tokens` of one image or volume (a batch of one), what could have been found, and `notes` (JSON)."""

    tokens: RegionTokens
    vocabulary: Mapping[str, torch.Tensor]
    notes: dict[str, Any]


def key_of(pixels: np.ndarray, grounder: Grounder, modality: str | None) -> str:
    """32 hex digits. `pixels`: uint8 of any shape; `modality`: as the user gave it, None where it was checked."""
    phrases = hashlib.sha256("\n".join(grounder.config.vocabulary).encode()).hexdigest()
    about = [FORMAT, metadata.version("med-glip"), grounder.hash, phrases, modality, list(pixels.shape)]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()[:32]


def recall(key: str) -> Remembered | None:
    """What `remember` kept; None where that is nothing, or cannot be read."""
    try:
        _, tokens, notes, vocabulary = load_region_tokens(_path(key))
    except RegionError:
        return None
    return Remembered(tokens, vocabulary, notes)


def remember(key: str, seen: Remembered) -> None:
    """Keep regions for `recall`; a disk that is full or read-only is no reason to stop."""
    try:
        save_region_tokens(_path(key), ["image"], seen.tokens, seen.notes, seen.vocabulary)
    except OSError:
        return


def _path(key: str):
    return cache_dir() / "regions" / key[:2] / f"{key}.safetensors"
