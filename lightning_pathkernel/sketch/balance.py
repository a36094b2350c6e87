"""Balanced subspaces: two biorthogonal maps fitted to what is asked and to what is recorded.

As in balanced truncation (Moore 1981), with second moments ``C_g = L_g L_g^T`` of the training side and
``C_j = L_j L_j^T`` of the query side, ``L_j^T L_g = U S V^T``, the maps

    P = S^{-1/2} U^T L_j^T   (training side)        Q = S^{-1/2} V^T L_g^T   (query side)        P Q^T = 1

keep the directions that matter most to inner products between the two sides, eq. (9) of docs/theory.md. Both
moments are regularised by ``ridge`` times their mean eigenvalue: an oblique projection would otherwise amplify what
the samples did not contain.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balanced_factors", "leading_subspace"]


def leading_subspace(samples: Tensor, rank: int, generator: torch.Generator, iterations: int = 1) -> Tensor:
    """Orthonormal basis ``[d, rank]`` near the leading right singular space of ``samples [N, d]``.

    Randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4): no ``d x d`` matrix is formed.

    Args:
        samples: Rows, ``[N, d]``.
        rank: Columns wanted.
        generator: Private source of randomness, on the CPU.
        iterations: Power iterations.

    Returns:
        The basis.
    """
    start = torch.randn(samples.shape[1], rank, generator=generator, dtype=torch.float64)
    basis = samples.T @ (samples @ start.to(samples))
    for _ in range(iterations):
        basis = samples.T @ (samples @ torch.linalg.qr(basis)[0])
    return _orthonormal(basis)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _root(moment: Tensor, floor: float) -> Tensor:
    """A square root ``L`` with ``L L^T = moment + floor``; which one does not matter to the maps."""
    raised = moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(raised)
    if failed:
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * (values.clamp_min(0) + floor).sqrt()
    return root


def _leading_triplets(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors ``[d, k]``, values ``[k]`` and right vectors ``[d, k]`` of the ``k`` largest singular values."""
    # the eigenvectors of M^T M, in half the time; the ridge keeps values from where squaring would cost accuracy
    squares, right = torch.linalg.eigh(matrix.T @ matrix)
    values, right = squares[-k:].flip(0).clamp_min(1e-300).sqrt(), right[:, -k:].flip(1)
    return (matrix @ right) / values, values, right


def _coordinates(train: Tensor, query: Tensor, k: int, generator: torch.Generator) -> Tensor | None:
    """Columns spanning what both sides show, or None where the whole space is small enough."""
    d, rank = train.shape[1], 2 * k
    if d <= max(4 * k, 96):
        return None
    both = [leading_subspace(x, min(rank, d // 2), generator) for x in (train, query)]
    return _orthonormal(torch.cat(both, dim=1))


def balanced_factors(
    train: Tensor, query: Tensor, k: int, ridge: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The maps ``P`` and ``Q``, both ``[k, d]``, of the best ``k`` directions.

    Args:
        train: Samples of the training side, ``[N, d]``.
        query: Samples of the query side, ``[M, d]``, already preconditioned.
        k: Directions to keep, at most ``d``.
        ridge: Regularisation, relative to each moment's mean eigenvalue.
        generator: Private source of randomness, on the CPU.

    Returns:
        ``(P, Q)`` with ``P @ Q.T`` the identity, in the samples' dtype.
    """
    d = train.shape[1]
    work = [x / x.norm().clamp_min(1e-30) for x in (train, query)]
    basis = _coordinates(work[0], work[1], k, generator)
    coordinates = work if basis is None else [x @ basis for x in work]
    roots = [_root((x.T @ x).double(), max(ridge / d, 1e-14)) for x in coordinates]
    left, values, right = _leading_triplets(roots[1].T @ roots[0], k)
    scale = values.rsqrt().unsqueeze(1)
    p, q = scale * (left.T @ roots[1].T), scale * (right.T @ roots[0].T)
    if basis is not None:
        p, q = p @ basis.T.double(), q @ basis.T.double()
    return p.to(train), q.to(train)
