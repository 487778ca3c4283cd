"""Regions drawn on their image, as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from grounding.labels import LabelTree
from grounding.types import RegionSet


def overlay(pixels: np.ndarray, regions: RegionSet, path: Path, tree: LabelTree) -> None:
    """A PNG with boxes, labels and scores; findings in red over places in thin blue."""
    figure = Figure(figsize=(7, 7), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None)
    axes.axis("off")
    h, w = pixels.shape[:2]
    for k, (x1, y1, x2, y2) in enumerate(regions.boxes):
        label = regions.labels[k]
        finding = label not in tree.nodes or tree.is_finding(label)
        color, width = ("#ff5a4d", 2.2) if finding else ("#6cb6ff", 1.0)
        axes.add_patch(_rectangle(x1 * w, y1 * h, (x2 - x1) * w, (y2 - y1) * h, color, width))
        name = tree.phrase(label) if label in tree.nodes else label
        score = "" if regions.scores is None else f" {regions.scores[k]:.2f}"
        axes.text(
            x1 * w + 1, y1 * h - 1, f"[r{k}] {name}{score}", color=color, fontsize=9 if finding else 7, va="bottom"
        )
    figure.savefig(str(path), format="png")


def _rectangle(x: float, y: float, width: float, height: float, color: str, line: float):
    return Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=line)
