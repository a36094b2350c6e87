"""What a fit is recorded as, in words that can be compared: a resumed fit must be the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pathkernel.trainer_checks import FitError

__all__ = ["check_configuration", "digest_of"]

_TOLD = 6
"""So many differences are named."""


def digest_of(values: Any) -> str | None:
    """The first 32 digits of a sha256 over all tensors in a batch or a table; None for None."""
    if values is None:
        return None
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().to("cpu").contiguous().reshape(-1)
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:32]


def check_configuration(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse to go on with a recording of another configuration.

    Args:
        recorded: Of the recording.
        found: Of the fit that is to go on.

    Raises:
        FitError: Naming what changed, from what to what.
    """
    changes = list(_differences("", recorded, found))
    if not changes:
        return
    more = f"; and {len(changes) - _TOLD} more" if len(changes) > _TOLD else ""
    raise FitError(
        f"PathKernelCallback cannot go on with the recording, the configuration changed: {'; '.join(changes[:_TOLD])}"
        f"{more}. Resume with the old one, or begin a new fit with another dirpath and without ckpt_path."
    )


def _differences(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    for key in dict.fromkeys([*before, *now]):
        name = f"{prefix}{key}"
        old, new = before.get(key, "nothing"), now.get(key, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(f"{name}: ", old, new)
        elif old != new:
            yield f"{name} was {old!r}, is {new!r}"
