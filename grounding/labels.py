"""The label tree of `configs/labels.yaml`, and what is read from a phrase by rule: its side and whether it is negated.

A *label* is an id path (`brain/frontal_lobe/left_frontal_lobe/lesion`); a *phrase* is free text. Side and negation are
parsed by rule because text encoders hardly separate "left lung" from "right lung", or "lesion" from "no lesion".
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from configs import CONFIG_DIR, ConfigError

SIDES = {-1: "left", 0: None, 1: "right"}

_SIDE_WORDS = {"left": -1, "lt": -1, "right": 1, "rt": 1}
_SIDE = re.compile(r"\b(left|lt|right|rt)\b", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:(?:there\s+(?:is|are)\s+)?(?:no|not|without)(?:\s+(?:any|an|a))?(?:\s+(?:evidence|sign|signs)\s+of)?"
    r"|absence\s+of|absent|free\s+of|negative\s+for|(?:is|are)\s+(?:absent|not\s+(?:seen|present|visible)))\b",
    re.IGNORECASE,
)
_VERB_LEFT_OVER = re.compile(
    r"\s+(?:is|are)\s+(?:seen|present|visible|found|identified)\b|\b(?:seen|present)\s*$", re.IGNORECASE
)
_TREE_KEYS = {"alone", "findings", "places"}
_PLACE_KEYS = {
    "name", "synonyms", "plural", "adjective", "sided", "side",
    "findings", "local_findings", "modalities", "code", "parts",
}  # fmt: skip
_FINDING_KEYS = {"name", "synonyms", "says_place", "code"}


def parse_side(phrase: str) -> int:
    """Patient side that a phrase names: -1 left, +1 right, 0 none or both ("left and right lung")."""
    sides = {_SIDE_WORDS[word.lower()] for word in _SIDE.findall(phrase)}
    return sides.pop() if len(sides) == 1 else 0


def split_negation(phrase: str) -> tuple[str, bool]:
    """Take the negation out of a phrase: "no lesion" -> ("lesion", True); "nodule" -> ("nodule", False).

    Whole words only, so that *nodule*, *normal* and *abnormal* are safe. A phrase that is nothing but a negation
    ("no") comes back unchanged, since it names nothing that could be looked for.
    """
    rest, count = _NEGATION.subn(" ", phrase)
    if not count or not re.search(r"\w", rest):
        return phrase.strip(), False
    return " ".join(_VERB_LEFT_OVER.sub(" ", rest).split()).strip(" .,;"), True


def normalise(phrase: str) -> str:
    """Lower case, words separated by one space, no punctuation, no articles, sides spelled out."""
    words = re.sub(r"[^\w]+|_", " ", phrase.lower()).split()
    sides = {"lt": "left", "rt": "right"}
    return " ".join(sides.get(word, word) for word in words if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class Label:
    """One node. `side` is -1 left, 0 none, +1 right; `finding` is the finding's key, or None for a place. `said`: what
    a finding is called by itself ("lesion"); `says_place`: that this tells where it is ("pneumothorax")."""

    id: str
    phrase: str
    synonyms: tuple[str, ...]
    side: int
    modalities: tuple[str, ...]
    finding: str | None = None
    code: str | None = None
    said: tuple[str, ...] = ()
    says_place: bool = False


@dataclass(frozen=True)
class LabelTree:
    """All labels, parents before children, keyed by id. An unknown id raises KeyError.

    `alone`: normalised name → the ids it means, the first first, where several labels have that name and the modality
    does not tell them apart.
    """

    nodes: dict[str, Label]
    alone: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.nodes)

    def phrase(self, id: str) -> str:
        """How the label is said: "left temporal lobe", "left temporal lobe lesion"."""
        return self.nodes[id].phrase

    def synonyms(self, id: str) -> tuple[str, ...]:
        return self.nodes[id].synonyms

    def code(self, id: str) -> str | None:
        """Coded concept "SCHEME:VALUE" (of a structure without its side, of a finding without its place), or None."""
        return self.nodes[id].code

    def parent(self, id: str) -> str | None:
        """The id one step up the path: of a finding the place it is in. None for a body region."""
        return self.nodes[id].id.rpartition("/")[0] or None

    def ancestors(self, id: str) -> list[str]:
        """Every id up the path, nearest first."""
        parts = self.nodes[id].id.split("/")
        return ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]

    def children(self, id: str) -> list[str]:
        return self._children[self.nodes[id].id]

    def broader(self, id: str) -> list[str]:
        """Labels that hold for the same region, nearest first (is-a, where `ancestors` is part-of).

        A left frontal lobe is a frontal lobe; a left frontal lobe lesion is a frontal lobe lesion and a brain lesion.
        A left upper lobe of the lung has none: it is a part of the left lung.
        """
        node = self.nodes[id]
        if node.finding:
            wider = [f"{place}/{node.finding}" for place in self.ancestors(id)[1:]]
            return [other for other in wider if other in self.nodes]
        parent = self.parent(id)
        return [parent] if parent and node.side and not self.nodes[parent].side else []

    def find(self, phrase: str, *, modality: str | None = None) -> str | None:
        """Id whose name, synonym or path the phrase is, after normalisation; None if there is none, or several.

        Findings are also found as "lesion in (of) the left frontal lobe"; alone ("lesion"), as that of the uppermost
        place that has it. Of several labels with one name, those count that occur in `modality` ("oedema" is that of
        the brain in MRI, of the lungs in X-ray); then the first of them that `alone` names. A finding alone never
        stands for one that does not occur in `modality`.
        """
        if phrase in self.nodes:
            return phrase
        name = normalise(phrase)
        ids = self._index.get(name, ())
        if modality is not None and (len(ids) > 1 or name in self._placeless):
            ids = tuple(id for id in ids if modality in self.nodes[id].modalities)
        if len(ids) > 1:
            return next((id for id in self.alone.get(name, ()) if id in ids), None)
        return ids[0] if ids else None

    def closest(self, phrase: str, n: int = 3) -> list[str]:
        """The n names most like a phrase that was not found, for error messages."""
        return difflib.get_close_matches(normalise(phrase), list(self._index), n=n, cutoff=0.5)

    def laterality(self, id: str) -> str | None:
        """ "left", "right" or None."""
        return SIDES[self.nodes[id].side]

    def is_finding(self, id: str) -> bool:
        return self.nodes[id].finding is not None

    def modalities(self, id: str) -> tuple[str, ...]:
        return self.nodes[id].modalities

    @cached_property
    def _index(self) -> dict[str, tuple[str, ...]]:
        index: dict[str, tuple[str, ...]] = {}
        for id, node in self.nodes.items():
            for name in {normalise(name) for name in (node.phrase, *node.synonyms)}:
                index[name] = (*index.get(name, ()), id)
        return index

    @cached_property
    def _placeless(self) -> frozenset[str]:
        """Names of findings that do not tell where these are: "opacity"."""
        said = {name for node in self.nodes.values() if not node.says_place for name in node.said}
        return frozenset(map(normalise, said))

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {id: [] for id in self.nodes}
        for id in self.nodes:
            if parent := self.parent(id):
                children[parent].append(id)
        return children


@cache
def load_label_tree(path: str | Path | None = None) -> LabelTree:
    """Read a label tree from YAML, once a path; without a path, the one that is shipped.

    Raises:
        ConfigError: a key, finding or modality that is not known, a label twice, or a name under `alone` that its label
            does not have; the message names the file and the place.
    """
    path = Path(path or CONFIG_DIR / "labels.yaml")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(tree, _TREE_KEYS, str(path))
    findings = {key: entry or {} for key, entry in (tree.get("findings") or {}).items()}
    for key, entry in findings.items():
        _check_keys(entry, _FINDING_KEYS, f"{path}: finding {key}")
    builder = _Builder(path, findings)
    labels = [label for key, entry in tree["places"].items() for label in builder.place(key, entry or {}, _Above())]
    nodes = {label.id: label for label in labels}
    if len(nodes) < len(labels):
        twice = next(label.id for label in labels if nodes[label.id] is not label)
        raise ConfigError(f"{path}: {twice} is there twice")
    alone = {normalise(name): tuple(ids) for name, ids in (tree.get("alone") or {}).items()}
    for name, id in ((name, id) for name, ids in alone.items() for id in ids):
        if id not in nodes or name not in map(normalise, (nodes[id].phrase, *nodes[id].synonyms)):
            raise ConfigError(f"{path}: alone: {id} is no label, or is not called {name!r}")
    return LabelTree(nodes, alone)


@dataclass(frozen=True)
class _Above:
    """What a place takes over from those above it. `findings`: inherited finding → its modalities (None: all that the
    place has); `known`: every finding that a place above has."""

    id: str = ""
    side: int = 0
    modalities: tuple[str, ...] = ()
    findings: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Builder:
    """Expands the places of a file into labels."""

    path: Path
    findings: Mapping[str, dict[str, Any]]

    def place(self, key: str, entry: dict[str, Any], above: _Above) -> list[Label]:
        """The labels of one place: itself, its findings, its sides, its parts, in that order."""
        side = SIDES[above.side]
        id = f"{above.id}/{side}_{key}" if side else f"{above.id}/{key}".lstrip("/")
        _check_keys(entry, _PLACE_KEYS, f"{self.path}: {id}")
        modalities = tuple(entry.get("modalities", above.modalities))
        inherited = {**above.findings, **self._listed(id, entry.get("findings"), modalities)}
        here = {**inherited, **self._listed(id, entry.get("local_findings"), modalities)}
        place = _named(id, key, entry, above.side, modalities)
        labels = [place]
        for finding, where in here.items():
            shown = modalities if where is None else tuple(x for x in modalities if x in where)
            if shown:
                labels.append(self._finding(place, finding, entry, shown, finding not in above.known))
        if entry.get("sided") and not above.side:
            for either in (-1, 1):
                labels += self.place(key, entry, replace(above, id=id, side=either, modalities=modalities))
            return labels
        below = _Above(id, above.side, modalities, inherited, above.known | set(here))
        for part, inner in (entry.get("parts") or {}).items():
            if (inner or {}).get("side") in (None, side):
                labels += self.place(part, inner or {}, below)
        return labels

    def _listed(self, id: str, listed: Any, modalities: tuple[str, ...]) -> dict[str, tuple[str, ...] | None]:
        """A list of findings, or a mapping from finding to modalities, as a mapping."""
        table = listed or {}
        table = table if isinstance(table, dict) else dict.fromkeys(table)
        for key, where in table.items():
            if key not in self.findings:
                raise ConfigError(f"{self.path}: {id} has the finding {key!r}, which is not in the table `findings`")
            if set(where or ()) - set(modalities):
                raise ConfigError(
                    f"{self.path}: {id} has {key!r} in {where}, but occurs in {', '.join(modalities)} only"
                )
        return {key: None if where is None else tuple(where) for key, where in table.items()}

    def _finding(self, place: Label, key: str, entry: dict[str, Any], modalities: tuple[str, ...], new: bool) -> Label:
        """A finding in a place. Its names are every name of the finding with every name of the place; and where it is
        `new`, in no place above, the finding's alone."""
        finding = self.findings[key]
        said = (finding.get("name", key.replace("_", " ")), *finding.get("synonyms", ()))
        alone = tuple(_sided(said, place.side)) if new else ()
        if finding.get("says_place") and new:
            names = alone
        else:
            plurals = _plurals(entry) if not place.side else ()
            places = [name for name in (place.phrase, *place.synonyms) if name not in plurals]
            forms = [
                form.format(what, where)
                for form in ("{1} {0}", "{0} in the {1}", "{0} of the {1}")
                for what in said
                for where in places
            ]
            adjective = [f"{entry['adjective']} {what}" for what in said] if "adjective" in entry else []
            names = tuple(dict.fromkeys((*forms, *_sided(adjective, place.side), *alone)))
        return Label(
            f"{place.id}/{key}",
            names[0],
            tuple(names[1:]),
            place.side,
            modalities,
            key,
            finding.get("code"),
            said,
            bool(finding.get("says_place")),
        )


def _named(id: str, key: str, entry: dict[str, Any], side: int, modalities: tuple[str, ...]) -> Label:
    """The label of a place itself. A plural ("lungs") names both sides, so neither of them."""
    names = [entry.get("name", key.replace("_", " ")), *entry.get("synonyms", ())]
    names = _sided(names, side) if side else [*names, *_plurals(entry)]
    return Label(id, names[0], tuple(names[1:]), side, modalities, None, entry.get("code"))


def _plurals(entry: dict[str, Any]) -> tuple[str, ...]:
    return (entry["plural"], f"both {entry['plural']}") if "plural" in entry else ()


def _sided(names: Iterable[str], side: int) -> list[str]:
    return [f"{SIDES[side]} {name}" for name in names] if side else list(names)


def _check_keys(entry: dict, allowed: set[str], where: str) -> None:
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(allowed))}")
