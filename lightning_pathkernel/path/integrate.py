"""Integration along a chord to a tolerance, with an error estimate from two rules of one family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_pathkernel.path.quadrature import QuadratureRule, gauss_legendre

__all__ = ["Integral", "integrate"]


@dataclass(frozen=True)
class Integral:
    """An integral over [0, 1].

    Attributes:
        value: The finer rule's value.
        error: Norm of the difference from the coarser rule's, which bounds the coarser one's error.
        points: Points of the finer rule.
    """

    value: Tensor
    error: float
    points: int


def integrate(
    function: Callable[[float], Tensor],
    rtol: float,
    family: Callable[[int], QuadratureRule] = gauss_legendre,
    start: int = 2,
    limit: int = 64,
) -> Integral:
    """Integrate over [0, 1], doubling the points until two rules in a row agree.

    Args:
        function: What is integrated.
        rtol: Tolerance of the error estimate, relative to the norm of the value.
        family: Number of points -> rule.
        start: Points of the first, coarser rule.
        limit: Most points of a rule; the estimate then says how far from the tolerance the value is.

    Returns:
        The integral with its error estimate.

    Raises:
        ValueError: If the tolerance is not positive, or the points do not leave room for two rules.
    """
    if rtol <= 0 or start < 1 or 2 * start > limit:
        raise ValueError(f"rtol must be positive and 2 * start at most limit, found {rtol}, {start} and {limit}")
    points = start
    coarse = _apply(family(points), function)
    while True:
        points *= 2
        fine = _apply(family(points), function)
        error = float((fine - coarse).norm())
        if error <= rtol * float(fine.norm()) or 2 * points > limit:
            return Integral(fine, error, points)
        coarse = fine


def _apply(rule: QuadratureRule, function: Callable[[float], Tensor]) -> Tensor:
    total = rule.weights[0] * function(rule.points[0])
    for t, w in zip(rule.points[1:], rule.weights[1:], strict=True):
        total = total + w * function(t)
    return total
