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

__all__ = ["StepRows", "carry_over", "weighted"]

Sketches = Mapping[str, KroneckerSketch]


@dataclass
class StepRows:
    """Visits of one optimiser step, or of one of its batches.

    Attributes:
        ids: Training examples, ``[n]``.
        parts: Parameter -> one entry per use: features ``[n, k_left * k_right]``, or their two factors.
        coefficient: What clipping multiplied the gradients with.
    """

    ids: Tensor
    parts: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    coefficient: float = 1.0

    def add(self, name: str, sketch: KroneckerSketch, gradient: PerExampleGradient) -> None:
        """Take in one use of one parameter."""
        factors = gradient.factors()
        part: tuple[Tensor, ...]
        part = (sketch.train(gradient),) if factors is None else sketch.train_factors(*factors)
        self.parts.setdefault(name, []).append(part)

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
    after = [StepRows(torch.cat([part.ids for part in step])) for step in batches]
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
