"""The open chord's rows, many steps at a time: what a step costs when its chord closes is mostly calls, not numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.recording.rows import RecordedStep, Rows, Sketches, StepRows, features_of

__all__ = ["VisitBatch", "batches"]

_NUMBERS = 1 << 20
"""Features formed at once, 4 MB."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class VisitBatch:
    """Visits of several backward passes with as many rows each.

    Attributes:
        steps: Index of each one's step, ``[s]``.
        coefficients: What the gradients of each were multiplied with, ``[s]``.
        ids: Training examples, ``[s * n]``.
        features: Of the gradients before that, ``[s * n, F]``.
    """

    steps: list[int]
    coefficients: Array
    ids: Tensor
    features: Tensor

    def shares(self, weights: Array, sketches: Sketches) -> Tensor:
        """Every visit's share of the displacement, ``-weight * S_train(g)``, eq. (5), ``[s * n, F]``.

        Args:
            weights: One per step and parameter.
            sketches: The chord's basis.

        Returns:
            The shares.
        """
        counts = [sketch.features for sketch in sketches.values()]
        factors = np.repeat(-weights[self.steps] * self.coefficients[:, None], counts, axis=1)
        return self.times(factors, self.features)

    def times(self, factors: Array, values: Tensor) -> Tensor:
        """``values [s * n, k]`` with those of each backward pass multiplied by its ``factors [s, k]``."""
        each = values.unflatten(0, (len(self.steps), -1))
        out: Tensor = (each * torch.from_numpy(factors).to(values).unsqueeze(1)).flatten(0, 1)
        return out


def batches(steps: Sequence[RecordedStep], sketches: Sketches) -> Iterator[VisitBatch]:
    """Visits in the order of their steps, as many together as have one layout and take little memory.

    Args:
        steps: The steps.
        sketches: The chord's basis.

    Yields:
        The batches.
    """
    width = max(sum(sketch.features for sketch in sketches.values()), 1)
    run: list[tuple[int, Rows]] = []
    layout: object = None
    for index, step in enumerate(steps):
        for part in step.parts:
            full = run and (len(run) + 1) * len(part.ids) * width > _NUMBERS
            own = part.layout
            if run and (own != layout or full):
                yield _batch(run, steps, sketches)
                run = []
            run.append((index, part))
            layout = own
    if run:
        yield _batch(run, steps, sketches)


def _batch(run: Sequence[tuple[int, Rows]], steps: Sequence[RecordedStep], sketches: Sketches) -> VisitBatch:
    indices, parts = [index for index, _ in run], [part for _, part in run]
    own = [part for part in parts if isinstance(part, StepRows)]
    features = features_of(own, sketches) if own else torch.cat([part.features(sketches) for part in parts])
    coefficients = np.array([steps[index].coefficient for index in indices])
    return VisitBatch(indices, coefficients, torch.cat([part.ids for part in parts]), features)
