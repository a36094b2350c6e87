"""Random and deflated factors of a Kronecker sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pathkernel.sketch.balance import leading_subspace

__all__ = ["deflated_factor", "random_factor"]


def random_factor(d: int, k: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``[k, d]`` with independent normal entries of variance ``1 / k``: ``E[P^T P] = 1``.

    Args:
        d: Dimension sketched.
        k: Rows.
        generator: Private source of randomness; the numbers are drawn on the CPU, the same for every device.
        like: Gives dtype and device.

    Returns:
        The factor.
    """
    factor: Tensor = torch.randn(k, d, generator=generator, dtype=torch.float64) / k**0.5
    return factor.to(like)


def deflated_factor(samples: Tensor, k: int, generator: torch.Generator, kept: float = 0.75) -> Tensor:
    """Leading eigenvectors of the second moment, and random rows on their orthogonal complement.

    Exact on the kept subspace, unbiased on the rest: the idea of Hutch++ (Meyer et al. 2021).

    Args:
        samples: Rows whose second moment is deflated, ``[N, d]``.
        k: Rows of the factor.
        generator: Private source of randomness, on the CPU.
        kept: Share of the rows that are eigenvectors.

    Returns:
        The factor, ``[k, d]``, used on both sides.
    """
    d = samples.shape[1]
    kept_rows = min(int(kept * k), d)
    basis = leading_subspace(samples.double(), min(d, 2 * max(kept_rows, 1)), generator)
    core = torch.linalg.eigh((samples.double() @ basis).T @ (samples.double() @ basis))[1]
    top = (basis @ core[:, -kept_rows:]).T if kept_rows else basis.new_zeros(0, d)
    noise = random_factor(d, k - kept_rows, generator, top)
    return torch.cat([top, noise - (noise @ top.T) @ top]).to(samples)
