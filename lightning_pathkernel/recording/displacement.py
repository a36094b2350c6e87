"""A chord's displacement in weight space, and the parts that the optimiser's rule gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.network import Tensors
from lightning_pathkernel.optim import ParameterUpdate

__all__ = ["ChordDisplacement", "DisplacementParts"]


@dataclass(frozen=True)
class DisplacementParts:
    """``delta = attributed + decay + residual``, eq. (6).

    Attributes:
        delta: The displacement.
        preconditioner: The chord's clipped secant D; empty for an optimiser without one.
        decay: Part of weight decay; empty where there is none.
        residual: Part that the chord's one preconditioner leaves over; empty where it leaves nothing.
    """

    delta: dict[str, Tensor]
    preconditioner: dict[str, Tensor]
    decay: dict[str, Tensor]
    residual: dict[str, Tensor]


class ChordDisplacement:
    """Running sums of one chord over its optimiser steps, a few tensors of the weights' size.

    Args:
        start: Weights at the chord's first node.
        decay_buffers: Weight decay that an earlier chord left in the momentum buffers.
    """

    def __init__(self, start: Tensors, decay_buffers: Mapping[str, Tensor] | None = None) -> None:
        self.start = dict(start)
        self.decay_buffers = dict(decay_buffers or {})
        self.learning_time = 0.0
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._upper: dict[str, Tensor] = {}
        self._decoupled: dict[str, Tensor] = {}
        self._coupled: dict[str, Tensor] = {}

    def remember(self, parameters: Mapping[str, Tensor]) -> None:
        """Note the weights before a step; needed only where there is weight decay."""
        if not self._before:
            self._before = {name: torch.empty_like(p) for name, p in parameters.items()}
        torch._foreach_copy_(list(self._before.values()), [p.detach() for p in parameters.values()])

    def decays(self, update: ParameterUpdate) -> bool:
        """Whether weight decay is part of this update, or still in a momentum buffer."""
        return bool(update.coupled_decay or update.decay_rate or self.decay_buffers)

    def step_decay(self, names: Sequence[str], update: ParameterUpdate) -> None:
        """Take in the weight decay of one step of some parameters; `remember` came before it."""
        before = [self._before[name] for name in names]
        if update.decay_rate:
            torch._foreach_add_(_sums(self._decoupled, names, before), before, alpha=-update.decay_rate)
        if not update.coupled_decay and not self.decay_buffers:
            return
        pulled = torch._foreach_mul(before, update.coupled_decay)
        if update.from_buffer:
            buffers = _sums(self.decay_buffers, names, before)
            torch._foreach_mul_(buffers, update.keep)
            torch._foreach_add_(buffers, pulled, alpha=update.inject)
            rate = update.rate * update.from_buffer
            torch._foreach_add_(_sums(self._coupled, names, before), buffers, alpha=rate)
        if update.from_gradient:
            rate = update.rate * update.from_gradient
            torch._foreach_add_(_sums(self._coupled, names, before), pulled, alpha=rate)

    def step_preconditioned(
        self, names: Sequence[str], update: ParameterUpdate, directions: list[Tensor], denominators: list[Tensor]
    ) -> None:
        """Take in one step of parameters with a preconditioner ``D = 1 / denominator``; `remember` came before decay.

        Args:
            names: The parameters.
            update: Their scalars.
            directions: Theirs, by `directions`.
            denominators: Overwritten.
        """
        scale = 1.0 if update.from_gradient else update.from_buffer
        torch._foreach_add_(_sums(self._moved, names, directions), directions, alpha=update.rate * scale)
        torch._foreach_maximum_(_sums(self._largest, names, directions), denominators)
        torch._foreach_reciprocal_(denominators)
        # a coordinate that does not move in this step has a D that may mean nothing: it must not bound the secant
        moving = torch._foreach_sign(directions)
        torch._foreach_abs_(moving)
        torch._foreach_mul_(denominators, moving)
        torch._foreach_maximum_(_sums(self._upper, names, directions), denominators)

    def directions(
        self, names: Sequence[str], update: ParameterUpdate, buffers: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """What D multiplies in one step of some parameters, as `OptimizerRule.denominators` takes it.

        Args:
            names: The parameters.
            update: Their scalars.
            buffers: Their momentum buffers; empty for an optimiser without.
            gradients: What the optimiser received.

        Returns:
            ``from_buffer b + from_gradient (sign g + coupled_decay w)``; the buffers themselves where ``from_gradient``
            is 0.
        """
        if not update.from_gradient:
            return buffers
        out = torch._foreach_mul(gradients, update.from_gradient * update.sign)
        if update.coupled_decay:
            before = [self._before[name] for name in names]
            torch._foreach_add_(out, before, alpha=update.from_gradient * update.coupled_decay)
        if update.from_buffer:
            torch._foreach_add_(out, buffers, alpha=update.from_buffer)
        return list(out)

    def parts(self, end: Tensors) -> DisplacementParts:
        """The parts of the displacement from the start to ``end``; may be asked before the chord closes."""
        delta = {name: end[name] - w for name, w in self.start.items()}
        secants = {name: self._secant(name, delta[name]) for name in self._moved}
        decay: dict[str, Tensor] = {}
        residual: dict[str, Tensor] = {}
        for name in delta:
            parts = [self._decoupled[name]] if name in self._decoupled else []
            if name in self._coupled:
                parts.append(-self._coupled[name] * secants[name] if name in secants else -self._coupled[name])
            if parts:
                decay[name] = torch.stack(parts).sum(0)
            if name in secants:
                attributed = (self._coupled.get(name, 0) - self._moved[name]) * secants[name]
                residual[name] = delta[name] - attributed - decay.get(name, 0)
        return DisplacementParts(delta, secants, decay, residual)

    def _secant(self, name: str, delta: Tensor) -> Tensor:
        """``clip(sum_s D_s m_s / sum_s m_s)`` between the least and the greatest D of the chord's steps."""
        moved, upper = self._moved[name], self._upper[name]
        own = delta - self._decoupled[name] if name in self._decoupled else delta
        ratio = torch.where(moved == 0, torch.zeros_like(moved), -own / moved)
        lower = torch.minimum(self._largest[name].reciprocal(), upper)
        return torch.minimum(torch.maximum(ratio, lower), upper)


def _sums(sums: dict[str, Tensor], names: Sequence[str], like: Sequence[Tensor]) -> list[Tensor]:
    """The running sums of these parameters, zero where there are none yet."""
    for name, value in zip(names, like, strict=True):
        if name not in sums:
            sums[name] = torch.zeros_like(value)
    return [sums[name] for name in names]
