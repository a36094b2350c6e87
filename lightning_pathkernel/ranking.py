"""Contributions out of query features and stored rows, block by block: all of them, or the strongest on each side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.example_rows import ExampleRows

__all__ = ["ChordShare", "all_contributions", "strongest_contributions"]


@dataclass(frozen=True)
class ChordShare:
    """What a chord's part of the contributions to some queries is made of.

    Attributes:
        features: Query side of eq. (8), ``[n, k]``.
        examples: The chord's examples.
        gap: What its sketch lost of the sum of contributions, ``[n]``, shared out by the control variate of
            docs/theory.md section 4: ``gamma_i = <row_i, S> / |S|^2`` with ``S`` the sum of all rows; they add up to 1.
            None for contributions as they are stored.
    """

    features: Tensor
    examples: ExampleRows
    gap: Tensor | None = None

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[b]``, ascending, and their contributions ``[n, b]``."""
        for ids, rows in self.examples.blocks():
            if not len(ids):
                continue
            part = self.features @ rows.T
            if self.gap is not None:
                total = self.examples.total
                shares = rows @ total / (total @ total).clamp_min(1e-30)
                part = part + self.gap.unsqueeze(1) * shares
            yield ids, part


def all_contributions(shares: Sequence[ChordShare], ids: Tensor) -> Tensor:
    """Contributions of every example.

    Args:
        shares: Chord by chord.
        ids: All ids, ascending; the columns of the answer.

    Returns:
        The contributions, ``[n, N]``.
    """
    like = shares[0].features
    out = like.new_zeros(len(like), len(ids))
    for share in shares:
        for found, part in share.blocks():
            out.index_add_(1, torch.searchsorted(ids, found), part)
    return out


def strongest_contributions(shares: Sequence[ChordShare], top_k: int) -> tuple[Tensor, Tensor]:
    """The examples with the largest and with the smallest contributions; memory does not grow with their number.

    Args:
        shares: Chord by chord.
        top_k: Examples on each side; all of them where there are fewer.

    Returns:
        Ids and contributions, ``[n, 2k]`` each: the largest first, then the smallest first.
    """
    like = shares[0].features
    sides = [(like.new_zeros(len(like), 0), torch.zeros(len(like), 0, dtype=torch.long)) for _ in range(2)]
    for ids, part in _merged(shares):
        sides = [
            _stronger(values, known, part, ids, top_k, largest)
            for (values, known), largest in zip(sides, (True, False), strict=True)
        ]
    return torch.cat([known for _, known in sides], 1), torch.cat([values for values, _ in sides], 1)


def _stronger(
    values: Tensor, known: Tensor, part: Tensor, ids: Tensor, top_k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    values, known = torch.cat([values, part], 1), torch.cat([known, ids.expand(len(part), -1)], 1)
    best = values.topk(min(top_k, values.shape[1]), dim=1, largest=largest)
    return best.values, known.gather(1, best.indices)


def _merged(shares: Sequence[ChordShare]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and contributions of all chords together, ascending: every id comes once, with all of its contribution."""
    streams = [share.blocks() for share in shares]
    heads = [next(stream, None) for stream in streams]
    while last := [int(head[0][-1]) for head in heads if head is not None]:
        bound = min(last)
        pieces = []
        for index, head in enumerate(heads):
            if head is None:
                continue
            cut = int(torch.searchsorted(head[0], bound, right=True))
            if cut:
                pieces.append((head[0][:cut], head[1][:, :cut]))
            heads[index] = (head[0][cut:], head[1][:, cut:]) if cut < len(head[0]) else next(streams[index], None)
        ids = torch.unique(torch.cat([found for found, _ in pieces]))
        out = pieces[0][1].new_zeros(len(pieces[0][1]), len(ids))
        for found, part in pieces:
            out.index_add_(1, torch.searchsorted(ids, found), part)
        yield ids, out
