"""The label tree of `configs/labels.yaml`, and what is read from a phrase by rule: its side and whether it is negated.

A *label* is an id path (`brain/frontal_lobe/left_frontal_lobe/lesion`); a *phrase* is free text. Side and negation are
parsed by rule because text encoders hardly separate "left lung" from "right lung", or "lesion" from "no lesion".
"""

import difflib
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

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
_PLACE_KEYS = {"name", "synonyms", "sided", "findings", "modalities", "code", "parts"}
_FINDING_KEYS = {"name", "synonyms", "code"}


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
    """One node. `side` is -1 left, 0 none, +1 right; `finding` is the finding's key, or None for a place."""

    id: str
    phrase: str
    synonyms: tuple[str, ...]
    side: int
    modalities: tuple[str, ...]
    finding: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class LabelTree:
    """All labels, parents before children, keyed by id. An unknown id raises KeyError."""

    nodes: dict[str, Label]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.nodes)

    def phrase(self, id: str) -> str:
        """How the label is said: "left temporal lobe", "left temporal lobe lesion"."""
        return self.nodes[id].phrase

    def synonyms(self, id: str) -> tuple[str, ...]:
        return self.nodes[id].synonyms

    def code(self, id: str) -> str | None:
        """Coded concept "SCHEME:VALUE" (of the structure without its side), or None."""
        return self.nodes[id].code

    def parent(self, id: str) -> str | None:
        """The id one step up the path: of a finding the place it is in. None for a body region."""
        return self.nodes[id].id.rpartition("/")[0] or None

    def ancestors(self, id: str) -> list[str]:
        """Every id up the path, nearest first."""
        parts = self.nodes[id].id.split("/")
        return ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]

    def children(self, id: str) -> list[str]:
        depth = self.nodes[id].id.count("/") + 1
        return [other for other in self.nodes if other.startswith(id + "/") and other.count("/") == depth]

    def broader(self, id: str) -> list[str]:
        """Labels that hold for the same region, nearest first (is-a, where `ancestors` is part-of).

        A left frontal lobe is a frontal lobe; a left frontal lobe lesion is a frontal lobe lesion and a brain lesion.
        """
        node = self.nodes[id]
        if node.finding:
            wider = [f"{place}/{node.finding}" for place in self.ancestors(id)[1:]]
            return [other for other in wider if other in self.nodes]
        parent = self.parent(id)
        return [parent] if parent and node.side and not self.nodes[parent].side else []

    def find(self, phrase: str) -> str | None:
        """Id whose name, synonym or path the phrase is, after normalisation; None if there is none, or several.

        Findings are also found as "lesion in (of) the left frontal lobe"; alone ("lesion"), as that of the body
        region, if just one region has it.
        """
        if phrase in self.nodes:
            return phrase
        ids = self._index.get(normalise(phrase), ())
        return ids[0] if len(ids) == 1 else None

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


@cache
def load_label_tree(path: str | Path | None = None) -> LabelTree:
    """Read a label tree from YAML, once a path; without a path, the one that is shipped.

    Raises:
        ConfigError: the file has a key or a finding that is not known, naming both it and the place.
    """
    path = Path(path or CONFIG_DIR / "labels.yaml")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    findings = {key: entry or {} for key, entry in (tree.get("findings") or {}).items()}
    for key, entry in findings.items():
        _check_keys(entry, _FINDING_KEYS, f"{path}: finding {key}")
    labels = [label for key, entry in tree["places"].items() for label in _expand(key, entry or {}, findings, path)]
    return LabelTree({label.id: label for label in labels})


def _expand(key, entry, findings, path, above="", side=0, inherited=(), modalities=()) -> list[Label]:
    """The labels of one place: itself, its findings, its sides, its parts, in that order."""
    id = f"{above}/{SIDES[side]}_{key}" if side else f"{above}/{key}".lstrip("/")
    _check_keys(entry, _PLACE_KEYS, f"{path}: {id}")
    names = [entry.get("name", key.replace("_", " ")), *entry.get("synonyms", ())]
    if side:
        names = [f"{SIDES[side]} {name}" for name in names]
    held = tuple(dict.fromkeys((*inherited, *entry.get("findings", ()))))
    modalities = tuple(entry.get("modalities", modalities))
    labels = [Label(id, names[0], tuple(names[1:]), side, modalities, None, entry.get("code"))]
    labels += [_finding(labels[0], name, findings, path, alone=not above) for name in held]
    if entry.get("sided") and not side:
        for either in (-1, 1):
            labels += _expand(key, entry, findings, path, id, either, held, modalities)
        return labels
    for part, below in (entry.get("parts") or {}).items():
        labels += _expand(part, below or {}, findings, path, id, side, held, modalities)
    return labels


def _finding(place: Label, key: str, findings: dict, path: Path, alone: bool) -> Label:
    """A finding in a place. Its names are every name of the finding with every name of the place."""
    if key not in findings:
        raise ConfigError(f"{path}: {place.id} has the finding {key!r}, which is not in the table `findings`")
    entry = findings[key]
    said = [entry.get("name", key.replace("_", " ")), *entry.get("synonyms", ())]
    places = (place.phrase, *place.synonyms)
    synonyms = [
        name.format(what, where)
        for name in ("{1} {0}", "{0} in the {1}", "{0} of the {1}")
        for what in said
        for where in places
    ]
    return Label(
        f"{place.id}/{key}",
        synonyms[0],
        (*synonyms[1:], *(said if alone else ())),
        place.side,
        place.modalities,
        key,
        entry.get("code"),
    )


def _check_keys(entry: dict, allowed: set[str], where: str) -> None:
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(allowed))}")
