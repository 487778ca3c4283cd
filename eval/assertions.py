"""Is what a sentence names there, denied, or in doubt? The scope rules under the report labelers.

A sentence becomes words; the phrases of `configs/clinical.yaml` are spotted in them, the longest first. It is cut into
clauses ("but", "except", "there is") and those into the parts of a list (commas, "and", "or", "with"). A cue such as
"no" or "may represent" holds to the end of its part, and on through the next ones until a new statement begins; a cue
such as "has resolved" holds backwards, over the list that is its subject. Structures get the states that they are said
to be in ("heart size and mediastinum are normal").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.phrases import Item

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1

_PLAIN = ("no", "not", "neither", "never", "cannot", "can't", "couldn't")
_DENY_VERBS = ("not", "no longer", "cannot", "never", "isn't", "aren't")
_STRENGTH = ("or", "nor", "versus", "and", "with", "which", "colon", "comma")  # of two joins in a row the first counts


@dataclass
class Mention:
    """Something named: its value (as the caller's table has it), words start to end, and whether it is there."""

    value: Any
    start: int
    end: int
    normal: bool = False  # a structure in its normal state, so that the finding is denied
    doubtful: bool = False  # a name that says "perhaps"
    pair: bool = False
    before: str | None = None  # the cue in front
    after: str | None = None  # the cue behind

    @property
    def assertion(self) -> int | None:
        """POSITIVE, NEGATIVE, UNCERTAIN; None where it is history, a question or a condition."""
        if self.before in ("past", "condition"):
            return None
        if self.after:
            return {"gone": NEGATIVE, "doubt": UNCERTAIN}[self.after]
        if self.normal or self.before == "negation":
            return NEGATIVE
        return UNCERTAIN if self.before == "doubt" or self.doubtful else POSITIVE


@dataclass
class Part:
    """A part of a clause: how it is joined to the one before, its words, its items and what it names."""

    join: str
    start: int
    end: int = 0
    items: list[Item] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)

    def has(self, *roles: str) -> bool:
        return any(role in item.roles for item in self.items for role in roles)


def read(items: Sequence[Item], count: int, pairs: Mapping[tuple[str, str], Any]) -> list[Mention]:
    """What a sentence of `count` words names, with the cues that hold for it.

    items: of `Phrases.spot`; the roles "mention" and "suggests" carry the caller's values. pairs: (subject, state) →
    value; that of the state "normal" is denied, and "borderline" is a doubtful "large".
    """
    found = []
    for clause, end in _clauses(items, count):
        parts = _parts(clause, end)
        _pair(parts, pairs)
        _look_ahead(parts)
        found += [mention for part in parts for mention in part.mentions]
    return found


def _clauses(items: Sequence[Item], count: int) -> list[tuple[list[Item], int]]:
    """(items, end) of each clause."""
    clauses: list[tuple[list[Item], int]] = []
    clause: list[Item] = []
    for item in items:
        if "stop" in item.roles:
            clauses.append((clause, item.start))
            clause = []
        else:
            clause.append(item)
    return [(clause, end) for clause, end in [*clauses, (clause, count)] if clause]


def _parts(clause: Sequence[Item], end: int) -> list[Part]:
    """Cuts a clause at its joins; of joins in a row ("," "and") the stronger counts."""
    parts = [Part("", clause[0].start, end)]
    for item in clause:
        join = item.roles.get("join")
        if join is None or join == "link":
            parts[-1].items.append(item)
        elif parts[-1].items or len(parts) == 1:
            parts[-1].end = item.start
            parts.append(Part(join, item.end, end))
        else:
            parts[-1].join = min(parts[-1].join, join, key=_STRENGTH.index)
            parts[-1].start = item.end
    for part in parts:
        part.mentions = [_mention(item) for item in part.items if _names(item)]
    return parts


def _names(item: Item) -> bool:
    return "mention" in item.roles or "suggests" in item.roles


def _mention(item: Item) -> Mention:
    value = item.roles.get("mention", item.roles.get("suggests"))
    return Mention(value, item.start, item.end, doubtful="mention" not in item.roles)


