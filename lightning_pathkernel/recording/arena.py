"""Memory for what a chord keeps of every step.

It is little, but lives as long as the chord. Anything so small and long-lived that the allocator puts among the tensors
of a backward pass, be it a tensor's header, splits a block that the next pass needs whole: the heap then grows in every
step, and every step pays for fresh pages (measured: docs/benchmarks.md). What is kept is therefore a `Slot`, no tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Arena", "Slot"]


class Slot(NamedTuple):
    """A matrix ``[n, k]``, column after column: the numbers of ``block``'s storage from ``start`` on.

    In this order a thin product is one with few rows: few columns cost BLAS up to twice as much (docs/benchmarks.md).
    """

    block: Tensor
    start: int
    n: int
    k: int

    def view(self) -> Tensor:
        """The matrix."""
        return self.block.as_strided((self.n, self.k), (1, self.n), self.start)


class Arena:
    """Blocks taken once and used again by every later chord, apart for every dtype and device.

    Args:
        block: Numbers allocated at once; of whole numbers (a row has one id, and some hundred features) a 128th of it.
    """

    def __init__(self, block: int = 9 << 20) -> None:
        self._size = block
        self._pools: dict[tuple[torch.dtype, torch.device], _Pool] = {}

    def reset(self) -> None:
        """Everything kept so far may be written over."""
        for pool in self._pools.values():
            pool.current, pool.at = 0, 0

    def new(self, n: int, k: int, like: Tensor) -> Slot:
        """Room for ``[n, k]`` of the dtype and on the device of ``like``, the asker's until the next `reset`."""
        key = like.dtype, like.device
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool(self._size if like.is_floating_point() else max(self._size >> 7, 1))
        return pool.take(n, k, like)

    def keep(self, values: Tensor) -> Slot:
        """A copy of ``values [n]``, as ``[n, 1]``."""
        slot = self.new(values.shape[0], 1, values)
        slot.block.narrow(0, slot.start, slot.n).copy_(values)
        return slot


class _Pool:
    def __init__(self, size: int) -> None:
        self._size = size
        self._blocks: list[Tensor] = []
        self.current, self.at = 0, 0

    def take(self, n: int, k: int, like: Tensor) -> Slot:
        total, start = n * k, self.at
        while self.current < len(self._blocks) and start + total > len(self._blocks[self.current]):
            self.current, start = self.current + 1, 0
        if self.current == len(self._blocks):
            # filled, so that its pages are there before the steps that write to it
            self._blocks.append(like.new_empty(max(self._size, total)).fill_(0))
        self.at = start + total
        return Slot(self._blocks[self.current], start, n, k)
