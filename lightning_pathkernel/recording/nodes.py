"""When the open chord ends: at the steps of a schedule, or at a drift that is watched.

The drift since a node is ``hypot(a, c b)``, with c = 0.1 and

- ``a`` the relative displacement of the weights: root mean square, over the parameters of two dimensions and more, of
  ``|w - w_a| / |w_a|``, none of them counted as more than 1;
- ``b`` the change of the preconditioner: root mean square of ``log(D / D_a)`` over the weights, each weighted by the
  square of its displacement. ``D_a`` is that of the last step before the node.

Both are passes over the weights, no probe takes part. Tangent features of 32 probes, looked at after every step, placed
the nodes of a small CNN under SGD no better (two seeds, contributions against brute force), and cost a good part of a
step each time one looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.network import Tensors
from lightning_pathkernel.path import DriftController, NodeBudget, node_schedule
from lightning_pathkernel.recording.displacement import ChordDisplacement
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.updates import OptimizerUpdates

__all__ = ["Nodes", "preconditioner_change", "relative_displacement"]

_PRECONDITIONER = 0.1


def relative_displacement(weights: Tensors, start: Tensors) -> float:
    """Root mean square over the matrices (over all parameters, if there is none) of ``min(|w - w_a| / |w_a|, 1)``."""
    names = [name for name in start if name in weights]
    matrices = [name for name in names if start[name].dim() > 1] or names
    before = [start[name] for name in matrices]
    moved = torch._foreach_norm(torch._foreach_sub([weights[name].detach() for name in matrices], before))
    length = torch.stack(torch._foreach_norm(before)).clamp_min(1e-30)
    return float((torch.stack(moved) / length).clamp(max=1.0).square().mean().sqrt())


def preconditioner_change(now: Tensors, reference: Tensors, weights: Tensors, start: Tensors) -> float:
    """Root mean square of ``log(D / D_a)``, weighted by squared displacements, over weights that both have a D of."""
    energy = total = torch.zeros(())
    for name, before in reference.items():
        if name not in now:
            continue
        both = (before > 0) & (now[name] > 0)
        moved = torch.where(both, weights[name].detach() - start[name], 0).square()
        change = torch.where(both, now[name] / before, 1).log().square()
        energy, total = energy + (moved * change).sum().cpu(), total + moved.sum().cpu()
    return math.sqrt(float(energy) / float(total)) if float(total) > 0 else 0.0


def further(schedule: Sequence[int], node: int, total: int) -> tuple[int, ...]:
    """A schedule for a fit whose end has moved: what has been stays, what is to come is evenly spaced.

    Args:
        schedule: Of the fit so far.
        node: Its latest node.
        total: Optimiser steps of the whole path now.

    Returns:
        Nodes up to ``node``, and as many to come for every step as there were.
    """
    left = max(total - node, 1)
    chords = max(1, round((len(schedule) - 1) * left / max(schedule[-1], 1)))
    kept = [step for step in schedule if step < node]
    return (*kept, *(node + step for step in node_schedule(left, chords, power=1.0)))


class Nodes:
    """Says after every optimiser step whether the open chord ends there.

    Args:
        nodes: Optimiser steps at which chords end, rising, the first one 0, beyond the last of which the last interval
            repeats; or a tolerance of the drift and a budget.
        ranks: The processes that train the network: the first one decides.
    """

    def __init__(self, nodes: Sequence[int] | NodeBudget, ranks: Ranks) -> None:
        self._schedule = () if isinstance(nodes, NodeBudget) else tuple(nodes)
        self._ends = frozenset(self._schedule[1:])
        self._controller = DriftController(nodes) if isinstance(nodes, NodeBudget) else None
        self._ranks = ranks
        self._reference: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """The schedule, or what the controller knows and measures the drift of D from."""
        controller = None if self._controller is None else self._controller.state()
        return {"schedule": list(self._schedule), "controller": controller, "reference": self._reference}

    def restore(self, state: Mapping[str, Any], node: int) -> None:
        """Go on where a fit broke off; one that is to last longer, or shorter, gets new nodes for what is to come.

        Args:
            state: The state then.
            node: Optimiser step of the latest node.
        """
        self._reference = dict(state["reference"])
        if self._controller is not None:
            self._controller.restore(state["controller"])
            return
        known = tuple(int(step) for step in state["schedule"])
        if known[-1] != self._schedule[-1]:
            known = further(known, node, self._schedule[-1])
        self._schedule, self._ends = known, frozenset(known[1:])

    def due(
        self, step: int, weights: Mapping[str, Tensor], displacement: ChordDisplacement, updates: OptimizerUpdates
    ) -> bool:
        """Whether the chord ends after this step.

        Args:
            step: Steps taken so far.
            weights: The trainable parameters.
            displacement: The open chord's sums.
            updates: What the optimiser of this step did.

        Returns:
            The same on all processes.
        """
        if self._controller is None:
            return self._scheduled(step)
        if not self._controller.looks(step):
            return False
        return self._watched(self._controller, step, weights, displacement, updates)

    def _scheduled(self, step: int) -> bool:
        last, before = self._schedule[-1], self._schedule[-2]
        return step in self._ends if step <= last else (step - last) % (last - before) == 0

    def _watched(
        self, controller: DriftController, step: int, weights: Tensors, displacement: ChordDisplacement,
        updates: OptimizerUpdates,
    ) -> bool:  # fmt: skip
        now = updates.preconditioner(set(weights), displacement)
        drift = relative_displacement(weights, displacement.start)
        if now:
            # nothing is known before the first node, and a preconditioner's first steps change it most: end at once
            known = self._reference.keys() & now.keys()
            change = preconditioner_change(now, self._reference, weights, displacement.start) if known else math.inf
            drift = math.hypot(drift, _PRECONDITIONER * change)
        drift = float(self._ranks.first({"drift": torch.tensor(drift, dtype=torch.float64)})["drift"])
        closes = controller.closes(step, drift)
        if closes:
            self._reference.update(now)
        return closes
