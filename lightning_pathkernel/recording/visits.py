"""How much of each step's gradient has gone into the weights: the scalars kappa of eq. (4), summed as in eq. (5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lightning_pathkernel.optim import ParameterUpdate

__all__ = ["VisitWeights"]

Array = npt.NDArray[np.float64]


class VisitWeights:
    """For every step of the open chord, and every older one still in a momentum buffer, one weight per parameter.

    The weight of step r is ``sum_{s in chord, s >= r} rate_s kappa_{s,r}``: what multiplies ``D . g_r`` in the chord's
    displacement. A parameter that sits out a step has weight 0 there.

    Args:
        parameters: Names, in the order of the columns.
        horizon: Older steps whose share of the buffer has fallen below this, relative to their first, are let go.
    """

    def __init__(self, parameters: Sequence[str], horizon: float = 1e-3) -> None:
        self._columns = {name: j for j, name in enumerate(parameters)}
        self._horizon = horizon
        self._steps = 0
        self._buffered, self._first, self._weights = (np.zeros((16, len(parameters))) for _ in range(3))

    @property
    def weights(self) -> Array:
        """Weights so far, ``[steps, parameters]``."""
        return self._weights[: self._steps]

    @property
    def buffered(self) -> Array:
        """Share of each step's gradient in the momentum buffers, ``[steps, parameters]``."""
        return self._buffered[: self._steps]

    def extend(self, names: Sequence[str]) -> None:
        """Add parameters, which no step so far has moved."""
        for name in names:
            self._columns[name] = len(self._columns)
        for field in ("_buffered", "_first", "_weights"):
            old = getattr(self, field)
            setattr(self, field, np.concatenate([old, np.zeros((len(old), len(names)))], axis=1))

    def newest(self) -> dict[str, float]:
        """Share of the latest step's gradient in the momentum buffers, by parameter."""
        return dict(zip(self._columns, self.buffered[-1].tolist(), strict=True))

    def step(self, updates: Mapping[ParameterUpdate, Sequence[str]]) -> None:
        """Take in one optimiser step: the parameters that moved, by their scalars; the others sat it out."""
        if self._steps == len(self._weights):
            self._grow()
        new = self._steps
        self._steps += 1
        for update, names in updates.items():
            where: slice | list[int] = slice(None)
            if len(names) < len(self._columns):
                where = [self._columns[name] for name in names]
            if update.from_buffer:
                self._buffered[:new, where] *= update.keep
                self._buffered[new, where] = self._first[new, where] = update.inject * update.sign
                self._weights[: new + 1, where] += update.rate * update.from_buffer * self._buffered[: new + 1, where]
            if update.from_gradient:
                self._weights[new, where] += update.rate * update.from_gradient * update.sign

    def _grow(self) -> None:
        for name in ("_buffered", "_first", "_weights"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))

    def alive(self) -> npt.NDArray[np.intp]:
        """Indices of the steps that a momentum buffer still holds."""
        scale = np.maximum(np.abs(self._first[: self._steps]).max(axis=1), 1e-300)
        return np.flatnonzero(np.abs(self.buffered).max(axis=1) > self._horizon * scale)

    def keep(self, steps: npt.NDArray[np.intp], chord_closed: bool) -> None:
        """Forget all other steps.

        Args:
            steps: Indices of those that stay.
            chord_closed: Whether their weights begin at 0 again.
        """
        size = max(16, 2 * len(steps))
        for field in ("_buffered", "_first", "_weights"):
            fresh = np.zeros((size, len(self._columns)))
            if field != "_weights" or not chord_closed:
                fresh[: len(steps)] = getattr(self, field)[steps]
            setattr(self, field, fresh)
        self._steps = len(steps)
