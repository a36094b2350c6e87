"""Rule for `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, register_optimizer_rule

__all__ = ["SGDRule"]


@register_optimizer_rule(torch.optim.SGD)
class SGDRule:
    """SGD with momentum, dampening, Nesterov momentum, weight decay and maximize, from torch's update equations.

    ``b <- momentum * b + (1 - dampening) * h`` (the first step takes ``h`` whole), ``m = b``, or ``h + momentum * b``
    with Nesterov. D is the identity. Weight decay is coupled: it passes through the momentum buffer.
    """

    diagonal = False

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        momentum = float(group["momentum"])
        buffered = momentum != 0
        nesterov = bool(group["nesterov"])
        return ParameterUpdate(
            rate=float(group["lr"]),
            keep=momentum,
            inject=1.0 if first else 1.0 - float(group["dampening"]),
            from_buffer=(momentum if nesterov else 1.0) if buffered else 0.0,
            from_gradient=1.0 if nesterov or not buffered else 0.0,
            sign=-1.0 if group["maximize"] else 1.0,
            coupled_decay=float(group["weight_decay"]),
        )

    def buffer(self, state: Mapping[str, Any]) -> Tensor | None:
        """``momentum_buffer``."""
        buffer: Tensor | None = state.get("momentum_buffer")
        return buffer

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Not asked for, as there is no preconditioner.

        Raises:
            TypeError: Always.
        """
        raise TypeError("SGD has no preconditioner")

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """There are none.

        Raises:
            TypeError: Always.
        """
        raise TypeError("SGD has no preconditioner")
