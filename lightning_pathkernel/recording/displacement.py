"""A chord's displacement in weight space, and the parts that the optimiser's rule gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.network import Tensors
from lightning_pathkernel.optim import ParameterUpdate

__all__ = ["LOOSENESS", "ChordDisplacement", "DisplacementParts"]

LOOSENESS = 1.25
"""Factor by which D may lie outside of what was seen of it, where it was not looked at in every step of the chord."""
_RUNNING = ("moved", "largest", "upper", "decoupled")


@dataclass(frozen=True)
class DisplacementParts:
    """``delta = attributed + decay + residual``, eq. (6).

    Attributes:
        delta: The displacement.
        preconditioner: The chord's clipped secant D; empty for optimisers without one.
        decay: Part of weight decay; empty where there is none.
        residual: Part that is no example's: gradients that came from none, what the chord's one preconditioner leaves
            over, and all of an optimiser without a rule. Empty where there is nothing.
        examples: Sum of all examples' parts before the preconditioner, ``-sum rate m``; parameters that follow a rule.
    """

    delta: dict[str, Tensor]
    preconditioner: dict[str, Tensor]
    decay: dict[str, Tensor]
    residual: dict[str, Tensor]
    examples: dict[str, Tensor]


class _Sums(dict[str, Tensor]):
    """Running sums by parameter, 0 until something is added."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(values or {})
        self._lists: dict[tuple[str, ...], list[Tensor]] = {}

    def of(self, names: Sequence[str], like: Sequence[Tensor]) -> list[Tensor]:
        """The sums of these parameters, which the caller adds to in place."""
        key = tuple(names)
        found = self._lists.get(key)
        if found is None:
            for name, value in zip(key, like, strict=True):
                if name not in self:
                    self[name] = torch.zeros_like(value)
            found = self._lists[key] = [self[name] for name in key]
        return found