def _pair(parts: Sequence[Part], pairs: Mapping[tuple[str, str], Any]) -> None:
    """Adds a mention for each structure with a state."""
    for k, part in enumerate(parts):
        for state in (item for item in part.items if "state" in item.roles):
            for subject in _subjects_of(parts, k, state):
                part.mentions += _paired(subject, state, pairs)
        part.mentions.sort(key=lambda mention: (mention.start, mention.end))


def _paired(subject: Item, state: Item, pairs: Mapping[tuple[str, str], Any]) -> list[Mention]:
    name = state.roles["state"]
    found = []
    for structure in subject.roles["subject"]:
        value = pairs.get((structure, "large" if name == "borderline" else name))
        if value is not None:
            normal, doubtful = name == "normal", name == "borderline"
            found.append(Mention(value, state.start, state.end, normal, doubtful, pair=True))
    return found


def _subjects_of(parts: Sequence[Part], k: int, state: Item) -> list[Item]:
    """The structures that are in a state: those before it in its part, and what is listed with them; else those that
    follow it ("enlarged heart and mediastinum"); else the last ones named ("the heart is stable and enlarged")."""
    part = parts[k]
    states = [item for item in part.items if "state" in item.roles]
    last = max((item.end for item in states if item.end < state.start - 2), default=part.start)  # "normal to enlarged"
    reach = state.end
    for other in states:  # "tortuous calcified aorta": both are of the aorta
        reach = other.end if other.start == reach else reach
    next_ = min((item.start for item in states if item.start >= reach), default=part.end)
    subjects = [item for item in part.items if "subject" in item.roles and item is not state]
    before = [item for item in subjects if last <= item.start < state.start]
    after = [item for item in subjects if state.end <= item.start < next_]
    of_it = after and after[0].start - state.end < 2 and before and before[-1].roles["subject"] == ("other",)
    if before and not of_it:
        return [*before, *_listed_before(parts, k)]
    if after:
        near = after[0].start - state.end < 5 and not any(_names(i) for i in part.items if next_ > i.start >= state.end)
        return [after[0], *_listed_after(parts, k)] if near else []
    if any(_names(item) for item in part.items if item.start < state.start):
        return []
    following = parts[k + 1] if k + 1 < len(parts) else None
    if following and following.join in ("and", "or") and any("state" in item.roles for item in following.items[:1]):
        return [item for item in following.items if "subject" in item.roles][:1]  # "an enlarged and tortuous aorta"
    verb = any("verb" in item.roles for item in part.items if item.start < state.start)
    if part.join == "with" or (not verb and state.start - part.start > 2) or part.end - state.end > 1:
        return []
    for j in range(k - 1, -1, -1):
        if earlier := [item for item in parts[j].items if "subject" in item.roles]:
            return [*earlier, *_listed_before(parts, j)]
        if parts[j].has("mention", "suggests"):
            break
    return []


def _listed_before(parts: Sequence[Part], k: int) -> list[Item]:
    """Structures of the parts before k that are in one list with it: no state and no verb of their own."""
    found: list[Item] = []
    for j in range(k - 1, -1, -1):
        if parts[j + 1].join not in ("and", "or", "comma") or parts[j].has("state", "verb"):
            break
        found += [item for item in parts[j].items if "subject" in item.roles]
    return found


def _listed_after(parts: Sequence[Part], k: int) -> list[Item]:
    found: list[Item] = []
    for j in range(k + 1, len(parts)):
        if parts[j].join not in ("and", "or", "comma") or parts[j].has("state", "verb", "mention"):
            break
        found += [item for item in parts[j].items if "subject" in item.roles]
    return found


