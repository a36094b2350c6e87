"""The order of each rule, measured along a chord of a smooth network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.path import composite_midpoint, gauss_legendre, integrate, node_schedule


def slope_and_change() -> tuple[Callable[[float], Tensor], Tensor]:
    """The directional derivative of a GELU network's outputs along a chord, and their exact change."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3)).double()
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    draw = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in net.named_parameters()}
    start = {n: 0.5 * d for n, d in draw.items()}
    delta = {n: 0.7 * torch.randn(d.shape, generator=generator, dtype=torch.float64) for n, d in draw.items()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, weights, (x,))

    def slope(t: float) -> Tensor:
        at = {n: w + t * delta[n] for n, w in start.items()}
        return torch.func.jvp(outputs, (at,), (delta,))[1].detach()

    end = {n: w + delta[n] for n, w in start.items()}
    return slope, (outputs(end) - outputs(start)).detach()


def error(rule: object, slope: Callable[[float], Tensor], exact: Tensor) -> float:
    total = sum(w * slope(t) for t, w in zip(rule.points, rule.weights, strict=True))
    return float((total - exact).norm() / exact.norm())


def test_the_midpoint_rule_is_of_second_order() -> None:
    slope, exact = slope_and_change()
    errors = [error(composite_midpoint(m), slope, exact) for m in (8, 16, 32)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


def test_gauss_legendre_converges_spectrally() -> None:
    slope, exact = slope_and_change()
    errors = [error(gauss_legendre(m), slope, exact) for m in (2, 4, 8, 16)]
    assert all(fine < coarse / 8 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("points", [1, 2, 3, 5])
def test_gauss_legendre_is_exact_for_polynomials_of_its_degree(points: int) -> None:
    rule = gauss_legendre(points)
    for degree in range(2 * points):
        found = sum(w * t**degree for t, w in zip(rule.points, rule.weights, strict=True))
        assert found == pytest.approx(1 / (degree + 1), rel=1e-13)


@pytest.mark.parametrize(("family", "rtol"), [(gauss_legendre, 1e-8), (composite_midpoint, 1e-3)])
def test_integrate_reaches_its_tolerance_for_every_row_and_its_estimate_bounds_the_error(
    family: Callable, rtol: float
) -> None:
    slope, exact = slope_and_change()
    found = integrate(lambda t, rows: slope(t)[rows], len(exact), rtol, family)
    true = (found.value - exact).norm(dim=1)
    rounding = 16 * torch.finfo(exact.dtype).eps * exact.norm(dim=1)  # of both sums; the estimate knows nothing of it
    assert (true <= found.error + rounding).all(), (true, found.error)
    assert (found.error <= rtol * found.value.norm(dim=1)).all(), found


def test_a_rows_points_do_not_depend_on_other_rows() -> None:
    slope, exact = slope_and_change()
    whole = integrate(lambda t, rows: slope(t)[rows], len(exact), 3e-5)
    assert len(whole.points.unique()) > 1, "rows of this network need unlike numbers of points"
    for row in range(len(exact)):
        alone = integrate(lambda t, rows, row=row: slope(t)[row : row + 1][rows], 1, 3e-5)
        assert int(alone.points) == int(whole.points[row])
        assert torch.equal(alone.value[0], whole.value[row])


def test_integrate_says_so_where_the_points_do_not_suffice() -> None:
    slope, exact = slope_and_change()
    found = integrate(lambda t, rows: slope(t)[rows], len(exact), 1e-12, composite_midpoint, limit=8)
    assert found.points.tolist() == [8] * len(exact)
    assert (found.error > 1e-12 * found.value.norm(dim=1)).all()
    with pytest.raises(ValueError, match="rtol must be positive"):
        integrate(lambda t, rows: slope(t)[rows], len(exact), 0.0)


def test_nodes_are_denser_at_the_start() -> None:
    nodes = node_schedule(100, 10)
    gaps = [b - a for a, b in itertools.pairwise(nodes)]
    assert nodes[0] == 0
    assert nodes[-1] == 100
    assert gaps == sorted(gaps)
    assert node_schedule(3, 10) == [0, 1, 2, 3]
