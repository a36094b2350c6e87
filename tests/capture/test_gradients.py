"""Gradients that sum over positions: the same in whatever order their products are taken."""

from __future__ import annotations

import pytest
import torch

from lightning_pathkernel.capture.gradients import BiasGradient, FactoredGradient


@pytest.mark.parametrize(("rows", "columns"), [(9, 1), (1, 9), (2, 3), (7, 5)], ids=["columns", "rows", "both", "wide"])
@pytest.mark.parametrize(("r", "c"), [(12, 7), (5, 40), (40, 5)])
def test_any_order_of_products(r: int, c: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gradient = FactoredGradient(normal(4, 6, r), normal(4, 6, c))
    bias, left, right = BiasGradient(gradient), normal(rows, r), normal(columns, c)
    whole = torch.einsum("nsr,nsc->nrc", gradient.left, gradient.right)
    torch.testing.assert_close(gradient.project(left, right), left @ whole @ right.T)
    torch.testing.assert_close(gradient.project(left, None), left @ whole)
    torch.testing.assert_close(gradient.project(None, right), whole @ right.T)
    torch.testing.assert_close(bias.dense()[:, :, 0], gradient.left.sum(1))
    torch.testing.assert_close(bias.take(slice(2)).values, gradient.left[:2].sum(1))
    torch.testing.assert_close(gradient.take(slice(1, 3)).sums(), gradient.left[1:3].sum(1))
