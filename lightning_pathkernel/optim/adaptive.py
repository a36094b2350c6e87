"""Rules for optimisers without a momentum buffer: `torch.optim.Adagrad` and `torch.optim.RMSprop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, UnsupportedOptimizerError, register_optimizer_rule

__all__ = ["AdagradRule", "RMSpropRule"]


def _plain(group: Mapping[str, Any], rate: float) -> ParameterUpdate:
    return ParameterUpdate(
        rate=rate,
        sign=-1.0 if group.get("maximize") else 1.0,
        coupled_decay=float(group["weight_decay"]),
    )


@register_optimizer_rule(torch.optim.Adagrad)
class AdagradRule:
    """Adagrad (Duchi, Hazan and Singer 2011): ``m = h``, ``D = 1 / (sqrt(sum of squares) + eps)``.

    The rate falls as ``lr / (1 + (t - 1) lr_decay)``; decay is coupled.
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        return _plain(group, float(group["lr"]) / (1.0 + (float(state["step"]) - 1.0) * float(group["lr_decay"])))

    def buffer(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where the sum of squares is more than it was at first."""
        found: Tensor = state["sum"] != float(group["initial_accumulator_value"])
        return found

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``sqrt(sum) + eps``."""
        out = torch._foreach_sqrt([state["sum"] for state in states])
        torch._foreach_add_(out, float(group["eps"]))
        return list(out)


@register_optimizer_rule(torch.optim.RMSprop)
class RMSpropRule:
    """RMSprop (Hinton 2012), centred too: ``m = h``, ``D = 1 / (sqrt(v) + eps)``; decay is coupled.

    With momentum its buffer holds gradients that are preconditioned already, every one by the D of its own step, which
    no single D of a later step can undo: refused.
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse momentum.

        Raises:
            UnsupportedOptimizerError: If any group has it.
        """
        for i, group in enumerate(optimizer.param_groups):
            if group["momentum"]:
                raise UnsupportedOptimizerError(
                    f"No optimiser rule for RMSprop with momentum (parameter group {i} has momentum="
                    f"{group['momentum']}): its buffer mixes the preconditioners of all steps. Use "
                    "momentum=0, or NAdam."
                )

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        return _plain(group, float(group["lr"]))

    def buffer(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where the second moment is not 0."""
        found: Tensor = state["square_avg"] != 0
        return found

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``sqrt(v) + eps``, with the squared mean taken off ``v`` if centred."""
        out = [state["square_avg"].clone() for state in states]
        if group["centered"]:
            means = [state["grad_avg"] for state in states]
            torch._foreach_addcmul_(out, means, means, value=-1.0)
        torch._foreach_sqrt_(out)
        torch._foreach_add_(out, float(group["eps"]))
        return out
