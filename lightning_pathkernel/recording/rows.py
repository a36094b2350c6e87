"""The open chord's rows: first-stage sketches of per-example gradients, visit by visit.

Where a layer has one position per example a gradient is an outer product, and so is its sketch. The two thin factors
are kept until the chord closes: less work in every step, and fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["RowArena", "StepRows", "carry_over", "weighted"]

Sketches = Mapping[str, KroneckerSketch]


class RowArena:
    """Memory for one chord's rows, taken once and used again by every later chord.

    A row is small, but lives as long as its chord: allocated one by one among the tensors of a backward pass they break
    its memory up, and every step pays for fresh pages (measured: docs/benchmarks.md).

    Args:
        block: Numbers allocated at once.
    """

    def __init__(self, block: int = 9 << 20) -> None:
        self._size = block
        self._blocks: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Everything kept so far may be written over."""
        self._block, self._at = 0, 0

    def new(self, n: int, k: int, like: Tensor) -> Tensor:
        """Room for rows ``[n, k]`` of the dtype and on the device of ``like``; it is theirs until the next `reset`."""
        total = n * k
        while self._block < len(self._blocks) and self._at + total > len(self._blocks[self._block]):
            self._block, self._at = self._block + 1, 0
        if self._block == len(self._blocks):
            # filled, so that its pages are there before the steps that write to it
            self._blocks.append(like.new_empty(max(self._size, total)).fill_(0.0))
        block = self._blocks[self._block]
        if block.dtype != like.dtype or block.device != like.device:
            return like.new_empty(n, k)
        self._at += total
        return block.as_strided((n, k), (k, 1), self._at - total)


@dataclass
class StepRows:
    """Visits of one optimiser step, or of one of its batches.

    Attributes:
        ids: Training examples, ``[n]``.
        parts: Parameter -> one entry per use: features ``[n, k_left * k_right]``, or their two factors.
        coefficient: What clipping multiplied the gradients with.
        arena: Where the parts are kept.
    """

    ids: Tensor
    arena: RowArena
    parts: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    coefficient: float = 1.0
    _last: tuple[Tensor, Tensor | None, Tensor] | None = None

    def add(self, name: str, sketch: KroneckerSketch, gradient: PerExampleGradient) -> None:
        """Take in one use of one parameter."""
        factors = gradient.factors()
        if factors is None:
            part: tuple[Tensor, ...] = (self._kept(sketch.train(gradient)),)
        else:
            left, right = factors
            part = (self._left(left, sketch.train_left),)
            if right is not None:
                part = (*part, self._product(right, sketch.train_right))
        if name in self.parts:
            self.parts[name].append(part)
        else:
            self.parts[name] = [part]

    def _left(self, left: Tensor, factor: Tensor | None) -> Tensor:
        """A weight and its bias have the same left factor, and under a common basis the same product."""
        if self._last is None or self._last[0] is not left or self._last[1] is not factor:
            self._last = (left, factor, self._product(left, factor))
        return self._last[2]

    def _product(self, rows: Tensor, factor: Tensor | None) -> Tensor:
        if factor is None:
            return self._kept(rows)
        return torch.mm(rows, factor.T, out=self.arena.new(len(rows), len(factor), rows))

    def _kept(self, rows: Tensor) -> Tensor:
        return self.arena.new(len(rows), rows.shape[1], rows).copy_(rows)

    def close(self) -> None:
        """Nothing more is taken in: let go of what adding kept at hand."""
        self._last = None

    def latest(self) -> Tensor | None:
        """What was taken in last: it comes from the layer that backward reaches last."""
        return next(reversed(self.parts.values()))[0][0] if self.parts else None

    def features(self, sketches: Sketches) -> Tensor:
        """All features, ``[n, F]``."""
        like = next(iter(self.parts.values()))[0][0]
        columns = []
        for name, sketch in sketches.items():
            uses = [_expanded(part) for part in self.parts.get(name, ())]
            zero = like.new_zeros(len(self.ids), sketch.features)
            columns.append(torch.stack(uses).sum(0) if len(uses) > 1 else uses[0] if uses else zero)
        out = torch.cat(columns, dim=1)
        return out if self.coefficient == 1.0 else out * self.coefficient


def _expanded(part: tuple[Tensor, ...]) -> Tensor:
    if len(part) == 1:
        return part[0]
    left, right = part
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
    after = [StepRows(torch.cat([part.ids for part in step]), step[0].arena) for step in batches]
    for j, (name, sketch) in enumerate(old.items()):
        rows = sketch.reexpress(before[name], new[name])
        if name in momentum:
            rows = _complete(rows, shares[:, j : j + 1], new[name].train_matrix(momentum[name]))
        for step, part in zip(after, rows.split(counts), strict=True):
            step.parts[name] = [(part,)]
    return [[step] for step in after]


def _complete(rows: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """Correct ``rows`` so that ``sum_i share_i row_i`` is ``wanted``."""
    held = rows * shares
    total = held.sum(0)
    gamma = held @ total / (total @ total).clamp_min(1e-30)
    share = shares[:, 0]
    gamma = torch.where(share == 0, torch.zeros_like(gamma), gamma / torch.where(share == 0, 1, share))
    return rows + gamma.unsqueeze(1) * (wanted - total)
