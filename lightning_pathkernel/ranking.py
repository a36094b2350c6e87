"""Contributions out of query features and stored rows, range by range: all of them, or the strongest on each side.

Examples are taken in ranges of their ids. Within a range the chords come one after another, and of each only the
rows of this range are read and added up; what is held are one chord's rows and the contributions of one range.

n: query, b: example of a range, k: number of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_pathkernel.example_rows import Block, ExampleRows

__all__ = ["ChordShare", "Passed", "all_contributions", "strongest_contributions"]

Passed = Callable[[int], object]
"""Told of the number of rows that have been dealt with."""
RANGE = 1024
"""Examples in a range where nothing is said of their number."""


@dataclass(frozen=True)
class ChordShare:
    """What a chord's part of the contributions to some queries is made of.

    Attributes:
        features: Query side of eq. (8), ``[n, k]``, with the control variate's where it is asked for.
        examples: The chord's examples.
    """

    features: Tensor
    examples: ExampleRows

    def completed(self, gap: Tensor) -> ChordShare:
        """The share with what the chord's sketch lost shared out by the control variate of docs/theory.md section 4.

        ``gamma_i = <row_i, S> / |S|^2`` with ``S`` the sum of all rows; they add up to 1. As they are inner products
        with the rows too, they become part of the features.

        Args:
            gap: What was lost of the sum of contributions, ``[n]``.

        Returns:
            A share whose contributions add up to ``gap`` more.
        """
        total = self.examples.total.to(self.features.device)
        direction = total / (total @ total).clamp_min(1e-30)
        return ChordShare(self.features + gap.unsqueeze(1) * direction, self.examples)


def all_contributions(
    shares: Iterable[ChordShare], ids: Tensor, length: int | None = None, passed: Passed = lambda rows: None
) -> Tensor:
    """Contributions of every example; one chord's features are held at a time where ``shares`` makes them on the way.

    Args:
        shares: Chord by chord, at least one.
        ids: All ids, ascending; the columns of the answer.
        length: Examples at a time; None for about a megabyte of rows.
        passed: Called with the number of rows whenever some have been added.

    Returns:
        The contributions, ``[n, N]``, on the CPU.

    Raises:
        ValueError: If there are no shares.
    """
    out: Tensor | None = None
    for share in shares:
        if out is None:
            out = torch.zeros(len(share.features), len(ids), dtype=share.features.dtype)
        for block in share.examples.blocks(length):
            if not len(block.ids):
                continue
            _add(out, torch.searchsorted(ids, block.ids), _part(share, block).cpu())
            passed(len(block.ids))
    if out is None:
        raise ValueError("a machine without chords")
    return out


def strongest_contributions(
    shares: Sequence[ChordShare], top_k: int, length: int | None = None, passed: Passed = lambda rows: None
) -> tuple[Tensor, Tensor]:
    """The examples with the largest and with the smallest contributions; memory does not grow with their number.

    Of equal contributions that of the smaller id comes first.

    Args:
        shares: Chord by chord.
        top_k: Examples on each side; all of them where there are fewer.
        length: As in `all_contributions`, and of a range; None for 1,024 there.
        passed: As in `all_contributions`.

    Returns:
        Ids and contributions, ``[n, 2k]`` each, on the CPU: the largest first, then the smallest first.
    """
    like = shares[0].features
    empty = like.new_zeros(len(like), 0), torch.zeros(len(like), 0, dtype=torch.long)
    sides = {1: empty, -1: empty}
    for ids, part in _ranges(shares, length, passed):
        for sign, (values, known) in sides.items():
            values, known = torch.cat([values, sign * part], 1), torch.cat([known, ids.expand(len(part), -1)], 1)
            kept = _strongest(values, top_k)
            sides[sign] = values.gather(1, kept), known.gather(1, kept.cpu())
    found = []
    for sign, (values, known) in sides.items():
        order = values.sort(stable=True, dim=1, descending=True)  # ids ascend
        found.append((known.gather(1, order.indices.cpu()), sign * order.values.cpu()))
    return torch.cat([known for known, _ in found], 1), torch.cat([values for _, values in found], 1)


def _strongest(values: Tensor, top_k: int) -> Tensor:
    """Columns of the largest numbers of each row, ascending, ``[n, k]``; of equal numbers the first ones are taken."""
    count = min(top_k, values.shape[1])
    if count in (0, values.shape[1]):
        return torch.arange(count, device=values.device).expand(len(values), -1)
    ranked = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = ranked.topk(top_k, 1).values[:, -1:]
    above, equal = ranked > least, ranked == least
    room = top_k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].reshape(len(values), top_k)


def _part(share: ChordShare, block: Block) -> Tensor:
    """Contributions of a block's examples, ``[n, b]``."""
    return share.features @ block.rows.to(share.features.device).T


def _add(out: Tensor, columns: Tensor, part: Tensor) -> None:
    """Add to some columns of a matrix, which ascend."""
    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 == len(columns):  # side by side, as they are where every chord visits all examples
        out[:, first : last + 1] += part
    else:
        out.index_add_(1, columns.to(out.device), part)


def _ranges(shares: Sequence[ChordShare], length: int | None, passed: Passed) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids, ascending, and contributions of all chords together: every id comes once, with all of its contribution."""
    count, like = length or RANGE, shares[0].features
    heads = [_Head(share.examples.blocks(length), count) for share in shares]
    while len(within := torch.unique(torch.cat([head.ids() for head in heads]))[:count]):
        out = like.new_zeros(len(like), len(within))
        for share, head in zip(shares, heads, strict=True):
            for block in head.until(int(within[-1])):
                _add(out, torch.searchsorted(within, block.ids), _part(share, block))
                passed(len(block.ids))
        yield within, out


class _Head:
    """The next examples of a chord, of which only the ids have been read.

    Args:
        blocks: The chord's blocks.
        count: Ids that are looked ahead, where so many are left.
    """

    def __init__(self, blocks: Iterator[Block], count: int) -> None:
        self._blocks, self._count = blocks, count
        self._held: list[Block] = []

    def ids(self) -> Tensor:
        """The next ids, at least ``count`` of them or all that are left."""
        while sum(len(block.ids) for block in self._held) < self._count:
            block = next(self._blocks, None)
            if block is None:
                break
            self._held.append(block)
        return torch.cat([torch.zeros(0, dtype=torch.long), *(block.ids for block in self._held)])

    def until(self, bound: int) -> Iterator[Block]:
        """Blocks of the examples up to an id, which are then behind."""
        held, self._held = self._held, []
        for block in held:
            cut = int(torch.searchsorted(block.ids, bound, right=True))
            if cut:
                yield Block(block.ids[:cut], block.between)
            if cut < len(block.ids):
                self._held.append(Block(block.ids[cut:], partial(_later, block, cut)))


def _later(block: Block, cut: int, start: int, stop: int) -> Tensor:
    return block.between(cut + start, cut + stop)
