"""The gallery: one self-contained page with the tables and the cases, right and wrong alike.

Python prepares data, `gallery.html` holds style and script, `eval/html.py` what it shares with the page of scores. With
tables it is the page of a demo run on the generated brain set; without, of one image of the user's own, about which
nothing generated is said.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from configs import write_atomic
from downstream.citations import CITATION
from eval.findings import Finding, kind_names, parse_findings
from eval.html import contour, self_contained
from grounding.labels import LabelTree, load_label_tree, split_negation
from grounding.types import RegionSet

NOTICE = "Research use only; not a medical device."
GENERATED = "Generated lesions on template MRI slices."
UNDEFINED = "undefined"

# Letters at the image's left and right edge, by plane. Sagittal: anterior and posterior.
EDGES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
# Image ids of the brain set end with the plane. A file of the user's own may be called anything: there only the slice
# of a NIfTI volume ("vol.nii.gz@axial:87"), which is reoriented on reading, is sure to lie so.
BRAIN_PLANE = re.compile(r"-(axial|coronal|sagittal)$")
NIFTI_PLANE = re.compile(r"@(axial|coronal|sagittal):\d+$")
IMPRESSION = re.compile(r"\bimpression\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One image with all that was found, asked and reported.

    png: the image as shown. found: regions of the grounding model. truth: annotations (none for a user's own image).
    questions: ``{"question", "reference", "question_type", "needs" ("boxes" | "feature"),
    "answers": {system: {"text", "right" (bool), "evidence" (RegionSet | None)}}}``.
    report: None, or ``{"reference", "systems": {system: {"sentences": [{"text", "region_ids"}] | None,
    "evidence": RegionSet | None, "text"}}}``; region id K is the K-th region of that system's evidence, from 0. An id
    that the evidence does not hold is dropped. Boxes are xyxy in [0, 1].
    """

    image_id: str
    png: bytes
    found: RegionSet
    truth: RegionSet
    questions: list[dict]
    report: dict | None


def write_gallery(path: Path, scores: dict, cases: Sequence[Case], notes: Sequence[str]) -> None:
    """Write the page, whole or not at all.

    scores: ``{"tables": [{"title", "columns", "rows", "note"?}], "run"?: facts}``; a cell is text, a number, None
    ("undefined") or an interval [lo, hi]. notes: paragraphs under the heading.
    """
    demo = bool(scores["tables"])
    reader = Reader(load_label_tree())
    data = {
        "demo": demo,
        "notice": f"{GENERATED} {NOTICE}" if demo else NOTICE,
        "notes": [note for note in notes if note != NOTICE],
        "tables": [_table(table) for table in scores["tables"]],
        "run": list(_facts(scores.get("run", {}))),
        "cases": [_case(case, reader, BRAIN_PLANE if demo else NIFTI_PLANE) for case in cases],
    }
    template = resources.files("downstream").joinpath("gallery.html").read_text(encoding="utf-8")
    write_atomic(Path(path), self_contained(template, data))


# --- tables and facts


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    rows = [[_cell(cell) for cell in row] for row in table["rows"]]
    return {"title": table["title"], "columns": table["columns"], "rows": rows, "note": table.get("note")}


