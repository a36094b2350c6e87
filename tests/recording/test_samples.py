"""Samples of gradients' sides have the moments that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_pathkernel.capture import OuterGradient, PerExampleGradient, VectorGradient
from lightning_pathkernel.capture.gradients import DenseGradient, FactoredGradient
from lightning_pathkernel.recording.samples import preconditioned_samples, scaled_samples

R, C, N = 12, 20, 40


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS: dict[str, list[PerExampleGradient]] = {
    "outer": [OuterGradient(normal(0, N, R), normal(1, N, C))],
    "factored": [FactoredGradient(normal(2, N, 5, R), normal(3, N, 5, C))],
    "dense": [DenseGradient(normal(4, N, R, C))],
    "two uses": [OuterGradient(normal(5, N, R), normal(6, N, C)), DenseGradient(normal(7, N, R, C))],
}


def moments(whole: Tensor) -> tuple[Tensor, Tensor]:
    return (whole @ whole.transpose(1, 2)).mean(0), (whole.transpose(1, 2) @ whole).mean(0)


def averaged(draw: object, seeds: range) -> tuple[Tensor, Tensor]:
    found = [draw(torch.Generator().manual_seed(seed)) for seed in seeds]  # type: ignore[operator]
    return tuple(torch.stack([x[side].T @ x[side] for x in found]).mean(0) for side in (0, 1))  # type: ignore[return-value]


def gaps(found: tuple[Tensor, Tensor], whole: Tensor) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, moments(whole), strict=True)]


def dense(uses: Sequence[PerExampleGradient]) -> Tensor:
    return torch.stack([use.dense() for use in uses]).sum(0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_one_scale_gives_the_scaled_moments(kind: str, scaled: bool) -> None:
    uses = KINDS[kind]
    scale = (normal(8, R).exp(), normal(9, C).exp()) if scaled else None
    whole = dense(uses) * (torch.outer(*scale) if scale else 1)
    found = averaged(lambda g: scaled_samples(uses, (R, C), scale, g), range(300))
    assert max(gaps(found, whole)) < (1e-12 if kind == "outer" else 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_any_preconditioner_gives_the_moments_of_what_it_multiplies(kind: str) -> None:
    uses, diagonal = KINDS[kind], normal(10, R, C).exp()
    found = averaged(lambda g: preconditioned_samples(uses, diagonal, g), range(300))
    assert max(gaps(found, dense(uses) * diagonal)) < 0.05


def test_a_vector_is_a_matrix_of_one_column() -> None:
    values, scale = normal(11, N, R), (normal(12, R).exp(), normal(13, 1).exp())
    generator = torch.Generator()
    rows, columns = scaled_samples([VectorGradient(values)], (R, 1), scale, generator)
    assert max(gaps((rows.T @ rows, columns.T @ columns), (values * scale[0] * scale[1]).unsqueeze(2))) < 1e-12
    diagonal = normal(14, R, 1).exp()
    rows, columns = preconditioned_samples([VectorGradient(values)], diagonal, generator)
    assert gaps((rows.T @ rows, columns.T @ columns), values.unsqueeze(2) * diagonal)[0] < 1e-12


def test_only_the_first_examples_are_looked_at() -> None:
    rows, _ = scaled_samples(KINDS["outer"], (R, C), None, torch.Generator(), examples=7)
    assert len(rows) == 7
