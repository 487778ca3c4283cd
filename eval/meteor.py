"""METEOR 1.5 (Denkowski & Lavie 2014) through its Java program: one warm process, all samples in one batch."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Any

import numpy as np

from eval.tokens import NO_JAVA, one_line, package_folder
from eval.types import ScoreError

DIED = "the METEOR program (Java) stopped"

# Its settings for English: https://www.cs.cmu.edu/~alavie/METEOR/README.html, "Ranking"
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # of an exact, a stem, a synonym and a paraphrase match


class _Stopped(Exception):
    """The program answered no more, or nonsense, after so many answers."""

    def __init__(self, answers: int) -> None:
        self.answers = answers


def meteor_values(hyp: Mapping[str, list[str]], ref: Mapping[str, list[str]]) -> tuple[float, list[float], np.ndarray]:
    """Corpus METEOR, METEOR of each sample, and the (S, 23) sums that the corpus value is made of; in ref's order.

    hyp: id → [tokens]; ref: id → token strings; tokens joined by spaces. Raises ScoreError where Java does not answer
    to the end, with the sample that it stopped at.
    """
    ids = list(ref)
    questions = [" ||| ".join(["SCORE", *map(_clean, ref[i]), _clean(hyp[i][0])]) for i in ids]
    program, scored = _running(), 0
    try:
        lines, sums = _ask(program, questions, len(ids), _numbers)
        scored = len(ids)
        values = _ask(program, [" ||| ".join(["EVAL", *lines])], len(ids) + 1, float)[1]
    except _Stopped as stopped:
        _end(program)
        raise ScoreError(_reason(ids, questions, scored + stopped.answers)) from None
    except BaseException:
        _end(program)  # the next call would read the answers of this one
        raise
    return values[-1], values[:-1], _whole_without_chunks(np.array(sums))


def corpus_meteor(totals: np.ndarray) -> np.ndarray:
    """(..., 23) sums → (...) METEOR.

    The sums, as the program writes them: length of the prediction, of the reference, function words of both; for each
    kind of match the content words matched in both and the function words matched in both; chunks; all words matched
    in both. Precision and recall weigh content words by delta, function words by 1 - delta. Chunks are 0 where a
    prediction is its reference word for word, and so add none to the total: the program sums them so.
    """
    matches = totals[..., 4:20].reshape(*totals.shape[:-1], 4, 4)
    precision, recall = (_share(totals[..., k], totals[..., k + 2], matches[..., k::2]) for k in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        f = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        fragments = totals[..., 20] / ((totals[..., 21] + totals[..., 22]) / 2)
    return np.nan_to_num(f * (1 - _GAMMA * fragments**_BETA))


def _share(length: np.ndarray, function: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """matched: (..., 4, 2) content and function words of each kind of match."""
    found = (_DELTA * matched[..., 0] + (1 - _DELTA) * matched[..., 1]) @ _WEIGHTS
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / (_DELTA * (length - function) + (1 - _DELTA) * function)


def _whole_without_chunks(sums: np.ndarray) -> np.ndarray:
    whole = (sums[:, 20] == 1) & (sums[:, 21:] == sums[:, :2]).all(1)
    sums[whole, 20] = 0
    return sums


def _numbers(line: str) -> list[float]:
    numbers = [float(word) for word in line.split()]
    if len(numbers) != 23:
        raise ValueError(line)
    return numbers


def _ask(
    program: subprocess.Popen, lines: Sequence[str], answers: int, read: Callable[[str], Any]
) -> tuple[list[str], list[Any]]:
    """The answers as written and as read. Another thread writes, so that neither side waits for the other's next line.
    Raises _Stopped where an answer is missing or cannot be read."""
    assert program.stdout is not None
    writer = Thread(target=_write, args=(program, lines), daemon=True)
    writer.start()
    written, said = [], []
    for k in range(answers):
        line = program.stdout.readline().decode(errors="replace").strip()
        try:
            said.append(read(line))
        except ValueError:
            raise _Stopped(k) from None
        written.append(line)
    writer.join()
    return written, said


def _write(program: subprocess.Popen, lines: Sequence[str]) -> None:
    assert program.stdin is not None
    with suppress(OSError, ValueError):  # where it died or was ended, the reader sees that too, and says so
        program.stdin.write("".join(line + "\n" for line in lines).encode(errors="replace"))
        program.stdin.flush()


def _reason(ids: Sequence[str], questions: Sequence[str], answers: int) -> str:
    if answers >= len(ids):
        return f"{DIED} at the end; it needs 2 GB of memory"
    words = len(questions[answers].split())
    return f"{DIED} at sample {ids[answers]!r} ({words:,} words); it needs 2 GB of memory, more for very long texts"


def _running() -> subprocess.Popen:
    """The warm program, or a new one where it was ended from outside. Raises ScoreError where Java is missing."""
    try:
        if _program().poll() is not None:
            _end(_program())
        return _program()
    except OSError:
        raise ScoreError(NO_JAVA) from None


def _end(program: subprocess.Popen) -> None:
    _program.cache_clear()
    program.kill()
    program.wait()
    with suppress(OSError):
        program.stdin.close()  # type: ignore[union-attr]


def _clean(text: str) -> str:
    """One line without the program's own separator."""
    return one_line(text.replace("|||", ""))


@cache
def _program() -> subprocess.Popen:
    """One process for all calls, since its tables take ten seconds to load; it ends with this process."""
    folder = package_folder() / "meteor"
    command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
