"""The open chord's rows: first-stage sketches of per-example gradients, visit by visit.

Where a layer has one position per example a gradient is an outer product, and so is its sketch. The two thin factors
are kept until the chord closes: less work in every step, and fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient
from lightning_pathkernel.recording.arena import Arena, Slot
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["StepRows", "carry_over", "weighted"]

Sketches = Mapping[str, KroneckerSketch]


class StepRows:
    """Visits of one optimiser step, or of one of its batches.

    Between the first `add` and `close` the matrices taken in are tensors of their own; then they become columns of one
    slot of the arena.

    Args:
        ids: Training examples, ``[n]``.
        arena: Where what is taken in is kept.

    Attributes:
        coefficient: What clipping multiplied the gradients with.
    """

    __slots__ = ("_arena", "_ids", "_last", "_matrices", "_rows", "_uses", "_widths", "coefficient")

    def __init__(self, ids: Tensor, arena: Arena) -> None:
        self._ids: Tensor | Slot = ids
        self._arena = arena
        self._rows: Slot | None = None
        self._matrices: list[Tensor] = []
        self._widths: tuple[int, ...] = ()
        self._uses: list[tuple[str, tuple[int, ...]]] = []
        self._last: tuple[Tensor, Tensor | None, int] | None = None
        self.coefficient = 1.0

    @classmethod
    def whole(cls, ids: Tensor, features: Mapping[str, Tensor]) -> StepRows:
        """Of features ``[n, k_left * k_right]`` by parameter; they are copied, to memory of their own."""
        rows = cls(ids, Arena(1))
        for name, matrix in features.items():
            rows._uses.append((name, (rows._take(matrix),)))
        rows.close()
        return rows

    @property
    def ids(self) -> Tensor:
        """Training examples, ``[n]``."""
        return self._ids.view()[:, 0] if isinstance(self._ids, Slot) else self._ids

    def add(self, name: str, sketch: KroneckerSketch, gradient: PerExampleGradient) -> None:
        """Take in one use of one parameter: its features, or the two factors of them."""
        factors = gradient.factors()
        if factors is None:
            self._uses.append((name, (self._take(sketch.train(gradient)),)))
            return
        left, right = factors
        by_left, by_right = sketch.train_transposed
        at = self._left(left, sketch.train_left, by_left)
        self._uses.append((name, (at,) if right is None else (at, self._product(right, by_right))))

    def _left(self, left: Tensor, factor: Tensor | None, transposed: Tensor | None) -> int:
        """A weight and its bias have the same left factor, and under a common basis the same product."""
        if self._last is None or self._last[0] is not left or self._last[1] is not factor:
            self._last = (left, factor, self._product(left, transposed))
        return self._last[2]

    def _product(self, rows: Tensor, transposed: Tensor | None) -> int:
        # a copy, since what the layer computed may be written over before this batch is closed
        return self._take(rows.clone() if transposed is None else torch.mm(rows, transposed))

    def _take(self, matrix: Tensor) -> int:
        self._matrices.append(matrix)
        return len(self._matrices) - 1

    def close(self) -> None:
        """Nothing more is taken in: hold on to no tensor, only to what the arena keeps."""
        matrices = self._matrices
        if not matrices:
            return
        self._widths = tuple(matrix.shape[1] for matrix in matrices)
        self._rows = self._arena.new(matrices[0].shape[0], sum(self._widths), _widest(matrices))
        torch.cat(matrices, 1, out=self._rows.view())
        self._ids = self._arena.keep(self.ids)
        self._matrices, self._last = [], None

    def total(self) -> float:
        """The sum of all that was taken in, finite only if every number is; 0 if there is none."""
        return 0.0 if self._rows is None else float(self._rows.view().sum())

    def features(self, sketches: Sketches) -> Tensor:
        """All features of a closed batch, ``[n, F]``."""
        assert self._rows is not None
        rows = self._rows.view()
        matrices = rows.split(self._widths, dim=1)
        found: dict[str, Tensor] = {}
        for name, use in self._uses:
            part = _outer([matrices[at] for at in use])
            found[name] = found[name] + part if name in found else part
        columns = [
            found[name] if name in found else rows.new_zeros(len(rows), s.features) for name, s in sketches.items()
        ]
        out = torch.cat(columns, dim=1)
        return out if self.coefficient == 1.0 else out * self.coefficient


def _widest(matrices: list[Tensor]) -> Tensor:
    """One of the dtype that holds them all."""
    first = matrices[0].dtype
    return matrices[0] if all(m.dtype is first for m in matrices) else max(matrices, key=Tensor.element_size)


def _outer(factors: list[Tensor]) -> Tensor:
    if len(factors) == 1:
        return factors[0]
    left, right = factors
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def split(features: Tensor, sketches: Sketches) -> dict[str, Tensor]:
    """Features ``[*, F]`` by parameter."""
    sizes = [sketch.features for sketch in sketches.values()]
    return dict(zip(sketches, features.split(sizes, dim=-1), strict=True))


def _by_step(batches: list[list[StepRows]], sketches: Sketches) -> list[Tensor]:
    return [torch.cat([part.features(sketches) for part in step]) for step in batches]


def weighted(batches: list[list[StepRows]], weights: npt.NDArray[np.float64], sketches: Sketches) -> Tensor:
    """Every visit's share of the displacement, ``-weight * S_train(g)``, eq. (5), ``[visits, F]``.

    Args:
        batches: For each step, its batches.
        weights: One per step and parameter.
        sketches: The chord's basis.

    Returns:
        The shares, in the order of the visits.
    """
    counts = [sketch.features for sketch in sketches.values()]
    parts = []
    for features, factor in zip(_by_step(batches, sketches), weights, strict=True):
        scale = torch.from_numpy(np.repeat(-factor, counts)).to(features)
        parts.append(features * scale)
    return torch.cat(parts)


def carry_over(
    batches: list[list[StepRows]],
    buffered: npt.NDArray[np.float64],
    momentum: Mapping[str, Tensor],
    old: Sketches,
    new: Sketches,
) -> list[list[StepRows]]:
    """Visits whose gradients a momentum buffer still holds, in the next chord's basis.

    Each row is re-expressed through the subspace its old basis kept. What that loses of their sum, which is known
    exactly from the optimiser's buffer, is shared out by a control variate: row i gets the part
    ``<h z_i, Z> / |Z|^2`` of it, ``Z`` the sum of all rows.

    Args:
        batches: For each step, its batches, in the old basis.
        buffered: Their steps' shares of the buffers, ``[steps, parameters]``.
        momentum: Parameter -> what the buffers hold of training gradients, as matrices ``[r, c]``.
        old: The old basis.
        new: The new one.

    Returns:
        The visits in the new basis, one batch per step.
    """
    if not batches:
        return []
    steps = _by_step(batches, old)
    counts = [len(step) for step in steps]
    before = split(torch.cat(steps), old)
    shares = torch.from_numpy(np.repeat(buffered, counts, axis=0)).to(steps[0])
    after: list[dict[str, Tensor]] = [{} for _ in steps]
    for j, (name, sketch) in enumerate(old.items()):
        rows = sketch.reexpress(before[name], new[name])
        if name in momentum:
            rows = _complete(rows, shares[:, j : j + 1], new[name].train_matrix(momentum[name]))
        for step, part in zip(after, rows.split(counts), strict=True):
            step[name] = part
    ids = [torch.cat([part.ids for part in step]) for step in batches]
    return [[StepRows.whole(*step)] for step in zip(ids, after, strict=True)]


def _complete(rows: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """Correct ``rows`` so that ``sum_i share_i row_i`` is ``wanted``."""
    held = rows * shares
    total = held.sum(0)
    gamma = held @ total / (total @ total).clamp_min(1e-30)
    share = shares[:, 0]
    gamma = torch.where(share == 0, torch.zeros_like(gamma), gamma / torch.where(share == 0, 1, share))
    return rows + gamma.unsqueeze(1) * (wanted - total)
