"""Where nodes lie and how chords are integrated."""

from lightning_pathkernel.path.controller import DriftController, NodeBudget
from lightning_pathkernel.path.integrate import Integral, integrate
from lightning_pathkernel.path.quadrature import QuadratureRule, composite_midpoint, gauss_legendre
from lightning_pathkernel.path.schedule import node_schedule

__all__ = [
    "DriftController",
    "Integral",
    "NodeBudget",
    "QuadratureRule",
    "composite_midpoint",
    "gauss_legendre",
    "integrate",
    "node_schedule",
]
