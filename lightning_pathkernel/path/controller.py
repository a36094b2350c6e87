"""Nodes that the path itself places, as a step-size controller of an ODE solver does: at a drift, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DriftController", "NodeBudget"]


@dataclass(frozen=True)
class NodeBudget:
    """A chord ends once it has drifted by ``tolerance``, and there are at most ``nodes`` chords.

    Attributes:
        tolerance: Drift at which a chord ends, relative (see `recording.drift`).
        nodes: Most chords of the whole path.
        total_steps: Optimiser steps of the whole path; None where nobody knows.

    Raises:
        ValueError: If a number is not positive.
    """

    tolerance: float
    nodes: int
    total_steps: int | None = None

    def __post_init__(self) -> None:
        total = 1 if self.total_steps is None else self.total_steps
        if not (0 < self.tolerance < math.inf) or self.nodes < 1 or total < 1:
            raise ValueError(
                f"tolerance, nodes and total_steps must be positive, found {self.tolerance}, {self.nodes} and {total}"
            )

    def threshold(self, closed: int) -> float:
        """Drift at which the next chord ends after ``closed`` chords.

        Where the end of the path is unknown, the tolerance rises as the budget goes, without bound at its end: what is
        left is never all spent on one stretch of the path.

        Args:
            closed: Chords that have ended.

        Returns:
            The drift.
        """
        if self.total_steps is not None:
            return self.tolerance
        left = self.nodes - closed - 1  # the last chord ends with the path
        return self.tolerance * self.nodes / left if left > 0 else math.inf

    @property
    def longest(self) -> float:
        """Steps after which a chord ends whatever its drift: twice the schedule's last interval, for bases age too."""
        return math.inf if self.total_steps is None else max(1.0, 4 * self.total_steps / self.nodes)

    def earliest(self, closed: int) -> int:
        """First step at which the next chord may end after ``closed`` chords.

        Where the end of the path is known, no more chords may have ended by any step than the schedule
        ``total_steps * (c / nodes) ** 2`` has: the nodes left are never spread thinner than the schedule spreads them.

        Args:
            closed: Chords that have ended.

        Returns:
            The step.
        """
        if self.total_steps is None:
            return 1
        return max(1, math.ceil(self.total_steps * ((closed + 1) / self.nodes) ** 2))


class DriftController:
    """Decides, step by step, when to look at the drift of the open chord and when to end it.

    Args:
        budget: Tolerance and number of nodes.
    """

    def __init__(self, budget: NodeBudget) -> None:
        self._budget = budget
        self._closed = 0
        self._node = 0
        self._next: float = budget.earliest(0)

    def state(self) -> dict[str, Any]:
        """What is known of the chords so far."""
        return {"closed": self._closed, "node": self._node, "next": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the controller whose `state` this was; the budget stays, so that a fit may go on for longer."""
        self._closed, self._node, self._next = int(state["closed"]), int(state["node"]), float(state["next"])

    def looks(self, step: int) -> bool:
        """Whether the drift is wanted after this step; intervals grow while the tolerance is far."""
        return step >= self._next or step == self._budget.total_steps

    def closes(self, step: int, drift: float) -> bool:
        """Whether the chord ends after this step.

        Args:
            step: Steps taken so far.
            drift: How far the chord has drifted since its node; not a number ends it, as does the end of the path.

        Returns:
            The decision; the controller takes it as done.
        """
        threshold, length = self._budget.threshold(self._closed), step - self._node
        over = length >= self._budget.longest or step == self._budget.total_steps
        if drift < threshold and not over:
            # half of what is left if the drift grows in proportion to the steps: it may well grow faster
            ahead = length * (0.5 * (threshold / drift - 1) if drift > 0 else 1.0)
            wait = max(1, length // 16, math.floor(min(ahead, length)))
            self._next = min(step + wait, self._node + self._budget.longest)
            return False
        self._closed, self._node = self._closed + 1, step
        self._next = max(step + max(1, length // 4), self._budget.earliest(self._closed))
        return True
