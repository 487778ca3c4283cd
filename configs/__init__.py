"""One strict loader for every configuration, and the record that each run leaves beside its output.

A configuration is a frozen, flat dataclass at the top of the file that uses it, plus YAML and `key=value` overrides:

    config = load_config(TrainConfig, "configs/grounding/brain.yaml", ["lr=1e-4", "seed=1"])

Scalars are read as text and cast by the field's annotation, so `1e-4` is a float, `no` stays a string in a `str` field,
and `1` never turns into `True`.
"""

import dataclasses
import difflib
import json
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = ["CONFIG_DIR", "ConfigError", "cache_dir", "load_config", "save_run_info", "write_atomic"]

CONFIG_DIR = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "accelerate", "med-glip")
NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {"true": True, "false": False}

Raw = str | list[str] | None
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used: one line with the file, the key and the remedy."""


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Build the dataclass `cls` from a YAML file (None: no file) and `key=value` overrides, which win.

    Fields may be int, float, bool, str, Path, tuple[X, ...] of these, and any of them `| None`.

    Raises:
        ConfigError: missing or malformed file, unknown or repeated key, value that does not fit, required key missing,
            or a ValueError of the dataclass's own checks.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    entries = [] if path is None else _read_yaml(Path(path))
    for where, key, raw in [*entries, *map(_read_override, overrides)]:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; {_nearest(key, names)}")
        try:
            values[key] = _cast(raw, hints[key])
        except ValueError as error:
            raise ConfigError(f"{where}: {key}: {error}") from None
    return _construct(cls, values, str(path or "overrides"))


def save_run_info(config: Any, out: Path, **extra: Any) -> None:
    """Write `out/config.yaml` (resolved, loadable) and `out/run.json` (versions, seed, commit, command, `extra`)."""
    resolved = {key: _plain(value) for key, value in dataclasses.asdict(config).items()}
    run = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": resolved.get("seed"),
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
        **extra,
    }
    out = Path(out)
    write_atomic(out / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    write_atomic(out / "run.json", json.dumps(run, indent=2, default=str) + "\n")


def cache_dir() -> Path:
    """Folder for converted weights and phrase vectors: `$MEDGLIP_CACHE`, or `~/.cache/med-glip`. Not created here."""
    return Path(os.environ.get("MEDGLIP_CACHE") or "~/.cache/med-glip").expanduser()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system; not mkstemp, whose files are private.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_yaml(path: Path) -> list[tuple[str, str, Raw]]:
    """Entries (where, key, raw value) of a flat YAML mapping; composed, not loaded, to keep text, lines and repeats."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level")
    entries = [(f"{path}:{key.start_mark.line + 1}", str(key.value), value) for key, value in node.value]
    seen: set[str] = set()
    for where, key, _ in entries:
        if key in seen:
            raise ConfigError(f"{where}: {key!r} is given twice; remove one")
        seen.add(key)
    return [(where, key, _raw(value, f"{where}: {key}")) for where, key, value in entries]


def _read_override(text: str) -> tuple[str, str, Raw]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}: an override has the form key=value")
    return "override", key.strip(), None if value in NULLS[1:] else value


def _raw(node: yaml.Node, where: str) -> Raw:
    """A scalar as text (an unquoted null as None), a list of scalars as a list of texts."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in NULLS else str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [str(item.value) for item in node.value]
    raise ConfigError(f"{where}: nested values are not used; a configuration is flat")


def _cast(raw: Raw, hint: Any) -> Any:
    """`raw` as the annotated type. Raises ValueError with what was expected."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if raw is None:
        if type(None) in options:
            return None
        raise ValueError(f"expected {_name(hint)}, got null")
    (kind,) = [option for option in options if option is not type(None)]
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_cast_scalar(text, item) for text in _items(raw))
    if isinstance(raw, list):
        raise ValueError(f"expected {_name(hint)}, got a list")
    return _cast_scalar(raw, kind)


def _cast_scalar(text: str, kind: type) -> Any:
    wrong = ValueError(f"expected {_name(kind)}, got {text!r}")
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError(f"expected true or false, got {text!r}")
        return BOOLS[text.lower()]
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise wrong from None
        if kind is float and not math.isfinite(value):
            raise wrong
        return value
    if kind in (str, Path):
        return kind(text)
    raise TypeError(f"configurations do not hold {_name(kind)}")


def _items(raw: str | list[str]) -> list[str]:
    """Texts of a list; an override may say `a,b` or `[a, b]`."""
    if isinstance(raw, list):
        return raw
    text = raw if raw.startswith("[") else f"[{raw}]"
    try:
        items = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"expected a list such as [a, b], got {raw!r}")
    return items


def _construct(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; add to the file or give {missing[0]}=VALUE")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _nearest(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, n=3)
    return f"nearest: {', '.join(close)}" if close else f"known keys: {', '.join(names)}"


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of this checkout, `-dirty` if it has changes; None for an installed package or without git."""
    if not (CONFIG_DIR.parent / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=CONFIG_DIR.parent, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
