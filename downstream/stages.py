"""The stages of a long run: each leaves its result in a folder, and is skipped where that is complete."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from configs import CONFIG_DIR, write_atomic

console = Console(width=max(110, shutil.get_terminal_size().columns))


class Stages:
    """Runs stages with their times; a stage whose folder says that it is complete with the same settings is reused."""

    def __init__(self, out: Path):
        self.out = out
        self.seconds: dict[str, float] = {}

    def run(self, name: str, title: str, settings: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        """`work(folder)` fills `out/name`; `settings` is all that the result depends on."""
        folder = self.out / name
        marker, started = folder / ".complete.json", folder / ".started.json"
        wanted = json.dumps(dict(settings), sort_keys=True, default=str)
        number = len(self.seconds) + 1
        done = json.loads(marker.read_text()) if marker.exists() else {}
        if done.get("settings") == wanted:
            console.print(f"[bold]{number}. {title}[/bold]: reused from {folder}")
            self.seconds[title] = done["seconds"]
            return folder
        console.print(f"[bold]{number}. {title}[/bold]")
        if folder.exists() and not (started.exists() and started.read_text() == wanted):
            shutil.rmtree(folder)  # begun or made with other settings: nothing of it may be resumed
        write_atomic(started, wanted)
        began = time.perf_counter()
        work(folder)
        self.seconds[title] = round(time.perf_counter() - began, 1)
        write_atomic(marker, json.dumps({"settings": wanted, "seconds": self.seconds[title]}))
        console.print(f"   done in {self.seconds[title]:.0f} s")
        return folder


def launch(module: str, *arguments: str, accelerate: str = "cpu", pass_fds: Sequence[int] = ()) -> None:
    """The command that README gives for training, as a process of its own, with a file of configs/accelerate.

    `pass_fds`: open files that the process inherits. Raises RuntimeError where it fails.
    """
    file = CONFIG_DIR / "accelerate" / f"{accelerate}.yaml"
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "--num_cpu_threads_per_process", threads]
    shown = f"   accelerate launch --config_file configs/accelerate/{accelerate}.yaml -m {module} {' '.join(arguments)}"
    console.print(shown, style="dim", soft_wrap=True, highlight=False)
    command = [sys.executable, "-m", *launcher, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | _quiet(), pass_fds=tuple(pass_fds))
    if done.returncode:
        raise RuntimeError(f"{module} stopped with exit code {done.returncode}; its last lines above say why")


def _quiet() -> dict[str, str]:
    """No hub, and no messages of libraries between progress bars."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return quiet if torch.accelerator.is_available() else quiet | {"DS_ACCELERATOR": "cpu"}
