"""One optimiser and the backward passes whose gradients are in its parameters' ``grad`` at the moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import CaptureError, PerExampleGradient
from lightning_pathkernel.optim import OptimizerRule
from lightning_pathkernel.recording.received import Changes, GradientWatch
from lightning_pathkernel.recording.rows import StepRows
from lightning_pathkernel.recording.updates import OptimizerUpdates

__all__ = ["FollowedOptimizer", "check_shared"]


class FollowedOptimizer:
    """Follows what waits for an optimiser's next step, until it is zeroed.

    Args:
        module: The network.
        names: Id of a parameter -> its name.
        optimizer: The raw torch optimiser.
        rule: Its rule; None to leave its steps unattributed.
        changes: What may happen to gradients before a step.

    Attributes:
        parts: Rows whose gradients are in ``grad``, those that a step has used already included.
        received: Parameters that have a gradient at the step in progress, by name.
        scale: Loss scale that is in the rows and not in what `GradientWatch` saw.
        prepared: Whether a step is in progress.
    """

    def __init__(
        self, module: nn.Module, names: Mapping[int, str], optimizer: torch.optim.Optimizer,
        rule: OptimizerRule | None, changes: Changes,
    ) -> None:  # fmt: skip
        self.optimizer = optimizer
        self.updates = OptimizerUpdates(module, names, optimizer, rule)
        self.watch = GradientWatch(changes, type(optimizer).__name__)
        self.parts: list[StepRows] = []
        self.received: dict[str, Tensor] = {}
        self.scale = 1.0
        self.prepared = False
        self._names = names
        self._stale = False
        self._spent = 0

    def state(self, places: Mapping[int, int]) -> dict[str, Any]:
        """All of it between two batches; ``places`` gives the number of each rows object, by its id."""
        return {
            "updates": self.updates.state(), "watch": self.watch.state(), "scale": self.scale,
            "parts": [places[id(part)] for part in self.parts], "stale": self._stale, "spent": self._spent,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], rows: Sequence[StepRows], parameters: Mapping[str, Tensor]) -> None:
        """Become the one whose `state` this was."""
        self.updates.restore(state["updates"], parameters)
        self.watch.restore(state["watch"])
        self.parts = [rows[i] for i in state["parts"]]
        self.scale, self._stale, self._spent = float(state["scale"]), bool(state["stale"]), int(state["spent"])

    def abandon(self) -> None:
        """The batch in progress will be run again: what came of it is forgotten."""
        self.parts, self._spent, self.prepared, self.received = [], 0, False, {}

    def wait(self, rows: StepRows, names: set[str] | None) -> None:
        """Take in the rows of a backward pass; ``names`` are the parameters it reached, None for all."""
        if rows.empty:
            return
        if names is None or any(self._names.get(id(p)) in names for p in self._all()):
            self.parts.append(rows)

    def _all(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def forget_zeroed(self) -> None:
        """Let go of rows whose gradients have been zeroed."""
        if (self.parts or self._stale) and not any(p.grad is not None and bool(p.grad.any()) for p in self._all()):
            self.parts, self._spent, self._stale = [], 0, False

    def fresh(self) -> bool:
        """Whether gradients wait that no step has used."""
        return len(self.parts) > self._spent

    @property
    def reused(self) -> bool:
        """Whether gradients that a step has used are still there."""
        return self._spent > 0 or self._stale

    def held(self, names: Sequence[str]) -> list[dict[str, list[PerExampleGradient]]]:
        """What was held back of these parameters, part by part; parts without any are left out."""
        found = [{n: part.held[n] for n in names if part.held.get(n)} for part in self.parts]
        return [batch for batch in found if batch]

    def spend(self) -> None:
        """A step has used all rows; used again, they count again."""
        self._spent = len(self.parts)

    def check_stale(self) -> None:
        """Refuse a step that uses gradients of a closed chord again.

        Raises:
            CaptureError: If it does.
        """
        if self._stale:
            raise CaptureError(
                f"{type(self.optimizer).__name__} used gradients again that an earlier step had used, across a node: "
                "zero them after every step."
            )

    def uncaptured(self) -> dict[str, Tensor]:
        """Gradients received of parameters for which no row has anything; none where all is unattributed anyway."""
        if self.updates.rule is None:
            return {}
        seen = set().union(*(part.names() for part in self.parts))
        return {n: p.grad.detach().clone() for n, p in self.received.items() if n not in seen and p.grad is not None}

    def end_chord(self) -> None:
        """The chord has closed: rows that a step has used are in its basis."""
        self._stale = bool(self.parts)
        self.parts, self._spent = [], 0
        self.updates.end_chord()

    def norm(self) -> float:
        """Norm of all gradients."""
        gradients = [p.grad for p in self._all() if p.grad is not None]
        return float(torch.stack(torch._foreach_norm(gradients)).norm()) if gradients else 0.0

    def learning_rate(self) -> float:
        """That of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])


def check_shared(optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]) -> None:
    """Every parameter has one momentum buffer in the account: refuse those that several optimisers move.

    Args:
        optimizers: The optimisers.
        names: Id of a parameter -> its name.

    Raises:
        CaptureError: Naming them.
    """
    owned = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    shared = sorted(names.get(i, "a parameter outside the module") for i, count in owned.items() if count > 1)
    if shared:
        listed = ", ".join(map(repr, shared))
        raise CaptureError(f"several optimisers move {listed}: give every parameter to a single one.")
