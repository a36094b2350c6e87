"""What happened to gradients between backward pass and optimiser step: clipping, unscaling, changes by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Changes", "GradientWatch"]

Changes = Literal["none", "factor", "any"]
"""What may change gradients: nothing, one common factor (clipping by norm, loss scaling), or anything."""

_log = logging.getLogger(__name__)


class GradientWatch:
    """Compares gradients as the backward pass left them with those that the optimiser received.

    Args:
        changes: What may happen in between.
        optimizer: The optimiser's name, for the log.
    """

    def __init__(self, changes: Changes, optimizer: str) -> None:
        self._changes = changes
        self._optimizer = optimizer
        self._names: list[str] = []
        self._norms: Tensor | None = None
        self._copies: dict[str, Tensor] = {}
        self._warned = False

    def state(self) -> dict[str, Any]:
        """What was seen last."""
        return {"names": self._names, "norms": self._norms, "copies": self._copies, "warned": self._warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the watch whose `state` this was."""
        self._names, self._norms = list(state["names"]), state["norms"]
        self._copies, self._warned = dict(state["copies"]), bool(state["warned"])

    def look(self, parameters: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Note the gradients as they are now, divided by the loss scale that is in them."""
        if self._changes == "none":
            return
        gradients = _gradients(parameters)
        self._names = list(gradients)
        self._norms = torch.stack(torch._foreach_norm(list(gradients.values()))) / scale if gradients else None
        if self._changes == "any":
            self._copies = {name: g.detach() / scale for name, g in gradients.items()}

    def compare(self, parameters: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """What was done to the gradients since `look`.

        Args:
            parameters: Those that have a gradient, by name.

        Returns:
            The common factor that everything was multiplied with, and by parameter what is left over: empty, where
            nothing is. NaN where gradients are not finite; 0 and all of them where they have become finite since.

        Raises:
            ValueError: If more than a factor changed where nothing else was expected.
        """
        if self._norms is None:
            return 1.0, {}
        gradients = _gradients(parameters)
        new = sorted(gradients.keys() - set(self._names))
        if new:
            raise ValueError(f"set for {', '.join(map(repr, new))}")
        norms = self._norms
        if len(gradients) < len(self._names):  # some were taken away: no change of what was received
            norms = norms[[self._names.index(name) for name in gradients]]
        after = torch.stack(torch._foreach_norm(list(gradients.values()))) if gradients else norms
        before, clipped = float(norms.norm()), float(after.norm())
        if not math.isfinite(clipped):
            return math.nan, {}
        if not math.isfinite(before):
            return 0.0, {name: gradient.detach().clone() for name, gradient in gradients.items()}
        factor = clipped / before if before > 0 else 1.0
        if float((after - factor * norms).abs().max()) <= 1e-5 * clipped and self._parallel(gradients, factor):
            return factor, {}
        if self._changes == "factor":
            if float((after - factor * norms).abs().max()) <= 1e-3 * clipped:
                return factor, {}
            raise ValueError("changed by more than one common factor")
        return 1.0, self._left_over(gradients, before)

    def _parallel(self, gradients: Mapping[str, Tensor], factor: float) -> bool:
        """Whether every gradient is the old one times the factor; taken for granted where only factors may happen."""
        if self._changes == "factor":
            return True
        for name, gradient in gradients.items():
            gap = float((gradient - factor * self._copies[name]).norm())
            if gap > 1e-5 * float(gradient.norm()):
                return False
        return True

    def _left_over(self, gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
        out = {name: gradient.detach() - self._copies[name] for name, gradient in gradients.items()}
        found = {name: value for name, value in out.items() if bool(value.any())}
        if found and not self._warned:
            self._warned = True
            share = float(torch.stack([v.norm() for v in found.values()]).norm()) / max(norm, 1e-30)
            _log.warning(
                "gradients of %s were changed between the backward pass and the step by more than a common factor "
                "(clipping by value?): the difference, %.1f %% of them in this step, is left unattributed.",
                self._optimizer,
                100 * share,
            )
        return found


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}
