"""What a report states, as entities of the label tree: finding, place, side and severity, for every modality.

The names are those of `configs/labels.yaml` and a few more of `configs/clinical.yaml`; what is denied, doubted or
history is told by `eval/assertions.py`. A place is a label without its side (`chest/lung/lower_lobe`); where none is
named it is the uppermost one that has the finding. "Bilateral" makes two entities.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from eval.assertions import NEGATIVE, Mention, read
from eval.phrases import Item, Phrases, cue_rows, forms, load_phrases, words_of
from eval.report_text import sentences
from grounding.labels import LabelTree, load_label_tree

_SIDES = ("left", "right")
_CLOSE = ("and", "or", "nor", "with", "versus")  # joins over which a place is shared


class Entity(NamedTuple):
    """A finding (key of the label tree) in a place (label id without sides). side: left, right or None; severity: mild,
    moderate, severe or None."""

    finding: str
    place: str
    side: str | None = None
    severity: str | None = None

    def __str__(self) -> str:
        words = (self.severity, self.side, self.finding.replace("_", " "))
        return f"{' '.join(word for word in words if word)} ({self.place})"


class Reading(NamedTuple):
    """What a report states (also with doubt) and what it denies; `speaks`: whether it says anything of the kind."""

    stated: tuple[Entity, ...]
    denied: tuple[Entity, ...]
    speaks: bool


class _Spot(NamedTuple):
    """What one part of a sentence says of a finding: places (with a side of their own or not), sides, severity."""

    places: tuple[tuple[str, str | None], ...]
    sides: tuple[str, ...]
    severity: str | None = None


def read_entities(report: str, modality: str | None = None) -> Reading:
    """The entities of a report. modality: of the label tree; it settles names that several labels have ("lesion")."""
    stated: dict[Entity, None] = {}
    denied: dict[Entity, None] = {}
    speaks = False
    for sentence in sentences(report):
        found, normal = _read_sentence(sentence, modality)
        speaks = speaks or normal or bool(found)
        for entity, assertion in found:
            (denied if assertion == NEGATIVE else stated)[entity] = None
    present = _most_specific(tuple(stated))
    seen = {entity[:3] for entity in present}
    return Reading(present, tuple(entity for entity in denied if entity[:3] not in seen), speaks)


def same_place(a: str, b: str) -> bool:
    """Whether two places are one, or one lies in the other, or they can hardly be told apart in the image."""
    return _related(a, b) or _alike(a, b)


@lru_cache(maxsize=50_000)
def _read_sentence(sentence: str, modality: str | None) -> tuple[tuple[tuple[Entity, int], ...], bool]:
    """((entity, assertion), ...) of one sentence, and whether it speaks of a normal image."""
    words = words_of(sentence)
    items = _vocabulary(modality).spot(words)
    named = [m for m in read(items, len(words), _pairs()) if m.assertion is not None and m.value]
    spots = _spots(items, named)
    found: list[tuple[Entity, int | None]] = []
    for k, mention in enumerate(named):
        if not any(spot.places or spot.sides for spot in spots[k]):
            spots[k] += _shared(k, named, spots, items)  # which a third one may share
        here = spots[k]
        if mention.assertion == NEGATIVE:  # "no large effusion" denies an effusion
            here = [spot._replace(severity=None) for spot in here]
        found += [(entity, mention.assertion) for entity in _entities(mention.value, here, modality)]
    normality = load_phrases()["normality"]
    denies = any("negation" in item.roles for item in items)
    normal = not {*normality["said"], *(normality["denied"] if denies else ())}.isdisjoint(words)
    return tuple((e, a) for e, a in dict.fromkeys(found) if a is not None), normal


def _spots(items: Sequence[Item], named: Sequence[Mention]) -> list[list[_Spot]]:
    """For each mention what the parts of the sentence say of it, in their order."""
    spots: list[list[_Spot]] = [[] for _ in named]
    for chunk in _chunks(items) if named else ():
        inside = [k for k, m in enumerate(named) if chunk[0].start <= m.start <= chunk[-1].end]
        owned: dict[int, list[Item]] = {}
        for item in chunk:
            if {"place", "side", "severity"} & item.roles.keys():
                owned.setdefault(_owner(item, chunk, inside, named), []).append(item)
        for k, belongings in owned.items():
            spots[k].append(_spot([i for i in belongings if (i.start, i.end) != (named[k].start, named[k].end)]))
    return spots


def _chunks(items: Sequence[Item]) -> list[list[Item]]:
    """The items between joins and stops."""
    chunks: list[list[Item]] = [[]]
    for item in items:
        if "stop" in item.roles or item.roles.get("join", "link") != "link":
            chunks.append([])
        else:
            chunks[-1].append(item)
    return [chunk for chunk in chunks if chunk]


def _owner(item: Item, chunk: Sequence[Item], inside: Sequence[int], named: Sequence[Mention]) -> int:
    """The mention that a place, side or severity belongs to: the next one of its part, unless it comes after the last,
    or after "in"; in a part that names nothing, the last mention before it, else the first after."""
    if not inside:
        before = [k for k, mention in enumerate(named) if mention.start < item.start]
        return before[-1] if before else 0
    earlier = [k for k in inside if named[k].end <= item.start]
    later = [k for k in inside if named[k].end > item.start]
    if not earlier or not later:
        return later[0] if later else earlier[-1]
    start = named[earlier[-1]].end
    return earlier[-1] if any("within" in i.roles and start <= i.start < item.start for i in chunk) else later[0]


def _spot(items: Sequence[Item]) -> _Spot:
    sides = tuple(dict.fromkeys(side for item in items for side in item.roles.get("side", ())))
    places = tuple(place for item in items for place in item.roles.get("place", ()))
    return _Spot(places, sides, next((item.roles["severity"] for item in items if "severity" in item.roles), None))


def _shared(k: int, named: Sequence[Mention], spots: Sequence[list[_Spot]], items: Sequence[Item]) -> list[_Spot]:
    """The spots of a neighbour, for a mention without any: of the next one in its list ("consolidation and effusion on
    the left"), else of the one before it ("left lower lobe opacity, likely atelectasis")."""
    for other in (k + 1, k - 1):
        if not 0 <= other < len(named) or not any(spot.places or spot.sides for spot in spots[other]):
            continue
        low, high = sorted((k, other))
        between = [i for i in items if named[low].end <= i.start < named[high].start]
        joins = [i.roles["join"] for i in between if i.roles.get("join", "link") != "link"]
        stopped = any("stop" in i.roles for i in between)
        doubt = any({"doubt", "doubt_either"} & i.roles.keys() for i in between)
        near = all(join in _CLOSE for join in joins) or (doubt and other < k)
        after = other < k or not any({"place", "side"} & i.roles.keys() for i in between)
        if near and after and not stopped and named[k].assertion == named[other].assertion or near and doubt:
            return [spot._replace(severity=None) for spot in spots[other]]
    return []


def _entities(keys: Sequence[str], spots: Sequence[_Spot], modality: str | None) -> list[Entity]:
    """One mention as entities: one for each place and side."""
    finding, fits, home = _where(keys, [place for spot in spots for place, _ in spot.places], modality)
    overall = next((spot.severity for spot in spots if spot.severity), None)
    found: list[Entity] = []
    waiting: list[tuple[str | None, str | None]] = []  # (side, severity) that still want a place
    for spot in spots:
        here = [(place, side) for place, side in spot.places if place in fits]
        if not here:
            waiting += [(side, spot.severity) for side in spot.sides]
            continue
        for place, own in here:
            sides = [(own, None)] if own else [*waiting, *((side, spot.severity) for side in spot.sides)]
            found += [Entity(finding, place, *side) for side in sides or [(None, spot.severity)]]
        waiting = []
    if waiting and any(entity.side is None for entity in found):
        found = [Entity(finding, entity.place, *side) for entity in found for side in waiting if entity.side is None]
    elif waiting or not found:
        found += [Entity(finding, found[0].place if found else home, *side) for side in waiting or [(None, None)]]
    return [e._replace(side=_possible(e), severity=e.severity or overall) for e in found]


def _where(keys: Sequence[str], named: Sequence[str], modality: str | None) -> tuple[str, list[str], str]:
    """(finding, places, home): of the findings that have the name the first that the places can have; of the places
    those that it can have, the narrowest."""
    homes = _homes(modality)
    finding = next((key for key in keys if any(_related(home, p) for home in homes[key] for p in named)), keys[0])
    fits = [p for p in named if any(_related(home, p) for home in homes[finding])]
    fits = fits or [p for p in named if any(home.split("/")[0] == p.split("/")[0] for home in homes[finding])]
    fits = [p for p in fits if not any(other.startswith(p + "/") for other in fits)]
    return finding, fits, homes[finding][0]


def _possible(entity: Entity) -> str | None:
    """The side of an entity, None for what has none: "left heart enlargement"."""
    return entity.side if entity.finding not in _midline() else None


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(b + "/") or b.startswith(a + "/")


def _alike(a: str, b: str) -> bool:
    return any(a in group and b in group for group in load_phrases()["entities"]["same_place"])


def _most_specific(entities: Sequence[Entity]) -> tuple[Entity, ...]:
    """Leaves out what another entity says in more detail: an impression repeats its findings in fewer words."""
    return tuple(e for e in entities if not any(_says_more(other, e) for other in entities if other != e))


def _says_more(a: Entity, b: Entity) -> bool:
    if a.finding != b.finding or b.side not in (None, a.side) or b.severity not in (None, a.severity):
        return False
    if a.place == b.place or a.place.startswith(b.place + "/"):
        return True
    return _alike(a.place, b.place) and ((a.side, a.severity) != (b.side, b.severity) or a.place < b.place)


@cache
def _pairs() -> dict[tuple[str, str], tuple[str, ...]]:
    pairs = load_phrases()["entities"]["pairs"]
    return {
        (subject, state): (finding,)
        for finding, subjects in pairs.items()
        for subject, states in subjects.items()
        for state in states
    }


@cache
def _vocabulary(modality: str | None) -> Phrases:
    """Cues, findings, places, sides and severities as one table of phrases."""
    words = load_phrases()["entities"]
    rows = cue_rows()
    rows += [(form, "mention", keys) for name, keys in _names(modality).items() for form in forms([name])]
    rows += [(form, "mention", ()) for form in forms(words["ignored"])]
    rows += [(form, "place", (place,)) for name, place in _places(modality) for form in forms([name])]
    for side, texts in words["sides"].items():
        rows += [(text, "side", _SIDES if side == "both" else (side,)) for text in texts]
    rows += [(text, "severity", severity) for severity, texts in words["severities"].items() for text in texts]
    return Phrases(rows + [(text, "within", text) for text in words["within"]])


def _names(modality: str | None) -> dict[str, tuple[str, ...]]:
    """What a finding is called → its keys, the likelier first."""
    tree = load_label_tree()
    more = load_phrases()["entities"]["findings"]
    names: dict[str, dict[str, None]] = {}
    for name, ids in tree.alone.items():
        for id in ids:
            if modality is None or modality in tree.modalities(id):
                names.setdefault(name, {})[str(tree.nodes[id].finding)] = None
    for node in _findings(tree, modality):
        for name in (*node.said, node.finding.replace("_", " "), *more.get(node.finding, ())):
            names.setdefault(" ".join(words_of(name)), {})[node.finding] = None
    return {name: tuple(keys) for name, keys in names.items() if name}


def _findings(tree: LabelTree, modality: str | None) -> Iterable:
    return (node for node in tree.nodes.values() if node.finding and (modality is None or modality in node.modalities))


def _places(modality: str | None) -> list[tuple[str, tuple[str, str | None]]]:
    """(name, (place, its side)) of all places; the side only where the name alone tells it ("LLL")."""
    rows: list[tuple[str, tuple[str, str | None]]] = []
    tree = load_label_tree()
    for id, node in tree.nodes.items():
        if node.finding or (modality is not None and modality not in node.modalities):
            continue
        for name in (node.phrase, *node.synonyms):
            first, _, rest = name.partition(" ")
            rows.append((rest if first in _SIDES and rest else name, (_without_sides(id), None)))
    known = {place for _, (place, _) in rows}
    for place, texts in load_phrases()["entities"]["places"].items():
        for text in texts if place in known else ():
            side, _, name = text.rpartition(":")
            rows.append((name, (place, side or None)))
    return rows


@cache
def _homes(modality: str | None) -> dict[str, list[str]]:
    """Finding → the uppermost places that have it, without sides."""
    homes: dict[str, list[str]] = {}
    for node in _findings(load_label_tree(), modality):
        place = _without_sides(node.id.rpartition("/")[0])
        known = homes.setdefault(node.finding, [])
        if not any(place == home or place.startswith(home + "/") for home in known):
            known.append(place)
    return homes


@cache
def _midline() -> frozenset[str]:
    """Findings of the heart, the mediastinum and other structures that are there once."""
    single = ("chest/heart", "chest/mediastinum", "chest/aorta")
    nodes = [node for node in load_label_tree().nodes.values() if node.finding]
    return frozenset(str(node.finding) for node in nodes if node.id.rpartition("/")[0] in single)


def _without_sides(id: str) -> str:
    """chest/lung/left_lung/left_upper_lobe → chest/lung/upper_lobe."""
    parts = [part.removeprefix("left_").removeprefix("right_") for part in id.split("/")]
    return "/".join(part for k, part in enumerate(parts) if not k or part != parts[k - 1])
