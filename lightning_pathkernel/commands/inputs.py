"""What the user brings along: a module by its class, with a machine for it, and inputs from a file."""

from __future__ import annotations

import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import ForwardFn

__all__ = ["load_machine", "read_inputs", "read_targets"]

_KINDS = ".npy (one array), .safetensors (one tensor, or one called x), .csv (numbers, a row per input)"


def load_machine(
    directory: str, module: str, arguments: dict[str, Any] | None, forward_fn: str | None, device: str | None
) -> tuple[KernelMachine, nn.Module]:
    """The machine of an artifact, for the network that the command line names; nothing that it says is ever imported.

    Args:
        directory: Of the artifact, or an fsspec URL.
        module: ``package.Class``, or a function that makes the network; looked for in the working directory too.
        arguments: What it is called with.
        forward_fn: ``package.function``, or None.
        device: Where the network is to run, such as ``cuda`` or ``cuda:1``; None for the CPU.

    Returns:
        The machine and the network.

    Raises:
        ArtifactError: If the artifact is damaged or of another module.
        ValueError: If there is no such module, function or device here.
    """
    network, function, place = _module(module, arguments), _forward(forward_fn), _device(device)
    return KernelMachine.load(directory, network, function, device=place), network


def _module(name: str, arguments: dict[str, Any] | None) -> nn.Module:
    made = _named("--module", name)
    try:
        module = made(**(arguments or {}))
    except Exception as error:  # whatever the user's class raises
        raise ValueError(f"--module {name} could not be made: {error!r}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"--module {name} makes a {type(module).__name__}, which is no torch.nn.Module")
    return module


def _forward(name: str | None) -> ForwardFn | None:
    found: ForwardFn | None = None if name is None else _named("--forward-fn", name)
    return found


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch has no one class for it
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _named(option: str, name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` would find it
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs the user's file, which may raise anything
        raise ValueError(f"{option} {name}: cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{option} {name}: is a {type(found).__name__} and cannot be called")
    return found


def read_inputs(path: str, module: nn.Module) -> Tensor:
    """Inputs from a file, a row for each, in the dtype that the module's weights have; integers stay as they are.

    Args:
        path: The file; by its ending one of `.npy`, `.safetensors`, `.csv`.
        module: The network.

    Returns:
        ``[n, ...]``.

    Raises:
        ValueError: If the file is none of these, or holds no such thing.
        OSError: If it cannot be read.
    """
    found = _read(Path(path))
    if found.dim() < 1 or not len(found):
        raise ValueError(f"{path}: a tensor of shape {tuple(found.shape)}, but a row for each input is needed")
    if not found.is_floating_point():
        return found.long() if found.dtype != torch.bool else found
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return found.to(next(floating, torch.float32))


def read_targets(target: int | list[int] | None, queries: int) -> Tensor | None:
    """Which output is explained of each query.

    Args:
        target: One for all, or one for each; None for the predicted class.
        queries: How many there are.

    Returns:
        ``[queries]``, or None.

    Raises:
        ValueError: If there is another number of them.
    """
    if target is None:
        return None
    values = [target] * queries if isinstance(target, int) else target
    if len(values) != queries:
        raise ValueError(f"--target: {len(values)} given for {queries} inputs: give one for all, or one for each")
    return torch.tensor(values)


def _read(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)  # noqa: TID251  nothing is unpickled
            return torch.from_numpy(np.ascontiguousarray(stored))
        if path.suffix == ".safetensors":
            return _only(load_file(path))
        if path.suffix == ".csv":
            return torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    raise ValueError(f"{path}: inputs are read from {_KINDS}")


def _only(tensors: dict[str, Tensor]) -> Tensor:
    if "x" in tensors:
        return tensors["x"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise ValueError(f"{len(tensors)} tensors ({', '.join(sorted(tensors))[:200]}) and none is called x")
