"""A process that dies, on one machine and on the second of two: the others stop within a minute, and a resume works."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("trunk=tiny", "image_size=64", "width=32", "batch_size=2", "calibration=4", "warmup=2")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
MINUTE = 60

# Two machines: network namespaces with a cable between them, in a user namespace of their own, so that nobody need be
# root and nothing is left behind. The main process of the script is the first machine; the second is entered through
# the sleeper. $1: a file on whose appearance the cable is pulled; the rest: the command.
TWO_MACHINES = """
set -u
cut=$1; shift
ip link set lo up
unshare --net sleep 1000 &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
on_second() { nsenter --net=/proc/$second/ns/net "$@"; }
ip link add near type veth peer name far netns $second
ip addr add 10.77.0.1/24 dev near && ip link set near up
on_second ip addr add 10.77.0.2/24 dev far && on_second ip link set far up && on_second ip link set lo up
GLOO_SOCKET_IFNAME=near TP_SOCKET_IFNAME=near "$@" & first_run=$!
GLOO_SOCKET_IFNAME=far TP_SOCKET_IFNAME=far on_second "${@/machine_rank=0/machine_rank=1}" & second_run=$!
if [ -n "$cut" ]; then
  until [ -e "$cut" ] || ! kill -0 $first_run; do sleep 0.1; done
  ip link set near down
  date +%s.%N > "$cut.pulled"
fi
wait $first_run; first=$?
[ -n "$cut" ] && date +%s.%N > "$cut.stopped" && kill -9 $second_run
wait $second_run; other=$?
kill $second
echo "exit codes $first $other"
exit $((first || other))
"""


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


def command(kind: str, store: Path, out: Path, *more: str, machine: tuple[str, ...] = ()) -> list[str]:
    file = str(ROOT / "configs" / "accelerate" / f"{kind}.yaml")
    settings = [*TINY, f"store={store}", f"out={out}", *more]
    return [*LAUNCH, file, *(machine or ("--main_process_port", "0")), "-m", "grounding.train", *settings]


def workers_of(launcher: int) -> dict[int, int]:
    """Rank → process id of the training processes below a launcher."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                variables = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                found[int(variables["RANK"])] = int(entry.name)
        except (OSError, KeyError, IndexError):
            continue
    return found


def wait_for(condition, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_when_a_process_dies_the_other_stops_and_a_resume_works(brain_store, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings = ("steps=8", "save_every=2")
    subprocess.run(command("ddp", brain_store, whole, *settings), env=ENVIRONMENT, cwd=ROOT, check=True)
    run = subprocess.Popen(command("ddp", brain_store, out, *settings), env=ENVIRONMENT, cwd=ROOT)
    wait_for(lambda: list(out.glob("checkpoints/step-*")), run)
    workers = workers_of(run.pid)
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    assert run.wait(MINUTE) != 0
    assert time.monotonic() - began < MINUTE and not Path(f"/proc/{workers[0]}").exists()
    subprocess.run(command("ddp", brain_store, out, *settings), env=ENVIRONMENT, cwd=ROOT, check=True)
    assert curve(out) == curve(whole) and len(curve(out)) == 8


@pytest.fixture(scope="module")
def two_machines():
    """Runs a command on both; skips where the kernel does not let us make them."""
    enter = ["unshare", "--user", "--map-root-user", "--net"]
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs unshare, nsenter and ip (util-linux, iproute2)")
    trial = "ip link add near type veth peer name far && unshare --net true"
    tried = subprocess.run([*enter, "bash", "-c", trial], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"network namespaces are not permitted here: {tried.stderr.strip()}")

    def run(store: Path, out: Path, *more: str, cut: Path | None = None) -> subprocess.CompletedProcess:
        machine = ("--machine_rank=0", "--main_process_ip=10.77.0.1", "--main_process_port=29511")
        words = command("two_nodes", store, out, *more, machine=machine)
        script = [*enter, "bash", "-c", TWO_MACHINES, "two_machines", str(cut or ""), *words]
        return subprocess.run(script, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=280)

    return run


@pytest.mark.multinode
@pytest.mark.timeout(600)
def test_two_machines_train_as_two_processes_do(two_machines, brain_store, tmp_path):
    done = two_machines(brain_store, tmp_path / "two", "steps=6")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    one = command("ddp", brain_store, tmp_path / "one", "steps=6")
    subprocess.run(one, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True)
    assert curve(tmp_path / "two") == curve(tmp_path / "one") and len(curve(tmp_path / "two")) == 6


@pytest.mark.multinode
@pytest.mark.timeout(600)
def test_when_the_cable_is_pulled_the_first_machine_stops_within_a_minute(two_machines, brain_store, tmp_path):
    """Nothing tells the first machine: it must notice by itself."""
    out, cut = tmp_path / "out", tmp_path / "out" / "curves.png"  # which is drawn after the first checkpoint
    done = two_machines(brain_store, out, "steps=400", "save_every=2", cut=cut)
    assert done.returncode != 0
    assert "another process has died, or did not answer" in done.stderr
    pulled, stopped = (float(Path(f"{cut}.{what}").read_text()) for what in ("pulled", "stopped"))
    assert stopped - pulled < MINUTE
