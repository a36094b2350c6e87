"""What a module must look like for a machine to be of it, and the parts of its state that training never moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_pathkernel.network import float_buffers
from lightning_pathkernel.store import CONSTANTS, ArtifactError

__all__ = ["CONSTANTS", "check_module", "check_state", "constants", "describe_module", "load_constants"]


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Name, shape and dtype of every parameter and buffer, and which parameters are trainable."""

    def facts(tensor: Tensor) -> dict[str, Any]:
        return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}

    return {
        "parameters": {n: {**facts(p), "trainable": p.requires_grad} for n, p in module.named_parameters()},
        "buffers": {n: facts(b) for n, b in module.named_buffers()},
    }


def check_module(module: nn.Module, expected: Mapping[str, Any]) -> None:
    """Refuse a module that is not of the architecture described.

    Args:
        module: The module offered.
        expected: `describe_module` of the one that was trained.

    Raises:
        ArtifactError: Naming every difference.
    """
    found = describe_module(module)
    wrong = []
    for kind in ("parameters", "buffers"):
        mine, theirs = found[kind], expected[kind]
        wrong += [f"{kind[:-1]} {n!r} is missing from the module" for n in theirs if n not in mine]
        wrong += [f"{kind[:-1]} {n!r} is not in the artifact" for n in mine if n not in theirs]
        for name in mine.keys() & theirs.keys():
            for key in ("shape", "dtype"):
                if mine[name][key] != theirs[name][key]:
                    wrong.append(f"{name!r}: {key} {mine[name][key]}, expected {theirs[name][key]}")
    if wrong:
        raise ArtifactError("the module is not the one this machine was made of: " + "; ".join(sorted(wrong)))


def check_state(module: nn.Module, stored: Mapping[str, tuple[tuple[int, ...], object]], whole: bool = True) -> None:
    """Refuse chords that are not of this module.

    Args:
        module: The module.
        stored: Shape and dtype of weights and floating-point buffers that are stored, by name.
        whole: Whether these must be all that training moves.

    Raises:
        ArtifactError: Naming every difference.
    """
    tensors = {**{n: p for n, p in module.named_parameters() if p.requires_grad}, **float_buffers(module)}
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    wrong = sorted(stored.keys() - mine.keys())
    wrong += [n for n in sorted(mine.keys() - stored.keys()) if whole]
    wrong += [n for n in sorted(mine.keys() & stored.keys()) if mine[n] != stored[n]]
    if wrong:
        raise ArtifactError(f"a chord is not of this network: {', '.join(map(repr, wrong))}")


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters and buffers that are not floating-point."""
    floats = float_buffers(module)
    frozen = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    return {**frozen, **{n: b.detach() for n, b in module.named_buffers() if n not in floats}}


def load_constants(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put stored constants into a module.

    Args:
        module: The module, changed in place.
        values: What `constants` gave.

    Raises:
        ArtifactError: If they do not fit.
    """
    own = constants(module)
    missing = sorted(own.keys() - values.keys())
    if missing:
        raise ArtifactError(f"{CONSTANTS}: no {', '.join(map(repr, missing))}")
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise ArtifactError(f"{CONSTANTS}: {name!r} does not fit the module")
        own[name].copy_(value)
