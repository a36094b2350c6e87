"""What an optimiser did in its latest step, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import CaptureError, matrix_shape
from lightning_pathkernel.optim import OptimizerRule, ParameterUpdate
from lightning_pathkernel.recording.displacement import ChordDisplacement

__all__ = ["OptimizerUpdates"]


class OptimizerUpdates:
    """Reads an optimiser's groups and state after each of its steps.

    Args:
        module: The network, for the names in messages.
        names: Id of a parameter -> its name, for every parameter that can be recorded.
        optimizer: The raw torch optimiser.
        rule: Its rule; None for an optimiser whose steps are left unattributed.
    """

    def __init__(
        self, module: nn.Module, names: Mapping[int, str], optimizer: torch.optim.Optimizer, rule: OptimizerRule | None
    ) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self._module = module
        self._names = names
        self._seen: set[str] = set()
        self._plain: dict[str, Tensor] = {}

    def decaying(self) -> bool:
        """Whether any group has weight decay."""
        return self.rule is not None and any(group.get("weight_decay", 0) for group in self.optimizer.param_groups)

    def received(self) -> dict[str, Tensor]:
        """The parameters that have a gradient, by name.

        Returns:
            Name -> parameter.

        Raises:
            CaptureError: If one of them cannot be recorded.
        """
        found = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    name = self._names.get(id(parameter))
                    if name is None:
                        raise CaptureError(_stranger(self._module, parameter))
                    found[name] = parameter
        return found

    def take(self, displacement: ChordDisplacement, foreign: Mapping[str, Tensor]) -> dict[ParameterUpdate, list[str]]:
        """Note the latest step in the chord's running sums.

        Args:
            displacement: The sums of the open chord.
            foreign: Parameter -> what its gradient held beyond the examples' parts.

        Returns:
            The parameters that moved, by the scalars of their update.
        """
        if self.rule is None:
            displacement.step_unruled(list(self.received()))
            return {}
        moved: dict[ParameterUpdate, list[str]] = {}
        for group in self.optimizer.param_groups:
            for update, parameters in self._buckets(group).items():
                names = list(parameters)
                displacement.step_foreign(names, update, foreign)
                if displacement.decays(update):
                    displacement.step_decay(names, update)
                if self.rule.diagonal:
                    self._precondition(self.rule, displacement, group, update, parameters)
                moved.setdefault(update, []).extend(names)
        return moved

    def _precondition(
        self, rule: OptimizerRule, displacement: ChordDisplacement, group: Mapping[str, Any], update: ParameterUpdate,
        parameters: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        denominators, directions, factor = self._multiplied(rule, displacement, group, update, parameters)
        if update.before_buffer:
            buffers = self._plain_buffers(list(parameters), update, directions)
            mixed = torch._foreach_mul(directions, update.from_gradient)
            torch._foreach_add_(mixed, buffers, alpha=update.from_buffer)
            directions, factor = list(mixed), 1.0
        displacement.step_preconditioned(list(parameters), update.rate * factor, directions, denominators)

    def _multiplied(
        self, rule: OptimizerRule, displacement: ChordDisplacement, group: Mapping[str, Any], update: ParameterUpdate,
        parameters: Mapping[str, Tensor],
    ) -> tuple[list[Tensor], list[Tensor], float]:  # fmt: skip
        """``1 / D`` of the latest step, what D multiplied in it, and a factor to that."""
        names, states = list(parameters), [self.optimizer.state[p] for p in parameters.values()]
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if update.before_buffer:
            entering = update._replace(from_buffer=0.0, from_gradient=1.0)
            directions, _ = displacement.directions(names, entering, [], gradients)
            return rule.denominators(group, states, directions), directions, 1.0
        buffers = [b for state in states if (b := rule.buffer(state)) is not None]
        directions, factor = displacement.directions(names, update, buffers, gradients)
        return rule.denominators(group, states, directions), directions, factor

    def _plain_buffers(self, names: Sequence[str], update: ParameterUpdate, entering: list[Tensor]) -> list[Tensor]:
        """Momentum of gradients without their preconditioners, which the optimiser itself does not keep."""
        for name, value in zip(names, entering, strict=True):
            if name not in self._plain:
                self._plain[name] = torch.zeros_like(value)
        buffers = [self._plain[name] for name in names]
        torch._foreach_mul_(buffers, update.keep)
        torch._foreach_add_(buffers, entering, alpha=update.inject)
        return buffers

    def _buckets(self, group: Mapping[str, Any]) -> dict[ParameterUpdate, dict[str, Tensor]]:
        """The parameters of a group that have a gradient, by the scalars of their update."""
        assert self.rule is not None
        alike: dict[tuple[float, bool], tuple[Any, dict[str, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            name = self._names[id(parameter)]
            state = self.optimizer.state[parameter]
            key = (float(state.get("step", 0)), name not in self._seen)
            if key in alike:
                alike[key][1][name] = parameter
            else:
                alike[key] = (state, {name: parameter})
            if key[1] and self.rule.buffer(state) is not None:
                self._seen.add(name)
        buckets: dict[ParameterUpdate, dict[str, Tensor]] = {}
        for (_, first), (state, named) in alike.items():
            buckets.setdefault(self.rule.update(group, state, first), {}).update(named)
        return buckets

    def preconditioner(self, names: set[str], displacement: ChordDisplacement) -> dict[str, Tensor]:
        """D of the latest step, by parameter, 0 where a weight has never moved; empty for the identity."""
        out: dict[str, Tensor] = {}
        rule = self.rule
        if rule is None or not rule.diagonal:
            return out
        for group in self.optimizer.param_groups:
            for update, parameters in self._buckets(group).items():
                wanted = {name: p for name, p in parameters.items() if name in names}
                states = [self.optimizer.state[p] for p in wanted.values()]
                if not states:
                    continue
                denominators, _, _ = self._multiplied(rule, displacement, group, update, wanted)
                for name, state, found in zip(wanted, states, denominators, strict=True):
                    out[name] = found.reciprocal() * rule.moved(group, state)
        return out

    def direction(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where parameters are moving: their momentum buffers, or their gradients."""
        out = {}
        for name, parameter in names.items():
            buffer = self._momentum(name, parameter)
            found = parameter.grad if buffer is None else buffer
            out[name] = torch.zeros_like(parameter) if found is None else found.detach()
        return out

    def _momentum(self, name: str, parameter: Tensor) -> Tensor | None:
        if self.rule is None:
            return None
        plain = self._plain.get(name)
        return plain if plain is not None else self.rule.buffer(self.optimizer.state[parameter])

    def earlier_momentum(
        self, parameters: Mapping[str, Tensor], newest: Mapping[str, float], foreign: Mapping[str, Tensor],
        pulls: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the momentum buffers hold of the examples of earlier steps.

        Args:
            parameters: Those that are asked about.
            newest: Parameter -> share of the latest step's gradient in its buffer.
            foreign: Parameter -> what the latest gradient held beyond the examples' parts.
            pulls: Parameter -> what decay and foreign gradients, the latest included, put into its buffer.

        Returns:
            Parameter -> the rest of its buffer, as a matrix ``[r, c]``.
        """
        out = {}
        for name, parameter in parameters.items():
            buffer = self._momentum(name, parameter)
            if buffer is None:
                continue
            tail = buffer.detach().clone()
            if parameter.grad is not None:
                examples = parameter.grad - foreign[name] if name in foreign else parameter.grad
                tail -= examples * newest[name]
            if name in pulls:
                tail -= pulls[name]
            out[name] = tail.reshape(matrix_shape(parameter.shape))
        return out


def _stranger(module: nn.Module, parameter: Tensor) -> str:
    name = next((name for name, p in module.named_parameters() if p is parameter), None)
    if name is None:
        return (
            f"the optimiser moves a parameter of shape {tuple(parameter.shape)} that is not the module's: register "
            "what owns it (the loss?) as a submodule."
        )
    return (
        f"{name!r} was frozen when the fit began and is learning now: give it to the optimiser from the start, or use "
        "Lightning's BaseFinetuning."
    )
