"""The open chord's rows: first-stage sketches of per-example gradients, visit by visit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.recording.basis import Blocks
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["StepRows", "carry_over", "sketch_blocks", "weighted"]


@dataclass
class StepRows:
    """Visits of one optimiser step: ``ids [n]`` and ``features [n, F]`` of the gradients the optimiser received."""

    ids: Tensor
    features: Tensor


def sketch_blocks(sketches: Mapping[str, KroneckerSketch], blocks: Blocks, n: int) -> Tensor:
    """Training-side features of held gradients, ``[n, F]``."""
    like = next(iter(blocks.values()))[0]
    zeros = like.head(1).dense().new_zeros
    parts = []
    for name, sketch in sketches.items():
        uses = [sketch.train(use) for use in blocks.get(name, ())]
        parts.append(torch.stack(uses).sum(0) if uses else zeros(n, sketch.features))
    return torch.cat(parts, dim=1)


def expand(sketches: Mapping[str, KroneckerSketch], per_parameter: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """One number per parameter, ``[*, parameters]``, repeated over the parameter's features, ``[*, F]``."""
    counts = [sketch.features for sketch in sketches.values()]
    return np.repeat(per_parameter, counts, axis=-1)


def weighted(rows: list[StepRows], weights: npt.NDArray[np.float64], sketches: Mapping[str, KroneckerSketch]) -> Tensor:
    """Every visit's share of the displacement, ``-weight * S_train(g)``, eq. (5), ``[visits, F]``."""
    parts = []
    for step, factor in zip(rows, weights, strict=True):
        if np.ptp(factor) == 0:
            parts.append(step.features * -float(factor[0]))
        else:
            scale = torch.from_numpy(expand(sketches, factor)).to(step.features)
            parts.append(step.features * -scale)
    return torch.cat(parts)


def carry_over(
    rows: list[StepRows],
    buffered: npt.NDArray[np.float64],
    momentum: Mapping[str, Tensor],
    old: Mapping[str, KroneckerSketch],
    new: Mapping[str, KroneckerSketch],
) -> list[StepRows]:
    """Visits whose gradients a momentum buffer still holds, in the next chord's basis.

    Each row is re-expressed through the subspace its old basis kept. What that loses of their sum, which is known
    exactly from the optimiser's buffer, is shared out by a control variate: row i gets the part
    ``<h z_i, Z> / |Z|^2`` of it, ``Z`` the sum of all rows.

    Args:
        rows: The visits, in the old basis.
        buffered: Their steps' shares of the buffers, ``[steps, parameters]``.
        momentum: Parameter -> what the buffers hold of training gradients, as matrices ``[r, c]``.
        old: The old basis.
        new: The new one.

    Returns:
        The visits in the new basis.
    """
    if not rows:
        return []
    counts = [len(step.ids) for step in rows]
    before = torch.cat([step.features for step in rows])
    shares = torch.from_numpy(np.repeat(buffered, counts, axis=0)).to(before)
    parts, start = [], 0
    for j, (name, sketch) in enumerate(old.items()):
        z = sketch.reexpress(before[:, start : start + sketch.features], new[name])
        start += sketch.features
        if name in momentum:
            z = _complete(z, shares[:, j : j + 1], new[name].train_matrix(momentum[name]))
        parts.append(z)
    after = torch.cat(parts, dim=1)
    return [StepRows(step.ids, part) for step, part in zip(rows, after.split(counts), strict=True)]


def _complete(rows: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """Correct ``rows`` so that ``sum_i share_i row_i`` is ``wanted``."""
    held = rows * shares
    total = held.sum(0)
    norm = total @ total
    if float(norm) <= 0:
        return rows
    gamma = held @ total / norm
    divisor = torch.where(shares[:, 0] == 0, torch.ones_like(gamma), shares[:, 0])
    gamma = torch.where(shares[:, 0] == 0, torch.zeros_like(gamma), gamma / divisor)
    return rows + gamma.unsqueeze(1) * (wanted - total)