def _look_ahead(parts: Sequence[Part]) -> None:
    """Walks through a clause with the cue that holds, and gives it to each mention it meets."""
    cue: str | None = None
    unused = False  # the cue has met nothing yet
    for k, part in enumerate(parts):
        if cue and k and not (unused and part.join == "comma" and not _has_own_verb(part)):
            cue = cue if _goes_on(cue, parts, k) else None  # else: "no acute, displaced fracture"
        if part.join == "nor":
            cue = "negation"
        met = 0
        for n, item in enumerate(part.items):
            while met < len(part.mentions) and part.mentions[met].start <= item.start:
                part.mentions[met].before = cue
                met += 1
            cue, earlier = _next_cue(cue, parts, k, n), cue
            unused = cue != earlier or (unused and not _named_before(part, n + 1))
        for mention in part.mentions[met:]:
            mention.before = cue
            unused = False
        _either_or(parts, k)


def _goes_on(cue: str, parts: Sequence[Part], k: int) -> bool:
    """Whether a cue of the part before still holds in part k."""
    part = parts[k]
    if part.join in ("or", "nor", "versus"):
        return True
    if part.join in ("which", "colon") or (part.join == "with" and cue == "doubt"):
        return False
    if _or_follows(parts, k):
        return True
    if part.join == "comma" and cue in ("doubt", "past", "condition"):
        return False
    return not _opens(part) and not (part.join in ("comma", "and") and _ends_with_its_verb(parts[k - 1]))


def _or_follows(parts: Sequence[Part], k: int) -> bool:
    """Whether part k belongs to a list that ends with "or"."""
    for j in range(k, len(parts)):
        if _has_own_verb(parts[j]) or parts[j].has("negation", "past", "condition"):
            return False
        if j > k and parts[j].join in ("or", "nor"):
            return True
        if j > k and parts[j].join not in ("comma", "and"):
            return False
    return False


def _opens(part: Part) -> bool:
    """Whether a part begins a new statement: its own verb, a structure in a state, or a word like "stable" in front."""
    if _has_own_verb(part) or any(mention.pair for mention in part.mentions):
        return True
    if part.join == "comma" and part.has("verb", "doubt", "doubt_either", "gone"):
        return True
    first = (item for item in part.items if item.start - part.start < 3)
    return any(role in item.roles for item in first for role in ("assertive", "doubt", "doubt_either"))


def _has_own_verb(part: Part) -> bool:
    """A verb that says more than that the whole list "is seen"."""
    for n, item in enumerate(part.items):
        if "verb" in item.roles:
            following = part.items[n + 1 : n + 2]
            if not any("seen" in other.roles and other.start - item.end < 3 for other in following):
                return True
    return False


def _ends_with_its_verb(part: Part) -> bool:
    """ "No effusion is seen": what follows is no part of that list."""
    if not part.mentions or not part.items or "seen" not in part.items[-1].roles:
        return False
    return part.mentions[-1].end <= part.items[-1].start


def _next_cue(cue: str | None, parts: Sequence[Part], k: int, n: int) -> str | None:
    """The cue that holds after item n of part k; cues that hold backwards are given to their mentions here."""
    part, item = parts[k], parts[k].items[n]
    before = part.items[n - 1] if n else None
    follows = _follows(part, n) or (k + 1 < len(parts) and not _named_before(part, n))
    roles = item.roles
    if "nearly" in (before.roles if before else ()):
        return cue
    if "excluded" in roles:
        doubt = cue == "doubt" or (cue == "negation" and not _named_between(part, n))
        _look_back(parts, k, n, "doubt" if doubt else "gone")
        return None
    if "gone" in roles or ("negation_either" in roles and not follows):
        denied = before is not None and before.roles.get("negation") in _PLAIN  # "has not cleared"
        if not denied:
            _look_back(parts, k, n, "gone")
        return None if denied else cue
    if "doubt_after" in roles or ({"doubt_either", "exclude"} & roles.keys() and not follows):
        if cue != "negation" or "doubt_either" not in roles:
            _look_back(parts, k, n, "doubt")
        elif _named_before(part, n):
            _look_back(parts, k, n, "gone")  # "is not likely"
        return cue
    if "negation" in roles or "negation_either" in roles:
        return _negated(cue, parts, k, n)
    if "exclude" in roles:
        return "doubt"
    if "doubt" in roles or "doubt_either" in roles:
        return cue if cue in ("negation", "past", "condition") else "doubt"
    if "past" in roles or "condition" in roles:
        return "past" if "past" in roles else "condition"
    return cue


