"""Quadrature rules on [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["QuadratureRule", "composite_midpoint", "gauss_legendre"]


@dataclass(frozen=True)
class QuadratureRule:
    """Points and weights on [0, 1]."""

    name: str
    points: tuple[float, ...]
    weights: tuple[float, ...]


def gauss_legendre(points: int) -> QuadratureRule:
    """Gauss-Legendre rule, exact for polynomials of degree ``2 * points - 1``."""
    x, w = np.polynomial.legendre.leggauss(points)
    return QuadratureRule("gauss_legendre", tuple((x + 1) / 2), tuple(w / 2))


def composite_midpoint(points: int) -> QuadratureRule:
    """Midpoints of equal panels."""
    return QuadratureRule("composite_midpoint", tuple((np.arange(points) + 0.5) / points), (1 / points,) * points)
