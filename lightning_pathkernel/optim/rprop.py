"""Rule for `torch.optim.Rprop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.optim.rules import ParameterUpdate, register_optimizer_rule

__all__ = ["RpropRule"]


@register_optimizer_rule(torch.optim.Rprop)
class RpropRule:
    """Rprop (Riedmiller and Braun 1993): ``m = h``, ``D = step_size / |h|``, so that ``D . h = step_size sign(h)``.

    D is 0 where the gradient has just changed its sign, which Rprop takes for a step too far and waits. The learning
    rate is the first step size and nothing else: the rate of every step is 1.
    """

    diagonal = True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Every option is covered."""

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of the latest step."""
        return ParameterUpdate(rate=1.0, sign=-1.0 if group["maximize"] else 1.0)

    def buffer(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Where the latest step moved a weight: ``prev`` is its gradient, 0 where it waited. Elsewhere D is 0."""
        found: Tensor = state["prev"] != 0
        return found

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``|prev| / step_size``, infinite where the sign has changed, and next to nothing without a gradient."""
        previous = [state["prev"] for state in states]
        out = torch._foreach_abs(previous)
        torch._foreach_div_(out, [state["step_size"] for state in states])
        return [
            one.masked_fill_(prev == 0, torch.inf).masked_fill_(h == 0, torch.finfo(h.dtype).tiny)
            for one, prev, h in zip(out, previous, directions, strict=True)
        ]
