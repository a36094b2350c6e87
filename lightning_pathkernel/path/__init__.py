"""Where nodes lie and how chords are integrated."""

from lightning_pathkernel.path.quadrature import QuadratureRule, composite_midpoint, gauss_legendre
from lightning_pathkernel.path.schedule import node_schedule

__all__ = ["QuadratureRule", "composite_midpoint", "gauss_legendre", "node_schedule"]
