"""A rank-one model of a positive matrix in log space, used to take most of a preconditioner's range out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rank_one_log"]


def rank_one_log(matrix: Tensor, weights: Tensor, sweeps: int = 3) -> tuple[Tensor, Tensor]:
    """Weighted least-squares fit ``log matrix[r, c] = log left[r] + log right[c]``.

    Args:
        matrix: Positive where ``weights`` is, ``[r, c]``.
        weights: Weight of each entry, ``[r, c]``; entries of weight 0 are not read.
        sweeps: Alternating updates.

    Returns:
        ``left [r]`` and ``right [c]``, positive.
    """
    safe = torch.where(weights > 0, matrix, torch.ones_like(matrix)).log()
    rows, columns = weights.sum(1), weights.sum(0)
    total = weights.sum().clamp_min(1e-30)
    mean = (safe * weights).sum() / total
    left = torch.full_like(rows, float(mean / 2))
    right = torch.full_like(columns, float(mean / 2))
    for _ in range(sweeps):
        fit = (weights * (safe - right)).sum(1) / rows.clamp_min(1e-30)
        left = torch.where(rows > 0, fit, left.mean())
        fit = (weights * (safe - left.unsqueeze(1))).sum(0) / columns.clamp_min(1e-30)
        right = torch.where(columns > 0, fit, right.mean())
    return left.exp(), right.exp()
