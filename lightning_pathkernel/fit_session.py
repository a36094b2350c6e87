"""One recorded fit: recorder, probes, directories and clocks. Asks a Trainer, but knows no Lightning."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lightning_pathkernel.artifact_writer import remove_staged
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.configuration import check_configuration, digest_of
from lightning_pathkernel.exporter import KernelMachineExporter
from lightning_pathkernel.fingerprint import constants
from lightning_pathkernel.fit_clock import Clock
from lightning_pathkernel.fit_description import check_forward, check_not_compiled, check_size, description_of
from lightning_pathkernel.fit_resume import committed_by, recording_of
from lightning_pathkernel.fit_store import FitStore
from lightning_pathkernel.identity import BatchRows, TrainingIds
from lightning_pathkernel.network import ForwardFn, Network
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.probe_batch import collect_probes
from lightning_pathkernel.probes import ProbeTracker
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording_files import read_description
from lightning_pathkernel.recording_store import agreed
from lightning_pathkernel.sketch import SketchSettings
from lightning_pathkernel.trainer_checks import (
    FitError,
    check_begin,
    gradient_changes,
    loss_scaler,
    output_directory,
    rounding_of,
    skipped_validation,
    thaws_later,
    training_nodes,
    unused,
    within_batch,
)

__all__ = ["FitSession", "SessionOptions"]


@dataclass(frozen=True)
class SessionOptions:
    """The callback's arguments that a session reads; its docstring explains them."""

    dirpath: str | None
    sketch_dim: int
    nodes: int
    probes: int
    forward_fn: ForwardFn | None
    seed: int
    export: bool
    sketch: str
    unattributed: str
    positions: int
    tolerance: float | None
    on_store_error: str


