"""Reads text and JSON Lines, and says which lines are bad and why: nothing is guessed, skipped or mended in silence."""

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from eval.types import ScoreError

SHOWN = 4  # further bad lines that an error names

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 little endian starts like UTF-16
_ONE_OBJECT = "write one JSON object a line (jq -c '.[]' FILE makes that of a JSON array)"

Bad = tuple[int, str, str]  # line number, what is wrong, remedy


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without byte order mark. Raises ScoreError with the line and the command that converts."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if data.startswith(_UTF16) or b"\0" in data[:4]:
        raise ScoreError(
            f"{path}: is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8-{Path(path).name}"
        )
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        convert = f"iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8-{Path(path).name}"
        raise ScoreError(
            f"{path}:{line}: byte 0x{data[error.start]:02X} is not UTF-8 text; where the whole file is Latin-1 or "
            f"Windows-1252: {convert}; where lines differ, write it again as UTF-8"
        ) from None


def read_json(path: str | Path) -> Any:
    """A JSON file. Raises ScoreError."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ScoreError(f"{path}:{error.lineno}: not JSON ({error.msg}); write the file again") from None
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path}: not JSON that can be read ({type(error).__name__}); write the file again") from None


def read_lines(path: str | Path) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank. Raises ScoreError naming the bad lines and the reasons."""
    rows: list[tuple[int, dict]] = []
    bad: list[Bad] = []
    # Not splitlines(): texts may hold U+2028, which is no line end in JSON Lines.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row, wrong = _parse(line)
        if wrong:
            bad.append((number, wrong, _ONE_OBJECT))
        else:
            rows.append((number, row))
    refuse(path, bad)
    if not rows:
        raise ScoreError(f"{path}: holds no records; write one JSON object a line")
    return rows


def keyed(path: str | Path, *names: str) -> Iterator[tuple[str, int, dict]]:
    """(id, line number, row); the id stands under the first of the names that the row has. Raises ScoreError where an
    id is missing, no text or whole number, or there twice."""
    first_seen: dict[str, int] = {}
    rows, bad = read_lines(path), []
    for number, row in rows:
        name = next((name for name in names if row.get(name) not in (None, "")), None)
        key = None if name is None else row[name]
        if name is None:
            bad.append((number, f'no "{names[0]}"', "every line needs one"))
        elif isinstance(key, bool) or not isinstance(key, str | int):
            bad.append((number, f'"{name}" is {json.dumps(key)[:40]}', "an id is a text or a whole number"))
        elif str(key) in first_seen:
            again = f"{name} {str(key)!r} again, first on line {first_seen[str(key)]}"
            bad.append((number, again, "keep one of them"))
        else:
            first_seen[str(key)] = number
    refuse(path, bad)
    for key, (number, row) in zip(first_seen, rows, strict=True):
        yield key, number, row


def refuse(path: str | Path, bad: Sequence[Bad]) -> None:
    """Raises ScoreError for the first bad line, names the next ones, and counts the rest; does nothing without any."""
    if not bad:
        return
    (number, wrong, remedy), *others = bad
    named = "; ".join(f"line {k} {why}" for k, why, _ in others[:SHOWN]) + (" …" if len(others) > SHOWN else "")
    more = f" (and {len(others)} more: {named})" if others else ""
    fail(path, number, wrong + more, remedy)


def fail(path: str | Path, number: int, what: str, remedy: str) -> NoReturn:
    """Raises the ScoreError of one line."""
    raise ScoreError(f"{path}:{number}: {what}; {remedy}")


def _parse(line: str) -> tuple[dict, str]:
    """(object, "") or ({}, what is wrong)."""
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg}, column {error.colno})"
    except UnicodeEncodeError:
        return {}, "half a character (a lone surrogate, as of an emoji that was cut)"
    except RecursionError:
        return {}, "not JSON that can be read (nested too deeply)"
    except ValueError as error:
        return {}, f"not JSON that can be read ({error})"
    return (row, "") if isinstance(row, dict) else ({}, "not a JSON object")