def _negated(cue: str | None, parts: Sequence[Part], k: int, n: int) -> str | None:
    """The cue after a word of negation, which another one may undo, or one of change use up."""
    part, item = parts[k], parts[k].items[n]
    word = item.roles.get("negation", item.roles.get("negation_either"))
    rest = [other for other in part.items[n + 1 :] if not other.roles.keys() <= {"assertive", "verb", "state"}]
    if rest and "unmoved" in rest[0].roles and not ("state" in rest[0].roles and part.has("subject")):
        return "affirmed"
    if rest and "seen" in rest[0].roles and word in _DENY_VERBS and not _follows(part, n):
        _look_back(parts, k, n, "doubt" if cue == "doubt" else "gone")
        return None
    if n + 1 == len(part.items) and k + 1 == len(parts) and part.join == "colon" and not _named_before(part, n):
        _look_back(parts, k, n, "gone")  # "Effusion: no."
        return None
    last = part.items[n - 1] if n else None
    first = last.roles.get("negation") if last is not None else None
    if cue == "negation" and word not in _PLAIN and first in (*_PLAIN, "without"):
        return "affirmed"  # "not without"
    return "doubt" if cue == "doubt" and word == "not" and not _named_between(part, n) else "negation"


def _follows(part: Part, n: int) -> bool:
    """Whether something is named after item n of a part, before another cue."""
    for item in part.items[n + 1 :]:
        if _names(item):
            return True
        if {"negation", "gone", "excluded", "past", "condition"} & item.roles.keys():
            return False
    return any(mention.pair and mention.start > part.items[n].start for mention in part.mentions)


def _named_before(part: Part, n: int) -> bool:
    """Whether something is named before item n of a part; n may be one too many."""
    at = part.items[n].start if n < len(part.items) else part.end
    return any(mention.start < at for mention in part.mentions)


def _named_between(part: Part, n: int) -> bool:
    """Whether something is named between item n and the negation before it."""
    for item in reversed(part.items[:n]):
        if "negation" in item.roles:
            return False
        if _names(item):
            return True
    return False


def _look_back(parts: Sequence[Part], k: int, n: int, cue: str) -> None:
    """Gives a backward cue at item n of part k to what is named before it in the part, and in the list it ends."""
    at = parts[k].items[n].start
    named = [mention for mention in parts[k].mentions if mention.start < at]
    if not named and not parts[k].has("subject"):
        if k and parts[k].join in ("comma", "which", "colon", "and"):
            for mention in parts[k - 1].mentions:
                mention.after = cue
        return
    for mention in named:
        mention.after = mention.after or cue
    for j in _list_before(parts, k):
        for mention in parts[j].mentions:
            mention.after = mention.after or cue


def _list_before(parts: Sequence[Part], k: int) -> list[int]:
    """Parts that are one list with part k as the subject of its verb: "A, B and C are absent"."""
    singular = any(item.roles.get("verb") in ("is", "was", "has") for item in parts[k].items)
    singular |= parts[k].has("gone") and any(str(i.roles.get("gone")).startswith("has ") for i in parts[k].items)
    if parts[k].join not in ("and", "or", "nor") or (parts[k].join == "and" and singular):
        return []
    listed = []
    for j in range(k - 1, -1, -1):
        if parts[j].has("verb", "negation", "past", "doubt", "gone", "excluded"):
            break
        listed.append(j)
        if parts[j].join not in ("comma", "and", "or", "nor"):
            break
    return listed


def _either_or(parts: Sequence[Part], k: int) -> None:
    """ "A versus B" puts both in doubt, and so does "A or B" where nothing denies them."""
    join, two = parts[k].join, [*parts[k - 1].mentions[-1:], *parts[k].mentions[:1]] if k else []
    if any(mention.normal or mention.before not in (None, "doubt") for mention in two):
        return
    different = len(two) == 2 and two[0].value != two[1].value
    if join == "versus" or (join == "or" and different):
        for mention in two:
            mention.before = "doubt"
