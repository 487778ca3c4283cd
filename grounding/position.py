"""Where in the image a phrase says that its thing is: "polyp at the bottom", "largest nodule", "lesion in the upper
left part of the image".

**Image left is not patient left.** A chest film or an axial slice shows the patient's left on the right of the image,
and a slice may have been flipped. So "left" and "right" are read as directions of the image only where the phrase says
so ("left part", "left half", "on the left of the image", "left-most"), or where nothing in that part of the body has
sides (a polyp, a skin lesion, a blood cell). Everywhere else they belong to the name ("left lung", "nodule on the
left"): the label has the side, and geometry has no say in it.

Boxes are xyxy in [0, 1] of the image as the user gave it; x grows to the image's right, y downwards.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grounding.labels import normalise

Span = tuple[float, float]

_ROWS = {"upper": (0.0, 0.5), "top": (0.0, 0.5), "lower": (0.5, 1.0), "bottom": (0.5, 1.0)}
_COLUMNS = {"left": (0.0, 0.5), "right": (0.5, 1.0)}
_CENTRAL = ("central", "centre", "center", "middle")
_MIDDLE, _ALL = (0.25, 0.75), (0.0, 1.0)
_SUPERLATIVES = {
    "largest": ("largest", "biggest"),
    "smallest": ("smallest", "tiniest"),
    "leftmost": ("leftmost", "left most"),
    "rightmost": ("rightmost", "right most"),
    "uppermost": ("uppermost", "upper most", "topmost", "top most", "highest"),
    "lowermost": ("lowermost", "lower most", "bottommost", "bottom most", "lowest"),
    "most central": ("most central",),
}
_WORD = "(?:" + "|".join((*_ROWS, *_COLUMNS, *_CENTRAL)) + ")"
_DIRECTION = rf"(?P<direction>{_WORD}(?: (?:and )?{_WORD}){{0,2}})"
_PART = r"(?: (?:hand )?(?P<part>part|side|corner|half|third|quadrant|area|portion|region|section))?"
_IMAGE = r"(?P<image> (?:of|in) (?:this )?(?:image|picture|photograph|photo|frame|scan|slice|film|view|field))?"
_AFTER = re.compile(
    rf"(?P<thing>.+?)(?: (?:that is|which is|located|lying|seen))? (?:in|at|on|near|to|toward|towards|within) "
    rf"{_DIRECTION}{_PART}{_IMAGE}"
)
_BEFORE = re.compile(rf"{_DIRECTION} (?P<thing>.+)")
_EXTREME = re.compile(
    "(?P<word>" + "|".join(word for words in _SUPERLATIVES.values() for word in words) + ") (?P<thing>.+)"
)


@dataclass(frozen=True)
class Position:
    """``thing``: the phrase without its place. ``columns`` and ``rows``: (low, high) in [0, 1] between which the box's
    centre lies. ``superlative``: a key of the table above, or None: of all that are found there, only that one."""

    thing: str
    columns: Span = _ALL
    rows: Span = _ALL
    superlative: str | None = None

    def inside(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) → (N,) bool: whose centre lies there."""
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        return (x >= self.columns[0]) & (x <= self.columns[1]) & (y >= self.rows[0]) & (y <= self.rows[1])


def extreme(superlative: str, boxes: np.ndarray, areas: np.ndarray) -> int:
    """Index of the one of (N, 4) boxes with (N,) areas that a superlative means; the first of equals. N ≥ 1."""
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    keys = {
        "largest": -areas,
        "smallest": areas,
        "leftmost": x,
        "rightmost": -x,
        "uppermost": y,
        "lowermost": -y,
        "most central": (x - 0.5) ** 2 + (y - 0.5) ** 2,
    }
    return int(np.argmin(keys[superlative]))


def parse_position(phrase: str, known: Callable[[str], bool], sided: Callable[[str], bool]) -> Position | None:
    """What a phrase says of the place in the image, by rule; None where it says nothing of it.

    ``known``: whether a phrase is a name by itself, since "left upper lobe" is one. ``sided``: whether the part of the
    body that a thing belongs to has a left and a right of its own (see above).
    """
    rest, superlative = normalise(phrase), None
    if known(rest):
        return None
    if found := _EXTREME.fullmatch(rest):
        superlative = next(key for key, words in _SUPERLATIVES.items() if found["word"] in words)
        rest = found["thing"]
    placed = None if known(rest) else _placed(rest, known, sided)
    thing, columns, rows = placed or (rest, _ALL, _ALL)
    return Position(thing, columns, rows, superlative) if superlative or placed else None


def _placed(phrase: str, known: Callable[[str], bool], sided: Callable[[str], bool]) -> tuple[str, Span, Span] | None:
    """(thing, columns, rows) of "thing at the bottom" or "bottom thing"."""
    if found := _AFTER.fullmatch(phrase):
        explicit = bool(found["image"]) or found["part"] not in (None, "side")
        spans = _spans(found["direction"], found["part"])
        if spans and (explicit or spans[0] in (_ALL, _MIDDLE) or not sided(found["thing"])):
            return (found["thing"], *spans)
    if (found := _BEFORE.fullmatch(phrase)) and known(found["thing"]) and not sided(found["thing"]):
        spans = _spans(found["direction"], None)
        return (found["thing"], *spans) if spans else None
    return None


def _spans(direction: str, part: str | None) -> tuple[Span, Span] | None:
    """(columns, rows) of "upper left"; None for a contradiction such as "upper lower"."""
    words = [word for word in direction.split() if word != "and"]
    rows, columns = ([table[word] for word in words if word in table] for table in (_ROWS, _COLUMNS))
    central = any(word in _CENTRAL for word in words)
    if len(set(rows)) > 1 or len(set(columns)) > 1 or (central and rows and columns):
        return None
    middle = (1 / 3, 2 / 3) if part == "third" else _MIDDLE
    other = middle if central else _ALL
    if central and part == "third" and not rows and not columns:
        return _ALL, middle  # "the middle third" is a band across the image
    spans = columns[0] if columns else other, rows[0] if rows else other
    return (_third(spans[0]), _third(spans[1])) if part == "third" else spans


def _third(span: Span) -> Span:
    return {(0.0, 0.5): (0.0, 1 / 3), (0.5, 1.0): (2 / 3, 1.0)}.get(span, span)
