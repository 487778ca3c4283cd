"""Runs a program of ours as a process of its own, and says how long it took and how much memory it held."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EVERY = 0.05  # seconds between two looks at the memory


class BenchError(ValueError):
    """A benchmark that cannot go on; one line with the program, its log and what it said last."""


@dataclass(frozen=True)
class Child:
    """`seconds` on the clock; `peak_mb`: the most memory that it held at once (VmHWM), 0 where the system does not
    tell."""

    seconds: float
    peak_mb: float


def run(arguments: Sequence[str], log: Path, threads: int) -> Child:
    """`python ARGUMENTS`, output in `log`. Raises BenchError where it fails. It ends with this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began, peak = time.perf_counter(), 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment(threads)},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                peak = max(peak, high_water(process.pid))
                time.sleep(EVERY)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise BenchError(f"python {' '.join(arguments[:4])} … failed, see {log}: {said[-1]}")
    return Child(time.perf_counter() - began, peak)


def environment(threads: int) -> Mapping[str, str]:
    """This checkout's packages, and so many threads for every library."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def high_water(pid: int | str = "self") -> float:
    """VmHWM of a process in MB; 0 where it is gone or the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _end_with_parent() -> None:
    """Asks the kernel (prctl, PR_SET_PDEATHSIG) to end the child where its parent is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
