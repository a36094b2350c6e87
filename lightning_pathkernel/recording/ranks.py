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
        device: Where tensors must be to be sent.
    """

    def __init__(self, world: int = 1, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.world = world
        self.rank = rank
        self._device = torch.device(device)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return values
        out = values.detach().to(self._device, copy=True)
        dist.all_reduce(out)
        return out.to(values.device)

    def rows(self, values: Tensor) -> Tensor:
        """All processes' rows ``[n, *]``, one process after the other; they may hold different numbers of rows."""
        if self.world == 1:
            return values
        counts = [torch.zeros(1, dtype=torch.long, device=self._device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(values)], device=self._device))
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, *values.shape[1:], dtype=values.dtype, device=self._device)
        padded[: len(values)] = values.detach().to(self._device)
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        parts = [part[: int(count)] for part, count in zip(found, counts, strict=True)]
        return torch.cat(parts).to(values.device)

    def texts(self, text: str) -> list[str]:
        """All processes' texts, by rank."""
        if self.world == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)[: len(text.encode())]
        counts = [torch.zeros(1, dtype=torch.long, device=self._device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(data)], device=self._device))
        every = self.rows(data).to("cpu").split([int(count) for count in counts])
        return [bytes(part.tolist()).decode() for part in every]

    def first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process' tensors, which must have the same names and shapes everywhere."""
        if self.world == 1:
            return dict(tensors)
        out = {}
        for name, value in tensors.items():
            sent = value.detach().to(self._device, copy=True).contiguous()
            dist.broadcast(sent, 0)
            out[name] = sent.to(value.device)
        return out

    def first_matrices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process' matrices; the others' have the same names and columns, but perhaps not as many rows."""
        if self.world == 1:
            return dict(tensors)
        out = {}
        for name, value in tensors.items():
            rows = self.first({"rows": torch.tensor([len(value)])})["rows"]
            like = value if len(value) == int(rows) else value.new_empty(int(rows), *value.shape[1:])
            out[name] = self.first({name: like})[name]
        return out
