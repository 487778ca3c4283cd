"""What several test files stand on: a small store of the embedded brain set, and a way to launch a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Programs are launched with one thread (below). With two here, sums have another order, and on some processors a curve
# of the same seed differs in its last digits.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that train first, since they take longest: where files are spread over cores, none waits at the end."""
    items.sort(key=lambda item: "test_train" not in item.path.name)


@pytest.fixture(scope="session")
def brain_store(tmp_path_factory) -> Path:
    """24 images of the training template."""
    from grounding.brain import build_brain

    folder = tmp_path_factory.mktemp("brain") / "store"
    build_brain(folder, "train", 24, seed=0)
    return folder


@pytest.fixture(scope="session")
def launch():
    """Runs ``accelerate launch -m MODULE`` with a file of configs/accelerate; the finished process, output captured."""

    def run(accelerate: str, module: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        config = ROOT / "configs" / "accelerate" / f"{accelerate}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", "0", "-m", module, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, cwd=ROOT)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    return run
