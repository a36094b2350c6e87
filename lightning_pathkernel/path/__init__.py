"""Where nodes lie and how chords are integrated."""
from lightning_pathkernel.path.quadrature import QuadratureRule, composite_midpoint, gauss_legendre

__all__ = ["QuadratureRule", "composite_midpoint", "gauss_legendre"]
