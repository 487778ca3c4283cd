"""What an experiment takes away to see what it was worth."""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from PIL import Image

from grounding.store import Store
from grounding.types import GroundingSample


class BlankImages:
    """A store whose images are grey all over, each of its own size; patients, regions and spacing are as they were.

    A bridge that was trained with images and is asked with these says what it needs them for; trained and asked with
    them on route `none`, it has the text of the question alone.
    """

    def __init__(self, store: Store):
        self.store = store

    @property
    def image_ids(self) -> Sequence[str]:
        return self.store.image_ids

    def by_id(self, image_id: str) -> GroundingSample:
        sample = self.store.by_id(image_id)
        return replace(sample, image=blank(sample.regions.image_size))


@lru_cache(maxsize=8)
def blank(size: tuple[int, int]) -> bytes:
    """PNG of a grey image of `size` (H, W)."""
    stream = io.BytesIO()
    Image.new("L", (size[1], size[0]), 128).save(stream, "PNG")
    return stream.getvalue()
