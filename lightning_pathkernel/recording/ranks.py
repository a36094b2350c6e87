"""Several processes that train one network on shares of every batch, as distributed data parallel does.

Every method is a collective: all processes call it, in the same order, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes of a fit; with one of them nothing is sent.

    Args:
        world: Their number; more than one use torch's default process group.
        rank: This one's place among them.
    """

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        self.world = world
        self.rank = rank

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return values
        out = values.detach().clone()
        dist.all_reduce(out)
        return out

    def rows(self, values: Tensor) -> Tensor:
        """All processes' rows ``[n, *]``, one process after the other; they may hold different numbers of rows."""
        if self.world == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
        longest = max(int(count) for count in counts)
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values.detach()
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return torch.cat([part[: int(count)] for part, count in zip(found, counts, strict=True)])

    def first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process' tensors, which must have the same names and shapes everywhere."""
        if self.world == 1:
            return dict(tensors)
        out = {name: value.detach().clone() for name, value in tensors.items()}
        for value in out.values():
            dist.broadcast(value, 0)
        return out
