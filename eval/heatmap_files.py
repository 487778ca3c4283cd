"""Heat maps in a file: one safetensors file with a tensor (H, W) for each image and phrase.

The name of a tensor is the image id, a tab and the phrase; an id holds no tab. A map covers the whole image at any
resolution. Values are the model's own, of any real type that numpy has; overlap is measured at .1, .2 ... .5 of them.

    from safetensors.numpy import save_file
    save_file({f"{image_id}\t{phrase}": heat for (image_id, phrase), heat in maps.items()}, "maps.safetensors")
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from eval.types import ScoreError

TYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_NAMING = 'name each "IMAGE_ID\\tPHRASE"'


class ImageHeatmaps(Mapping[str, np.ndarray]):
    """phrase → (H, W) of one image, each read when it is asked for: a file may be larger than the memory."""

    def __init__(self, file: Any, names: dict[str, str]):
        self._file, self._names = file, names

    def __getitem__(self, phrase: str) -> np.ndarray:
        return self._file.get_tensor(self._names[phrase])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Heatmaps = dict[str, ImageHeatmaps]


def read_heatmaps(path: str | Path) -> Heatmaps:
    """image_id → phrase → map. Raises ScoreError where the file is none, naming the first tensor that is no map."""
    try:
        file: Any = safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScoreError(f"{path}: not a safetensors file ({why}); docs/evaluation.md has the form") from None
    names: dict[str, dict[str, str]] = {}
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        image_id, tab, phrase = name.partition("\t")
        if not (image_id and tab and phrase):
            raise ScoreError(f"{path}: tensor {name!r} is of no image and phrase; {_NAMING}")
        part = file.get_slice(name)
        shape, kind = part.get_shape(), part.get_dtype()
        if len(shape) != 2 or 0 in shape or kind not in TYPES:
            raise ScoreError(f"{path}: tensor {name!r} is {kind} of shape {shape}; a map is float32 (rows, columns)")
        names.setdefault(image_id, {})[phrase] = name
    if not names:
        raise ScoreError(f"{path}: holds no heat maps; {_NAMING}")
    return {image_id: ImageHeatmaps(file, phrases) for image_id, phrases in names.items()}