def _cell(cell: Any) -> dict[str, Any]:
    """``{"text", "kind": "text" | "number" | "interval" | "undefined", "span"?}``; NaN is undefined as well."""
    if isinstance(cell, list | tuple):
        if len(cell) != 2 or not all(_is_number(end) for end in cell):
            return {"text": UNDEFINED, "kind": "undefined"}
        return {"text": f"{cell[0]:.3f} to {cell[1]:.3f}", "kind": "interval", "span": [float(end) for end in cell]}
    if isinstance(cell, str | bool):
        return {"text": str(cell), "kind": "text"}
    if not _is_number(cell):
        return {"text": UNDEFINED, "kind": "undefined"}
    return {"text": f"{cell:.3f}" if isinstance(cell, float) else str(cell), "kind": "number"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _facts(value: Any, name: str = ""):
    """(name, text) of nested facts: {"versions": {"torch": "2"}} → ("versions / torch", "2")."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _facts(inner, f"{name} / {key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, UNDEFINED if value is None else str(value)


# --- cases


@dataclass(frozen=True)
class Reader:
    """The label tree, and what it calls findings (read once a page)."""

    tree: LabelTree
    kinds: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", kind_names(self.tree))

    def is_finding(self, label: str) -> bool:
        """A free phrase that the tree does not know counts as one."""
        return label not in self.tree.nodes or self.tree.is_finding(label)

    def findings(self, report: str) -> list[Finding]:
        return parse_findings(report, self.tree, self.kinds)


class Drawing:
    """The regions of one case, each stored once, and the sets ("views") of them that the page can show."""

    def __init__(self, case: Case, reader: Reader):
        self.reader, self.size = reader, case.found.image_size
        self.regions: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self._rows: dict[tuple, int] = {}
        # A region in a prompt has no mask; that of the same region found or annotated is drawn for it.
        self._contours = {
            _key(regions, k): contour(mask)
            for regions in (case.truth, case.found)
            for k, mask in enumerate(regions.masks or ())
            if mask is not None
        }
        self.found = {_key(case.found, k) for k in range(len(case.found))}
        self.views.append({"regions": self.add(case.found), "found": True, "uses": []})

    def add(self, regions: RegionSet) -> list[int]:
        """Row in ``self.regions`` of each region."""
        return [self._add(regions, k) for k in range(len(regions))]

    def view(self, regions: RegionSet, system: str, task: str) -> int:
        """Number of the view of these regions in this order, which ``system`` was given for ``task``."""
        rows = self.add(regions)
        number = next((n for n, view in enumerate(self.views) if view["regions"] == rows), len(self.views))
        if number == len(self.views):
            self.views.append({"regions": rows, "found": False, "uses": []})
        self.views[number]["uses"].append([system, task])
        return number

    def _add(self, regions: RegionSet, k: int) -> int:
        score = None if regions.scores is None else round(float(regions.scores[k]), 3)
        key = (_key(regions, k), score)
        if key not in self._rows:
            self._rows[key] = len(self.regions)
            self.regions.append(self._describe(regions, k, score))
        return self._rows[key]

    def _describe(self, regions: RegionSet, k: int, score: float | None) -> dict[str, Any]:
        (height, width), label, tree = self.size, regions.labels[k], self.reader.tree
        known = label in tree.nodes
        return {
            "box": [round(float(v), 1) for v in regions.boxes[k] * np.array([width, height, width, height])],
            "id": label,
            "name": tree.phrase(label) if known else label,
            "path": label.replace("_", " ").split("/") if known else [label],
            "finding": self.reader.is_finding(label),
            "score": score,
            "contour": self._contours.get(_key(regions, k), ""),
            "details": list(regions.attributes[k].values()) if regions.attributes else [],
        }


def _key(regions: RegionSet, k: int) -> tuple:
    return regions.labels[k], tuple(round(float(v), 4) for v in regions.boxes[k])


def _case(case: Case, reader: Reader, plane: re.Pattern[str]) -> dict[str, Any]:
    drawing = Drawing(case, reader)
    match = plane.search(case.image_id)
    report = None if case.report is None else _report(case.report, drawing, reader)
    start = next((row["view"] for row in report["systems"] if row["ours"]), 0) if report else 0
    return {
        "id": case.image_id,
        "plane": match[1] if match else None,
        "edges": EDGES[match[1]] if match else None,
        "image": "data:image/png;base64," + base64.b64encode(case.png).decode(),
        "size": list(case.found.image_size),
        "truth": drawing.add(case.truth),
        "lesions": {
            name: sum(map(reader.is_finding, s.labels)) for name, s in (("truth", case.truth), ("found", case.found))
        },
        "questions": [_question(row, f"question {number}", drawing) for number, row in enumerate(case.questions, 1)],
        "report": report,
        "start": start,
        "views": drawing.views,
        "regions": drawing.regions,
    }


def _question(row: Mapping[str, Any], name: str, drawing: Drawing) -> dict[str, Any]:
    answers = [
        {
            "system": system,
            "text": answer["text"],
            "right": bool(answer["right"]),
            "view": _evidence_view(answer["evidence"], system, name, drawing),
        }
        for system, answer in row["answers"].items()
    ]
    return {**{key: row[key] for key in ("question", "reference", "question_type", "needs")}, "answers": answers}


def _evidence_view(evidence: RegionSet | None, system: str, task: str, drawing: Drawing) -> int | None:
    return None if evidence is None or not len(evidence) else drawing.view(evidence, system, task)


def _report(report: Mapping[str, Any], drawing: Drawing, reader: Reader) -> dict[str, Any]:
    rows = []
    for system, said in report["systems"].items():
        evidence = said["evidence"]
        regions = [] if evidence is None else drawing.add(evidence)
        sentences = [
            {
                "text": CITATION.sub("", sentence["text"]),
                "cites": [[k, regions[k]] for k in sentence["region_ids"] if 0 <= k < len(regions)],
            }
            for sentence in said["sentences"] or [{"text": said["text"], "region_ids": []}]
        ]
        cited = any(sentence["cites"] for sentence in sentences)
        own = evidence is not None and all(_key(evidence, k) in drawing.found for k in range(len(evidence)))
        view = _evidence_view(evidence, system, "report", drawing)
        row = {"system": system, "sentences": sentences, "view": view, "ours": cited and own}
        rows.append(row | judge_report([sentence["text"] for sentence in sentences], report["reference"], reader))
    return {"reference": report["reference"], "systems": rows}


def judge_report(sentences: Sequence[str], reference: str, reader: Reader) -> dict[str, Any]:
    """Which sentences state what the reference states (finding, structure and side; sizes and looks are not judged).

    Returns {"verdicts": True | False | None (says nothing to judge, or is the impression) a sentence, "missed":
    phrases of findings left out, "right": bool | None without a reference}.
    """
    if not reference.strip():
        return {"verdicts": [None] * len(sentences), "missed": [], "right": None}
    truth = reader.findings(reference)
    left, verdicts, normal, impression = Counter(truth), [], False, False
    for sentence in sentences:
        impression = impression or bool(IMPRESSION.search(sentence))
        stated = [] if impression else reader.findings(sentence)
        said = Counter(stated)
        denied = not impression and not stated and split_negation(sentence)[1]
        normal = normal or denied
        verdicts.append(said <= left if stated else not truth if denied else None)
        left -= said
    missed = [" ".join(filter(None, (f.side, (f.structure or "").replace("_", " "), f.kind))) for f in left.elements()]
    right = not missed and False not in verdicts and (bool(truth) or normal)
    return {"verdicts": verdicts, "missed": missed, "right": right}
