"""What a chord holds of its training examples, in memory or in a file, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Block", "ExampleRows", "HeldRows", "KeptRows", "block_length"]

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 2048


def block_length(row_bytes: int) -> int:
    """Rows of a block: about a megabyte, at most 2,048."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(row_bytes, 1)))


@dataclass(frozen=True)
class Block:
    """Some of a chord's examples, in the order of their ids; their rows are read when they are asked for.

    Attributes:
        ids: Ascending, ``[b]``.
        between: ``(start, stop) -> rows [stop - start, k]`` of this block.
    """

    ids: Tensor
    between: Callable[[int, int], Tensor]

    @property
    def rows(self) -> Tensor:
        """All of its rows, ``[b, k]``."""
        return self.between(0, len(self.ids))


class ExampleRows(Protocol):
    """The examples of one chord."""

    @property
    def width(self) -> int:
        """Numbers of a row."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def blocks(self, length: int | None = None) -> Iterator[Block]:
        """All of them, ids ascending, at most ``length`` at a time; None for about a megabyte of rows."""
        ...

    def influences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and self inner products, block by block."""
        ...

    @property
    def total(self) -> Tensor:
        """Sum of the rows, ``[k]``."""
        ...

    def held(self) -> HeldRows:
        """All of it in memory."""
        ...


class HeldRows:
    """Examples in memory.

    Args:
        example_ids: Ascending, ``[V]``.
        rows: ``[V, k]``.
        self_inner: ``[V]``.
    """

    def __init__(self, example_ids: Tensor, rows: Tensor, self_inner: Tensor) -> None:
        self.example_ids, self.rows, self.self_inner = example_ids, rows, self_inner

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self.rows.dtype

    def __len__(self) -> int:
        return len(self.example_ids)

    def blocks(self, length: int | None = None) -> Iterator[Block]:
        """All of them, ids ascending."""
        step = length or block_length(self.rows.shape[1] * self.rows.element_size())
        for start in range(0, len(self), step):
            rows = self.rows[start : start + step]
            yield Block(self.example_ids[start : start + step], partial(_sliced, rows))

    def influences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and self inner products."""
        yield self.example_ids, self.self_inner

    @cached_property
    def total(self) -> Tensor:
        """Sum of the rows, ``[k]``, in double precision on the way: rows mostly cancel."""
        return self.rows.sum(0, dtype=torch.float64).to(self.rows.dtype)

    def held(self) -> HeldRows:
        """Itself."""
        return self


class KeptRows:
    """A chord's examples without some of them.

    Args:
        whole: All of them.
        gone: Ids to leave out.
    """

    def __init__(self, whole: ExampleRows, gone: Tensor) -> None:
        self.whole, self.gone = whole, gone

    @cached_property
    def _sums(self) -> tuple[int, Tensor, Tensor]:
        """Number of examples left, sum of their rows, and sum of those left out."""
        count, like = 0, self.whole.total
        kept, lost = (torch.zeros_like(like, dtype=torch.float64) for _ in range(2))
        for block in self.whole.blocks():
            out, rows = torch.isin(block.ids, self.gone), block.rows
            kept += rows[~out].double().sum(0)
            lost += rows[out].double().sum(0)
            count += int((~out).sum())
        return count, kept.to(like.dtype), lost.to(like.dtype)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.whole.width

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self.whole.dtype

    def __len__(self) -> int:
        return self._sums[0]

    @property
    def total(self) -> Tensor:
        """Sum of the rows that are left, ``[k]``."""
        return self._sums[1]

    @property
    def lost(self) -> Tensor:
        """Sum of the rows that were left out, ``[k]``."""
        return self._sums[2]

    def blocks(self, length: int | None = None) -> Iterator[Block]:
        """Those that are left, ids ascending."""
        for block in self.whole.blocks(length):
            kept = (~torch.isin(block.ids, self.gone)).nonzero().flatten()
            if len(kept):
                yield Block(block.ids[kept], partial(_chosen, block, kept))

    def influences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and self inner products of those that are left."""
        for ids, values in self.whole.influences():
            kept = ~torch.isin(ids, self.gone)
            yield ids[kept], values[kept]

    def held(self) -> HeldRows:
        """All of it in memory."""
        whole = self.whole.held()
        kept = ~torch.isin(whole.example_ids, self.gone)
        return HeldRows(whole.example_ids[kept], whole.rows[kept], whole.self_inner[kept])


def _sliced(rows: Tensor, start: int, stop: int) -> Tensor:
    return rows[start:stop]


def _chosen(block: Block, places: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a block at some of the ascending ``places`` in it: what lies before and behind them is not read."""
    which = places[start:stop]
    first, last = (int(which[0]), int(which[-1])) if len(which) else (0, -1)
    return block.between(first, last + 1)[which - first]
