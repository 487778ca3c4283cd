"""What a training loop stands on: processes that joined, a learning rate a step, and a state that survives a kill."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import load_file, save
from torch import nn

from configs import ConfigError, write_atomic

PRECISIONS = ("auto", "fp32", "bf16")


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def setup(batch_size: int, seed: int, patience: float | None = None, clip: float | None = None) -> Accelerator:
    """``patience``: seconds that a process waits for the others before it takes them for dead; None: torch's default.
    ``clip``: the norm that gradients are clipped to, for DeepSpeed, whose engine does it and leaves them otherwise.

    Raises ConfigError where the processes did not join: separate copies would train in silence.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    alone = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    try:
        accelerator = Accelerator(cpu=alone and not deepspeed, kwargs_handlers=_group(alone, world, patience))
    except ValueError as error:
        raise ConfigError(f"{world} processes were launched but cannot join: {error}") from error
    apart = world > 1 and accelerator.distributed_type == DistributedType.NO
    if accelerator.num_processes != world or apart:
        raise ConfigError(
            f"{world} processes were launched but did not join; check the --config_file of accelerate launch"
        )
    if accelerator.state.deepspeed_plugin is not None:
        settings = {"train_micro_batch_size_per_gpu": batch_size, **({"gradient_clipping": clip} if clip else {})}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(settings)
    set_seed(seed)
    return accelerator


def _group(alone: bool, world: int, patience: float | None) -> list[InitProcessGroupKwargs]:
    """How the processes join. Without gloo and "cpu" accelerate leaves CPU processes apart."""
    if world == 1 or (not alone and patience is None):
        return []
    settings = {"backend": "gloo"} if alone else {}
    return [InitProcessGroupKwargs(**settings, timeout=None if patience is None else timedelta(seconds=patience))]


def lost_a_process(error: RuntimeError) -> bool:
    """Whether an error is that another process closed its connections, or did not answer in time."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextmanager
def others_wait(accelerator: Accelerator) -> Iterator[None]:
    """What the main process does alone may take longer than the patience of `setup`: here the others wait for a day."""
    many = accelerator.num_processes > 1
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1)) if many else None
    yield
    if many:
        torch.distributed.barrier(group)


def computes_in_bf16(accelerator: Accelerator, precision: str, cpu: bool = False) -> bool:
    """Whether the loop autocasts. ``auto``: on an accelerator that has bfloat16, so that a CPU gives the same numbers
    wherever it is; with ``cpu`` also on a CPU that has instructions for it. Where accelerate was launched with a mixed
    precision of its own, that holds."""
    if accelerator.mixed_precision != "no" or precision == "fp32":
        return False
    if accelerator.device.type == "cuda":
        return precision == "bf16" or torch.cuda.is_bf16_supported()
    # On a CPU without these instructions bfloat16 is emulated, and slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return precision == "bf16" or (cpu and fast and accelerator.device.type == "cpu")


class Average:
    """The running mean of the trained weights (Polyak and Juditsky, 1992), which is what gets saved.

    ``decay`` is approached from below, so that the first steps are soon forgotten. Each process keeps the mean of what
    it holds: of all weights, or under ZeRO-3 of its part.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.means = [_held(p).detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(_held(parameter), 1 - decay)

    @torch.no_grad()
    def put_in_place(self) -> None:
        """The mean becomes the model's weights; the end of training."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            _held(parameter).copy_(mean)

    def save(self, path: Path) -> None:
        write_atomic(path, save({str(k): mean.cpu().contiguous() for k, mean in enumerate(self.means)}))

    def load(self, path: Path) -> None:
        """Raises ConfigError where the checkpoint has none."""
        if not path.exists():
            raise ConfigError(f"{path}: missing, the run so far had ema=0; give ema=0, or resume=false to begin again")
        for mean, (_, saved) in zip(self.means, sorted(load_file(path).items(), key=lambda x: int(x[0])), strict=True):
            mean.copy_(saved)


def _held(parameter: nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter: ZeRO-3 leaves an empty one in its place."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def save_state(
    accelerator: Accelerator, out: Path, step: int, average: Average | None = None, trained_only: bool = False
) -> None:
    """``out``/checkpoints/step-N, complete or not there; the one before it is then removed. ``trained_only``: without
    the weights that are frozen, which may be gigabytes and never change; `resume_step` has to be told, too."""
    folder = out / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f".partial-{step}")
    with _without_frozen(accelerator) if trained_only else nullcontext({}) as options:
        accelerator.save_state(str(partial), **options)
    if average:
        average.save(partial / f"average-{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
    accelerator.wait_for_everyone()


@contextmanager
def _without_frozen(accelerator: Accelerator) -> Iterator[dict[str, bool]]:
    """What `Accelerator.save_state` takes beside the folder; without DeepSpeed, a hook leaves the weights out."""
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    yield {} if accelerator.state.deepspeed_plugin is None else {"exclude_frozen_parameters": True}
    hook.remove()


def _leave_out_frozen(models: list[nn.Module], weights: list[dict], folder: str) -> None:
    for model, state in zip(models, weights, strict=False):  # DeepSpeed saves by itself: `weights` is empty then
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in state.keys() - trained:
            del state[name]


def resume_step(accelerator: Accelerator, out: Path, average: Average | None = None, trained_only: bool = False) -> int:
    """Loads the last complete checkpoint; the step to go on with, 0 where there is none."""
    steps = [int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").glob("step-*")]
    if not steps:
        return 0
    folder = out / "checkpoints" / f"step-{max(steps)}"
    strict = "strict" if accelerator.state.deepspeed_plugin is None else "load_module_strict"
    accelerator.load_state(str(folder), **({strict: False} if trained_only else {}))
    if average:
        average.load(folder / f"average-{accelerator.process_index}.safetensors")
    return max(steps)


def cut_log(path: Path, start: int) -> None:
    """Keeps the rows before step ``start``: later ones belong to steps that are done again, and a kill may have cut
    the last one short."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() and start else []
    write_atomic(path, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] < start))
