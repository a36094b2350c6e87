"""Optimiser steps in, chords out. Knows nothing of Lightning.

Call `begin_batch` and `end_batch` around every batch, `before_backward` and `after_backward` around every backward
pass, `before_step` when an optimiser's gradients are complete, and `after_step` once it has moved the weights. What a
backward pass leaves in ``p.grad`` is followed until it is zeroed, so that several backward passes per step, several
optimisers, and steps that an optimiser skips need no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.capture import CaptureError, GradientCapture, PerExampleGradient
from lightning_pathkernel.capture.positions import check_positions
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.heap import give_back
from lightning_pathkernel.network import Network
from lightning_pathkernel.optim import optimizer_rule
from lightning_pathkernel.recording.batch import row_groups
from lightning_pathkernel.recording.checks import NonFiniteError, past, unseen
from lightning_pathkernel.recording.fitting import SketchFitter
from lightning_pathkernel.recording.followed import FollowedOptimizer, check_shared
from lightning_pathkernel.recording.nodes import Nodes
from lightning_pathkernel.recording.open_chord import OpenChord
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.rows import StepRows
from lightning_pathkernel.recording.saved import RecorderParts
from lightning_pathkernel.recording.settings import RecorderSettings
from lightning_pathkernel.recording.step_checks import StepChecks

__all__ = ["NonFiniteError", "PathRecorder", "RecorderSettings"]


class PathRecorder:
    """Records a training run as a kernel machine.

    Args:
        network: The network in training.
        optimizers: The raw torch optimiser, or all of them.
        settings: What to record.
        probes: A batch of validation examples that shows what queries look like, or None.
        on_chord: Receives every chord as it closes.
        ranks: The processes that train the network.

    Attributes:
        steps: Optimiser steps so far, those of all optimisers counted.

    Raises:
        UnsupportedOptimizerError: If an optimiser has no rule and may not be left unattributed.
        CaptureError: If two optimisers share a parameter, or positions were asked for and a layer has none.
    """

    def __init__(
        self,
        network: Network,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        settings: RecorderSettings,
        probes: object | None,
        on_chord: Callable[[Chord], None],
        ranks: Ranks | None = None,
    ) -> None:
        self.network = network
        self.settings = settings
        self.steps = 0
        self.capture = GradientCapture(network.module, network.plan)
        self.capture.retain = settings.manual
        self.capture.positions = settings.positions
        if settings.positions:
            check_positions(layer for layer in network.plan.layers if layer.parameters)
        self.capture.lenient = settings.allow_unattributed
        self._ranks = ranks or Ranks()
        found = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
        names = {id(p): name for name, p in network.plan.parameters.items()}
        check_shared(found, names)
        rules = [optimizer_rule(each, settings.allow_unattributed) for each in found]
        self._optimizers = [
            FollowedOptimizer(network.module, names, each, rule, settings.changes)
            for each, rule in zip(found, rules, strict=True)
        ]
        self._fitter = SketchFitter(network, probes, settings, self._ranks)
        self._on_chord = on_chord
        self._groups: list[Tensor] = []
        self._rows: list[StepRows] | None = None
        self._chord = OpenChord(network, self._ranks)
        self._due = False
        self._nodes = Nodes(settings.nodes, self._ranks)
        self._checks = StepChecks(settings, network.parameters, self._chord, self._ranks)
        self._waited = self._within = False
        self._parts = RecorderParts(network, self._chord, self._optimizers, self._fitter, self._nodes)

    # going on later

    def state(self, again: bool = False) -> dict[str, Any]:
        """All that a recorder needs to go on from here, as plain values and tensors that the next step changes.

        Args:
            again: The batch in progress will be run again.

        Returns:
            The state. ``broken`` says why nothing can go on from it, where that is so.
        """
        broken = None
        if again and self._waited:
            broken = "it was saved within a batch while gradients of earlier batches waited for their step"
        if self._within:
            broken = "it was saved within an optimiser's step"
        state = self._parts.state(again, self.settings.manual)
        return {"steps": self.steps, "due": self._due, "broken": broken, **state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a recorder with the same settings; weights and optimisers are as they were then."""
        self.steps, self._due = int(state["steps"]), bool(state["due"])
        self._parts.restore(state)

    @property
    def within(self) -> bool:
        """Whether a step is being taken in at this moment: an interrupt has left it half done."""
        return self._within

    def abandon_batch(self) -> None:
        """The batch in progress is not gone on with."""
        self.end_batch()
        for optimizer in self._optimizers:
            optimizer.abandon()

    # one batch

    def begin_batch(self, ids: Tensor | Sequence[tuple[Tensor, object]]) -> None:
        """Expect the forward passes of a batch.

        Args:
            ids: Its examples, ``[n]``; or, where several loaders feed it, each one's examples and part of the batch.
        """
        self._waited = any(each.fresh() or (self.settings.manual and each.parts) for each in self._optimizers)
        self._groups, groups = row_groups(ids, self.settings.positions)
        self.capture.begin(groups)

    def before_backward(self) -> None:
        """Expect the gradients of a backward pass; what was zeroed since the last one is forgotten."""
        for optimizer in self._optimizers:
            optimizer.forget_zeroed()
        self._close_if_due()
        self._rows = [StepRows(ids, self._chord.arena, self._chord.room) for ids in self._groups]
        self.capture.listen(self._take)

    def _take(self, group: int, name: str, gradient: PerExampleGradient) -> None:
        if self._rows is None:
            return
        rows = self._rows[group]
        if name in self._chord.fitted:
            rows.add(name, self._chord.sketches[name], gradient)
        else:
            rows.held.setdefault(name, []).append(gradient)

    def after_backward(self, scale: float = 1.0) -> None:
        """The gradients of a backward pass are all in.

        Args:
            scale: Loss scale that is in them, under manual optimisation.

        Raises:
            CaptureError: If a parameter's gradient could not be split among the examples.
        """
        self.capture.mute()
        if self._rows is None:
            return
        if not self.settings.allow_unattributed:
            self.capture.check()
        for rows in self._rows:
            rows.close()
            names = rows.names() if len(self._optimizers) > 1 else None
            for optimizer in self._optimizers:
                optimizer.wait(rows, names)
        self._rows = None
        if self.settings.manual:
            for optimizer in self._optimizers:
                self._checks.inspect(optimizer, optimizer.updates.received(), 1.0, scale, self.steps)

    def end_batch(self) -> None:
        """Expect nothing more of the batch."""
        self.capture.end()
        self._rows = None

    # one step

    def _followed(self, optimizer: torch.optim.Optimizer | None) -> FollowedOptimizer:
        if optimizer is None:
            return self._optimizers[0]
        return next(each for each in self._optimizers if each.optimizer is optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer | None = None, scale: float = 1.0) -> None:
        """An optimiser's gradients are complete.

        Args:
            optimizer: Which; None for the only one.
            scale: Loss scale that was in the backward pass and has been taken out of the gradients since.

        Raises:
            CaptureError: If they are not those that were captured.
        """
        followed = self._followed(optimizer)
        received = followed.received = followed.updates.received()
        new = [name for name in received if name not in self.network.parameters]
        if new:
            self.network.activate(new)
            self._chord.extend(new)
        followed.prepared = True
        if received:
            followed.check_stale()
        if not self.settings.manual:
            followed.scale = scale
            self._checks.inspect(followed, received, scale, 1.0, self.steps)
        seen = followed.parts or self.settings.allow_unattributed
        if not seen and any(p.grad is not None and bool(p.grad.any()) for p in received.values()):
            raise CaptureError(unseen(self.steps))
        followed.updates.expect_decay(self._chord.displacement, self.network.parameters)

    def prepared(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `before_step` has been called for the step in progress."""
        return self._followed(optimizer).prepared

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """An optimiser has moved the weights; ``p.grad`` is what it received.

        Args:
            optimizer: Which; None for the only one.

        Raises:
            CaptureError: If gradients were changed in a way that was ruled out.
            NonFiniteError: If they are not finite.
        """
        followed = self._followed(optimizer)
        if not followed.prepared:
            raise CaptureError(past(self.steps))
        self._within = True
        self._take_in(followed)
        self._within = False

    def _take_in(self, followed: FollowedOptimizer) -> None:
        if followed.received:
            self._record(followed, followed.received)
        followed.prepared, followed.received = False, {}
        self.steps += 1
        self._due = self._due or self._at_node(followed)
        if self._chord.full:
            self._settle()
            self._chord.fold([part for each in self._optimizers for part in each.parts])
        if not self.settings.manual:
            self._close_if_due()
        elif self._due:  # a gradient may be used again until it is zeroed, which shows at the next backward pass
            self._chord.end_here()

    def _record(self, followed: FollowedOptimizer, received: dict[str, Tensor]) -> None:
        factor, foreign = self._checks.changes(followed, self.steps)
        self._checks.check_finite(followed, factor, self.steps)
        if self.settings.allow_unattributed:
            foreign.update(followed.uncaptured())
        chord = self._chord
        moved = followed.updates.take(chord.displacement, foreign)
        if moved:
            parts = list(followed.parts) if factor else []  # rows of which nothing was received may not be finite
            chord.record(parts, factor / (followed.scale * self._ranks.world), moved)
            if parts and (not self._checks.all_fitted() or any(part.held for part in parts)):
                self._fit(followed, [name for name in received if name not in chord.fitted], foreign)
        followed.spend()
        chord.displacement.learning_time += followed.learning_rate() if followed is self._optimizers[0] else 0.0

    # one chord

    def _at_node(self, followed: FollowedOptimizer) -> bool:
        return self._nodes.due(self.steps, self.network.parameters, self._chord.displacement, followed.updates)

    def _close_if_due(self) -> None:
        """A chord ends when its last step was taken and no gradient waits for another one."""
        if self._due and not any(optimizer.fresh() for optimizer in self._optimizers):
            self.close_chord()

    def _fit(self, followed: FollowedOptimizer, unfitted: Sequence[str], foreign: dict[str, Tensor]) -> None:
        """Choose this chord's basis for what moves for the first time in it, and sketch what was held back."""
        chord = self._chord
        held = followed.held(unfitted) if unfitted else []
        names = {name for batch in held for name in batch}
        if names:
            self._fit_names(followed, foreign, held, names)
        for part in followed.parts:
            if part.held:
                part.settle(chord.sketches, [name for name in part.held if name in chord.fitted])

    def _fit_names(
        self, followed: FollowedOptimizer, foreign: dict[str, Tensor],
        held: Sequence[dict[str, list[PerExampleGradient]]], names: set[str],
    ) -> None:  # fmt: skip
        chord, updates = self._chord, followed.updates
        parameters = {name: p for name, p in self.network.parameters.items() if name in names}
        with self.capture.paused():
            sketches = self._fitter.first_stage(
                held, parameters, updates.preconditioner(names, chord.displacement), updates.direction(parameters)
            )
        pulls = chord.displacement.earlier_pulls
        chord.rebase(sketches, lambda newest: updates.earlier_momentum(parameters, newest, foreign, pulls))
        give_back()

    def close_chord(self) -> None:
        """End the open chord at the weights as they are now and hand it on; nothing happens if it is empty.

        Raises:
            NonFiniteError: If weights are not finite.
        """
        self._due = False
        with self.capture.paused():
            self._close()

    def finish(self) -> None:
        """The fit is over: close the last chord, and one more for what moved after its last step."""
        self.close_chord()
        remainder = self._chord.remainder() if self.steps else None
        if remainder is not None:
            with self.capture.paused():
                self._on_chord(remainder)

    def _close(self) -> None:
        self._settle()
        chord = self._chord.snapshot(self.steps, influences=True)
        if chord is None:
            return
        for name, value in chord.delta.items():
            if not bool(value.isfinite().all()):
                raise NonFiniteError(f"weights of {name!r} are not finite at optimiser step {self.steps}")
        chord = self._fitter.closed(chord)
        for optimizer in self._optimizers:
            optimizer.end_chord()
        self._chord.follow(self.steps)
        self._on_chord(chord)
        give_back()

    def snapshot(self) -> Chord | None:
        """The open chord as if it ended here, with first-stage rows; None where nothing was learned since its node."""
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(optimizer.updates.settled(self._chord.displacement))
            return self._chord.snapshot(self.steps)

    def _settle(self) -> None:
        for optimizer in self._optimizers:
            optimizer.updates.settle(self._chord.displacement)
