"""What self-contained pages are made of: a template filled with data, and masks as outlines.

A template has the marks {{style}} and {{script}}, for what pages share (page_base.css, page_base.js), and {{data}} for
its data as one JSON block. Scripts set all text as text, never as markup.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import contourpy
import numpy as np
from faster_coco_eval.core import mask as rle
from matplotlib.path import Path as Polygon

SHARED = {"{{style}}": "page_base.css", "{{script}}": "page_base.js"}
DATA_MARK = "{{data}}"
TOLERANCE = 0.35  # pixels that a drawn outline may leave the mask's by


def self_contained(template: str, data: Mapping[str, Any]) -> str:
    """The page: no file, font or address outside it. data: JSON-ready, all numbers finite."""
    # No "<" in the block: neither "</script" nor "<!--" can end it.
    block = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    for mark, name in SHARED.items():
        template = template.replace(mark, resources.files("eval").joinpath(name).read_text(encoding="utf-8"))
    return template.replace(DATA_MARK, block)


def contour(mask: Mapping[str, Any], scale: tuple[float, float] = (1.0, 1.0), tolerance: float = TOLERANCE) -> str:
    """The outlines of a COCO RLE mask as an SVG path, corner of the first pixel at (0, 0); "" for an empty mask.

    scale: (x, y) units of the path a pixel. tolerance: in pixels.
    """
    inside = np.pad(rle.decode(dict(mask)), 1)
    outlines = []
    for line in contourpy.contour_generator(z=inside).lines(0.5):
        polygon = Polygon(line - 0.5)  # one pixel of padding, and pixel centres at 0.5
        polygon.should_simplify, polygon.simplify_threshold = True, tolerance
        points = polygon.cleaned(simplify=True).vertices[:-1] * scale  # the last one is matplotlib's stop mark
        outlines.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(outlines)
