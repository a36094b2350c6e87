"""How many rows of a batch go through a network in one pass of ours, so that it takes little memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pathkernel.network import Network, batch_size, take_rows

__all__ = ["rows_at_once"]

_NUMBERS = 1 << 24
"""Numbers that a pass may save for its backward pass, 64 MB of them."""
_LEAST = 8
"""Rows in one pass at least."""


def rows_at_once(network: Network, batch: object, most: int) -> int:
    """Rows of a batch whose pass saves about as many numbers as one may.

    Args:
        network: The network; one pass of two rows is made, in evaluation mode.
        batch: The batch.
        most: Never more rows; with more of them small networks leave the processor's caches.

    Returns:
        The rows, 8 at least.
    """
    asked = take_rows(batch, slice(2))
    weights = {p.untyped_storage().data_ptr() for p in network.plan.parameters.values()}
    saved: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes() // value.element_size()
        return value

    with (
        network.evaluating(),
        network.learning(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda value: value),
    ):
        outputs = network.forward_fn(network.module, asked)  # keeps what is saved, so that no storage is used twice
    del outputs
    return max(_LEAST, min(most, _NUMBERS * batch_size(asked) // max(1, sum(saved.values()))))
