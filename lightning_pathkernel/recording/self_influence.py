"""Each visit's effect on its own loss, from the rows that its chord's sketch keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.recording.batches import VisitBatch
from lightning_pathkernel.recording.rows import split
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["SelfInfluence"]

Array = npt.NDArray[np.float64]


class SelfInfluence:
    """``-weight * <g, D g>`` times the rows of the step, with g as far as the sketch keeps it.

    Args:
        sketches: The chord's basis.
        preconditioner: Its D; empty for the identity.
        ranks: Processes that took as many rows each in every step.
    """

    def __init__(self, sketches: Mapping[str, KroneckerSketch], preconditioner: Tensors, ranks: int = 1) -> None:
        self._sketches = sketches
        self._forms = {name: _Energy(sketch, preconditioner.get(name)) for name, sketch in sketches.items()}
        self._ranks = ranks

    def of(self, batch: VisitBatch, weights: Array, rows: Array) -> Tensor:
        """One number per visit.

        Args:
            batch: The visits.
            weights: One per step and parameter, eq. (5).
            rows: Rows of each step in this process.

        Returns:
            Self-influences, ``[s * n]``.
        """
        parts = split(batch.features, self._sketches).items()
        energies = torch.stack([self._forms[name](z) for name, z in parts], dim=1)
        counts = self._ranks * rows[batch.steps] * batch.coefficients**2
        return batch.times(-weights[batch.steps] * counts[:, None], energies).sum(1)


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
