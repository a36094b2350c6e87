"""How much of each step's gradient has gone into the weights: the scalars kappa of eq. (4), summed as in eq. (5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_pathkernel.optim import ParameterUpdate

__all__ = ["VisitWeights"]

Array = npt.NDArray[np.float64]
_NOTED = 64
"""Steps noted before the tables are brought up to date."""


class VisitWeights:
    """For every step of the open chord, and every older one still in a momentum buffer, one weight per parameter.

    The weight of step r is ``sum_{s in chord, s >= r} rate_s kappa_{s,r}``: what multiplies ``D . g_r`` in the chord's
    displacement. A parameter that sits out a step has weight 0 there.

    A step only notes its scalars; the sums are taken when they are asked for, backwards over the steps:
    ``kept_s = keep_{s+1} kept_{s+1}`` and ``pulled_s = pull_s + keep_{s+1} pulled_{s+1}``, with which a gradient that
    enters the buffer with the share ``a`` at step s has the share ``a kept_s`` now and the weight ``a pulled_s``.

    Args:
        parameters: Names, in the order of the columns.
        horizon: Older steps whose share of the buffer has fallen below this, relative to their first, are let go.
    """

    def __init__(self, parameters: Sequence[str], horizon: float = 1e-3) -> None:
        self._columns = {name: j for j, name in enumerate(parameters)}
        self._horizon = horizon
        self._where: dict[tuple[str, ...], list[int]] = {}
        self._noted: list[Mapping[ParameterUpdate, Sequence[str]]] = []
        self._begin(np.zeros((3, 0, len(parameters))))

    def _begin(self, older: Array) -> None:
        """Go on from rows of earlier steps: their first shares of the buffers, their shares now, their weights."""
        self._older = self._steps = older.shape[1]
        # what a step keeps of the buffer, puts into it, takes of it, and takes of its own gradient at once
        self._tables = np.zeros((4, max(16, 2 * self._steps), older.shape[2]))
        self._tables[0] = 1.0
        self._tables[1, : self._older] = older[0]
        self._earlier = older[1:]

    def state(self) -> dict[str, Any]:
        """All of it, as plain values and tensors."""
        self._write()
        tables = torch.from_numpy(self._tables[:, : self._steps].copy())
        earlier = torch.from_numpy(np.ascontiguousarray(self._earlier))
        return {"parameters": list(self._columns), "older": self._older, "tables": tables, "earlier": earlier}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the weights whose `state` this was."""
        tables, earlier = state["tables"].numpy(), state["earlier"].numpy()
        self._columns = {name: j for j, name in enumerate(state["parameters"])}
        self._where, self._noted = {}, []
        self._begin(np.zeros((3, tables.shape[1], tables.shape[2])))
        self._older, self._earlier = int(state["older"]), earlier
        self._tables[:, : self._steps] = tables

    @property
    def weights(self) -> Array:
        """Weights so far, ``[steps, parameters]``."""
        return self._summed()[1]

    @property
    def buffered(self) -> Array:
        """Share of each step's gradient in the momentum buffers, ``[steps, parameters]``."""
        return self._summed()[0]

    def _summed(self) -> tuple[Array, Array]:
        self._write()
        keep, put, take, direct = self._tables[:, self._older : self._steps]
        kept, pulled = np.ones_like(keep), take.copy()
        for s in range(len(keep) - 2, -1, -1):
            kept[s] = keep[s + 1] * kept[s + 1]
            pulled[s] += keep[s + 1] * pulled[s + 1]
        shares, weights = self._earlier
        if len(keep):
            shares, weights = shares * keep[0] * kept[0], weights + shares * keep[0] * pulled[0]
        return np.concatenate([shares, put * kept]), np.concatenate([weights, put * pulled + direct])

    def extend(self, names: Sequence[str]) -> None:
        """Add parameters, which no step so far has moved."""
        self._write()
        self._where.clear()
        for name in names:
            self._columns[name] = len(self._columns)
        more = (0, 0), (0, 0), (0, len(names))
        self._tables = np.pad(self._tables, more)
        self._tables[0, :, -len(names) :] = 1.0
        self._earlier = np.pad(self._earlier, more)

    def newest(self) -> dict[str, float]:
        """Share of the latest step's gradient in the momentum buffers, by parameter."""
        self._write()
        return dict(zip(self._columns, self._tables[1, self._steps - 1].tolist(), strict=True))

    def step(self, updates: Mapping[ParameterUpdate, Sequence[str]]) -> None:
        """Take in one optimiser step.

        Args:
            updates: The parameters that moved, by their scalars, not to be changed; the others sat it out.
        """
        self._noted.append(updates)
        if len(self._noted) == _NOTED:
            self._write()

    def _write(self) -> None:
        """Bring the tables up to date."""
        if self._steps + len(self._noted) > self._tables.shape[1]:
            fresh = np.zeros_like(self._tables[:, :1]).repeat(self._tables.shape[1] + _NOTED, axis=1)
            fresh[0] = 1.0
            self._tables = np.concatenate([self._tables, fresh], axis=1)
        for updates in self._noted:
            for update, names in updates.items():
                column = self._tables[:, self._steps]
                where = self._columns_of(names)
                if update.from_buffer:
                    column[0, where] = update.keep
                    column[1, where] = update.inject * update.sign
                    column[2, where] = update.rate * update.from_buffer
                if update.from_gradient:
                    column[3, where] = update.rate * update.from_gradient * update.sign
            self._steps += 1
        self._noted.clear()

    def _columns_of(self, names: Sequence[str]) -> list[int]:
        key = tuple(names)
        if key not in self._where:
            self._where[key] = [self._columns[name] for name in key]
        return self._where[key]

    def alive(self) -> npt.NDArray[np.intp]:
        """Indices of the steps that a momentum buffer still holds."""
        buffered = self.buffered
        scale = np.maximum(np.abs(self._tables[1, : self._steps]).max(axis=1), 1e-300)
        return np.flatnonzero(np.abs(buffered).max(axis=1) > self._horizon * scale)

    def keep(self, steps: npt.NDArray[np.intp], chord_closed: bool) -> None:
        """Forget all other steps.

        Args:
            steps: Indices of those that stay.
            chord_closed: Whether their weights begin at 0 again.
        """
        shares, weights = self._summed()
        weights = np.zeros_like(weights) if chord_closed else weights
        self._begin(np.stack([self._tables[1, : self._steps], shares, weights])[:, steps])
