"""Reading models by folder or hub id, wherever the process runs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, from_pretrained gives each process all the weights, under DeepSpeed ZeRO-3 too, where it would leave a
    part in each: a trunk is looked over, and phrases are encoded, before training is prepared and split."""
    from transformers.integrations import deepspeed  # here, as it may import DeepSpeed itself

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def first_line(error: Exception) -> str:
    """Of a message; the hub's go on for many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
