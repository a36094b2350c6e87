"""Integration along a chord to a tolerance, row by row, with an error estimate from two rules of one family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.path.quadrature import QuadratureRule, gauss_legendre

__all__ = ["Integral", "integrate"]


@dataclass(frozen=True)
class Integral:
    """Integrals over [0, 1], one for each row.

    Attributes:
        value: The finer rule's value, ``[n, K]``.
        error: Norm of the difference from the coarser rule's, which bounds the coarser one's error, ``[n]``.
        points: Points of the finer rule, ``[n]``, on the CPU.
    """

    value: Tensor
    error: Tensor
    points: Tensor


def integrate(
    function: Callable[[float, Tensor], Tensor],
    rows: int,
    rtol: float,
    family: Callable[[int], QuadratureRule] = gauss_legendre,
    start: int = 2,
    limit: int = 64,
) -> Integral:
    """Integrate over [0, 1], doubling each row's points until two rules in a row agree about it.

    No row's answer depends on what other rows are there.

    Args:
        function: ``(t, which [m]) -> [m, K]``: the integrand at ``t`` for some of the rows.
        rows: Number of rows n.
        rtol: Tolerance of a row's error estimate, relative to the norm of its value.
        family: Number of points -> rule.
        start: Points of the first, coarser rule.
        limit: Most points of a rule; the estimate then says how far from the tolerance the value is.

    Returns:
        The integrals with their error estimates.

    Raises:
        ValueError: If the tolerance is not positive, or the points do not leave room for two rules.
    """
    if rtol <= 0 or start < 1 or 2 * start > limit:
        raise ValueError(f"rtol must be positive and 2 * start at most limit, found {rtol}, {start} and {limit}")
    open_rows, points = torch.arange(rows), start
    coarse = _apply(family(points), function, open_rows)
    value, errors = torch.zeros_like(coarse), coarse.new_zeros(rows)
    taken = torch.zeros(rows, dtype=torch.long)
    while len(open_rows):
        points *= 2
        fine = _apply(family(points), function, open_rows)
        error = (fine - coarse).norm(dim=1)
        done = error <= rtol * fine.norm(dim=1)
        if 2 * points > limit:
            done = torch.ones_like(done)
        here = done.cpu()
        value[open_rows[here]], errors[open_rows[here]], taken[open_rows[here]] = fine[done], error[done], points
        open_rows, coarse = open_rows[~here], fine[~done]
    return Integral(value, errors, taken)


def _apply(rule: QuadratureRule, function: Callable[[float, Tensor], Tensor], rows: Tensor) -> Tensor:
    total = rule.weights[0] * function(rule.points[0], rows)
    for t, w in zip(rule.points[1:], rule.weights[1:], strict=True):
        total = total + w * function(t, rows)
    return total
