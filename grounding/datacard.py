"""A data card in Markdown, written from what a region store holds (`medglip data card`)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from grounding.labels import load_label_tree
from grounding.stats import markdown, statistics, unmapped_labels
from grounding.store import Store

FEWEST_SHOWN = 12


def data_card(store: Store, sources: Sequence[Mapping], skipped: Sequence[Mapping[str, str]]) -> str:
    """`sources`: name, converter, licence, items, images, skipped of each; `skipped`: source, key, why of each record
    or region left out."""
    groups = statistics(store)
    parts = ["# Data card", _opening(store), "## Sources and licences", _sources(sources)]
    for name, rows in groups.items():
        parts += [f"## By {name}", markdown(rows, name)]
    parts += ["A box's side is the square root of its share of the image.", "## Left out", _left_out(skipped)]
    free = unmapped_labels(store, load_label_tree())
    if free:
        parts += ["## Labels the tree does not know", "Kept as free phrases: " + "; ".join(sorted(free)[:200]) + "."]
    return "\n\n".join(parts) + "\n"


def _opening(store: Store) -> str:
    return (
        f"{len(store):,} images, {store.regions:,} regions. Boxes are normalised to the image as displayed. What a "
        "source does not annotate exhaustively is unknown there, not absent (`labelled`). For research; not a medical "
        "device."
    )


def _sources(sources: Sequence[Mapping]) -> str:
    lines = [
        "| source | converter | licence | records | images | left out |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in sources:
        numbers = " | ".join(f"{row.get(key, 0):,}" for key in ("items", "images", "skipped"))
        lines.append(f"| {row['name']} | {row['converter']} | {row['licence'] or 'not stated'} | {numbers} |")
    return "\n".join(lines)


def _left_out(skipped: Sequence[Mapping[str, str]]) -> str:
    if not skipped:
        return "Nothing."
    kinds = Counter((row["source"], _kind(row["why"])) for row in skipped)
    lines = [f"- {source}: {count:,} × {why}" for (source, why), count in kinds.most_common(FEWEST_SHOWN)]
    rest = len(kinds) - FEWEST_SHOWN
    return "\n".join(
        [*lines, *([f"- and {rest} more kinds"] if rest > 0 else []), "", "Each is listed in skipped.jsonl."]
    )


def _kind(why: str) -> str:
    """A reason without what differs from record to record."""
    return re.sub(r"\[[^\]]*\]|\d[\d.,]*|(?:[\w.-]*/)+[\w.-]+", "…", why)
