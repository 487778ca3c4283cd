"""Does evidence entail a sentence of a report? By rule, without a model.

A sentence is read as facts: findings of the label tree that it states or negates, and places it calls normal.
It is entailed when the evidence, all sentences together, holds for each of its facts one that is at least as strong:
- a stated finding by the same finding in the same or a narrower place, on the same side, with the same ordinals
  ("sixth rib") and no other degree ("small", "large");
- a negated finding by the same negation of the same or a wider place, no further qualified ("no displaced fracture"
  does not entail "no fracture"), or by a place called normal where the finding would be;
- a normal place by the same or a wider place called normal.
Any sentence is entailed by one with the same words, but for words without content. What the tree does not know in a
sentence that has facts is not looked at: this is coarser than a radiologist, and the same every time.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from eval.findings import Finding, kind_names, parse_findings
from eval.hierarchy import where
from grounding.labels import LabelTree, load_label_tree, normalise, split_negation

VERSION = "1"

Entails = Callable[[str, Sequence[str]], bool]

_BOTH_SIDES = re.compile(r"\b(?:bilateral(?:ly)?|both|left and right|right and left|bibasilar|biapical)\b")
_NORMAL = re.compile(
    r"\b(?:normal(?:ly)?|unremarkable|clear|intact|within normal limits|not (?:enlarged|widened)"
    r"|free of (?:disease|abnormality)|without abnormality)\b"
)
_NOT_NORMAL = re.compile(r"\b(?:not|no longer) (?:normal|clear|unremarkable|intact)\b")
_EXCEPT = re.compile(r"\b(?:aside from|except|other than|apart from|otherwise|remain(?:der|ing)|rest of|other)\b")
_NO_ABNORMALITY = re.compile(r"\bno (?:evidence of )?(?:any )?((?:\w+ ){1,5}?)abnormalit(?:y|ies)\b")
_VERB = re.compile(r"\b(?:is|are|was|were|appears?|remains?|has|have|demonstrates?|shows?)\b")


def _table(**rows: str) -> dict[str, str]:
    """Each word → the name of its row."""
    return {word: name for name, words in rows.items() for word in words.split()}


# Words that change nothing in a sentence about a place or a finding.
_EMPTY = _table(
    empty="""is are was were be been there this that these has have had seen noted present evident identified found
    visualized visualised appear appears appearing remain remains demonstrate demonstrates show shows again also of in
    on at to with and for from by or size sized configuration contour contours silhouette shadow structures structure
    outline outlines appearance field fields space spaces patient s age projection degree which it its any evidence
    sign"""
)
_SAME_WORD = _table(
    heart="cardiac hearts",
    lung="lungs pulmonary",
    bone="osseous bony boney bones skeletal",
    mediastinum="mediastinal",
    vessel="vasculature vascularity vessels vascular",
    pleura="pleural pleurae",
    hilum="hila hilar",
    rib="ribs",
    tissue="tissues",
    diaphragm="diaphragms hemidiaphragm hemidiaphragms",
)
_TREE_WORD = {"bone": "skeleton", "thorax": "chest"}
_EXPANSION = frozenset(_table(all="inflated inflation expanded expansion aerated aeration"))
_DEGREES = _table(
    slight="tiny trace minimal minimally small mild mildly slight slightly subtle",
    moderate="moderate moderately",
    severe="large severe severely marked markedly massive extensive huge",
)
_ORDINAL = re.compile(
    r"\b(?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    r"|[ctl]\d{1,2})\b"
)
_ORDINAL_WORDS = tuple(_table(all="first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"))
_QUALIFIERS = {
    "active": "acute",
    **{word: word for word in _table(all="acute new displaced large focal lobar definite significant tension")},
}
_NARROWER_KINDS = {"consolidation": "opacity", "infiltration": "opacity", "ground_glass_opacity": "opacity"}


class Facts(NamedTuple):
    """What a sentence says. normal: the places it calls normal, each a set of words; besides: what else it says of them
    ("well expanded"), in words; words: what it says at all."""

    stated: tuple[Finding, ...]
    negated: tuple[Finding, ...]
    normal: tuple[frozenset[str], ...]
    besides: tuple[frozenset[str], ...]
    words: frozenset[str]
    both_sides: bool
    degrees: frozenset[str]
    ordinals: frozenset[str]
    qualifiers: frozenset[str]


def rule_entailment(tree: LabelTree | None = None) -> Entails:
    """`entails(hypothesis, evidence)` by the rules of this module; sentences that were read once are remembered."""
    tree = tree or load_label_tree()
    compare = Kinds(tree)

    @lru_cache(maxsize=100_000)
    def read(sentence: str) -> Facts:
        return read_facts(sentence, tree, compare)

    def entails(hypothesis: str, evidence: Sequence[str]) -> bool:
        said, facts = read(hypothesis), [read(sentence) for sentence in evidence]
        if said.words and any(said.words == other.words for other in facts):
            return True
        if not (said.stated or said.negated or said.normal):
            return False
        return (
            all(any(_states(f, said, other, compare) for other in facts) for f in said.stated)
            and all(any(_negates(f, said, other, compare) for other in facts) for f in said.negated)
            and all(any(_calls_normal(place, other) for other in facts) for place in said.normal)
            and all(any(words <= other.words for other in facts) for words in said.besides)
        )

    return entails


def read_facts(sentence: str, tree: LabelTree, compare: "Kinds") -> Facts:
    """The facts of one sentence; see the head of this module."""
    text = compare.singular(sentence)
    stated = parse_findings(text, tree, compare.names)
    negated = [f for f in parse_findings(split_negation(text)[0], tree, compare.names) if f not in stated]
    plain = normalise(text)
    words = plain.split()
    normal, besides = ((), ()) if stated else _normal_places(sentence)
    return Facts(
        stated=tuple(dict.fromkeys(stated)),
        negated=tuple(dict.fromkeys(negated)),
        normal=normal,
        besides=besides,
        words=_content(plain),
        both_sides=bool(_BOTH_SIDES.search(plain)),
        degrees=frozenset(_DEGREES[word] for word in words if word in _DEGREES),
        ordinals=frozenset(_ordinal(m[0]) for m in _ORDINAL.finditer(plain)),
        qualifiers=frozenset(_QUALIFIERS[word] for word in words if word in _QUALIFIERS),
    )


class Kinds:
    """Which kinds and places of the label tree agree."""

    def __init__(self, tree: LabelTree):
        self.names = kind_names(tree)
        self._alike: dict[str, set[str]] = {}
        for kinds in self.names.values():
            for kind in kinds:
                self._alike.setdefault(kind, set()).update(kinds)
        self._paths: dict[str, set[tuple[str, ...]]] = {}
        self._homes: dict[str, set[str]] = {}
        self._placed: set[str] = set()
        for id, node in tree.nodes.items():
            place = where(id, tree)
            if node.finding:
                self._homes.setdefault(node.finding, set()).update(place.places)
                self._placed |= {node.finding} if node.says_place else set()
            else:
                self._paths.setdefault(place.places[-1], set()).add(place.places)
        self._words = {word for name in (*self.names, *map(normalise, self._paths)) for word in name.split()}

    def singular(self, sentence: str) -> str:
        """Plurals that the tree does not have, of words that it has, in the singular: "effusions", "pneumothoraces"."""

        def one(match: re.Match) -> str:
            word = match[0].lower()
            if word in self._words:
                return match[0]
            guesses = (word.removesuffix("s"), word.removesuffix("ces") + "x", word.removesuffix("es"))
            return next((guess for guess in guesses if guess != word and guess in self._words), match[0])

        return re.sub(r"[A-Za-z]+s\b", one, sentence)

    def same(self, a: str, b: str) -> bool:
        """One kind, or two that share a name (a "mass" of the lung and of the brain)."""
        return a == b or b in self._alike.get(a, ())

    def says_place(self, kind: str) -> bool:
        """ "pneumothorax": the name tells where it is."""
        return kind in self._placed

    def within(self, inner: str | None, outer: str | None) -> bool:
        """Is a place the other or a part of it? Nothing said (None) is everywhere."""
        if outer is None or inner == outer:
            return True
        return inner is not None and any(outer in path for path in self._paths.get(inner, ()))

    def at_home(self, kind: str, place: str) -> bool:
        """Can the finding be in the place or a part of it?"""
        return place in self._homes.get(kind, ())


def _states(f: Finding, said: Facts, other: Facts, compare: Kinds) -> bool:
    if not said.ordinals <= other.ordinals or (said.degrees and other.degrees and not said.degrees & other.degrees):
        return False
    for g in other.stated:
        kind = compare.same(f.kind, g.kind) or _NARROWER_KINDS.get(g.kind) == f.kind
        place = compare.says_place(f.kind) or compare.within(g.structure, f.structure)
        side = other.both_sides or (f.side in (None, g.side) and not said.both_sides)
        if kind and place and side:
            return True
    return False


def _negates(f: Finding, said: Facts, other: Facts, compare: Kinds) -> bool:
    for place in other.normal:
        side = place & {"left", "right"}
        homes = {_TREE_WORD.get(word, word) for word in place - side}
        if (not side or f.side in side) and all(compare.at_home(f.kind, home) for home in homes):
            return True
    if not other.qualifiers <= said.qualifiers or not other.ordinals <= said.ordinals:
        return False
    for g in other.negated:
        kind = compare.same(f.kind, g.kind) or _NARROWER_KINDS.get(f.kind) == g.kind
        place = compare.says_place(f.kind) or compare.within(f.structure, g.structure)
        if kind and place and g.side in (None, f.side):
            return True
    return False


def _calls_normal(place: frozenset[str], other: Facts) -> bool:
    """Is a wider place called normal: "lungs" for "left lung"? Clear lungs need not be well expanded."""
    return any(wider <= place and place & _EXPANSION <= wider for wider in other.normal)


def _normal_places(sentence: str) -> tuple[tuple[frozenset[str], ...], tuple[frozenset[str], ...]]:
    """(places called normal, what else is said of them): "The heart and mediastinum are normal." → ({heart},
    {mediastinum}), (). None where there is an exception ("otherwise")."""
    places: list[frozenset[str]] = []
    besides: list[frozenset[str]] = []
    for clause in re.split(r"[.;]\s|\bbut\b|\bwithout\b", sentence):
        plain = normalise(clause)
        if none := _NO_ABNORMALITY.search(plain):
            words = _content(none[1])
            places += [] if words & _QUALIFIERS.keys() else [words]
        elif _NORMAL.search(plain) and not _NOT_NORMAL.search(plain) and not _EXCEPT.search(plain):
            found, more = _subjects(re.split(r",\s*(?:and\s+)?|\band\b", clause))
            places += found
            besides += more
    kept = dict.fromkeys(p for place in places for p in _split_heart(place) if p)
    return tuple(kept), tuple(dict.fromkeys(besides))


def _subjects(pieces: Sequence[str]) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
    """What the pieces of a clause call normal, and what else they say. "The lungs are expanded" of "the lungs are
    expanded and clear" calls nothing normal, but says what is clear; "the heart" of "the heart and lungs are clear" is
    called clear, too."""
    places: list[frozenset[str]] = []
    besides: list[frozenset[str]] = []
    waiting: list[frozenset[str]] = []
    last: frozenset[str] = frozenset()
    for piece in map(normalise, pieces):
        words = _content(_NORMAL.sub(" ", piece))
        if _NORMAL.search(piece):
            places += [*waiting, words or last]
            waiting, last = [], words or last
        elif verb := _VERB.search(piece):
            besides.append(words)
            waiting, last = [], _content(piece[: verb.start()])
        else:
            waiting.append(words)
    return places, besides + waiting


def _split_heart(place: frozenset[str]) -> list[frozenset[str]]:
    """ "Cardiomediastinal" is the heart and the mediastinum."""
    if not place & {"cardiomediastinal", "cardiomediastinum"}:
        return [place]
    rest = place - {"cardiomediastinal", "cardiomediastinum"}
    return [rest | {"heart"}, rest | {"mediastinum"}]


def _content(plain: str) -> frozenset[str]:
    """Words with content of a normalised text, one word for the names of one thing."""
    words = frozenset(_SAME_WORD.get(word, word) for word in plain.split() if word not in _EMPTY)
    return words - {"lung"} if "vessel" in words else words  # clear lungs say nothing of the pulmonary vessels


def _ordinal(word: str) -> str:
    """ "sixth" and "6th" → "6"; "t12" stays."""
    if word in _ORDINAL_WORDS:
        return str(_ORDINAL_WORDS.index(word) + 1)
    return re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", word)
