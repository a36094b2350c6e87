"""Memory for what a chord keeps of every step.

It is little, but lives as long as the chord. Anything so small and long-lived that the allocator puts among the tensors
of a backward pass, be it a tensor's header, splits a block that the next pass needs whole: the heap then grows in every
step, and every step pays for fresh pages (measured: docs/benchmarks.md). What is kept is therefore a `Slot`, no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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

    def state(self) -> list[dict[str, Any]]:
        """What is kept, pool by pool, and how far each is filled."""
        return [pool.state() for pool in self._pools.values()]

    def restore(self, state: list[Mapping[str, Any]]) -> None:
        """Become the arena whose `state` this was."""
        self._pools = {}
        for each in state:
            pool = _Pool(self._size if each["like"].is_floating_point() else max(self._size >> 7, 1))
            pool.restore(each)
            self._pools[each["like"].dtype, each["like"].device] = pool

    def blocks(self) -> list[Tensor]:
        """All blocks, in the order of `state`."""
        return [block for pool in self._pools.values() for block in pool.blocks]

    def keep(self, values: Tensor) -> Slot:
        """A copy of ``values [n]``, as ``[n, 1]``."""
        slot = self.new(values.shape[0], 1, values)
        slot.block.narrow(0, slot.start, slot.n).copy_(values)
        return slot


class _Pool:
    def __init__(self, size: int) -> None:
        self._size = size
        self.blocks: list[Tensor] = []
        self.current, self.at = 0, 0

    def state(self) -> dict[str, Any]:
        used = [block if i < self.current else block[: self.at] for i, block in enumerate(self.blocks)]
        used = used[: self.current + 1]
        lengths = [len(block) for block in self.blocks]
        return {
            "like": self.blocks[0][:0], "lengths": lengths, "used": used, "current": self.current, "at": self.at
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.blocks = [state["like"].new_zeros(length) for length in state["lengths"]]
        for block, used in zip(self.blocks, state["used"], strict=False):
            block[: len(used)] = used
        self.current, self.at = int(state["current"]), int(state["at"])

    def take(self, n: int, k: int, like: Tensor) -> Slot:
        total, start = n * k, self.at
        while self.current < len(self.blocks) and start + total > len(self.blocks[self.current]):
            self.current, start = self.current + 1, 0
        if self.current == len(self.blocks):
            # filled, so that its pages are there before the steps that write to it
            self.blocks.append(like.new_empty(max(self._size, total)).fill_(0))
        self.at = start + total
        return Slot(self.blocks[self.current], start, n, k)
