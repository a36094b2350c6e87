"""A chord's displacement in weight space, and the parts that the optimiser's rule gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.network import Tensors
from lightning_pathkernel.optim import OptimizerRule, ParameterUpdate

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
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._lower: dict[str, Tensor] = {}
        self._upper: dict[str, Tensor] = {}
        self._decoupled: dict[str, Tensor] = {}
        self._coupled: dict[str, Tensor] = {}
        self.learning_time = 0.0

    def remember(self, parameters: Mapping[str, Tensor]) -> None:
        """Note the weights before a step; needed only where there is weight decay."""
        self._before = {name: p.detach().clone() for name, p in parameters.items()}

    def step(
        self, name: str, parameter: Tensor, update: ParameterUpdate, rule: OptimizerRule,
        group: Mapping[str, object], state: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Take in one parameter's step, after it was made."""
        if update.coupled_decay or update.decay_rate or name in self.decay_buffers:
            self._step_decay(name, update)
        if not rule.diagonal:
            return
        gradient = parameter.grad
        direction = _direction(update, rule.buffer(state), gradient)
        preconditioner = rule.preconditioner(group, state)
        if name not in self._moved:
            self._moved[name] = torch.zeros_like(direction)
            self._lower[name] = torch.full_like(direction, torch.inf)
            self._upper[name] = torch.zeros_like(direction)
        self._moved[name].add_(direction, alpha=update.rate)
        still = direction == 0
        torch.minimum(self._lower[name], preconditioner.masked_fill(still, torch.inf), out=self._lower[name])
        torch.maximum(self._upper[name], preconditioner.masked_fill(still, 0.0), out=self._upper[name])

    def _step_decay(self, name: str, update: ParameterUpdate) -> None:
        before = self._before[name]
        if update.decay_rate:
            _accumulate(self._decoupled, name, before, -update.decay_rate)
        pulled = before * update.coupled_decay
        if update.from_buffer:
            buffer = self.decay_buffers.setdefault(name, torch.zeros_like(before))
            buffer.mul_(update.keep).add_(pulled, alpha=update.inject)
            _accumulate(self._coupled, name, buffer, update.rate * update.from_buffer)
        if update.from_gradient:
            _accumulate(self._coupled, name, pulled, update.rate * update.from_gradient)

    def parts(self, end: Tensors) -> DisplacementParts:
        """The parts of the displacement from the start to ``end``; may be asked before the chord closes."""
        delta = {name: end[name] - w for name, w in self.start.items()}
        secants = {name: self._secant(name, delta[name]) for name in self._moved}
        decay, residual = {}, {}
        for name in delta:
            coupled = self._coupled.get(name)
            if coupled is not None:
                coupled = coupled * secants[name] if name in secants else coupled
            part = _sum(self._decoupled.get(name), None if coupled is None else -coupled)
            if part is not None:
                decay[name] = part
            if name in secants:
                attributed = (self._coupled.get(name, 0) - self._moved[name]) * secants[name]
                rest = delta[name] - attributed if part is None else delta[name] - attributed - part
                residual[name] = rest
        return DisplacementParts(delta, secants, decay, residual)

    def _secant(self, name: str, delta: Tensor) -> Tensor:
        """``clip(sum_s D_s m_s / sum_s m_s)`` between the least and the greatest D of the steps that moved it."""
        moved, own = self._moved[name], delta
        if name in self._decoupled:
            own = delta - self._decoupled[name]
        ratio = torch.where(moved == 0, torch.zeros_like(moved), -own / moved)
        clipped = torch.minimum(torch.maximum(ratio, self._lower[name]), self._upper[name])
        return torch.where(self._upper[name] == 0, torch.zeros_like(clipped), clipped)


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor, alpha: float) -> None:
    if name not in sums:
        sums[name] = torch.zeros_like(value)
    sums[name].add_(value, alpha=alpha)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _direction(update: ParameterUpdate, buffer: Tensor | None, gradient: Tensor | None) -> Tensor:
    parts: Tensor | None = None
    if update.from_buffer and buffer is not None:
        parts = buffer * update.from_buffer
    if update.from_gradient and gradient is not None:
        parts = _sum(parts, gradient * (update.from_gradient * update.sign))
    if parts is None:
        raise ValueError("an update with neither a buffer nor a gradient")
    return parts
