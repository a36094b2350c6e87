"""One optimiser step in, records out. Knows nothing of Lightning.

Call `begin_batch` and `end_batch` around every forward and backward pass, `before_step` when the gradients are final
but for clipping, and `after_step` once the weights have moved. A chord is closed when its last step was taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_pathkernel.capture import CaptureError, GradientCapture, PerExampleGradient
from lightning_pathkernel.chord import Chord, QueryBuffer
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import QuadratureRule, gauss_legendre
from lightning_pathkernel.recording.arena import Arena
from lightning_pathkernel.recording.basis import fit_basis, probe_gradients, random_cotangent
from lightning_pathkernel.recording.cancelling import warn_of_cancelling
from lightning_pathkernel.recording.checks import check_sum
from lightning_pathkernel.recording.displacement import ChordDisplacement
from lightning_pathkernel.recording.rows import StepRows, carry_over, weighted
from lightning_pathkernel.recording.self_influence import self_influence
from lightning_pathkernel.recording.updates import OptimizerUpdates
from lightning_pathkernel.recording.visits import VisitWeights
from lightning_pathkernel.sketch import KroneckerSketch, SketchSettings, fit_second_stage

__all__ = ["NonFiniteError", "PathRecorder", "RecorderSettings"]


class NonFiniteError(ArithmeticError):
    """Gradients or weights stopped being finite."""


@dataclass(frozen=True)
class RecorderSettings:
    """What is recorded.

    Attributes:
        nodes: Optimiser steps at which chords end, rising, the first one 0.
        sketch_dim: Numbers stored per example and chord.
        sketch: How sketches are fitted.
        clipping: Whether gradients may be changed between the backward pass and the step.
        seed: Seed of the private random generator.
        rule: Quadrature along a chord, where the recorder needs one.
    """

    nodes: Sequence[int]
    sketch_dim: int = 256
    sketch: SketchSettings = field(default_factory=SketchSettings)
    seed: int = 0
    clipping: bool = True
    rule: QuadratureRule = field(default_factory=lambda: gauss_legendre(2))


class PathRecorder:
    """Records a training run as a kernel machine.

    Args:
        network: The network in training.
        optimizer: The raw torch optimiser.
        settings: What to record.
        probes: A batch of validation examples that shows what queries look like, or None.
        on_chord: Receives every chord as it closes.

    Raises:
        UnsupportedOptimizerError: If the optimiser has no rule.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        settings: RecorderSettings,
        probes: object | None,
        on_chord: Callable[[Chord], None],
    ) -> None:
        self.network = network
        self.settings = settings
        self.steps = 0
        self.capture = GradientCapture(network.module, network.plan)
        self._updates = OptimizerUpdates(network, optimizer)
        self._probes = probes
        self._on_chord = on_chord
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._shapes = {name: p.shape for name, p in network.parameters.items()}
        self._visits = VisitWeights(list(network.parameters))
        self._rows: list[list[StepRows]] = []
        self._arena = Arena()
        self._batch: tuple[StepRows, dict[str, list[PerExampleGradient]]] | None = None
        self._step: list[StepRows] = []
        self._ends = frozenset(settings.nodes[1:])
        self._sketches: dict[str, KroneckerSketch] = {}
        self._fitted = False
        self._chords = 0
        self._held: list[dict[str, list[PerExampleGradient]]] = []
        self._norms: Tensor | None = None
        self._open(None)

    def _open(self, previous: ChordDisplacement | None) -> None:
        self._first_step = self.steps
        self._fitted = False
        self._start_buffers = self.network.buffers()
        decay = previous.decay_buffers if previous else None
        self._displacement = ChordDisplacement(self.network.weights(), decay)

    # one batch

    def begin_batch(self, ids: Tensor) -> None:
        """Expect the per-example gradients of a batch whose examples are ``ids [n]``."""
        rows = StepRows(ids, self._arena)
        held: dict[str, list[PerExampleGradient]] = {}
        self._batch = rows, held
        if self._fitted:
            sketches = self._sketches
            self.capture.begin(len(ids), lambda name, gradient: rows.add(name, sketches[name], gradient))
        else:
            self.capture.begin(len(ids), lambda name, gradient: held.setdefault(name, []).append(gradient))

    def end_batch(self) -> None:
        """The batch's backward pass is over; a batch without one leaves no trace.

        Raises:
            CaptureError: If a parameter's gradient could not be split among the examples, or this is the batch's
                second backward pass.
        """
        if self._batch is None:
            raise CaptureError(
                f"a second backward pass in one batch, before optimiser step {self.steps}: add the losses up and go "
                "back once (manual optimisation with several backward passes is not supported)."
            )
        self.capture.check()
        self.capture.end()
        rows, held = self._batch
        rows.close()
        self._step.append(rows)
        self._held.append(held)
        self._batch = None

    def skip_batch(self) -> None:
        """Expect nothing more of the batch that was begun last, if its backward pass never came."""
        if self._batch is not None:
            self.capture.end()
            self._batch = None

    # one step

    def before_step(self) -> None:
        """The gradients are complete, but not clipped yet."""
        if not self._step:
            return
        if self.settings.clipping:
            self._norms = self._gradient_norms()
        if self._displacement.decay_buffers or self._updates.decaying():
            self._displacement.remember(self.network.parameters)

    def _gradient_norms(self) -> Tensor:
        grads = [p.grad for p in self.network.parameters.values() if p.grad is not None]
        if not grads:
            raise CaptureError("no parameter has a gradient at the optimiser step: nothing was learned from this batch")
        return torch.stack(torch._foreach_norm(grads))

    def after_step(self) -> None:
        """The optimiser has moved the weights; ``p.grad`` is what it received.

        Raises:
            CaptureError: If the gradients are not those that were captured.
            NonFiniteError: If they are not finite.
        """
        self.skip_batch()
        if self._step:
            self._record_step()
        elif any(p.grad is not None for p in self.network.parameters.values()):
            raise CaptureError(
                f"optimiser step {self.steps} came without a backward pass of its own: several steps per batch are not "
                "supported."
            )
        self.steps += 1
        if self.steps in self._ends:
            self.close_chord()

    def _record_step(self) -> None:
        coefficient = self._clip_coefficient()
        if coefficient != 1.0:
            for rows in self._step:
                rows.coefficient = coefficient
        self._visits.step(self._updates.take(self._displacement, self.steps))
        if not self._fitted:
            self._fit(coefficient)
        self._rows.append(self._step)
        self._step, self._held = [], []

    def _clip_coefficient(self) -> float:
        """What clipping by norm multiplied every gradient with."""
        if self._norms is None:
            # a loss that is not finite leaves no row finite: cheaper to see than in all norms
            self._check_finite(self._step[-1].total() if self._fitted else float(self._gradient_norms().sum()))
            return 1.0
        after = self._gradient_norms()
        clipped = float(after.norm())
        self._check_finite(clipped)
        total = float(self._norms.norm())
        factor = clipped / total if total > 0 else 1.0
        if float((after - factor * self._norms).abs().max()) > 1e-3 * clipped:
            raise CaptureError(
                f"gradients were changed between the backward pass and optimiser step {self.steps} by more than one "
                "common factor. Clipping by norm is supported; clipping by value and other changes are not."
            )
        return factor

    def _check_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"gradients are not finite at optimiser step {self.steps}: the path ends there. Everything up to step "
                f"{self._first_step} was recorded. Lower the learning rate, clip the gradients, or check the data."
            )

    # one chord

    def _fit(self, coefficient: float) -> None:
        """Choose the chord's basis from its first step, which was held back for it, and sketch that step."""
        if not any(self._held):
            raise CaptureError(
                "no layer's gradient was seen in the backward pass: the hooks did not fire. A compiled module must be "
                "compiled after the fit has begun; manual gradients are not supported."
            )
        check_sum(self._held, self.network.parameters, coefficient, self.steps)
        if self._chords == 0 and self._updates.rule.diagonal:
            warn_of_cancelling(self._held, type(self._updates.optimizer).__name__)
        probes = {} if self._probes is None else self._probe_blocks()
        old = self._sketches
        self._sketches = fit_basis(
            next(held for held in self._held if held),
            probes,
            self._updates.preconditioner(self.steps),
            self._updates.direction(),
            self._shapes,
            self.settings.sketch,
            self._generator,
        )
        if self._rows:
            buffered = self._visits.buffered
            momentum = self._updates.earlier_momentum(buffered[-1], self._displacement.decay_buffers)
            self._rows = carry_over(self._rows, buffered[: len(self._rows)], momentum, old, self._sketches)
        self._arena.reset()
        for rows, held in zip(self._step, self._held, strict=True):
            for name, uses in held.items():
                for use in uses:
                    rows.add(name, self._sketches[name], use)
            rows.close()
        self._fitted = True

    def _probe_blocks(self) -> dict[str, list[PerExampleGradient]]:
        return probe_gradients(self.network, self._probes, random_cotangent(self._generator))

    def close_chord(self) -> None:
        """End the open chord at the weights as they are now and hand it on; nothing happens if it is empty."""
        self.skip_batch()
        chord = self.snapshot()
        if chord is None:
            return
        chord = replace(self._compressed(chord), self_inner=self._self_inner(chord))
        for name, value in chord.delta.items():
            if not bool(value.isfinite().all()):
                raise NonFiniteError(f"weights of {name!r} are not finite at optimiser step {self.steps}")
        kept = self._visits.close()
        self._rows = [self._rows[i] for i in kept]
        previous = self._displacement
        self._chords += 1
        self._open(previous)
        self._on_chord(chord)

    def snapshot(self) -> Chord | None:
        """The open chord as if it ended here, with first-stage rows; None where nothing was learned since its node."""
        if self.steps == self._first_step or not self._rows:
            return None
        end = self.network.weights()
        parts = self._displacement.parts(end)
        start_buffers, end_buffers = self._start_buffers, self.network.buffers()
        visits = weighted(self._rows, self._visits.weights, self._sketches)
        ids = torch.cat([part.ids for step in self._rows for part in step])
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = visits.new_zeros(len(unique), visits.shape[1]).index_add_(0, inverse.to(visits.device), visits)
        return Chord(
            self._chords, self._first_step, self.steps, self._displacement.learning_time, unique, rows,
            rows.new_zeros(len(unique)), dict(self._sketches), None, dict(self._displacement.start), parts.delta,
            start_buffers, end_buffers, parts.preconditioner, parts.decay, parts.residual,
        )  # fmt: skip

    def _self_inner(self, chord: Chord) -> Tensor:
        """Every example's effect on its own loss over the chord, in the order of its ids."""
        visits = self_influence(self._rows, self._visits.weights, self._sketches, chord.preconditioner)
        ids = torch.cat([part.ids for step in self._rows for part in step])
        out = visits.new_zeros(len(chord.example_ids))
        return out.index_add_(0, torch.searchsorted(chord.example_ids, ids).to(out.device), visits)

    def _compressed(self, chord: Chord) -> Chord:
        """Bring the rows down to ``sketch_dim`` by the second stage."""
        if chord.rows.shape[1] <= self.settings.sketch_dim:
            return chord
        query = self._query_features(chord) if self._probes is not None else None
        total = chord.rows.sum(0)
        maps = fit_second_stage(
            chord.rows, query, total, self.settings.sketch_dim, self.settings.sketch, self._generator
        )
        if maps is None:
            return chord
        return replace(chord, rows=chord.rows @ maps[0].T, second_stage=maps[1])

    def _query_features(self, chord: Chord) -> Tensor:
        """First-stage query features of the probes along the chord, ``[M, F]``."""
        parts = []
        for t in self.settings.rule.points:
            blocks = probe_gradients(
                self.network, self._probes, random_cotangent(self._generator), rows=256,
                weights=chord.weights(t), buffers=chord.end_buffers,
            )  # fmt: skip
            n = next(iter(blocks.values()))[0].n
            buffer = QueryBuffer(chord.sketches, chord.preconditioner, n)
            for name, uses in blocks.items():
                for use in uses:
                    buffer(name, use)
            parts.append(buffer.features())
        return torch.cat(parts)
