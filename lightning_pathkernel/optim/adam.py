"""Rules for Adam and its kin, whose momentum is an exponential average of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, register_optimizer_rule

__all__ = ["AdamRule", "AdamaxRule", "NAdamRule", "RAdamRule"]


def _steps(states: Sequence[Mapping[str, Any]]) -> list[float]:
    """Every parameter's number of steps, read from the device at once; they differ where a parameter sat steps out."""
    found: list[float] = torch.stack([torch.as_tensor(state["step"]) for state in states]).tolist()
    return found


class _Averaging:
    """``b <- beta1 b + (1 - beta1) h``; decay is coupled, or beside the update where the group says so."""

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        beta1, rate = float(group["betas"][0]), float(group["lr"])
        from_buffer, from_gradient = self._weights(group, state)
        return ParameterUpdate(
            rate=rate,
            keep=beta1,
            inject=1.0 - beta1,
            from_buffer=from_buffer,
            from_gradient=from_gradient,
            sign=-1.0 if group["maximize"] else 1.0,
            coupled_decay=0.0 if group.get("decoupled_weight_decay", False) else float(group["weight_decay"]),
            decay_rate=self.decay_rate(group),
        )

    def decay_rate(self, group: Mapping[str, Any]) -> float:
        """Learning rate times weight decay, where the group decouples it."""
        return float(group["lr"]) * float(group["weight_decay"]) if group.get("decoupled_weight_decay", False) else 0.0

    def rise(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """V falls by beta2 at most, and not at all under amsgrad; the bias correction ``1 - beta2^t`` grows."""
        beta2, step = float(group["betas"][1]), float(state["step"])
        keep = 1.0 if group.get("amsgrad") else beta2
        before = keep * (1.0 - beta2**step)
        return math.sqrt((1.0 - beta2 ** (step + 1.0)) / before) if before > 0 else math.inf

    def _weights(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, float]:
        """``from_buffer`` and ``from_gradient``."""
        return 1.0 / (1.0 - float(group["betas"][0]) ** float(state["step"])), 0.0

    def buffer(self, state: Mapping[str, Any]) -> Tensor | None:
        """``exp_avg``."""
        buffer: Tensor = state["exp_avg"]
        return buffer

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where ``exp_avg`` is not 0."""
        found: Tensor = state["exp_avg"] != 0
        return found

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``sqrt(v / (1 - beta2^t)) + eps``."""
        second = [state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"] for state in states]
        beta2 = float(group["betas"][1])
        out = torch._foreach_div(second, [1.0 - beta2**step for step in _steps(states)])
        torch._foreach_sqrt_(out)
        torch._foreach_add_(out, float(group["eps"]))
        return list(out)


@register_optimizer_rule(torch.optim.Adam, torch.optim.AdamW)
class AdamRule(_Averaging):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with amsgrad and maximize.

    ``m = b / (1 - beta1^t)``, ``D = 1 / (sqrt(v / (1 - beta2^t)) + eps)``, with the largest ``v`` so far under amsgrad.
    """


@register_optimizer_rule(torch.optim.NAdam)
class NAdamRule(_Averaging):
    """NAdam (Dozat 2016): Adam's D, and ``m = mu' b / (1 - mu' M) + (1 - mu) h / (1 - M)``.

    mu is the momentum of this step, mu' of the next, M the product of all so far.
    """

    def _weights(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, float]:
        step, product = float(state["step"]), float(state["mu_product"])
        mu, following = (
            float(group["betas"][0]) * (1.0 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))
            for t in (step, step + 1.0)
        )
        return following / (1.0 - product * following), (1.0 - mu) / (1.0 - product)


@register_optimizer_rule(torch.optim.RAdam)
class RAdamRule(_Averaging):
    """RAdam (Liu et al. 2020): ``m`` as Adam's, ``D = r sqrt(1 - beta2^t) / (sqrt(v) + eps)``.

    In the first steps, while the variance of the adaptive rate is not tractable, D is 1.
    """

    def rise(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """V falls by beta2 at most; ``r sqrt(1 - beta2^t)`` grows."""
        beta2, step = float(group["betas"][1]), float(state["step"])
        before, after = _rectified(beta2, step), _rectified(beta2, step + 1.0)
        if before is None or after is None or beta2 == 0:
            return math.inf
        return after / before / math.sqrt(beta2)

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``(sqrt(v) + eps) / (r sqrt(1 - beta2^t))``, or 1."""
        beta2, eps = float(group["betas"][1]), float(group["eps"])
        factors = [_rectified(beta2, step) for step in _steps(states)]
        return [
            torch.ones_like(state["exp_avg"]) if factor is None else state["exp_avg_sq"].sqrt().add_(eps).div_(factor)
            for state, factor in zip(states, factors, strict=True)
        ]


def _rectified(beta2: float, step: float) -> float | None:
    """``r sqrt(1 - beta2^t)``; None while the variance is not tractable."""
    correction, longest = 1.0 - beta2**step, 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * beta2**step / correction
    if length <= 5.0:
        return None
    square = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    return float((square * correction) ** 0.5)


@register_optimizer_rule(torch.optim.Adamax)
class AdamaxRule(_Averaging):
    """Adamax (Kingma and Ba 2015, algorithm 2): ``D = 1 / u``, u the decaying maximum of ``|h| + eps``."""

    def rise(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """U falls by beta2 at most."""
        beta2 = float(group["betas"][1])
        return 1.0 / beta2 if beta2 > 0 else math.inf

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``u``."""
        return [state["exp_inf"].clone() for state in states]
