"""Regions drawn on their image, as a picture: thin lines with a dark rim, which show on bright and on dark ground and
hide little; one colour a label; annotations dashed in white.

Dimension key: H, W the image, h, w the picture of it, N regions.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from pycocotools import mask as rle

from grounding.labels import LabelTree
from grounding.types import RegionSet

# Told apart by the colour-blind, too (Okabe and Ito, 2008, https://jfly.uni-koeln.de/color/), without black and the
# dark blue, which is lost on a black ground.
COLOURS = ("#e69f00", "#56b4e9", "#f0e442", "#cc79a7", "#d55e00", "#009e73")
LONGEST = 1400  # pixels of the picture's longer side; larger images are reduced
FEW = 8  # regions that have their names beside them; of more, the legend has them
RIM = [withStroke(linewidth=2.2, foreground="black")]


def overlay(
    pixels: np.ndarray, regions: RegionSet, path: Path, tree: LabelTree, truth: RegionSet | None = None
) -> None:
    """A PNG of uint8 (H, W) or (H, W, 3) ``pixels`` with boxes, outlines of masks, names and scores of ``regions``, and
    the boxes of ``truth``, the annotations, dashed."""
    picture = _reduced(pixels)
    h, w = picture.shape[:2]
    lines, names = _legend(regions, colours := _colours(regions, tree), tree, truth)
    inches, legend = 7 / max(h, w), 0.6 + 0.055 * max(map(len, names))
    figure = Figure(figsize=(w * inches + legend, max(h * inches, 2.0)), dpi=130, facecolor="black")
    share = w * inches / (w * inches + legend)
    axes = figure.add_axes((0, 0, share, 1))
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=255, aspect="equal")
    axes.axis("off")
    if truth is not None:
        for box in truth.boxes:
            axes.add_patch(_rectangle(box, w, h, "white", "--"))
    for k in reversed(range(len(regions))):  # the best on top
        _draw(axes, regions, k, colours[regions.labels[k]], (h, w), tree)
    axes.set_xlim(-0.5, w - 0.5)
    axes.set_ylim(h - 0.5, -0.5)
    figure.legend(
        lines, names, loc="upper left", bbox_to_anchor=(share, 1), fontsize=7, labelcolor="white", frameon=False
    )
    figure.savefig(str(path), format="png", facecolor="black")


def _reduced(pixels: np.ndarray) -> np.ndarray:
    if max(pixels.shape[:2]) <= LONGEST:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST))
    return np.asarray(image)


def _colours(regions: RegionSet, tree: LabelTree) -> dict[str, str]:
    """Label → colour, findings first, so that few labels always have the colours that differ most."""
    labels = sorted(dict.fromkeys(regions.labels), key=lambda label: label in tree.nodes and not tree.is_finding(label))
    return {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}


def _draw(axes: Axes, regions: RegionSet, k: int, colour: str, size: tuple[int, int], tree: LabelTree) -> None:
    h, w = size
    box = regions.boxes[k]
    mask = None if regions.masks is None else regions.masks[k]
    if mask is not None:
        _outline(axes, mask, box, size, colour)
    axes.add_patch(_rectangle(box, w, h, colour, "-"))
    score = "" if regions.scores is None else f" {regions.scores[k]:.2f}"
    named = _is_named(regions, k, tree)
    name = f" {_name(regions.labels[k], tree)}" if named else ""
    low = box[1] * h < 0.04 * h  # no room above the image
    crowd = int((np.abs(regions.boxes[:k, :2] - box[:2]).max(1, initial=0) < 0.03).sum())  # better ones at this corner
    axes.annotate(
        f"r{k}{name}{score}",
        (min(max(box[0] * w, 0), 0.98 * w), (box[3] if low else box[1]) * h),
        (0, (-1 if low else 1) * (1 + 8 * crowd)),
        textcoords="offset points",
        color=colour,
        fontsize=7 if named else 5.5,
        va="top" if low else "bottom",
        ha="right" if box[0] > 0.75 else "left",
        path_effects=[withStroke(linewidth=1.1, foreground="black")],
        annotation_clip=False,
    )


def _is_named(regions: RegionSet, k: int, tree: LabelTree) -> bool:
    """All of few regions, and the findings among many places."""
    places = [label in tree.nodes and not tree.is_finding(label) for label in regions.labels]
    return len(regions) <= FEW or (not places[k] and places.count(False) <= FEW)


def _outline(axes: Axes, mask: dict, box: np.ndarray, size: tuple[int, int], colour: str) -> None:
    """The edge of a mask; of a large image's, at the picture's pixels."""
    h, w = size
    whole = rle.decode(mask)
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(size, whole.shape, strict=True))
    inside = whole[rows][:, columns]
    if min(size) > 1 and inside.any() and not inside.all():
        axes.contour(np.arange(w), np.arange(h), inside, levels=[0.5], colors=[colour], linewidths=0.7, alpha=0.9)


def _rectangle(box: np.ndarray, w: int, h: int, colour: str, line: str) -> Rectangle:
    """``box``: (4,) xyxy in [0, 1]; pixel k of the picture reaches from k - 0.5 to k + 0.5."""
    x1, y1, x2, y2 = box * [w, h, w, h] - 0.5
    return Rectangle(
        (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.0, linestyle=line, path_effects=RIM
    )


def _name(label: str, tree: LabelTree) -> str:
    return tree.phrase(label) if label in tree.nodes else label


def _legend(
    regions: RegionSet, colours: dict[str, str], tree: LabelTree, truth: RegionSet | None
) -> tuple[list[Line2D], list[str]]:
    """A line a label, with the numbers of its regions and their best score."""
    lines, names = [], []
    for label, colour in colours.items():
        own = [k for k, x in enumerate(regions.labels) if x == label]
        ids = ", ".join(f"r{k}" for k in own[:4]) + (f" … r{own[-1]}" if len(own) > 4 else "")
        best = "" if regions.scores is None else f", best {max(regions.scores[k] for k in own):.2f}"
        count = f" ({len(own)}{best})" if len(own) > 1 else best.replace(", best", "")
        lines.append(Line2D([], [], color=colour))
        names.append(f"{ids}: {_name(label, tree)}{count}")
    if truth is not None:
        lines.append(Line2D([], [], color="white", linestyle="--"))
        names.append(f"annotated ({len(truth)})")
    if not lines:
        lines.append(Line2D([], [], color="none"))
        names.append("no region found")
    return lines, names
