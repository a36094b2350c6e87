"""A recorder's state between two batches, and a recorder that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_pathkernel.network import Network
from lightning_pathkernel.recording.fitting import SketchFitter
from lightning_pathkernel.recording.followed import FollowedOptimizer
from lightning_pathkernel.recording.nodes import Nodes
from lightning_pathkernel.recording.open_chord import OpenChord
from lightning_pathkernel.recording.row_table import RowTable
from lightning_pathkernel.recording.rows import StepRows

__all__ = ["RecorderParts"]


@dataclass(frozen=True)
class RecorderParts:
    """What a recorder is made of."""

    network: Network
    chord: OpenChord
    optimizers: Sequence[FollowedOptimizer]
    fitter: SketchFitter
    nodes: Nodes

    def state(self, again: bool, every: bool) -> dict[str, Any]:
        """Their state, as plain values and tensors that the next step changes.

        Args:
            again: The batch in progress will be run again: what came of it so far is left out.
            every: Whether gradients that a step has used may be used again, and are kept.

        Returns:
            The state. ``gradients``: what waits in ``p.grad``; ``now`` and ``buffers``: weights and buffers as they
            are; ``learning``: the parameters that learn.
        """
        table = RowTable(self.chord.arena)
        chord = self.chord.state(table)
        for optimizer in self.optimizers:
            for part in optimizer.parts:
                table.add(part)
        followed = [optimizer.state(table.places) for optimizer in self.optimizers]
        waits = any(optimizer.fresh() or (every and optimizer.parts) for optimizer in self.optimizers)
        if again:
            followed = [{**each, "parts": [], "spent": 0} for each in followed]
        parameters = self.network.plan.parameters
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None} if waits and not again else {}
        return {
            "learning": list(self.network.parameters), "chord": chord, "rows": table.state(), "optimizers": followed,
            "fitter": self.fitter.state(), "nodes": self.nodes.state(), "gradients": gradients,
            "now": {n: p.detach() for n, p in self.network.parameters.items()}, "buffers": self.network.buffers(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the network and its optimisers are as they were then.

        Args:
            state: The state.
        """
        plan = self.network.plan.parameters
        self.network.parameters.clear()
        self.network.activate(state["learning"])
        rows = self.chord.restore(state["chord"], state["rows"])
        own = [each if isinstance(each, StepRows) else StepRows(each.ids, self.chord.arena) for each in rows]
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.restore(stored, own, plan)
        self.fitter.restore(state["fitter"])
        self.nodes.restore(state["nodes"], self.chord.first_step)
        _put_back(plan, state["gradients"])


def _put_back(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
