"""Cells of an experiment: one run of a program each, in a folder named by the hash of all that its result depends on.

Paths are not part of the hash: what lies there is. So a folder of results may be moved, and a cell is run again only
where its settings, or what it reads, have changed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs import ConfigError, load_config

HOW = ("out", "save_every", "resume")  # they say where and how a program works, and change nothing in its result
DIGITS = 10


class Artefact(NamedTuple):
    """A path as a program takes it, and the hash of what lies there."""

    path: str
    hash: str

    def __truediv__(self, name: str) -> "Artefact":
        return Artefact(f"{self.path}/{name}", f"{self.hash}/{name}")


@dataclass(frozen=True)
class Cell:
    """`settings`: resolved. `identity`: all that the result depends on. `arguments`: of the program, without
    out=. `folder`: below the experiment's `out`; `result`: the same as an artefact."""

    name: str
    module: str
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]
    arguments: tuple[str, ...]
    folder: str
    result: Artefact


def cell(
    out: Path,
    name: str,
    module: str,
    kind: type,
    file: Path | None,
    keys: Sequence[str],
    reads: Mapping[str, Artefact],
    launcher: str = "",
) -> Cell:
    """A run of `module`, whose configuration is the dataclass `kind`, read from the YAML `file` and from `keys`
    (key=value); `reads`: its keys that name inputs. `launcher`: the file of configs/accelerate, where the result
    depends on it. Raises ConfigError where the program would refuse the settings."""
    given = [*keys, *(f"{key}={artefact.path}" for key, artefact in reads.items())]
    try:
        settings = dataclasses.asdict(load_config(kind, file, [*given, f"out={out}"]))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    depends = {key: value for key, value in settings.items() if key not in (*reads, *HOW)}
    inputs = {key: artefact.hash for key, artefact in reads.items()}
    identity = {"program": module, "launcher": launcher, "settings": depends, "reads": inputs}
    key = _digest(json.dumps(identity, sort_keys=True, default=str).encode())
    folder = f"{name}-{key}"
    arguments = (*(["--config", str(file)] if file else []), *given)
    return Cell(name, module, settings, identity, arguments, folder, Artefact(str(out / folder), key))


def file_hash(path: Path) -> str:
    """Of a file's content. Raises ValueError where there is no such file."""
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:DIGITS]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file that is there") from None


def folder_hash(folder: Path, needed: Sequence[str]) -> Artefact:
    """A folder that `downstream.train data=` reads: its JSON Lines by content, and its store. Raises ValueError where a
    file of `needed`, or the store, is missing."""
    for name in needed:
        if not (folder / name).exists():
            raise ValueError(f"{folder}: no {name}; give a folder that medglip data questions or regionqa wrote")
    parts = [[path.name, file_hash(path)] for path in sorted(folder.glob("*.jsonl"))]
    return Artefact(str(folder), _digest(json.dumps([parts, store_hash(folder / "store").hash]).encode()))


def store_hash(store: Path) -> Artefact:
    """Of store.json, and of the names and sizes of the shards: they may be larger than one wants to read each time.
    Raises ValueError where there is no store."""
    shards = [[path.name, path.stat().st_size] for path in sorted(store.glob("*.arrow"))]
    return Artefact(str(store), _digest(json.dumps([file_hash(store / "store.json"), shards]).encode()))


def grounder_hash(checkpoint: str) -> str:
    """Of the weights and settings in a folder; a name that is no folder, a model of the hub, stands for itself."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return _digest(json.dumps([[path.name, file_hash(path)] for path in files]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
