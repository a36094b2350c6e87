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
        self._buffered = np.zeros((0, len(parameters)))
        self._first = np.zeros((0, len(parameters)))
        self._weights = np.zeros((0, len(parameters)))

    def __len__(self) -> int:
        """Number of steps held."""
        return len(self._weights)

    @property
    def weights(self) -> Array:
        """Weights so far, ``[steps, parameters]``."""
        return self._weights

    @property
    def buffered(self) -> Array:
        """Share of each step's gradient in the momentum buffers, ``[steps, parameters]``."""
        return self._buffered

    def step(self, updates: Mapping[str, ParameterUpdate]) -> None:
        """Take in one optimiser step; parameters without an update sat it out."""
        width = len(self._columns)
        keep, inject, out, direct = np.ones(width), np.zeros(width), np.zeros(width), np.zeros(width)
        for name, update in updates.items():
            j = self._columns[name]
            keep[j] = update.keep
            inject[j] = update.inject * update.sign if update.from_buffer else 0.0
            out[j], direct[j] = update.rate * update.from_buffer, update.rate * update.from_gradient * update.sign
        self._buffered = np.vstack([self._buffered * keep, inject])
        self._first = np.vstack([self._first, inject])
        self._weights = np.vstack([self._weights, direct])
        self._weights += out * self._buffered

    def close(self) -> npt.NDArray[np.intp]:
        """Start the next chord.

        Returns:
            Indices of the steps that stay, because a momentum buffer still holds them.
        """
        scale = np.abs(self._first).max(axis=1)
        alive = np.abs(self._buffered).max(axis=1) > self._horizon * np.maximum(scale, 1e-300)
        kept = np.flatnonzero(alive)
        self._buffered, self._first = self._buffered[kept], self._first[kept]
        self._weights = np.zeros_like(self._buffered)
        return kept
