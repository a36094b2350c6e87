"""Rules for optimisers that scale gradients by their past sizes: Adagrad, RMSprop and Adadelta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, register_optimizer_rule

__all__ = ["AdadeltaRule", "AdagradRule", "RMSpropRule"]


def _plain(group: Mapping[str, Any], rate: float) -> ParameterUpdate:
    return ParameterUpdate(
        rate=rate,
        sign=-1.0 if group.get("maximize") else 1.0,
        coupled_decay=float(group["weight_decay"]),
    )


def _squared(mean: Tensor, keep: float) -> Tensor:
    """Where a decaying mean of squares has seen any; everywhere if it takes nothing in."""
    return mean != 0 if keep < 1 else torch.ones_like(mean, dtype=torch.bool)


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

    With momentum ``b <- momentum * b + D . h`` and ``m = b``: every gradient keeps the D of its own step.
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        plain, momentum = _plain(group, float(group["lr"])), float(group["momentum"])
        if not momentum:
            return plain
        return plain._replace(keep=momentum, from_buffer=1.0, from_gradient=0.0, before_buffer=True)

    def buffer(self, state: Mapping[str, Any]) -> Tensor | None:
        """``momentum_buffer``, which holds ``D . h``."""
        buffer: Tensor | None = state.get("momentum_buffer")
        return buffer

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where the second moment is not 0."""
        return _squared(state["square_avg"], float(group["alpha"]))

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


@register_optimizer_rule(torch.optim.Adadelta)
class AdadeltaRule:
    """Adadelta (Zeiler 2012): ``m = h``, ``D = sqrt(u + eps) / sqrt(v + eps)``; decay is coupled.

    v is the decaying mean of ``h^2`` with this step, u that of ``(D h)^2`` before it. The state holds u after the step,
    ``u' = rho u + (1 - rho) D^2 h^2``. With D inserted that is linear in u, so that

        1 / D^2 = (v + eps) / (u + eps) = (rho (v + eps) + (1 - rho) h^2) / (u' + rho eps)
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        return _plain(group, float(group["lr"]))

    def buffer(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where the mean of squares is not 0."""
        return _squared(state["square_avg"], float(group["rho"]))

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``1 / D`` as above; infinite where a weight without memory (``rho = 0``) stands still."""
        rho, eps = float(group["rho"]), float(group["eps"])
        out = torch._foreach_add([state["square_avg"] for state in states], eps)
        torch._foreach_mul_(out, rho)
        torch._foreach_addcmul_(out, list(directions), list(directions), value=1.0 - rho)
        torch._foreach_div_(out, torch._foreach_add([state["acc_delta"] for state in states], rho * eps))
        torch._foreach_sqrt_(out)
        return [one.nan_to_num_(nan=torch.inf, posinf=torch.inf) for one in out]
