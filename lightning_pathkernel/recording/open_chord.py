"""The chord that is being recorded: its steps, their rows and its displacement, from one node to the next."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.chord import Chord, synthesise
from lightning_pathkernel.network import Network
from lightning_pathkernel.optim import ParameterUpdate
from lightning_pathkernel.recording.arena import Arena
from lightning_pathkernel.recording.batches import batches
from lightning_pathkernel.recording.carry import carried, reexpress
from lightning_pathkernel.recording.displacement import ChordDisplacement, DisplacementParts
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.row_table import RowTable
from lightning_pathkernel.recording.rows import RecordedStep, Rows, StepRows, summed, visited
from lightning_pathkernel.recording.self_influence import SelfInfluence
from lightning_pathkernel.recording.visits import VisitWeights
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["OpenChord", "compressed"]

_log = logging.getLogger(__name__)
_OUTSIDE = 0.02
"""Share of a displacement by which rows may miss it, by rounding and the momentum of steps long past."""
_NAMED = 8
"""Parameters that a warning names."""
_FOLD = 1 << 24
"""Numbers kept of single visits, beyond which those whose weights are final are added up by example."""


class OpenChord:
    """Steps taken since the last node.

    Args:
        network: The network in training.
        ranks: The processes that train it.

    Attributes:
        index: Its place on the path.
        first_step: Optimiser step of its node.
        displacement: Running sums of what the optimisers did.
        sketches: Parameter -> its sketch, of this chord or, until `fitted` has it, of an earlier one.
        fitted: Parameters whose sketch is this chord's.
        room: Numbers that the rows of a backward pass of the latest step took at most.
    """

    def __init__(self, network: Network, ranks: Ranks) -> None:
        self._network = network
        self._ranks = ranks
        self._arenas = (Arena(), Arena())
        self._visits = VisitWeights(list(network.parameters))
        self._steps: list[RecordedStep] = []
        self._kept = 0
        self._carried = 0
        self.room = 0
        self._folded: list[tuple[Tensor, Tensor, Tensor]] = []
        self.index = 0
        self.sketches: dict[str, KroneckerSketch] = {}
        self.fitted: set[str] = set()
        self.first_step = 0
        self.displacement = ChordDisplacement(network.weights())
        self._start_buffers = ranks.first(network.buffers())
        self._end_buffers: dict[str, Tensor] | None = None
        self._warned = False

    def state(self, table: RowTable) -> dict[str, Any]:
        """All of it between two batches but its rows, which ``table`` takes, as values that the next step changes."""
        steps = [[[table.add(part) for part in step.parts], step.coefficient] for step in self._steps]
        sketches = {n: {"rows": s.rows, "columns": s.columns, "factors": s.tensors()} for n, s in self.sketches.items()}
        return {
            "arena": self.arena.state(), "visits": self._visits.state(), "steps": steps, "kept": self._kept,
            "carried": self._carried, "room": self.room, "folded": self._folded, "index": self.index,
            "sketches": sketches, "fitted": sorted(self.fitted), "first_step": self.first_step,
            "displacement": self.displacement.state(), "start_buffers": self._start_buffers,
            "end_buffers": self._end_buffers, "warned": self._warned,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], table: Mapping[str, Any]) -> list[Rows]:
        """Become the chord whose `state` this was.

        Args:
            state: Its state.
            table: Of its rows.

        Returns:
            All rows of the table.
        """
        self.arena.restore(state["arena"])
        rows = RowTable.restored(table, self.arena)
        self._steps = [RecordedStep([rows[i] for i in parts], float(factor)) for parts, factor in state["steps"]]
        self._visits.restore(state["visits"])
        self._folded = [(ids, found, inner) for ids, found, inner in state["folded"]]
        self.sketches = {
            n: KroneckerSketch(s["rows"], s["columns"]).with_tensors(s["factors"]) for n, s in state["sketches"].items()
        }
        self._kept, self._carried, self.room = int(state["kept"]), int(state["carried"]), int(state["room"])
        self.index, self.first_step = int(state["index"]), int(state["first_step"])
        self.displacement.restore(state["displacement"])
        self.fitted, self._warned = set(state["fitted"]), bool(state["warned"])
        self._start_buffers, self._end_buffers = state["start_buffers"], state["end_buffers"]
        return rows

    @property
    def arena(self) -> Arena:
        """Where this chord's rows are kept."""
        return self._arenas[0]

    def end_here(self) -> None:
        """Note the buffers: the chord may end here, but may close only after the next forward pass has moved them."""
        self._end_buffers = self._network.buffers()

    def extend(self, names: Sequence[str]) -> None:
        """Take in parameters that begin to learn now."""
        self._visits.extend(names)
        weights = self._network.weights()
        self.displacement.extend({name: weights[name] for name in names})

    def record(
        self, parts: Sequence[StepRows], coefficient: float, moved: Mapping[ParameterUpdate, Sequence[str]]
    ) -> None:
        """Take in one optimiser step: its visits and the parameters that it moved."""
        self._visits.step(moved)
        self._steps.append(RecordedStep(parts, coefficient))
        self.room = max([part.numbers() for part in parts], default=0)
        self._kept += self.room if len(parts) < 2 else sum(part.numbers() for part in parts)

    def rebase(
        self,
        sketches: Mapping[str, KroneckerSketch],
        momentum: Callable[[Mapping[str, float]], Mapping[str, Tensor]],
    ) -> None:
        """Some parameters have their basis for this chord now; what momentum carried here is brought into it.

        Args:
            sketches: Parameter -> sketch.
            momentum: Share of the latest step's gradient in the buffers -> what these hold of earlier steps.
        """
        old = {name: self.sketches[name] for name in sketches if name in self.sketches}
        earlier = self._steps[: self._carried]
        if any(step.parts for step in earlier) and old:
            shares = self._visits.buffered[: len(earlier)]
            columns = {name: shares[:, j] for j, name in enumerate(self._network.parameters)}
            reexpress(earlier, columns, momentum(self._visits.newest()), old, sketches, self._ranks)
        self.sketches.update(sketches)
        self.fitted.update(sketches)

    @property
    def full(self) -> bool:
        """Whether single visits take so much memory that it is time to `fold`."""
        return self._kept >= _FOLD

    def fold(self, waiting: Sequence[StepRows]) -> None:
        """Add up by example the visits whose weights are final.

        Args:
            waiting: Rows that no step, or not every optimiser's, has used yet.
        """
        alive = self._visits.alive()
        final = np.setdiff1d(np.arange(len(self._steps)), alive)
        parts = self.displacement.parts(self._network.weights())
        ids, rows, inner = self._summed([self._steps[i] for i in final], self._visits.weights[final], parts, True)
        self._folded = [(ids, rows, inner)]
        self._steps = [self._steps[i] for i in alive]
        self._carried = int((alive < self._carried).sum())
        self._visits.keep(alive, chord_closed=False)
        self._arenas = (self._arenas[1], self._arenas[0])
        live = [part for step in self._steps for part in step.parts if isinstance(part, StepRows)]
        for part in [*live, *waiting]:
            part.move(self.arena)
        self._arenas[1].reset()
        self._kept = sum(part.numbers() for part in live)

    def _summed(
        self, steps: Sequence[RecordedStep], weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
        parts: DisplacementParts, influences: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Ids, rows and, if asked for, self-influences of some steps and of what was folded, by example."""
        ids = torch.unique(torch.cat([visited(steps), *(folded[0] for folded in self._folded)]))
        features = sum(sketch.features for sketch in self.sketches.values())
        like = next(iter(parts.delta.values()))
        columns = {name: j for j, name in enumerate(self._network.parameters)}
        weights = weights[:, [columns[name] for name in self.sketches]]
        rows, inner = like.new_zeros(len(ids), features), like.new_zeros(len(ids))
        own = SelfInfluence(self.sketches, parts.preconditioner, self._ranks.world) if influences else None
        counts = np.array([sum(len(part.ids) for part in step.parts) for step in steps], dtype=np.float64)
        for batch in batches(steps, self.sketches):
            at = torch.searchsorted(ids, batch.ids).to(rows.device)
            rows.index_add_(0, at, batch.shares(weights, self.sketches).to(rows))
            if own is not None:
                inner.index_add_(0, at, own.of(batch, weights, counts).to(inner))
        for found, folded_rows, folded_inner in self._folded:
            at = torch.searchsorted(ids, found).to(rows.device)
            rows.index_add_(0, at, folded_rows)
            inner.index_add_(0, at, folded_inner)
        return ids, rows, inner

    def snapshot(self, last_step: int, influences: bool = False) -> Chord | None:
        """The chord as if it ended here, with first-stage rows; None where nothing was learned since its node.

        Args:
            last_step: Steps taken so far.
            influences: Whether self-influences are wanted, which cost some time; zeros otherwise.

        Returns:
            The chord.
        """
        if last_step == self.first_step:
            return None
        parts = self.displacement.parts(self._network.weights())
        if not (self._steps or self._folded or any(bool(delta.any()) for delta in parts.delta.values())):
            return None
        ids, rows, inner = self._summed(self._steps, self._visits.weights, parts, influences)
        total = self._ranks.total(rows.sum(0))
        residual = {**parts.residual, **self._outside(parts, total, rows)}
        return Chord(
            self.index, self.first_step, last_step, self.displacement.learning_time, ids, rows, inner,
            dict(self.sketches), None, dict(self.displacement.start), parts.delta, self._start_buffers,
            self._buffers(), parts.preconditioner, parts.decay, residual,
            total=total if self._ranks.world > 1 else None,
        )  # fmt: skip

    def _buffers(self) -> dict[str, Tensor]:
        return self._ranks.first(self._network.buffers() if self._end_buffers is None else self._end_buffers)

    def remainder(self) -> Chord | None:
        """What moved after the last node without an optimiser's step, weights by hand or buffers; None if nothing did.

        Returns:
            A chord of no steps, unattributed as a whole.
        """
        weights, buffers = self._network.weights(), self._ranks.first(self._network.buffers())
        start, before = self.displacement.start, self._start_buffers
        same = all(torch.equal(w, start[name]) for name, w in weights.items())
        if same and all(torch.equal(b, before[name]) for name, b in buffers.items()):
            return None
        delta = {name: w - start[name] for name, w in weights.items()}
        none = next(iter(weights.values())).new_zeros(0)
        return Chord(
            self.index, self.first_step, self.first_step, 0.0, torch.zeros(0, dtype=torch.long), none.reshape(0, 0),
            none, {}, None, dict(start), delta, before, buffers, residual={} if same else delta,
        )  # fmt: skip

    def _outside(self, parts: DisplacementParts, total: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Where the rows do not add up to what the optimiser did, as far as the sketch shows it: part of the residual.

        The first stage is linear, so both must agree to rounding unless something else moved the weights, or a
        gradient had parts that were not captured.

        Args:
            parts: The displacement's parts.
            total: Sum of all rows, ``[F]``.
            rows: The rows, for what rounding may make of their sum.

        Returns:
            The whole residual of the parameters concerned.
        """
        found: dict[str, Tensor] = {}
        start, wanted = 0, 0.0
        for name, sketch in self.sketches.items():
            part = slice(start, start + sketch.features)
            start += sketch.features
            if name not in parts.examples or name not in self.fitted:
                continue
            expected = sketch.train_matrix(parts.examples[name].reshape(matrix_shape(parts.examples[name].shape)))
            gap = expected - total[part]
            wanted = math.hypot(wanted, float(expected.norm()))
            if float(gap.norm()) > _OUTSIDE * float(expected.norm()) + 1e-3 * float(rows[:, part].norm()):
                found[name] = gap
        if not found:
            return {}
        self._warn(found, wanted)
        out = {}
        for name, gap in found.items():
            matrix = synthesise({name: self.sketches[name]}, gap, parts.preconditioner, parts.delta)[name]
            out[name] = parts.residual[name] + matrix if name in parts.residual else matrix
        return out

    def _warn(self, found: Mapping[str, Tensor], wanted: float) -> None:
        if self._warned:
            return
        self._warned = True
        share = float(torch.cat(list(found.values())).norm()) / max(wanted, 1e-30)
        names = [repr(name) for name in found]
        names[_NAMED:] = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        _log.warning(
            "between optimiser step %d and the next node %s moved otherwise than the recorded gradients say (weights "
            "changed by hand, or gradients that no hook saw): %.1f %% of the chord's sketched displacement is left "
            "unattributed.",
            self.first_step,
            ", ".join(names),
            100 * share,
        )

    def follow(self, last_step: int) -> None:
        """Begin the next chord at the node where this one ends."""
        alive = self._visits.alive()
        self._steps = carried([self._steps[i] for i in alive], self.sketches)
        self._visits.keep(alive, chord_closed=True)
        for arena in self._arenas:
            arena.reset()
        self._kept, self._carried, self._folded = 0, len(self._steps), []
        self.index += 1
        self.first_step = last_step
        self.fitted = set()
        self.displacement = ChordDisplacement(self._network.weights(), self.displacement)
        self._start_buffers = self._buffers()
        self._end_buffers = None
        self._warned = False


def compressed(
    chord: Chord, ranks: Ranks, fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None], sketch_dim: int
) -> Chord:
    """Bring a chord's rows down to ``sketch_dim`` by the second stage.

    Args:
        chord: With first-stage rows.
        ranks: The processes that hold its rows.
        fit: All rows ``[V, F]`` and their sum ``[F]`` -> the maps of both sides, or None.
        sketch_dim: Numbers to keep.

    Returns:
        The chord.
    """
    if chord.rows.shape[1] <= sketch_dim:
        return chord
    rows = chord.rows
    if ranks.world > 1:
        ids, every = ranks.rows(chord.example_ids), ranks.rows(chord.rows)
        merged = torch.unique(ids)
        rows = summed(merged, iter([(ids, every)]), (every.shape[1],), every)
    total = rows.sum(0) if chord.total is None else chord.total
    maps = fit(rows, total)
    if maps is None:
        return chord
    common = ranks.first({"train": maps[0], "query": maps[1]})
    maps = common["train"], common["query"]
    shared = None if chord.total is None else chord.total @ maps[0].T
    return replace(chord, rows=chord.rows @ maps[0].T, second_stage=maps[1], total=shared)
