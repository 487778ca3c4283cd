"""The gradient of one large batch in the memory of a small one.

Adding up the gradients of micro-batches is not the gradient of their union here: each part of the loss is a mean over
what a batch holds (positives, known negatives, siblings). So the outputs of all micro-batches are computed first
without a graph, the loss is taken of all of them together, and then each micro-batch runs again and gets its share of
the gradient (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). This costs
one more forward pass.

Dimension key: B images of the whole batch, k micro-batches of B / k.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

Forward = Callable[[slice], Any]  # rows of the batch → the model's output for them, a dataclass of tensors


def accumulated(
    accelerator: Accelerator,
    model: nn.Module,
    forward: Forward,
    loss_of: Callable[[Any], torch.Tensor],
    rows: Sequence[slice],
    seed: int,
) -> None:
    """Leaves in the parameters the gradient of ``loss_of`` (the output for the whole batch). ``seed``: of dropout,
    which must fall alike both times."""
    outs = []
    with torch.no_grad():
        for k, part in enumerate(rows):
            torch.manual_seed(seed + k)
            outs.append(forward(part))
    whole = _joined(outs)
    tensors = [tensor.requires_grad_() for tensor in _tensors(whole)]
    gradients = torch.autograd.grad(loss_of(whole), tensors, allow_unused=True)
    for k, part in enumerate(rows):
        last = k == len(rows) - 1
        accelerator.sync_gradients = last
        with nullcontext() if last else accelerator.no_sync(model):
            torch.manual_seed(seed + k)
            pairs = zip(_tensors(forward(part)), gradients, strict=True)
            shares = [(tensor * gradient[part]).sum() for tensor, gradient in pairs if gradient is not None]
            accelerator.backward(torch.stack(shares).sum())


def in_float32(out: Any) -> Any:
    """An output with every tensor in float32, for losses that bfloat16 is too coarse for."""
    return _mapped(lambda tensor: tensor.float(), out)


def _mapped(change: Callable[..., torch.Tensor], *outs: Any) -> Any:
    """A dataclass of the same kind, each tensor made from those of ``outs``; None stays None."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(outs[0]):
        values = [getattr(out, field.name) for out in outs]
        if values[0] is None:
            fields[field.name] = None
        elif isinstance(values[0], torch.Tensor):
            fields[field.name] = change(*values)
        else:
            fields[field.name] = _mapped(change, *values)
    return dataclasses.replace(outs[0], **fields)


def _joined(outs: Sequence[Any]) -> Any:
    return _mapped(lambda *parts: torch.cat(parts), *outs)


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, in the order of its fields."""
    for field in dataclasses.fields(out):
        value = getattr(out, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif value is not None:
            yield from _tensors(value)