class FitSession:
    """Records one fit.

    Args:
        trainer: The Trainer, at the start of training.
        module: The LightningModule.
        options: What to record.
        ids: What knows the examples of every batch.
        used_before: Whether an earlier fit wrote to ``options.dirpath``.
        resumed: The callback's part of the checkpoint that the fit goes on from; None for a new one.

    Raises:
        FitError: If the fit cannot be recorded, or its recording not be gone on with.
        CaptureError: If the network cannot be.
        IdentityError: If the examples of a batch cannot be told.
        UnsupportedOptimizerError: If an optimiser has no rule.
        ArtifactError: If the recording that is gone on with is damaged.
        StoreError: If it cannot be written.
    """

    def __init__(
        self, trainer: Any, module: Any, options: SessionOptions, ids: TrainingIds, used_before: bool,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_begin(trainer, resumed is not None)
        ids.begin(trainer)
        self._trainer = trainer
        self._ids = ids
        self._options = options
        self._scaler = loss_scaler(trainer)
        self._manual = not module.automatic_optimization
        self._timed = Clock(trainer.strategy.root_device.type)
        self._ranks = Ranks(trainer.world_size, trainer.global_rank, trainer.strategy.root_device)
        self.store = FitStore(self._ranks, options.on_store_error)
        self.optimizers: Sequence[torch.optim.Optimizer] = trainer.optimizers
        self._handles: list[RemovableHandle] = []
        self.history: list[dict[str, float]] = []
        self._step_seconds = self._batch_started = 0.0
        self._moment = 0
        self._build(trainer, module)
        # nothing is written, nor hooked in, before all that may refuse the fit has let it pass
        if resumed is None:
            directory = output_directory(trainer, options.dirpath, used_before)
            self.recording_dir, self.machine_dir = directory / "recording", directory / "machine"
            self.store.begin(self.recording_dir, self._description, constants(module))
        else:
            self._resume(trainer, resumed)
        if self.store.stopped is None:
            self._attach()

    def _build(self, trainer: Any, module: Any) -> None:
        """Recorder and probes of this fit, at its first weights."""
        options = self._options
        nodes = training_nodes(trainer, options.nodes, len(self.optimizers) if self._manual else 1, options.tolerance)
        check_not_compiled(module)
        network = Network(module, plan_capture(module, everything=thaws_later(trainer)), options.forward_fn)
        probes = collect_probes(trainer, options.probes)
        if probes is not None:
            check_forward(network, probes)
        settings = RecorderSettings(
            nodes, options.sketch_dim, SketchSettings(options.sketch), options.seed,
            changes=gradient_changes(trainer, module), manual=self._manual, sum_rtol=rounding_of(trainer),
            allow_unattributed=options.unattributed == "allow", positions=options.positions,
        )  # fmt: skip
        self.recorder = PathRecorder(network, self.optimizers, settings, probes, self._on_chord, self._ranks)
        self._tracker = None if probes is None else ProbeTracker(network, probes, gauss_legendre(4), options.seed)
        self._description = description_of(trainer, module, options, settings, self._ids.facts(), digest_of(probes))

    def _resume(self, trainer: Any, resumed: Mapping[str, Any]) -> None:
        committed = committed_by(resumed, self._ranks.world, self._ranks.rank)
        self.recording_dir = recording_of(trainer, resumed, self._options.dirpath)
        description = read_description(self.recording_dir)[0]
        check_configuration(description["configuration"], self._description["configuration"])
        state, names = self.store.resume(self.recording_dir, committed, trainer.strategy.root_device)
        try:
            if state["recorder"]["broken"]:
                raise FitError(
                    f"PathKernelCallback cannot resume from this checkpoint: {state['recorder']['broken']}. Resume "
                    "from an earlier one."
                )
            if state["recorder"]["steps"] != resumed["steps"]:
                raise FitError("the checkpoint's optimiser steps are not those of the recording's state.")
            self._restore(state, names)
            if self.recorder.steps and skipped_validation(trainer):
                self.metrics()
        except BaseException:
            self.store.close()
            raise
        self.machine_dir = Path(trainer.strategy.broadcast(str(unused(self.recording_dir.parent / "machine"))))

    def _restore(self, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
        try:
            self.recorder.restore(state["recorder"])
            if self._tracker is not None:
                self._tracker.restore(state["tracker"])
            self._ids.restore(state["ids"], names)
            history = state["history"]
            self.history = [{n: math.nan if v is None else v for n, v in entry.items()} for entry in history]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FitError(
                f"PathKernelCallback cannot resume: the recorder's state is not of this module and its optimisers "
                f"({error!r}). Resume with those of the first fit."
            ) from error

    def _attach(self) -> None:
        self.recorder.capture.attach()
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_raw_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @property
    def recording(self) -> bool:
        """Whether something is recorded."""
        return self.store.writing

    # every batch and step

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """A batch with these examples is coming."""
        self._batch_started = time.perf_counter()
        check_size([part.ids for part in rows], self._options.positions)
        with self._timed, self.store.guarded():
            self.store.check()
            self._moment += 1
            self.recorder.begin_batch(rows[0].ids if len(rows) == 1 else rows)

    def before_backward(self) -> None:
        """A backward pass is coming."""
        with self._timed, self.store.guarded():
            self.recorder.before_backward()

    def after_backward(self) -> None:
        """A backward pass is over."""
        with self._timed:
            scale = float(self._scaler.get_scale()) if self._manual and self._scaler is not None else 1.0
            self.recorder.after_backward(scale)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete, unscaled, and not clipped but under manual optimisation."""
        if not self.recording:
            return
        with self._timed:
            scale = 1.0
            if self._scaler is not None and not self._manual and not _unscales_by_itself(optimizer):
                scale = float(self._scaler.get_scale())
            self.recorder.before_step(optimizer, scale)

    def _before_raw_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> None:
        """A step past Lightning has no hook of Lightning's; one with a closure has no gradients yet."""
        if not args[1:] and kwargs.get("closure") is None and not self.recorder.prepared(optimizer):
            self.before_step(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):  # a fused optimiser, told by the loss scaler to do nothing
            return
        if self.recording:
            with self._timed, self.store.guarded():
                self._moment += 1
                self.recorder.after_step(optimizer)

    def end_batch(self) -> None:
        """The batch is over."""
        self._moment += 1
        self.recorder.end_batch()
        self._step_seconds += time.perf_counter() - self._batch_started
        if not self.recording:
            self.release()

    def _on_chord(self, chord: Chord) -> None:
        self.store.chord(replace(chord, names=self._ids.new_names()))
        if self._tracker is not None:
            self._tracker.advance(chord)

    # metrics

    def metrics(self) -> dict[str, float]:
        """How faithful the kernel machine is at this moment of training, by name; kept for the artifact.

        What depends on the clock is not kept: a fit that was interrupted leaves what one leaves that was not.

        Returns:
            Name -> value.
        """
        self._moment += 1
        values = {} if self._tracker is None else self._tracker.metrics(self.recorder.snapshot())
        if self.history and self.history[-1]["step"] == self.recorder.steps:
            self.history.pop()
        self.history.append({"step": float(self.recorder.steps), **values})
        own = self._timed.seconds + self.recorder.capture.seconds
        return {"overhead": own / self._step_seconds if self._step_seconds else 0.0, **values}

    def _finite_history(self) -> list[dict[str, float | None]]:
        """What is not finite (the network's outputs overflowed) is null, which strict JSON has."""
        return [{n: v if math.isfinite(v) else None for n, v in entry.items()} for entry in self.history]

    # checkpoints and the end

    def _state(self, again: bool) -> dict[str, Any]:
        tracker = None if self._tracker is None else self._tracker.state()
        return {
            "recorder": self.recorder.state(again), "tracker": tracker, "history": self._finite_history(),
            "ids": self._ids.state(),
        }  # fmt: skip

    def save(self) -> dict[str, Any]:
        """Make all durable that a fit which goes on from here needs; every process calls it.

        Returns:
            What the checkpoint has to say of it.
        """
        found: dict[str, Any] | None = None
        with self.store.guarded():
            again, names = within_batch(self._trainer), self._ids.new_names(peek=True)
            found = self.store.save(self._moment, lambda: self._state(again), self.recorder.steps, names)
        return self.store.silence() if found is None else found

    def finish(self) -> dict[str, Any]:
        """Close the last chord and export.

        Returns:
            What a checkpoint has to say that is written from now on.
        """
        state = self.save()
        if not self.recording:
            return state
        with self.store.guarded():
            self.recorder.finish()
            self.store.end(self.recorder.steps, {"history": self._finite_history()}, together=True)
            if not self.recorder.steps:
                warnings.warn("PathKernelCallback: no optimiser step was made, so there is no machine.", stacklevel=2)
            elif self._options.export and self.recording:
                agreed(self._ranks, self._export, self.recording_dir)
        return state

    def _export(self) -> None:
        if self._ranks.rank == 0:
            remove_staged(self.recording_dir.parent)
            KernelMachineExporter(self.recording_dir).export(self.machine_dir)

    def interrupt(self) -> tuple[dict[str, Any], str | None]:
        """The fit has broken off: save what there is, and close the open chord; no other process is asked.

        Returns:
            What a checkpoint has to say that is written from now on, and what could not be done.
        """
        state: dict[str, Any] = {}
        if not self.recording or self.recorder.within or not self._finite():
            return state, None
        try:
            again = within_batch(self._trainer)
            saved = self._state(again)
            state = self.store.save_alone(saved, self.recorder.steps, self._ids.new_names(peek=True))
            if self._ranks.world == 1:
                self.recorder.abandon_batch()
                self.recorder.finish()
                self.store.end(self.recorder.steps, {"history": self._finite_history()}, together=False)
        except Exception as error:
            return state, f"{type(error).__name__}: {error}"
        return state, None

    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.recorder.network.parameters.values())

    def release(self) -> None:
        """Leave no hook behind, and let another writer in."""
        self.recorder.capture.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.store.close()


def _unscales_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
