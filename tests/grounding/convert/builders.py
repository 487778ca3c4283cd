"""What the tests of several converters share: items read as the build reads them, real files, pictures and masks."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from grounding.convert.record import Skipped, find_label
from grounding.labels import load_label_tree
from grounding.types import GroundingSample

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
JUNK = (b"", b'"', b",", b"null", b"[", b"}", b"NaN", b"-9e999", b"\xff\x00", b"99999999999999999999", b"\n", b"../")


# Reading


def collect(items):
    """(samples, skipped) as the build gathers them: from a worker, where an error skips the item. No two items have
    one key."""
    items = list(items)
    assert len({item.key for item in items}) == len(items)
    return _collect(items)


def collect_by_id(items):
    """({image_id: sample}, skipped), where a list may name an item twice."""
    samples, skipped = _collect(items)
    return {sample.image_id: sample for sample in samples}, skipped


def collect_with_reasons(items):
    """(samples, [(key, why)])."""
    samples, skipped = _collect(items)
    return samples, [(record.key, record.why) for record in skipped]


def _collect(items):
    samples, skipped = [], []
    for item in items:
        try:
            done = list(pickle.loads(pickle.dumps(item.read))())
        except (ValueError, OSError) as error:
            done = [Skipped(item.key, str(error))]
        samples += [record for record in done if isinstance(record, GroundingSample)]
        skipped += [record for record in done if isinstance(record, Skipped)]
    assert len({sample.image_id for sample in samples}) == len(samples)
    return samples, skipped


def read_mutants(root, files, count=100):
    """How many outcomes (samples or not, records skipped, errors that name something) `count` mutants of each of
    {name: (text, converter)} have. Raises what is no ValueError or OSError."""
    chance, outcomes = random.Random(0), 0
    for name, (text, source) in files.items():
        for _ in range(count):
            data = bytearray(text.encode())
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(len(data))
                data[place : place + chance.randint(0, 3)] = chance.choice(JUNK)
            (root / name).write_bytes(data)
            try:
                samples, skipped = collect_by_id(source(root, "x", ""))
                outcomes += bool(samples) + len(skipped)
            except (ValueError, OSError):
                outcomes += 1
    return outcomes


# Files


def real(*parts):
    """A path of shared/data; skips the test where it is not there."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared/data/{'/'.join(parts)} is not here")
    return path


def save(path, pixels, **options):
    """An image, or what becomes one of uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8))
    image.save(path, **options)
    return path


def picture(path, width=1024, height=1024):
    """A grey image."""
    return save(path, Image.new("L", (width, height), 60))


# Regions


def label(phrase):
    return find_label(phrase, load_label_tree())


def boxes_in_pixels(sample):
    """(N, 4) xyxy."""
    height, width = sample.regions.image_size
    return sample.regions.boxes * [width, height, width, height]


def decoded(mask):
    """COCO RLE → (H, W) bool."""
    return rle.decode(mask).astype(bool)


def masks_of(sample):
    """(H, W) bool of every region."""
    return [decoded(mask) for mask in sample.regions.masks or []]
