"""The proofs for rules and sketches: they pass for what is right, and name what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_pathkernel.sketch import SKETCHES, SideMoments, SketchSettings, register_sketch
from lightning_pathkernel.testing import assert_sketch


@pytest.mark.parametrize("kind", ["identity", "deflated", "balanced"])
def test_sketches_that_keep_the_fitted_span(kind: str) -> None:
    assert_sketch(kind)


def test_a_random_sketch_is_unbiased_but_not_exact() -> None:
    assert_sketch("random", exact=False)
    with pytest.raises(AssertionError, match="sketch 'random', inner products"):
        assert_sketch("random")


@pytest.fixture
def kind() -> Iterator[str]:
    yield "wrong"
    SKETCHES.pop("wrong", None)


def fixed(seed: int, moments: SideMoments, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, moments.train.shape[1], generator=generator, dtype=torch.float64)


def test_a_sketch_that_draws_from_the_global_generator(kind: str) -> None:
    @register_sketch(kind)
    def draw(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> tuple:
        factor = torch.randn(k, moments.train.shape[1], dtype=torch.float64)
        return factor, factor

    with pytest.raises(AssertionError, match="draws from the global random generator"):
        assert_sketch(kind)


def test_a_biased_sketch(kind: str) -> None:
    @register_sketch(kind)
    def biased(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> tuple:
        return fixed(0, moments, k), fixed(0, moments, k)

    with pytest.raises(AssertionError, match="sketch 'wrong' is biased"):
        assert_sketch(kind, exact=False)
