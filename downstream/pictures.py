"""Regions as pictures: drawn on their image (route `overlay`), or cut out of it (route `crop`).

Dimension key: H, W an image. Pixels are uint8, boxes xyxy in [0, 1].
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bridges.routes import NO_IMAGE

CROPS = 4  # pictures beside those of the study at most: a picture is many tokens, and the important regions are few
MARGIN = 0.25  # what a crop shows around its box, in box sides
LEAST = 8  # the shorter side of a crop is at least an eighth of the image's longer one
NAMES = ("orange", "blue", "yellow", "pink", "red", "green")  # of the colours of `grounding.overlay`, in their order


def colours_of(labels: Sequence[str]) -> list[int]:
    """The number of each label's colour: labels in their order have different ones, as long as there are any. In a
    prompt findings come first, so that the first finding is always orange."""
    order = list(dict.fromkeys(label for label in labels if label))
    return [order.index(label) % len(NAMES) if label else 0 for label in labels]


def overlaid(
    images: Sequence[np.ndarray], boxes: np.ndarray, colours: Sequence[int], image_of: Sequence[int]
) -> list[np.ndarray]:
    """`images` (H, W) or (H, W, 3) with the boxes (K, 4) of regions drawn on them, each with its number: "r0" is the
    first. An image without regions stays as it is. `image_of`: the image of each region, NO_IMAGE for none."""
    return [
        _drawn(pixels, {i: boxes[i] for i, image in enumerate(image_of) if image == number}, colours)
        for number, pixels in enumerate(images)
    ]


def _drawn(pixels: np.ndarray, boxes: dict[int, np.ndarray], colours: Sequence[int]) -> np.ndarray:
    if not boxes:
        return pixels
    from grounding.overlay import COLOURS  # matplotlib comes with it: no other route waits for that

    picture = Image.fromarray(pixels).convert("RGB")
    # Lines and letters in proportion to the image, so that they are there after it is reduced to what a model reads.
    longer = max(picture.size)
    line, font = max(1, round(longer / 128)), ImageFont.load_default(max(8, longer / 20))
    draw = ImageDraw.Draw(picture)
    for i, box in sorted(boxes.items(), reverse=True):  # the first on top
        x1, y1, x2, y2 = _pixels(box, picture.size)
        colour = COLOURS[colours[i]]
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        corner = (x1 + 2 * line, y1 + line)
        draw.text(corner, f"r{i}", fill=colour, font=font, stroke_width=max(1, line // 2), stroke_fill="black")
    return np.asarray(picture)


def _pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box's first and last pixel along each axis; at least one pixel."""
    (x1, y1, x2, y2), (width, height) = box.tolist(), size
    left, top = min(int(x1 * width), width - 1), min(int(y1 * height), height - 1)
    return left, top, max(left, min(round(x2 * width), width) - 1), max(top, min(round(y2 * height), height) - 1)


def cropped(pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of an image in a box, with `MARGIN` around it, and more where that would be too small to see."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = (box * [width, height, width, height]).tolist()
    least = max(height, width) / LEAST
    columns, rows = _span(x1, x2, width, least), _span(y1, y2, height, least)
    return np.ascontiguousarray(pixels[rows, columns])


def _span(low: float, high: float, limit: int, least: float) -> slice:
    side = max((high - low) * (1 + 2 * MARGIN), least)
    first = int(max(0.0, (low + high - side) / 2))
    last = min(limit, round((low + high + side) / 2))
    return slice(min(first, limit - 1), max(last, min(first, limit - 1) + 1))


def crops(
    images: Sequence[np.ndarray], boxes: np.ndarray, image_of: Sequence[int], order: Sequence[int]
) -> tuple[list[int], list[np.ndarray]]:
    """(regions, pictures): the first `CROPS` regions of `order` that have a box, and the cut-out of each."""
    chosen = [i for i in order if image_of[i] != NO_IMAGE][:CROPS]
    return chosen, [cropped(images[image_of[i]], boxes[i]) for i in chosen]
