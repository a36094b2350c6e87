"""What it takes to run a layer's forward pass a second time and get the same: its buffers, its random numbers.

A forward pass in training may move the state that it runs on: spectral norm iterates its singular vectors, dropout
draws from the random generator. `CallState` is that state as the call found or left it, and `repeatable` holds
everything else still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["CallState", "call_state", "mixes_rows", "random_state", "repeatable", "replayed"]


@dataclass(frozen=True)
class CallState:
    """The state that one call of a layer ran on.

    Attributes:
        buffers: Name within the layer -> buffer that parametrisations iterate, as the call left it and used it.
        random: State of the device's random generator before the call, or None if the call drew nothing from it.
    """

    buffers: Mapping[str, Tensor]
    random: Tensor | None


def random_state(device: torch.device) -> Tensor | None:
    """State of the default generator of a device; None where it has none that can be read."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def call_state(layer: nn.Module, before: Tensor | None, device: torch.device) -> CallState:
    """What a call of ``layer`` that has just ended ran on.

    Args:
        layer: The layer.
        before: `random_state` before the call, or None if random numbers play no part.
        device: Whose generator that is.

    Returns:
        The state.
    """
    after = None if before is None else random_state(device)
    drew = before is not None and after is not None and not torch.equal(before, after)
    moving = {id(module) for module in _iterating(layer)}
    buffers = {
        f"{path}.{name}" if path else name: buffer.clone()
        for path, module in (layer.named_modules() if moving else ())
        if id(module) in moving
        for name, buffer in module.named_buffers(recurse=False)
    }
    return CallState(buffers, before if drew else None)


def _iterating(layer: nn.Module) -> list[nn.Module]:
    """Modules whose weight is computed with buffers that move in training: spectral norm, of either make."""
    found: list[nn.Module] = []
    for module in layer.modules():
        if isinstance(module, ParametrizationList):
            found.extend(child for child in module.modules() if child._buffers)
        elif any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
            found.append(module)
    return found


def mixes_rows(layer: nn.Module) -> bool:
    """Whether the layer contains a batch norm that uses the batch's own statistics."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in layer.modules())


@contextmanager
def repeatable(layer: nn.Module) -> Iterator[None]:
    """Keep parametrisations from iterating, and put back the weights that old-style hooks leave in their modules."""
    iterating = [module for module in _iterating(layer) if module.training]
    computed = [(m, {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in layer.modules()]
    try:
        for module in iterating:
            module.training = False
        yield
    finally:
        for module in iterating:
            module.training = True
        for module, attributes in computed:
            vars(module).update(attributes)


@contextmanager
def replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the random numbers again that were drawn from ``state`` on; generators are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif state is not None:
            torch.set_rng_state(state)
        yield
