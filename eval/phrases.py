"""Phrases in words: the tables of `configs/clinical.yaml`, and where their phrases stand in a sentence."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import yaml

from configs import CONFIG_DIR

_TOKEN = re.compile(r"\w+(?:['’]\w+)?|[,:()/?&]|(?<=\s)[-–—]+(?=\s)")
_ARTICLES = frozenset(("a", "an", "the"))

Roles = Mapping[str, Any]


class Item(NamedTuple):
    """A phrase in a sentence: words start to end (exclusive), and what it may be: cue, join, mention, ..."""

    start: int
    end: int
    roles: Roles


class Phrases:
    """A table of phrases, looked up by their first word."""

    def __init__(self, rows: Iterable[tuple[str, str, Any]]) -> None:
        """rows: (phrase, role, value); a phrase may have several roles, and a role's tuples of values add up."""
        table: dict[tuple[str, ...], dict[str, Any]] = {}
        for phrase, role, value in rows:
            roles = table.setdefault(tuple(words_of(phrase)), {})
            both = isinstance(value, tuple) and isinstance(roles.get(role), tuple)
            roles[role] = tuple(dict.fromkeys((*roles[role], *value))) if both else value
        self._by_first: dict[str, list[tuple[int, tuple[str, ...], dict[str, Any]]]] = {}
        for words, roles in sorted(table.items(), key=lambda row: -len(row[0])):
            self._by_first.setdefault(words[0], []).append((len(words), words, roles))

    def spot(self, words: Sequence[str]) -> list[Item]:
        """The phrases in `words`, in order, none overlapping."""
        words, found, k = tuple(words), [], 0
        while k < len(words):
            for count, phrase, roles in self._by_first.get(words[k], ()):
                if words[k : k + count] == phrase:
                    found.append(Item(k, k + count, roles))
                    k += count - 1
                    break
            k += 1
        return found


@cache
def load_phrases() -> dict[str, Any]:
    """`configs/clinical.yaml`."""
    return yaml.safe_load((CONFIG_DIR / "clinical.yaml").read_text(encoding="utf-8"))


def cue_rows() -> list[tuple[str, str, Any]]:
    """Rows for `Phrases`: the cues, joins, subjects and states that every labeler needs."""
    phrases = load_phrases()
    rows: list[tuple[str, str, Any]] = [(text, cue, text) for cue, texts in phrases["cues"].items() for text in texts]
    rows += [(text, "join", join) for join, texts in phrases["joins"].items() for text in texts]
    rows += [(form, "subject", (name,)) for name, texts in phrases["subjects"].items() for form in forms(texts)]
    return rows + [(form, "state", state) for state, texts in phrases["states"].items() for form in forms(texts)]


def forms(names: Iterable[str]) -> list[str]:
    """Names with their plurals: "opacity" also as "opacities"."""
    return [form for name in names for form in dict.fromkeys((name, _plural(name)))]


def words_of(text: str) -> list[str]:
    """Lower-case words, and the marks that matter as words of their own; no articles, hyphens as spaces."""
    words = _TOKEN.findall(text.lower().replace("vs.", "vs"))
    return ["," if word[0] in "-–—" else word for word in words if word not in _ARTICLES]


def _plural(name: str) -> str:
    head, last = name[:-1], name[-1]
    if name.endswith("is"):
        return name[:-2] + "es"
    if last == "y" and name[-2] not in "aeiou":
        return head + "ies"
    if name.endswith("thorax"):
        return head + "ces"
    return name + ("es" if name.endswith(("s", "x", "sh", "ch")) else "s")
