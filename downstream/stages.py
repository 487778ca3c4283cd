"""The stages of a long run: each leaves its result in a folder, and is skipped where that is complete."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from configs import CONFIG_DIR, write_atomic

console = Console(width=max(110, shutil.get_terminal_size().columns))


class Stage(NamedTuple):
    """`work(folder)` fills the folder `name`; `settings` is all that the result depends on."""

    name: str
    title: str
    settings: Mapping[str, Any]
    work: Callable[[Path], None]


class Stages:
    """Runs stages with their times; a stage whose folder says that it is complete with the same settings is reused."""

    def __init__(self, out: Path):
        self.out = out
        self.seconds: dict[str, float] = {}
        self._spans: list[tuple[float, float]] = []
        self._begun = 0

    def run(self, name: str, title: str, settings: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        """The folder of the stage, complete; see `Stage`."""
        folder = self.out / name
        marker, started = folder / ".complete.json", folder / ".started.json"
        wanted = json.dumps(dict(settings), sort_keys=True, default=str)
        self._begun += 1
        number = self._begun
        done = json.loads(marker.read_text()) if marker.exists() else {}
        if done.get("settings") == wanted:
            console.print(f"[bold]{number}. {title}[/bold]: reused from {folder}")
            self._keep(title, done["seconds"], done.get("ended", marker.stat().st_mtime))
            return folder
        console.print(f"[bold]{number}. {title}[/bold]")
        if folder.exists() and not (started.exists() and started.read_text() == wanted):
            shutil.rmtree(folder)  # begun or made with other settings: nothing of it may be resumed
        write_atomic(started, wanted)
        began = time.perf_counter()
        work(folder)
        seconds, ended = round(time.perf_counter() - began, 1), round(time.time(), 1)
        write_atomic(marker, json.dumps({"settings": wanted, "seconds": seconds, "ended": ended}))
        self._keep(title, seconds, ended)
        console.print(f"   {number}. done in {seconds:.0f} s")
        return folder

    def run_all(self, stages: Sequence[Stage], jobs: int) -> None:
        """Runs stages that do not need each other, `jobs` at a time, begun in their order. Where one fails, those that
        are at work go on to their end, and its error is raised."""
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(self.run, *stage) for stage in stages]
            try:
                for one in as_completed(running):
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @property
    def elapsed(self) -> float:
        """Seconds in which a stage was at work: stages at one time count once, pauses between runs do not count."""
        total, latest = 0.0, 0.0
        for began, ended in sorted(self._spans):
            total += max(0.0, ended - max(began, latest))
            latest = max(latest, ended)
        return round(total, 1)

    def _keep(self, title: str, seconds: float, ended: float) -> None:
        self.seconds[title] = seconds
        self._spans.append((ended - seconds, ended))


def launch(module: str, *arguments: str, accelerate: str = "cpu", pass_fds: Sequence[int] = (), jobs: int = 1) -> None:
    """The command that README gives for training, as a process of its own, with a file of configs/accelerate.

    `pass_fds`: open files that the process inherits. `jobs`: so many such processes share the cores. Raises
    RuntimeError where it fails.
    """
    file = CONFIG_DIR / "accelerate" / f"{accelerate}.yaml"
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // jobs)
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "--num_cpu_threads_per_process", str(threads)]
    shown = f"   accelerate launch --config_file configs/accelerate/{accelerate}.yaml -m {module} {' '.join(arguments)}"
    console.print(shown, style="dim", soft_wrap=True, highlight=False)
    command = [sys.executable, "-m", *launcher, "-m", module, *arguments]
    with _line() as line:
        environment = os.environ | _quiet() | ({"TQDM_POSITION": str(line)} if jobs > 1 else {})
        done = subprocess.run(command, env=environment, pass_fds=tuple(pass_fds))
    if done.returncode:
        raise RuntimeError(f"{module} stopped with exit code {done.returncode}; its last lines above say why")


_taken: set[int] = set()
_lock = threading.Lock()


@contextmanager
def _line() -> Iterator[int]:
    """The line of the terminal, counted from the cursor, for the progress bar of one of several programs."""
    with _lock:
        line = next(n for n in count() if n not in _taken)
        _taken.add(line)
    try:
        yield line
    finally:
        _taken.discard(line)


def _quiet() -> dict[str, str]:
    """No hub, and no messages of libraries between progress bars."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return quiet if torch.accelerator.is_available() else quiet | {"DS_ACCELERATOR": "cpu"}
