"""Query maps in eight bits: on their grid for good, and exact again where the training side is corrected."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pathkernel.sketch import (
    KroneckerSketch,
    from_grid,
    pivots_of,
    rounded_sketches,
    rounded_stage,
    to_grid,
)
from lightning_pathkernel.sketch.balance import balanced_factors


def maps(k: int = 12, d: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balanced P and Q, and the samples of both sides, whose energies fall over five orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -5, d)
    train, query = (torch.randn(300, d, generator=generator) * scale for _ in range(2))
    train, query = train.to(dtype), query.to(dtype)
    return *balanced_factors(train, query, k, 0.03, generator), train, query


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1.0, 3.0, 1e30, 3e38])
def test_a_grid_is_within_half_a_step_and_gives_itself_back(scale: float) -> None:
    matrix = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * scale
    codes, exponents = to_grid(matrix)
    found = from_grid(codes, exponents)
    step = matrix.abs().amax(0).double() / 63.5  # the largest multiple is above 63
    gap = (found.double() - matrix.double()).abs()
    assert bool((gap <= 0.5 * step + 2.0**-127).all()), float((gap / step).max())
    assert torch.equal(from_grid(*to_grid(found)), found)


def test_columns_of_nothing_and_no_rows_are_on_the_grid() -> None:
    for matrix in (torch.zeros(3, 4), torch.zeros(0, 4)):
        assert torch.equal(from_grid(*to_grid(matrix)), matrix)


def test_rounded_maps_are_biorthogonal_again() -> None:
    p, q, _, _ = maps()
    sketch = rounded_sketches({"w": KroneckerSketch(40, 1, p, None, q, None)})["w"]
    assert sketch.train_left is not None
    assert sketch.query_left is not None
    assert not torch.equal(sketch.query_left, q)
    assert torch.equal(from_grid(*to_grid(sketch.query_left)), sketch.query_left)
    torch.testing.assert_close(sketch.train_left @ sketch.query_left.T, p @ q.T, rtol=0, atol=2e-5)
    torch.testing.assert_close(p @ q.T, torch.eye(12), rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", [False, True])
def test_correcting_the_training_side_makes_rounding_an_error_of_second_order(stage: bool) -> None:
    p, q, train, query = maps()

    def products(a: Tensor, b: Tensor) -> Tensor:
        return (query @ b.T) @ (train @ a.T).T

    wanted = products(p, q)
    if stage:
        a, b = rounded_stage(p, q)
    else:
        sketch = rounded_sketches({"w": KroneckerSketch(40, 1, p, None, q, None)})["w"]
        assert sketch.train_left is not None
        assert sketch.query_left is not None
        a, b = sketch.train_left, sketch.query_left
    corrected = float((products(a, b) - wanted).norm() / wanted.norm())
    alone = float((products(p, from_grid(*to_grid(q))) - wanted).norm() / wanted.norm())
    assert alone > 1e-3, alone
    assert corrected < 0.2 * alone, (corrected, alone)


def test_a_second_stage_has_the_identity_in_its_columns_and_small_entries_beside() -> None:
    p, q, _, _ = maps()
    a, b = rounded_stage(p, q)
    pivots = pivots_of(b)
    assert pivots is not None
    assert torch.equal(b[:, pivots], torch.eye(12))
    assert float(b.abs().max()) < 4
    torch.testing.assert_close(a @ b.T, torch.eye(12), rtol=0, atol=1e-4)
    assert pivots_of(q) is None


def test_maps_that_cannot_be_corrected_stay() -> None:
    p, q, _, _ = maps()
    dead = torch.zeros_like(q)
    for train, query in ((p, dead), (p, q * float("nan"))):
        sketch = rounded_sketches({"w": KroneckerSketch(40, 1, train, None, query, None)})["w"]
        assert sketch.train_left is train
        assert sketch.query_left is query
    assert rounded_stage(p, dead)[1] is dead


def test_factors_that_parameters_share_stay_shared() -> None:
    p, q, _, _ = maps()
    found = rounded_sketches({n: KroneckerSketch(40, 1, p, None, q, None) for n in ("weight", "bias")})
    assert found["weight"].train_left is found["bias"].train_left
    assert found["weight"].query_left is found["bias"].query_left


def test_a_bias_keeps_its_weights_training_factor_and_its_own_products() -> None:
    p, q, train, query = maps()
    own = q + 0.1 * torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    before = {"weight": KroneckerSketch(40, 1, p, None, q, None), "bias": KroneckerSketch(40, 1, p, None, own, None)}
    found = rounded_sketches(before)
    assert found["weight"].train_left is found["bias"].train_left
    a, b = found["bias"].train_left, found["bias"].query_left
    assert a is not None
    assert b is not None
    torch.testing.assert_close((query @ b.T) @ (train @ a.T).T, (query @ own.T) @ (train @ p.T).T, rtol=1e-4, atol=1e-3)
