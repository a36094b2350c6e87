"""Each visit's effect on its own loss, from the rows that its chord's sketch keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.recording.rows import RecordedStep, split
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["self_influence"]


def self_influence(
    steps: Sequence[RecordedStep],
    weights: npt.NDArray[np.float64],
    sketches: Mapping[str, KroneckerSketch],
    preconditioner: Tensors,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """``-weight * <g, D g>`` times the rows of the step, with g as far as the sketch keeps it.

    Args:
        steps: The steps.
        weights: One per step and parameter, eq. (5).
        sketches: The chord's basis.
        preconditioner: Its D; empty for the identity.
        ranks: Processes that took as many rows each in every step.

    Yields:
        Ids ``[n]``, and one number per visit ``[n]``.
    """
    forms = {name: _Energy(sketch, preconditioner.get(name)) for name, sketch in sketches.items()}
    for step, factors in zip(steps, weights, strict=True):
        count = ranks * sum(len(part.ids) for part in step.parts)
        for part in step.parts:
            parts = split(part.features(sketches) * step.coefficient, sketches).items()
            energies = [forms[name](z) * -float(factor) for (name, z), factor in zip(parts, factors, strict=True)]
            yield part.ids, torch.stack(energies).sum(0) * count


class _Energy:
    """The quadratic form ``z -> <g, D g>`` of the gradient g that features z stand for."""

    def __init__(self, sketch: KroneckerSketch, preconditioner: Tensor | None) -> None:
        self._diagonal = None if preconditioner is None else preconditioner.reshape(matrix_shape(preconditioner.shape))
        self._form = sketch.energy_form(self._diagonal) if sketch.tensors() else None

    def __call__(self, features: Tensor) -> Tensor:
        if self._form is not None:
            return ((features @ self._form) * features).sum(1)
        squares = features.square()
        return (squares if self._diagonal is None else squares * self._diagonal.flatten()).sum(1)
