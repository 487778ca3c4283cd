"""What a region store holds, counted: by source, modality, body region and class (`medglip data stats`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from grounding.labels import SIDES, LabelTree, load_label_tree
from grounding.store import Store

GROUPS = ("source", "modality", "body region", "class")
UNMAPPED = "not in the label tree"
PERCENTILES = (5, 50, 95)


@dataclass(frozen=True)
class Row:
    """One group. `sizes`: percentiles 5, 50 and 95 of a box's side, the square root of its share of the image."""

    name: str
    images: int
    regions: int
    patients: int
    sizes: tuple[float, float, float] | None


def unmapped_labels(store: Store, tree: LabelTree) -> list[str]:
    """Labels of the store that are free phrases."""
    return [label for label in store.labels if label not in tree.nodes]


def class_of(label: str, tree: LabelTree) -> str:
    """The label without its place's side: "lung", "lesion"; of a free phrase, itself."""
    if label not in tree.nodes:
        return label
    key = tree.nodes[label].finding or label.rsplit("/", 1)[-1]
    for side in filter(None, SIDES.values()):
        key = key.removeprefix(f"{side}_")
    return key.replace("_", " ")


def body_region_of(label: str, tree: LabelTree) -> str:
    return label.split("/")[0].replace("_", " ") if label in tree.nodes else UNMAPPED


def statistics(store: Store) -> dict[str, list[Row]]:
    """Group → rows, the one with most regions first. An image or patient counts in each group that it has a region of;
    by source and modality, also without one."""
    tree = load_label_tree()
    counts = np.concatenate([np.diff(block.offsets) for block in store.blocks] or [np.zeros(0, int)])
    boxes = np.concatenate([block.boxes for block in store.blocks] or [np.zeros((0, 4))])
    labels = np.concatenate([block.labels for block in store.blocks] or [np.zeros(0, int)]).astype(int)
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    image, patient = np.arange(len(store)), _codes(store, "patient_id")[0]
    of_region = np.repeat(image, counts)
    groups = {}
    for name in ("source", "modality"):
        codes, words = _codes(store, name)
        groups[name] = _rows(words, codes, image, patient, codes[of_region], sides)
    for name, meaning in (("body region", body_region_of), ("class", class_of)):
        words, table = np.unique([meaning(label, tree) for label in store.labels] or [""], return_inverse=True)
        codes = table[labels]
        groups[name] = _rows(list(words), codes, of_region, patient[of_region], codes, sides)
    return groups


def _codes(store: Store, column: str) -> tuple[np.ndarray, list[str]]:
    coded = pa.chunked_array(store.table.column(column)).combine_chunks().dictionary_encode()
    return coded.indices.to_numpy(), coded.dictionary.to_pylist()


def _rows(words, codes, images, patients, region_codes, sides) -> list[Row]:
    """`codes`, `images`, `patients`: of each thing that is counted; `region_codes`, `sides`: of each region."""
    n = len(words)
    pictures, people = (_distinct(codes, what, n) for what in (images, patients))
    regions = np.bincount(region_codes, minlength=n)
    order = np.argsort(region_codes, kind="stable")
    pieces = np.split(sides[order], np.cumsum(regions)[:-1])
    sizes = [tuple(float(v) for v in np.percentile(piece, PERCENTILES)) if len(piece) else None for piece in pieces]
    rows = [Row(words[k], int(pictures[k]), int(regions[k]), int(people[k]), sizes[k]) for k in range(n)]
    return sorted((row for row in rows if row.images), key=lambda row: (-row.regions, row.name))


def _distinct(codes: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """How many different values each code occurs with, (n,)."""
    if not len(codes):
        return np.zeros(n, int)
    span = int(values.max()) + 1
    return np.bincount(np.unique(codes.astype(np.int64) * span + values) // span, minlength=n)


def cells(rows: list[Row], group: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table."""
    head = [group, "images", "regions", "patients", "box side: 5 %", "median", "95 %"]
    lines = []
    for row in rows:
        sizes = ["-"] * 3 if row.sizes is None else [f"{size:.3f}" for size in row.sizes]
        lines.append([row.name, f"{row.images:,}", f"{row.regions:,}", f"{row.patients:,}", *sizes])
    return head, lines


def markdown(rows: list[Row], group: str) -> str:
    head, lines = cells(rows, group)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines])


def plot(groups: dict[str, list[Row]], path: Path) -> None:
    """A PNG: regions by group (logarithmic), and the sizes of boxes by class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for name, axis in zip(GROUPS, axes.flat, strict=True):
        rows = groups[name][:25][::-1]
        names = [row.name for row in rows]
        axis.barh(names, [row.regions for row in rows], color="#4477aa")
        axis.set(
            xscale="log", xlabel="regions", title=f"by {name}" + (" (25 largest)" if len(groups[name]) > 25 else "")
        )
        axis.tick_params(labelsize=8)
        for k, row in enumerate(rows):
            size = f", median side {row.sizes[1]:.3f}" if row.sizes else ""
            axis.text(max(row.regions, 1), k, f" {row.images:,} images{size}", va="center", fontsize=7)
    figure.savefig(path, dpi=120)