class _Pull:
    """A gradient that is no example's, followed through the optimiser's recurrence.

    Args:
        buffers: What earlier chords left of it in the momentum buffers.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = _Sums(buffers)
        self.sums = _Sums()

    def state(self) -> dict[str, Any]:
        return {"buffers": dict(self.buffers), "sums": dict(self.sums)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Pull:
        made = cls(state["buffers"])
        made.sums = _Sums(state["sums"])
        return made

    def step(self, names: Sequence[str], update: ParameterUpdate, pulled: list[Tensor]) -> None:
        """Take in one step of some parameters: ``pulled`` is what was added to their gradients."""
        if update.from_buffer:
            buffers = self.buffers.of(names, pulled)
            torch._foreach_mul_(buffers, update.keep)
            torch._foreach_add_(buffers, pulled, alpha=update.inject)
            torch._foreach_add_(self.sums.of(names, pulled), buffers, alpha=update.rate * update.from_buffer)
        if update.from_gradient:
            torch._foreach_add_(self.sums.of(names, pulled), pulled, alpha=update.rate * update.from_gradient)


class ChordDisplacement:
    """Running sums of one chord over its optimiser steps, a few tensors of the weights' size.

    Args:
        start: Weights at the chord's first node.
        previous: The chord before, whose decay and foreign gradients may still be in momentum buffers.

    Attributes:
        learning_time: Sum of the learning rates of the steps (of the first parameter group).
    """

    def __init__(self, start: Tensors, previous: ChordDisplacement | None = None) -> None:
        self.start = dict(start)
        self.learning_time = 0.0
        self._coupled: _Pull = _Pull(previous._coupled.buffers if previous else {})
        self._foreign: _Pull = _Pull(previous._foreign.buffers if previous else {})
        self._before: dict[str, Tensor] = {}
        self._moved = _Sums()
        self._largest = _Sums()
        self._upper = _Sums()
        self._decoupled = _Sums()
        self._loose: set[str] = set()
        self._unruled: set[str] = set()

    def state(self) -> dict[str, Any]:
        """All of it between two steps, as plain values and tensors that the next step changes."""
        sums = {name: dict(getattr(self, f"_{name}")) for name in _RUNNING}
        return {
            "start": self.start, "learning_time": self.learning_time, "coupled": self._coupled.state(),
            "foreign": self._foreign.state(), "loose": sorted(self._loose), "unruled": sorted(self._unruled), **sums,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the sums whose `state` this was."""
        self.start, self.learning_time = dict(state["start"]), float(state["learning_time"])
        self._coupled, self._foreign = _Pull.of(state["coupled"]), _Pull.of(state["foreign"])
        self._loose, self._unruled, self._before = set(state["loose"]), set(state["unruled"]), {}
        for name in _RUNNING:
            setattr(self, f"_{name}", _Sums(state[name]))

    def bounds(self, names: set[str]) -> dict[str, dict[str, Tensor]]:
        """Copies of what `look` and `decay_directly` change of some parameters."""
        kinds = {kind: getattr(self, f"_{kind}") for kind in ("largest", "upper", "decoupled")}
        return {kind: {n: v.clone() for n, v in sums.items() if n in names} for kind, sums in kinds.items()}

    def put_back(self, bounds: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Undo what was done since `bounds` was asked."""
        for kind, values in bounds.items():
            for name, value in values.items():
                getattr(self, f"_{kind}")[name].copy_(value)

    def extend(self, weights: Tensors) -> None:
        """Take in parameters that begin to learn in mid-chord, at their weights until now."""
        self.start.update(weights)

    @property
    def earlier_pulls(self) -> dict[str, Tensor]:
        """What decay and foreign gradients have put into the momentum buffers, by parameter."""
        out = dict(self._coupled.buffers)
        for name, buffer in self._foreign.buffers.items():
            out[name] = out[name] + buffer if name in out else buffer
        return out

    def remember(self, parameters: Mapping[str, Tensor]) -> None:
        """Note the weights before a step; needed only where there is weight decay."""
        if self._before.keys() != parameters.keys():
            self._before = {name: torch.empty_like(p) for name, p in parameters.items()}
        torch._foreach_copy_(list(self._before.values()), [p.detach() for p in parameters.values()])

    @property
    def remembers(self) -> bool:
        """Whether weight decay is still in a momentum buffer."""
        return bool(self._coupled.buffers)

    def decays(self, update: ParameterUpdate) -> bool:
        """Whether weight decay is part of this update, or still in a momentum buffer."""
        return bool(update.coupled_decay or update.decay_rate or self._coupled.buffers)

    def step_decay(self, names: Sequence[str], update: ParameterUpdate) -> None:
        """Take in the weight decay of one step of some parameters; `remember` came before it."""
        before = [self._before[name] for name in names]
        if update.decay_rate:
            self.decay_directly(names, before, update.decay_rate)
        if update.coupled_decay or self._coupled.buffers:
            self._coupled.step(names, update, list(torch._foreach_mul(before, update.coupled_decay)))

    def decay_directly(self, names: Sequence[str], before: Sequence[Tensor], rate: float) -> None:
        """Take in ``-rate w`` of some parameters, with their weights ``before`` the step."""
        with torch.no_grad():
            torch._foreach_add_(self._decoupled.of(names, before), list(before), alpha=-rate)

    def step_foreign(self, names: Sequence[str], update: ParameterUpdate, foreign: Mapping[str, Tensor]) -> None:
        """Take in what the optimiser received beyond the examples' gradients; nothing where that is nothing."""
        if not self._foreign.buffers and not (foreign and any(name in foreign for name in names)):
            return
        like = [self.start[name] for name in names]
        pulled = [
            update.sign * foreign[name] if name in foreign else torch.zeros_like(w)
            for name, w in zip(names, like, strict=True)
        ]
        self._foreign.step(names, update, pulled)

    def step_unruled(self, names: Sequence[str]) -> None:
        """Whatever moves these parameters in this chord is unattributed."""
        self._unruled.update(names)

    def directions(
        self, names: Sequence[str], update: ParameterUpdate, buffers: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], float]:
        """What D multiplies, ``m = from_buffer b + from_gradient (sign g + coupled_decay w)``, and a factor to it.

        Args:
            names: The parameters.
            update: Their scalars.
            buffers: Their momentum buffers; empty for an optimiser without.
            gradients: What the optimiser received.

        Returns:
            One tensor per parameter, the buffer itself where that is all there is, and the factor.
        """
        if not update.from_gradient:
            return buffers, update.from_buffer
        out = torch._foreach_mul(gradients, update.from_gradient * update.sign)
        if update.coupled_decay:
            before = [self._before[name] for name in names]
            torch._foreach_add_(out, before, alpha=update.from_gradient * update.coupled_decay)
        if update.from_buffer:
            torch._foreach_add_(out, buffers, alpha=update.from_buffer)
        return list(out), 1.0

    def step_preconditioned(
        self, names: Sequence[str], rate: float, directions: list[Tensor], denominators: list[Tensor]
    ) -> None:
        """Take in one step of parameters with a preconditioner ``D = 1 / denominator``; `remember` came before decay.

        Args:
            names: The parameters.
            rate: What multiplies ``D . direction``.
            directions: What D multiplies.
            denominators: Overwritten; infinite where D is 0.
        """
        self.step_moved(names, rate, directions)
        self.look(names, directions, denominators)

    def step_moved(self, names: Sequence[str], rate: float, directions: list[Tensor]) -> None:
        """Take in what D multiplies in one step: ``rate . direction``."""
        torch._foreach_add_(self._moved.of(names, directions), directions, alpha=rate)

    def look(self, names: Sequence[str], directions: list[Tensor], denominators: list[Tensor]) -> None:
        """See how large and how small D is at a step; arguments as for `step_preconditioned`."""
        torch._foreach_maximum_(self._largest.of(names, directions), denominators)
        torch._foreach_reciprocal_(denominators)
        # a coordinate that does not move in this step has a D that may mean nothing: it must not bound the secant
        moving = torch._foreach_sign(directions)
        torch._foreach_abs_(moving)
        torch._foreach_mul_(denominators, moving)
        torch._foreach_maximum_(self._upper.of(names, directions), denominators)

    def look_away(self, names: Sequence[str]) -> None:
        """A step passes without a `look`: D has stayed within `LOOSENESS` of what looks before and after it see."""
        self._loose.update(names)

    def parts(self, end: Tensors) -> DisplacementParts:
        """The parts of the displacement from the start to ``end``; may be asked before the chord closes."""
        delta = {name: end[name] - w for name, w in self.start.items()}
        secants = {name: self._secant(name, delta[name]) for name in self._moved if name not in self._unruled}
        decay: dict[str, Tensor] = {}
        residual: dict[str, Tensor] = {}
        examples: dict[str, Tensor] = {}
        for name, moved in delta.items():
            if name in self._unruled:
                residual[name] = moved.clone()
                continue
            scale: Tensor | float = secants.get(name, 1.0)
            coupled, foreign = self._coupled.sums.get(name), self._foreign.sums.get(name)
            found = [self._decoupled[name]] if name in self._decoupled else []
            found += [-coupled * scale] if coupled is not None else []
            if found:
                decay[name] = torch.stack(found).sum(0)
            pulls = [pull for pull in (coupled, foreign) if pull is not None]
            if name in secants:
                examples[name] = torch.stack([-self._moved[name], *pulls]).sum(0)
                residual[name] = moved - examples[name] * scale - decay.get(name, 0)
                continue
            if foreign is not None:
                residual[name] = -foreign
            examples[name] = moved - decay.get(name, 0) - residual.get(name, 0)
        return DisplacementParts(delta, secants, decay, residual, examples)

    def _secant(self, name: str, delta: Tensor) -> Tensor:
        """``clip(sum_s D_s m_s / sum_s m_s)`` between the least and the greatest D of the chord's steps."""
        moved, upper = self._moved[name], self._upper[name]
        own = delta - self._decoupled[name] if name in self._decoupled else delta
        ratio = torch.where(moved == 0, torch.zeros_like(moved), -own / moved)
        lower = torch.minimum(self._largest[name].reciprocal(), upper)
        if name in self._loose:  # D between two looks is not known better
            lower, upper = lower / LOOSENESS, upper * LOOSENESS
        return torch.minimum(torch.maximum(ratio, lower), upper)
