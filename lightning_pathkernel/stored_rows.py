"""A chord's examples in a file of an artifact: mapped, checked and decoded block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_pathkernel.example_rows import Block, HeldRows, block_length
from lightning_pathkernel.packing import check_rows, decode_rows
from lightning_pathkernel.store import ArtifactError, TensorFile

__all__ = ["StoredRows"]

_IDS, _ROWS, _INNER = "rows/example_ids", "rows/rows", "rows/self_inner"


class StoredRows:
    """Examples of a chord, read from its file whenever they are asked for.

    Args:
        file: The chord's file.

    Attributes:
        width: Numbers of a row.
        dtype: Type of the rows, decoded.

    Raises:
        ValueError: If codes, exponents, ids and inner products do not fit together; seen without reading them.
        KeyError: If one of them is missing.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        ids, rows, inner = (file.entries[name] for name in (_IDS, _ROWS, _INNER))
        if len(ids.shape) != 1 or ids.dtype not in (torch.int64, torch.int32) or inner.shape != ids.shape:
            raise ValueError(f"example ids {ids.shape} of {ids.dtype}, {inner.shape} inner products")
        if len(rows.shape) != 2 or rows.shape[0] != ids.shape[0]:
            raise ValueError(f"rows of {rows.shape} for {ids.shape[0]} examples")
        if not inner.dtype.is_floating_point:
            raise ValueError(f"self inner products of {inner.dtype}")
        self._count, self.width = rows.shape
        stored = {name: file.entries[f"rows/{name}"] for name in ("rows", "exponents", "rest", "row_exponents")
                  if f"rows/{name}" in file.entries}  # fmt: skip
        self._packed = check_rows({name: (entry.dtype, entry.shape) for name, entry in stored.items()})
        self.dtype = torch.float32 if self._packed else rows.dtype
        self._in_turn = "row_exponents" in stored
        self._length = block_length(self.width * max(rows.dtype.itemsize, 4))

    def __len__(self) -> int:
        return self._count

    def _spans(self, length: int | None = None) -> Iterator[tuple[int, int]]:
        step = length or self._length
        for start in range(0, self._count, step):
            yield start, min(start + step, self._count)

    def _ids(self, length: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Ids block by block, each checked to be above the one before it."""
        last: Tensor | None = None
        for start, stop in self._spans(length):
            ids = self._file.rows(_IDS, start, stop).long()
            joined = ids if last is None else torch.cat([last, ids])
            if not bool((joined[1:] > joined[:-1]).all()):
                raise ArtifactError(f"{self._file.name}: not a chord: example ids do not ascend")
            last = ids[-1:]
            yield start, stop, ids

    @cached_property
    def _exponents(self) -> Tensor:
        return self._file.get("rows/exponents")

    @cached_property
    def _rest(self) -> Tensor:
        rest = self._file.get("rows/rest")
        if not bool(rest.isfinite().all()):
            raise ArtifactError(f"{self._file.name}: not a chord: the rest of its rows is not finite")
        return rest

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Rows without the rest, in the type of the rows."""
        rows = self._file.rows(_ROWS, start, stop)
        if self._packed:
            each = self._file.rows("rows/row_exponents", start, stop) if self._in_turn else None
            rows = decode_rows(rows, self._exponents, each)
        if rows.numel() and not all(math.isfinite(end) for end in rows.aminmax()):  # a fifteenth of isfinite's time
            raise ArtifactError(f"{self._file.name}: not a chord: a row is not finite")
        return rows

    @cached_property
    def _summary(self) -> tuple[int, Tensor]:
        """Which row the rest belongs to, the largest one, and the sum of all rows."""
        largest, at, total = -1.0, 0, torch.zeros(self.width, dtype=torch.float64)
        for start, stop in self._spans():
            values = self._decoded(start, stop)
            if self._packed:
                sizes = values.abs().amax(1)
                if float(sizes.max()) > largest:
                    largest, at = float(sizes.max()), start + int(sizes.argmax())
            total += values.sum(0, dtype=torch.float64)
        if self._packed:
            peak = self._decoded(at, at + 1)[0]
            total += self._with_rest(peak).double() - peak.double()
        return at, total.to(self.dtype)

    def _with_rest(self, row: Tensor) -> Tensor:
        return (row.double() + self._rest.double()).float()

    @property
    def total(self) -> Tensor:
        """Sum of the rows, ``[k]``; the first time all of them are read for it."""
        return self._summary[1]

    def blocks(self, length: int | None = None) -> Iterator[Block]:
        """All of them, ids ascending, at most ``length`` at a time; None for about a megabyte of rows."""
        for start, _, ids in self._ids(length):
            yield Block(ids, partial(self._rows, start))

    def _rows(self, origin: int, start: int, stop: int) -> Tensor:
        """Rows with the rest, counted from ``origin``."""
        rows = self._decoded(origin + start, origin + stop)
        at = self._summary[0] - origin if self._packed else -1
        if start <= at < stop:
            rows[at - start] = self._with_rest(rows[at - start])
        return rows

    def influences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and self inner products, block by block."""
        for start, stop, ids in self._ids():
            yield ids, self._file.rows(_INNER, start, stop)

    def held(self) -> HeldRows:
        """All of it in memory."""
        blocks = list(self.blocks())
        rows = torch.cat([b.rows for b in blocks]) if blocks else self._file.get(_ROWS)
        ids = torch.cat([b.ids for b in blocks]) if blocks else torch.zeros(0, dtype=torch.long)
        return HeldRows(ids, rows, self._file.get(_INNER))

    def codes(self, gone: Tensor) -> dict[str, Tensor]:
        """The tensors of the group ``rows`` that hold examples, as they are stored, without some examples.

        Args:
            gone: Ids to leave out.

        Returns:
            Name within the group -> tensor. The rest stays with the largest row, and goes with it.
        """
        ids = self._file.get(_IDS)
        kept = ~torch.isin(ids.long(), gone)
        out = {name: self._file.get(f"rows/{name}")[kept] for name in ("example_ids", "rows", "self_inner")}
        if self._packed and not bool(kept.any()):
            return {**out, "rows": torch.zeros(0, self.width)}
        if self._in_turn:
            out["row_exponents"] = self._file.get("rows/row_exponents")[kept]
        if self._packed:
            stays = bool(kept[self._summary[0]])
            out |= {"exponents": self._exponents, "rest": self._rest if stays else torch.zeros_like(self._rest)}
        return out
