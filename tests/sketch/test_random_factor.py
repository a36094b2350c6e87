"""One random factor by itself: the variance of the inner products it estimates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pathkernel.sketch.deflation import random_factor

N, D = 4000, 12


def vector(seed: int) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimates(x: Tensor, y: Tensor, k: int) -> Tensor:
    """``x^T P^T P y`` for N independent factors P."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.stack([random_factor(D, k, generator, x) for _ in range(N)])
    return ((factors @ x) * (factors @ y)).sum(1)


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("alike", [False, True])
def test_mean_and_variance_of_one_factor(k: int, alike: bool) -> None:
    """``Var(x^T P^T P y) = (|x|^2 |y|^2 + (x.y)^2) / k``.

    The estimate is a mean of k independent products ``(p.x)(p.y)`` with p standard normal. By Isserlis' theorem
    ``E[(p.x)^2 (p.y)^2] = |x|^2 |y|^2 + 2 (x.y)^2``, and the square of the mean is ``(x.y)^2``.
    """
    x = vector(1)
    y = x if alike else vector(2)
    found = estimates(x, y, k)
    assert abs(float(found.mean() - x @ y)) < 4 * float(found.std()) / N**0.5
    squares = (found - x @ y) ** 2
    exact = float((x @ x) * (y @ y) + (x @ y) ** 2) / k
    assert abs(float(squares.mean()) - exact) < 4 * float(squares.std()) / N**0.5


def test_the_variance_of_one_factor_falls_like_one_over_k() -> None:
    x, y = vector(1), vector(2)
    assert float(estimates(x, y, 2).var() / estimates(x, y, 16).var()) == pytest.approx(8, rel=0.2)
