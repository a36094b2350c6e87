"""Per-example gradients have the parameters' precision, whatever the forward pass ran in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture.rules import LayerCall

__all__ = ["full_precision", "in_parameter_dtype"]

_NOTHING: AbstractContextManager[Any] = nullcontext()


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast for tensors where ``like`` is; nothing at all where autocast is off already."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def in_parameter_dtype(layer: nn.Module, call: LayerCall) -> LayerCall:
    """Bring what arrived in low precision, as under autocast, up to the dtype of the layer's parameters.

    Args:
        layer: A layer with parameters.
        call: One call of it.

    Returns:
        The same call where nothing was lower, else a copy with tensors cast up; nothing is ever cast down.
    """
    for own in layer._parameters.values():
        if own is not None:
            break
    else:
        own = next(layer.parameters())
    dtype = own.dtype
    first = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    if call.grad_output.dtype is dtype and isinstance(first, Tensor) and not _low(first, dtype):
        return call

    def up(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and _low(value, dtype) else value

    args, kwargs, grad = pytree.tree_map(up, (call.args, dict(call.kwargs), call.grad_output))
    return replace(call, args=args, kwargs=kwargs, grad_output=grad)


def _low(value: Tensor, dtype: torch.dtype) -> bool:
    return value.dtype is not dtype and value.is_floating_point() and value.dtype.itemsize < dtype.itemsize
