"""What the optimiser did in its latest step, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import CaptureError, matrix_shape
from lightning_pathkernel.network import Network
from lightning_pathkernel.optim import ParameterUpdate, UnsupportedOptimizerError, optimizer_rule
from lightning_pathkernel.recording.displacement import ChordDisplacement

__all__ = ["OptimizerUpdates"]


class OptimizerUpdates:
    """Reads an optimiser's groups and state after each of its steps.

    Args:
        network: The network in training.
        optimizer: The raw torch optimiser.

    Raises:
        UnsupportedOptimizerError: If it has no rule.
    """

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.rule = optimizer_rule(optimizer)
        self._module = network.module
        self._parameters = network.parameters
        self._by_id = {id(p): name for name, p in network.parameters.items()}
        self._seen: set[str] = set()
        self._directions: dict[str, Tensor] = {}

    def decaying(self) -> bool:
        """Whether any group has weight decay."""
        return any(group.get("weight_decay") for group in self.optimizer.param_groups)

    def take(self, displacement: ChordDisplacement, step: int) -> dict[ParameterUpdate, list[str]]:
        """Note the latest step in the chord's running sums.

        Args:
            displacement: The sums of the open chord.
            step: Its number, for messages.

        Returns:
            The parameters that moved, by the scalars of their update.

        Raises:
            CaptureError: If the optimiser moved a parameter that is not recorded.
        """
        moved: dict[ParameterUpdate, list[str]] = {}
        for group in self.optimizer.param_groups:
            buckets = self._buckets(group, step)
            for update, names in buckets.items():
                if displacement.decays(update):
                    displacement.step_decay(names, update)
                if self.rule.diagonal:
                    self._precondition(displacement, group, update, names)
                moved.setdefault(update, []).extend(names)
        displacement.learning_time += float(self.optimizer.param_groups[0]["lr"])
        return moved

    def _precondition(
        self, displacement: ChordDisplacement, group: Mapping[str, Any], update: ParameterUpdate, names: list[str]
    ) -> None:
        """Take in the step of some parameters of one group with equal scalars."""
        if update.before_buffer:
            raise UnsupportedOptimizerError(
                f"{type(self.optimizer).__name__} preconditions its gradients before they enter the momentum buffer: "
                "such a path cannot be recorded. Use momentum=0."
            )
        states = [self.optimizer.state[self._parameters[name]] for name in names]
        buffers = [b for state in states if (b := self.rule.buffer(state)) is not None]
        gradients = [g for name in names if (g := self._parameters[name].grad) is not None]
        directions = displacement.directions(names, update, buffers, gradients)
        self._directions.update(zip(names, directions, strict=True))
        denominators = self.rule.denominators(group, states, directions)
        displacement.step_preconditioned(names, update, directions, denominators)

    def _buckets(self, group: Mapping[str, Any], step: int) -> dict[ParameterUpdate, list[str]]:
        """The parameters of a group that have a gradient, by the scalars of their update."""
        alike: dict[tuple[float, bool], tuple[Any, list[str]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            name = self._by_id.get(id(parameter))
            if name is None:
                raise CaptureError(_stranger(self._module, parameter, step))
            state = self.optimizer.state[parameter]
            key = (float(state.get("step", 0)), name not in self._seen)
            if key in alike:
                alike[key][1].append(name)
            else:
                alike[key] = (state, [name])
            if key[1] and self.rule.buffer(state) is not None:
                self._seen.add(name)
        buckets: dict[ParameterUpdate, list[str]] = {}
        for (_, first), (state, names) in alike.items():
            buckets.setdefault(self.rule.update(group, state, first), []).extend(names)
        return buckets

    def preconditioner(self, step: int) -> dict[str, Tensor]:
        """D of the latest step, by parameter, 0 where a weight has never moved; empty for the identity."""
        out: dict[str, Tensor] = {}
        for group in self.optimizer.param_groups if self.rule.diagonal else ():
            for names in self._buckets(group, step).values():
                states = [self.optimizer.state[self._parameters[name]] for name in names]
                directions = [self._directions[name] for name in names]
                denominators = self.rule.denominators(group, states, directions)
                for name, state, found in zip(names, states, denominators, strict=True):
                    out[name] = found.reciprocal() * self.rule.moved(group, state)
        return out

    def direction(self) -> dict[str, Tensor]:
        """Where every parameter is moving: its momentum buffer, or the gradient."""
        out = {}
        for name, parameter in self._parameters.items():
            buffer = self.rule.buffer(self.optimizer.state[parameter])
            found = parameter.grad if buffer is None else buffer
            out[name] = torch.zeros_like(parameter) if found is None else found.detach()
        return out

    def earlier_momentum(self, newest: npt.NDArray[np.float64], decay: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the momentum buffers hold of the examples of earlier steps.

        Args:
            newest: Share of the latest step's gradient in the buffers, by parameter.
            decay: Parameter -> what weight decay put into its buffer.

        Returns:
            Parameter -> the rest of its buffer, as a matrix ``[r, c]``.
        """
        out = {}
        for j, (name, parameter) in enumerate(self._parameters.items()):
            buffer = self.rule.buffer(self.optimizer.state[parameter])
            if buffer is None:
                continue
            tail = buffer.detach().clone()
            if parameter.grad is not None:
                tail -= parameter.grad * float(newest[j])
            if name in decay:
                tail -= decay[name]
            out[name] = tail.reshape(matrix_shape(parameter.shape))
        return out


def _stranger(module: nn.Module, parameter: Tensor, step: int) -> str:
    name = next((name for name, p in module.named_parameters() if p is parameter), None)
    if name is None:
        return (
            f"the optimiser moved a parameter of shape {tuple(parameter.shape)} at step {step} that is not the "
            "module's: register what owns it (the loss?) as a submodule."
        )
    return (
        f"{name!r} was frozen when the fit began and learned at step {step}: unfreezing is not supported. Let "
        "it require gradients from the start, with a learning rate of 0 until then."
    )
