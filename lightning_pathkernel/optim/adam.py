"""Rules for `torch.optim.Adam` and `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, register_optimizer_rule

__all__ = ["AdamRule"]


@register_optimizer_rule(torch.optim.Adam, torch.optim.AdamW)
class AdamRule:
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with amsgrad and maximize.

    ``b <- beta1 b + (1 - beta1) h``, ``m = b / (1 - beta1^t)``, ``D = 1 / (sqrt(v / (1 - beta2^t)) + eps)``, with the
    largest ``v`` so far under amsgrad. Decay is coupled in Adam, and beside the update in AdamW.
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        beta1 = float(group["betas"][0])
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        return ParameterUpdate(
            rate=rate,
            keep=beta1,
            inject=1.0 - beta1,
            from_buffer=1.0 / (1.0 - beta1 ** float(state["step"])),
            from_gradient=0.0,
            sign=-1.0 if group["maximize"] else 1.0,
            coupled_decay=0.0 if decoupled else decay,
            decay_rate=rate * decay if decoupled else 0.0,
        )

    def buffer(self, state: Mapping[str, Any]) -> Tensor | None:
        """``exp_avg``."""
        buffer: Tensor = state["exp_avg"]
        return buffer

    def denominators(self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """``sqrt(v_hat) + eps``."""
        second = [state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] for state in states]
        correction = 1.0 - float(group["betas"][1]) ** float(states[0]["step"])
        out = torch._foreach_div(second, correction)
        torch._foreach_sqrt_(out)
        torch._foreach_add_(out, float(group["eps"]))
        return list(out)
