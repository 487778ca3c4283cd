"""Words to what a checkpoint looks for: labels, free phrases, and the place in the image that a phrase asks for."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from grounding.labels import LabelTree, normalise, parse_side, split_negation
from grounding.model import MedGLIPConfig
from grounding.position import Position, parse_position
from grounding.text import PhraseEncoder

LIKE_A_KNOWN_PHRASE = 0.55  # cosine of text vectors below which a phrase counts as unknown to the checkpoint
LIKE_A_LABEL = 0.8  # cosine from which on it counts as another name of the label that it is nearest to
# Text encoders give "upper lobe" and "lower lobe", "benign mass" and "malignant mass" nearly the same vector.
_CONTRASTS = """
    left right upper lower middle superior inferior anterior posterior medial lateral proximal distal central peripheral
    ascending descending internal external small large benign malignant acute chronic hard soft bright dark red white
    grey gray sharp blurred round irregular first second third fourth fifth open closed old new without
"""


class PhraseError(ValueError):
    """A phrase, modality or image that the checkpoint does not know; the message names it and what is known."""


@dataclass(frozen=True)
class Sought:
    """One phrase at work. ``text``: as it was asked, without its negation; ``label``: id or None for a free phrase;
    ``thing``: what the text encoder reads; ``position``: where in the image it must be, None anywhere."""

    text: str
    label: str | None
    thing: str
    position: Position | None = None

    @property
    def name(self) -> str:
        """The label of regions that it finds."""
        return self.label or self.thing


class Phrasebook:
    """The names that a checkpoint answers to: those of the label tree, and its own.

    Labels of the checkpoint that the tree does not have (it was trained with another tree, or on free phrases) keep
    their ids; they are found by their ids, and by the last part of it said as words.
    """

    def __init__(self, config: MedGLIPConfig, tree: LabelTree, encoder: PhraseEncoder):
        self.config, self.tree, self.encoder = config, tree, encoder
        self.foreign = [label for label in config.vocabulary if label not in tree.nodes]
        self._own = {name: x for x in self.foreign for name in (normalise(x), normalise(self.phrase(x)))}
        self._sought: dict[tuple[str, str | None], Sought] = {}

    def phrase(self, label: str) -> str:
        """How a label is said: "left lung"."""
        return self.tree.phrase(label) if label in self.tree.nodes else label.rsplit("/", 1)[-1].replace("_", " ")

    def vocabulary(self) -> list[tuple[str, str | None]]:
        return [(self.phrase(label), label) for label in self.config.vocabulary]

    def warn_of_foreign_labels(self, name: str) -> None:
        """One line on stderr where a checkpoint has labels of another tree; free phrases are no such labels."""
        ids = [label for label in self.foreign if "/" in label]
        if ids:
            print(
                f"{name}: {len(ids)} of {len(self.config.vocabulary)} labels are not in this label tree and are looked "
                f"for as free phrases, without side or place: {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}",
                file=sys.stderr,
            )

    def find(self, phrase: str, modality: str | None = None) -> str | None:
        """Label id of a name, the checkpoint's own before the tree's; None for a free phrase."""
        own = self._own.get(normalise(phrase)) if self._own else None
        return own or self.tree.find(phrase, modality=modality)

    def resolve(self, phrase: str, modality: str | None = None) -> tuple[str, str | None]:
        """Phrase → (text without negation, label id or None for a free phrase).

        A phrase that no name fits but that is much like one (cosine ≥ LIKE_A_LABEL, same side, no contrasting word) is
        that label's; one that is somewhat like a known phrase is looked for as it stands. Raises PhraseError for
        others.
        """
        text, _ = split_negation(phrase)
        label = self.find(text, modality)
        position = None if label or text in self.config.phrases else self._position(text, modality)
        thing = position.thing if position else text
        label = self.find(thing, modality)
        if not self._trained_on(label) and thing not in self.config.phrases:
            nearest, likeness = self._nearest(thing, modality)
            self._check_known(thing, likeness)
            if label is None and likeness >= LIKE_A_LABEL:  # never from one label of the tree to another
                label = nearest
        return text, label

    def sought(self, text: str, label: str | None) -> Sought:
        """What is looked for, for a row that ``resolve`` or ``vocabulary`` gave."""
        if (text, label) not in self._sought:
            self._sought[text, label] = self._read(text, label)
        return self._sought[text, label]

    def _read(self, text: str, label: str | None) -> Sought:
        names = self._names(label)
        if normalise(text) in names or text in self.config.phrases:
            return Sought(text, label, text)
        position = self._position(text, None, label)
        thing = position.thing if position else text
        # A name that was only guessed stands for the label: the label's own phrase is the one that was calibrated.
        said = thing if label is None or normalise(thing) in names else self.phrase(label)
        return Sought(text, label, said, position)

    def _names(self, label: str | None) -> set[str]:
        if label is None:
            return set()
        synonyms = self.tree.synonyms(label) if label in self.tree.nodes else (label,)
        return {normalise(name) for name in (self.phrase(label), *synonyms)}

    def _position(self, text: str, modality: str | None, label: str | None = None) -> Position | None:
        def known(name: str) -> bool:
            return self.find(name, modality) is not None or name in self.config.phrases or name in self._names(label)

        return parse_position(text, known, lambda name: self._sided(label or self.find(name, modality)))

    def _sided(self, label: str | None) -> bool:
        """Whether anything in a label's part of the body has sides; of an unknown thing, that is assumed."""
        return label not in self.tree.nodes or str(label).split("/")[0] in self._sided_regions

    @cached_property
    def _sided_regions(self) -> set[str]:
        return {label.split("/")[0] for label, node in self.tree.nodes.items() if node.side}

    def _trained_on(self, label: str | None) -> bool:
        """Whether the checkpoint has a label, or a broader one; the tree has more than any one checkpoint."""
        wider = self.tree.broader(label) if label in self.tree.nodes else []
        return label is not None and not {label, *wider}.isdisjoint(self.config.vocabulary)

    def _check_known(self, phrase: str, likeness_of_names: float) -> None:
        known = self.encoder.encode(self.config.phrases)
        likeness = known.vectors @ self.encoder.encode([phrase]).vectors[0]
        if max(float(likeness.max()), likeness_of_names) < LIKE_A_KNOWN_PHRASE:
            nearest = ", ".join(known.texts[k] for k in likeness.topk(min(3, len(known))).indices.tolist())
            raise PhraseError(f"phrase {phrase!r} is unknown to this checkpoint; nearest it knows: {nearest}")

    def _nearest(self, phrase: str, modality: str | None) -> tuple[str | None, float]:
        """The label whose name a phrase is most like, and the cosine of the two."""
        if not normalise(phrase):
            raise PhraseError("empty phrase; name what to look for, such as " + repr(self.config.phrases[0]))
        names = self._every_name(modality)
        texts = [name for name in names if not contrasting(name, phrase)]
        if not texts:
            return None, 0.0
        likeness = self.encoder.encode(texts).vectors @ self.encoder.encode([phrase]).vectors[0]
        k = int(likeness.argmax())
        return names[texts[k]], float(likeness[k])

    def _every_name(self, modality: str | None) -> dict[str, str]:
        """Name → label of all that is looked for, each name that means one label only."""
        names: dict[str, str] = {}
        for label in self.config.vocabulary:
            for name in [self.phrase(label), *(self.tree.synonyms(label) if label in self.tree.nodes else ())]:
                if self.find(name, modality) == label:
                    names.setdefault(name, label)
        return names


def contrasting(a: str, b: str) -> bool:
    """Whether one phrase has a side or a contrasting word ("upper", "benign") that the other has not."""
    words_a, words_b = (set(normalise(text).split()) for text in (a, b))
    return parse_side(a) != parse_side(b) or bool((words_a ^ words_b).intersection(_CONTRASTS.split()))


def check_any(phrases: Sequence) -> None:
    """Raises PhraseError for an empty list."""
    if not phrases:
        raise PhraseError("no phrase was given; name at least one thing to look for, or leave the list out (None)")
