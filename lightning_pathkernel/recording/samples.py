"""Samples of the two sides of a parameter's gradients, from which a sketch is fitted.

Rows ``X [*, r]`` with ``X^T X`` near the mean of ``G G^T`` over examples, ``[*, c]`` for ``G^T G``. Where a gradient
is not of rank one its columns (rows) are not all looked at but mixed by a few random signs, which leaves the moment's
expectation as it is: ``E[(G e)(G e)^T] = G G^T``. So no moment costs more than a few thin products, and only a
preconditioner that is not of rank one has gradients formed whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient

__all__ = ["Samples", "preconditioned_samples", "scaled_samples"]

Samples = tuple[Tensor, Tensor]
"""Of the rows ``[*, r]`` and of the columns ``[*, c]``."""

_EXAMPLES = 128
"""Most examples that are looked at."""

_DRAWS = 8
"""Random mixtures of each example's columns, and of its rows."""

_DENSE_NUMBERS = 1 << 21
"""About as many numbers of gradients are formed whole at once."""


def _signs(draws: int, d: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``draws`` vectors ``[draws, d]`` of random signs over ``sqrt(draws)``; all unit vectors where that is no more."""
    if d <= draws:
        return torch.eye(d, dtype=like.dtype, device=like.device)
    signs: Tensor = torch.randint(0, 2, (draws, d), generator=generator, dtype=torch.float64) * 2 - 1
    return like.new_tensor(draws**-0.5) * signs.to(like)


def _some(uses: Sequence[PerExampleGradient], examples: int) -> list[PerExampleGradient]:
    count = min(uses[0].n, examples)
    return [use.take(slice(count)) for use in uses]


def _added(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def scaled_samples(
    uses: Sequence[PerExampleGradient], shape: tuple[int, int], scale: tuple[Tensor, Tensor] | None,
    generator: torch.Generator, examples: int = _EXAMPLES,
) -> Samples:  # fmt: skip
    """Samples of ``(left right^T) . G``.

    Args:
        uses: Gradients of a parameter's uses, which add up.
        shape: ``(r, c)``.
        scale: ``left [r]`` and ``right [c]``; None for ones.
        generator: Private source of randomness, on the CPU.
        examples: Most examples that are looked at.

    Returns:
        The samples.
    """
    some = _some(uses, examples)
    factors = some[0].factors() if len(some) == 1 else None
    if factors is not None:
        return _outer_samples(factors, scale)
    like = some[0].total()
    by_rows, by_columns = (_signs(_DRAWS, d, generator, like) for d in shape)
    if scale is not None:
        by_rows, by_columns = by_rows * scale[0], by_columns * scale[1]
    columns = _added([use.project(by_rows, None) for use in some]).flatten(0, 1)
    rows = _added([use.project(None, by_columns) for use in some]).transpose(1, 2).flatten(0, 1)
    if scale is not None:
        rows, columns = rows * scale[0], columns * scale[1]
    share = some[0].n ** -0.5
    return rows * share, columns * share


def _outer_samples(factors: tuple[Tensor, Tensor | None], scale: tuple[Tensor, Tensor] | None) -> Samples:
    left, right = factors
    right = left.new_ones(len(left), 1) if right is None else right
    if scale is not None:
        left, right = left * scale[0], right * scale[1]
    share = len(left) ** -0.5
    return left * right.norm(dim=1, keepdim=True) * share, right * left.norm(dim=1, keepdim=True) * share


def preconditioned_samples(
    uses: Sequence[PerExampleGradient], diagonal: Tensor, generator: torch.Generator, examples: int = _EXAMPLES,
    passes: int = 1,
) -> Samples:  # fmt: skip
    """Samples of ``diagonal [r, c] . G``.

    Args:
        uses: Gradients of a parameter's uses, which add up.
        diagonal: What every gradient is multiplied with, elementwise.
        generator: Private source of randomness, on the CPU.
        examples: Most examples that are looked at; fewer where gradients have to be formed whole and are large.
        passes: Of so many, whose samples are put together, this is one: the fewer are shared out over them.

    Returns:
        The samples.
    """
    by_rows, by_columns = (_signs(_DRAWS, d, generator, diagonal) for d in diagonal.shape)
    factors = uses[0].take(slice(examples)).factors() if len(uses) == 1 else None
    if factors is not None:
        left, right = factors
        right = left.new_ones(len(left), 1) if right is None else right
        # (e . g) D . a for every draw e: the columns of D . (g a^T), mixed, without forming it
        columns = ((left.unsqueeze(1) * by_rows) @ diagonal) * right.unsqueeze(1)
        rows = ((right.unsqueeze(1) * by_columns) @ diagonal.T) * left.unsqueeze(1)
    else:
        some = _some(uses, min(examples, -(-max(8, _DENSE_NUMBERS // diagonal.numel()) // passes)))
        whole = _added([use.dense() for use in some]) * diagonal
        columns, rows = by_rows @ whole, (whole @ by_columns.T).transpose(1, 2)
    share = len(columns) ** -0.5
    return rows.flatten(0, 1) * share, columns.flatten(0, 1) * share
