"""The scores.json files of a comparison: are they of the same samples and versions, and what is odd in them?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.lines import read_json
from eval.types import ScoreError

SHOWN = 5  # ids that a note names

MetricPath = tuple[str, ...]


class System(NamedTuple):
    """One scores.json. metrics: where it stands → the score's JSON form, of those with a per-sample column."""

    name: str
    path: Path
    content: dict
    metrics: dict[MetricPath, dict]


def load_system(path: Path) -> System:
    content = read_json(path)
    if not isinstance(content, dict) or not all(key in content for key in ("task", "files", "protocols", "clusters")):
        raise ScoreError(f"{path}: not a scores.json of `medglip score`; write it with --out (schema 2 or later)")
    return System(path.stem, path, content, dict(_metrics(content["protocols"])))


def name_systems(systems: Sequence[System]) -> list[System]:
    """Each under the shortest name that tells it apart: the file's, then with its folder, then the whole path."""
    for name in (lambda p: p.stem, lambda p: f"{p.parent.name}/{p.stem}", str):
        names = [name(system.path) for system in systems]
        if len(set(names)) == len(names):
            return [system._replace(name=n) for system, n in zip(systems, names, strict=True)]
    raise ScoreError(f"{systems[0].path}: a file is given twice; compare different ones")


def _metrics(node: Mapping, path: MetricPath = ()):
    for key, value in node.items():
        if isinstance(value, dict) and value.get("per_sample") and value.get("value") is not None:
            if all("value" in row for row in value["per_sample"]):
                yield (*path, key), value
        elif isinstance(value, dict):
            yield from _metrics(value, (*path, key))


def check_same(systems: Sequence[System]) -> list[str]:
    """Notes on what is odd but can be compared. Raises ScoreError where two files answer different questions."""
    first, notes = systems[0], []
    for other in systems[1:]:
        pair = f"{first.path} and {other.path}"
        for what, value in (("tasks", _task), ("references (sha256)", _references)):
            if value(first.content) != value(other.content):
                shown = f"{value(first.content)} and {value(other.content)}"
                raise ScoreError(f"{pair} have different {what}: {shown}; score both against the same file")
        _check_ids(first, other)
        _check_protocols(first, other, notes)
        if _scored(first.content) == _scored(other.content):
            notes.append(f"{first.name} and {other.name} are scores of the same predictions")
    return notes


def _check_ids(first: System, other: System) -> None:
    a, b = first.content["clusters"], other.content["clusters"]
    for system, alone in ((first, a.keys() - b.keys()), (other, b.keys() - a.keys())):
        if alone:
            raise ScoreError(
                f"{first.path} and {other.path} have different sample ids: only {system.path} has "
                f"{_some(sorted(alone))}; score both against the same file"
            )
    moved = sorted(key for key in a if a[key] != b[key])
    if moved:
        raise ScoreError(f"{first.path} and {other.path} have different patients of {_some(moved)}; score both again")


def note_differences(systems: Sequence[System]) -> list[str]:
    """Notes on what the files were made with, where that is not the same: programs, label tree, training set."""
    notes = []
    for name in dict.fromkeys(name for system in systems for name in system.content.get("versions", {})):
        found = {system.name: system.content.get("versions", {}).get(name) for system in systems}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{version or 'not told'} ({system})" for system, version in found.items())
            notes.append(f"scored with different versions of {name}: {listed}")
    if len({_hash(system.content, "training") for system in systems}) > 1:
        notes.append("looked through with different training sets, so that the checks and by_training differ")
    return notes


def note_checks(systems: Sequence[System]) -> list[str]:
    """What the checks of the files list: "a: 2 missing: q2, q3"; once where it is the same of several."""
    listed: dict[tuple[str, ...], list[str]] = {}
    for system in systems:
        for name, found in system.content.get("checks", {}).items():
            if found:
                listed.setdefault((name, *found), []).append(system.name)
    return [f"{', '.join(who)}: {len(found)} {name}: {_some(found)}" for (name, *found), who in listed.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _check_protocols(first: System, other: System, notes: list[str]) -> None:
    a, b = first.content["protocols"], other.content["protocols"]
    pair = f"{first.path} and {other.path}"
    if not a.keys() & b.keys():
        names = f"{', '.join(a)} and {', '.join(b)}"
        raise ScoreError(f"{pair} share no protocol: {names}; score both with the same --protocol")
    for name in sorted(a.keys() ^ b.keys()):
        notes.append(f"protocol {name} is left out: only one of {first.name} and {other.name} has it")
    for name in a.keys() & b.keys():
        for key in ("protocol", "version", "tokenizer"):
            if a[name].get(key) != b[name].get(key):
                said = f"{a[name].get(key)} and {b[name].get(key)}"
                raise ScoreError(f"{pair} differ in the {key} of {name}: {said}; score both again with one version")
    for path in first.metrics.keys() & other.metrics.keys():
        versions = first.metrics[path]["version"], other.metrics[path]["version"]
        if versions[0] != versions[1]:
            where, said = " · ".join(path), " and ".join(map(str, versions))
            raise ScoreError(f"{pair} have different versions of {where}: {said}; score both again with one version")


def _task(content: Mapping) -> Any:
    return content["task"]


def _references(content: Mapping) -> Any:
    return _hash(content, "references")[:12]


def _scored(content: Mapping) -> list[str]:
    """Hashes of what was scored: predictions, heat maps or both."""
    return [_hash(content, name) for name in ("predictions", "heatmaps")]


def _hash(content: Mapping, name: str) -> str:
    return str(content["files"].get(name, {}).get("sha256"))


def shared_metrics(systems: Sequence[System], wanted: Sequence[str]) -> list[MetricPath]:
    shared = [path for path in systems[0].metrics if all(path in system.metrics for system in systems)]
    unknown = [name for name in wanted if not any(name in path for path in shared)]
    if unknown:
        known = ", ".join(dict.fromkeys(part for path in shared for part in path))
        raise ScoreError(f"no metric {unknown[0]!r} in all files; choose from {known}")
    return [path for path in shared if not wanted or set(wanted) & set(path)]
