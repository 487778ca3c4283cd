"""Predictions as they come, batch by batch, so that a run that was killed goes on where it was.

`out`/parts-KEY/rank-R.jsonl is one process's; a line of it is one batch, whole or not there. KEY tells what the
predictions depend on, so that those of other settings are never taken for these.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import write_atomic
from downstream.samples import Prediction


@dataclass(frozen=True)
class AnswerParts:
    """The parts of one run. A batch has the same number whatever the number of processes."""

    out: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.out / f"parts-{self.key}"

    def mend(self) -> None:
        """Cut off the line that a killed process left half-written. For one process, before any other reads."""
        for file in self.folder.glob("rank-*.jsonl"):
            content = file.read_bytes()
            os.truncate(file, content.rfind(b"\n") + 1)

    def done(self) -> set[int]:
        """The numbers of the batches that are there."""
        return set(self._read())

    def add(self, rank: int, number: int, rows: Sequence[Prediction], counts: Mapping[str, int]) -> None:
        """Append a batch, with what was counted on the way, to a process's file, and see it onto the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = {"batch": number, "predictions": [asdict(row) for row in rows], "counts": dict(counts)}
        with (self.folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(part, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def merge(self, batches: Sequence[Sequence[int]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Writes `out`/predictions.jsonl: the rows of all `batches`, which hold indices of samples, in the samples'
        order. Returns them, and the sums of what was counted."""
        parts, counts = self._read(), Counter[str]()
        rows = {}
        for number, indices in enumerate(batches):
            rows |= dict(zip(indices, parts[number]["predictions"], strict=True))
            counts.update(parts[number]["counts"])
        ordered = [rows[i] for i in sorted(rows)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        write_atomic(self.out / "predictions.jsonl", text)
        return ordered, dict(counts)

    def remove(self) -> None:
        """These parts, and those that a run with other settings left here."""
        for folder in self.out.glob("parts-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            with file.open(encoding="utf-8") as lines:
                for part in map(json.loads, lines):
                    found[part["batch"]] = part
        return found
