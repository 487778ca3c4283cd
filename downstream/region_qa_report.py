"""Reports about any annotated image, by rule: a sentence a finding with its place, size and looks.

Only what the source annotates exhaustively is said to be absent. The sentence names the label in its first clause and
the place in the picture after a semicolon, so that "upper left of the image" is not read as the patient's left side
(eval/findings.py), and `downstream.citations.cite` finds the region of each sentence by its label.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from downstream.region_qa_looks import Measures, Thresholds, looks_of
from downstream.region_qa_questions import (
    areas_of,
    counted,
    extents_of,
    is_finding,
    name_of,
    organ_of,
    place_of,
    plural,
    with_article,
)
from downstream.samples import ReportSample
from grounding.labels import LabelTree
from grounding.types import GroundingSample

ONE_BY_ONE = 3  # findings of one label that have a sentence each; of more, their number and the largest

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BRIGHT = {"brighter": "brighter than its surroundings", "darker": "darker than its surroundings"}


def region_text(
    sample: GroundingSample, index: int, measures: Measures, thresholds: Thresholds, tree: LabelTree
) -> list[str]:
    """["30 mm", "darker than its surroundings", "round", ...]: size and looks of a region, the size first."""
    looks = looks_of(measures, thresholds, sample.modality, sample.regions.labels[index])
    said = [looks.get("shape"), looks.get("texture")]
    edge = f"{looks['margin']} margin" if "margin" in looks else None
    return [_size(sample, index), *filter(None, (_BRIGHT.get(looks.get("brightness", "")), *said, edge))]


def report_of(
    sample: GroundingSample, measures: Mapping[int, Measures], thresholds: Thresholds, tree: LabelTree
) -> ReportSample:
    """The report of one image, without citations; the study has the image's id.

    measures: index of a region -> what was measured of it (`downstream.region_qa_looks.measure`).
    """
    labels, areas = sample.regions.labels, areas_of(sample.regions)
    found = {label: [k for k, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}
    found = {label: sorted(rows, key=lambda k: -areas[k]) for label, rows in found.items()}
    findings = {label: rows for label, rows in found.items() if is_finding(label, tree)}
    sentences = _structures([label for label in found if label not in findings], tree)
    for rows in sorted(findings.values(), key=lambda rows: -areas[rows[0]]):
        if len(rows) > ONE_BY_ONE:
            sentences.append(_several(sample, rows, measures, thresholds, tree))
        else:
            sentences += [_single(sample, k, measures.get(k, {}), thresholds, tree) for k in rows]
    absent = [label for label in sorted(sample.labelled) if is_finding(label, tree) and label not in findings]
    if absent and not findings:
        sentences.append(f"No {_listed([name_of(label, tree) for label in absent], 'or')} is seen.")
    text = " ".join(sentences) or None
    impression = _impression(findings, tree) if findings or absent else None
    return ReportSample(sample.image_id, sample.patient_id, (sample.image_id,), sample.modality, None, text, impression)


def _size(sample: GroundingSample, index: int) -> str:
    """ "30 mm" (rounded to 5 mm, below 10 mm to 1), or "30% of the image" (to 5 %), of the longer side of its box."""
    shares, in_mm = extents_of(sample)
    if in_mm is not None:
        step = 5 if in_mm[index] >= 10 else 1
        return f"{max(step, round(float(in_mm[index]) / step) * step)} mm"
    share = float(shares[index])
    return "less than 5% of the image" if share < 0.025 else f"{max(5, round(share * 20) * 5)}% of the image"


def _structures(labels: Sequence[str], tree: LabelTree) -> list[str]:
    names = [f"the {name_of(label, tree)}" for label in sorted(labels)]
    if not names:
        return []
    text = _listed(names, "and")
    return [f"{text[0].upper()}{text[1:]} {'is' if len(names) == 1 else 'are'} shown."]


def _single(sample: GroundingSample, index: int, measures: Measures, thresholds: Thresholds, tree: LabelTree) -> str:
    name = name_of(sample.regions.labels[index], tree)
    organ = organ_of(sample.regions, index, tree)
    place = name_of(organ, tree) if organ else None
    there = f" in the {place}" if place and place not in name else ""
    said = _described(sample, index, measures, thresholds, tree)
    return f"There is {with_article(name)}{there}; it {said}."


def _several(sample: GroundingSample, rows: Sequence[int], measures, thresholds: Thresholds, tree: LabelTree) -> str:
    # In the singular: the plurals of many labels are not in the label tree, by whose names reports are read.
    name = counted(name_of(sample.regions.labels[rows[0]], tree))
    said = _described(sample, rows[0], measures.get(rows[0], {}), thresholds, tree)
    return f"There is more than one {name}, {_number(len(rows))} in all; the largest {said}."


def _described(sample: GroundingSample, index: int, measures: Measures, thresholds: Thresholds, tree: LabelTree) -> str:
    """ "lies in the upper left of the image, is 30% of the image long, darker ..., with a sharp margin"."""
    where = where_of(sample.regions.boxes[index])
    size, *looks = region_text(sample, index, measures, thresholds, tree)
    edge = looks.pop() if looks and looks[-1].endswith("margin") else None
    measured = f"measures {size}" if size.endswith("mm") else f"spans {size}"
    parts = [f"lies in the {where} of the image", measured, *([f"is {_listed(looks, 'and')}"] if looks else [])]
    return _listed([*parts, *([f"has a {edge}"] if edge else [])], "and")


def where_of(box: np.ndarray) -> str:
    """(4,) xyxy in [0, 1] → "upper left", "left half", "middle" … of the image."""
    half, quadrant = place_of(box)
    return quadrant or (f"{half} half" if half else _middle(box))


def _middle(box: np.ndarray) -> str:
    centre_row = float(box[1] + box[3]) / 2
    return "upper part" if centre_row < 1 / 3 else "lower part" if centre_row > 2 / 3 else "middle"


def _impression(findings: Mapping[str, Sequence[int]], tree: LabelTree) -> str:
    if not findings:
        return "No finding of the kinds looked for."
    parts = []
    for label, rows in sorted(findings.items(), key=lambda item: (-len(item[1]), item[0])):
        name = name_of(label, tree)
        parts.append(f"one {name}" if len(rows) == 1 else f"{_number(len(rows))} {plural(counted(name))}")
    text = _listed(parts, "and")
    return f"{text[0].upper()}{text[1:]}."


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _listed(items: Sequence[str], word: str) -> str:
    return f" {word} ".join(filter(None, (", ".join(items[:-1]), items[-1])))
