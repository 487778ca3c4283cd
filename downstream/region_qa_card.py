"""The card of a question set made from a region store: what is asked, how it is balanced, what guessing gets."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from downstream.region_qa_balance import FEATURE_SHARE, Asked
from downstream.region_qa_looks import CLEARLY, FEWEST, SMALLEST
from grounding.store import Store

_SCORES = {
    "chance": "chance: 1 / number of balanced answers",
    "majority": "commonest answer to each text, counted in these very questions",
    "text_only": "nearest training questions by their words",
    "boxes_only": "looks, from the box alone: nearest boxes of training",
    "boxes_only_chance": "chance of those",
}


def counts_by(asked: Sequence[Asked]) -> dict[str, dict[str, int]]:
    """Modality → kind → number of questions, both sorted."""
    counts = Counter((one.sample.modality, one.sample.question_type) for one in asked)
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for (modality, kind), number in sorted(counts.items()):
        found[modality][kind] = number
    return dict(found)


def card(store: Store, found: Mapping[str, Any], asked: Sequence[Asked], has_train: bool) -> str:
    """Markdown. found: what `build_region_qa` returns."""
    parts = [
        "# Questions and reports from regions",
        f"{found['questions']:,} questions and {found['reports']:,} reports on {found['images']:,} images, made by rule"
        f" from annotated regions ({', '.join(sorted(set(store.column('source'))))}). No person has read the images for"
        " them. For research; not a medical device.",
        "## How many",
        _counts(found["by"]),
        f"{found['feature_share']:.0%} of the questions cannot be answered from boxes and labels: brightness, texture,"
        f" margin and shape are measured from pixels and mask (at least {FEATURE_SHARE:.0%} where regions have masks)."
        f" Of {found['candidates']:,} possible questions the others were left out to balance the answers.",
        "## Balance",
        "Within each topic, label and modality, every answer to every wording occurs equally often; regions with"
        " the two answers to a question about looks are paired by their boxes' size and place.",
        _answers(asked),
        "## Without looking",
        _scores(found["scores"], has_train),
        "## Limits",
        _limits(found["notes"]),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(by: Mapping[str, Mapping[str, int]]) -> str:
    kinds = sorted({kind for row in by.values() for kind in row})
    lines = [f"| modality | {' | '.join([*kinds, 'all'])} |", f"| --- |{' ---: |' * (len(kinds) + 1)}"]
    for modality, row in by.items():
        cells = [*(row.get(kind, 0) for kind in kinds), sum(row.values())]
        lines.append(f"| {modality} | {' | '.join(f'{n:,}' for n in cells)} |")
    totals = [sum(row.get(kind, 0) for row in by.values()) for kind in kinds]
    return "\n".join([*lines, f"| all | {' | '.join(f'{n:,}' for n in [*totals, sum(totals)])} |"])


def _answers(asked: Sequence[Asked]) -> str:
    """The answers of each kind; of many the ten commonest."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for one in asked:
        counts[one.sample.question_type][one.sample.answer] += 1
    lines = ["| kind | answers |", "| --- | --- |"]
    for kind, answers in sorted(counts.items()):
        shown = sorted(answers.items(), key=lambda item: (-item[1], item[0]))
        more = [f"and {len(shown) - 10} more"] if len(shown) > 10 else []
        lines.append(f"| {kind} | {', '.join([*(f'{a} {n:,}' for a, n in shown[:10]), *more])} |")
    return "\n".join(lines)


def _scores(scores: Mapping[str, Mapping[str, Any]], has_train: bool) -> str:
    lines = ["| guess | accuracy | 95 % interval | questions |", "| --- | ---: | --- | ---: |"]
    for name, text in _SCORES.items():
        score = scores[name]
        value = f"{score['value']:.3f}" if score["value"] is not None else f"undefined ({score['reason']})"
        interval = "[{:.3f}, {:.3f}]".format(*score["ci95"]) if score["ci95"] else ""
        lines.append(f"| {text} | {value} | {interval} | {score['n']:,} |")
    where = (
        "the training part"
        if has_train
        else "one half of the patients and asked of the other, where less than chance is to be expected: what one half"
        " has less of, the other has more"
    )
    return "\n".join(lines) + f"\n\nWords and boxes: learnt from {where}. Intervals: bootstrap over patients."


def _limits(notes: Sequence[str]) -> str:
    rules = [
        "Left, right, upper and lower are those of the picture where the question says so.",
        "Absence is only asked about where the source annotates a label exhaustively.",
        "A look is relative: the upper or the lower third of its label and modality (of all findings of the modality"
        f" where fewer than {FEWEST} regions have it); the middle third is not asked about. Brighter and darker: by"
        f" {CLEARLY:.0f} of 255 greys at least. Regions under {SMALLEST:.0f} pixels in diameter have no measures.",
        "A mask drawn coarsely blurs the measured margin, and smooths the shape.",
        *notes,
    ]
    return "\n".join(f"- {rule}" for rule in rules)
