"""One recorded fit: recorder, probes, directories and clocks. Asks a Trainer, but knows no Lightning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.capture.plan import compiled_modules
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import write_chord
from lightning_pathkernel.exporter import KernelMachineExporter, open_recording, record_metrics
from lightning_pathkernel.identity import BatchRows, TrainingIds
from lightning_pathkernel.network import ForwardFn, Network
from lightning_pathkernel.path import NodeBudget, gauss_legendre
from lightning_pathkernel.probe_batch import collect_probes
from lightning_pathkernel.probes import ProbeTracker
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.sketch import SketchSettings
from lightning_pathkernel.trainer_checks import (
    FitError,
    check_begin,
    gradient_changes,
    loss_scaler,
    output_directory,
    rounding_of,
    thaws_later,
    training_nodes,
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


class FitSession:
    """Records one fit.

    Args:
        trainer: The Trainer, at the start of training.
        module: The LightningModule.
        options: What to record.
        ids: What knows the examples of every batch.
        used_before: Whether an earlier fit wrote to ``options.dirpath``.

    Raises:
        FitError: If the fit cannot be recorded.
        CaptureError: If the network cannot be.
        IdentityError: If the examples of a batch cannot be told.
        UnsupportedOptimizerError: If an optimiser has no rule.
    """

    def __init__(self, trainer: Any, module: Any, options: SessionOptions, ids: TrainingIds, used_before: bool) -> None:
        check_begin(trainer)
        ids.begin(trainer)
        self._ids = ids
        self._options = options
        self._scaler = loss_scaler(trainer)
        self._manual = not module.automatic_optimization
        self._timed = _Clock(trainer.strategy.root_device.type)
        allow = options.unattributed == "allow"
        self.optimizers: Sequence[torch.optim.Optimizer] = trainer.optimizers
        nodes = training_nodes(trainer, options.nodes, len(self.optimizers) if self._manual else 1, options.tolerance)
        _check_not_compiled(module)
        network = Network(module, plan_capture(module, everything=thaws_later(trainer)), options.forward_fn)
        probes = collect_probes(trainer, options.probes)
        if probes is not None:
            _check_forward(network, probes)
        ranks = Ranks(trainer.world_size, trainer.global_rank, trainer.strategy.root_device)
        self._ranks = ranks
        settings = RecorderSettings(
            nodes, options.sketch_dim, SketchSettings(options.sketch), options.seed,
            changes=gradient_changes(trainer, module), manual=self._manual, sum_rtol=rounding_of(trainer),
            allow_unattributed=allow, positions=options.positions,
        )  # fmt: skip
        self.recorder = PathRecorder(network, self.optimizers, settings, probes, self._on_chord, ranks)
        self._tracker = None if probes is None else ProbeTracker(network, probes, gauss_legendre(4), options.seed)
        # nothing is written, nor hooked in, before all that may refuse the fit has let it pass
        directory = output_directory(trainer, options.dirpath, used_before)
        self.recording_dir, self.machine_dir = directory / "recording", directory / "machine"
        self._open(module, nodes)
        self.recorder.capture.attach()
        self._handles: list[RemovableHandle] = []
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_raw_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self.history: list[dict[str, float]] = []
        self._step_seconds = self._batch_started = 0.0

    def _open(self, module: nn.Module, nodes: list[int] | NodeBudget) -> None:
        options, names = self._options, [type(o).__name__ for o in self.optimizers]
        placed = asdict(nodes) if isinstance(nodes, NodeBudget) else nodes
        settings = {
            "sketch_dim": options.sketch_dim, "nodes": placed, "seed": options.seed, "sketch": options.sketch,
            "unattributed": options.unattributed, "positions": options.positions,
        }  # fmt: skip
        if self._ranks.rank == 0:
            facts = {
                "module_class": type(module).__name__, "optimizer": {"name": ", ".join(names)}, "settings": settings,
                "ranks": self._ranks.world, "ids": self._ids.facts(),
            }  # fmt: skip
            open_recording(self.recording_dir, module, facts)

    # every batch and step

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """A batch with these examples is coming."""
        self._batch_started = time.perf_counter()
        _check_size([part.ids for part in rows], self._options.positions)
        with self._timed:
            self.recorder.begin_batch(rows[0].ids if len(rows) == 1 else rows)

    def before_backward(self) -> None:
        """A backward pass is coming."""
        with self._timed:
            self.recorder.before_backward()

    def after_backward(self) -> None:
        """A backward pass is over."""
        with self._timed:
            scale = float(self._scaler.get_scale()) if self._manual and self._scaler is not None else 1.0
            self.recorder.after_backward(scale)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete, unscaled, and not clipped but under manual optimisation."""
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
        with self._timed:
            self.recorder.after_step(optimizer)

    def end_batch(self) -> None:
        """The batch is over."""
        self.recorder.end_batch()
        self._step_seconds += time.perf_counter() - self._batch_started

    def _on_chord(self, chord: Chord) -> None:
        write_chord(self.recording_dir, replace(chord, names=self._ids.new_names()), self._ranks.rank)
        if self._tracker is not None:
            self._tracker.advance(chord)

    # metrics and the end

    def metrics(self) -> dict[str, float]:
        """How faithful the kernel machine is at this moment of training, by name; kept for the artifact."""
        own = self._timed.seconds + self.recorder.capture.seconds
        values = {"overhead": own / self._step_seconds if self._step_seconds else 0.0}
        if self._tracker is not None:
            values.update(self._tracker.metrics(self.recorder.snapshot()))
        self.history.append({"step": float(self.recorder.steps), **values})
        return values

    def finish(self, barrier: Any) -> None:
        """Close the last chord and export.

        Args:
            barrier: Waits for all processes.
        """
        self.recorder.finish()
        barrier()
        if not self.recorder.steps:
            warnings.warn("PathKernelCallback: no optimiser step was made, so there is no machine.", stacklevel=2)
        elif self._ranks.rank == 0:
            record_metrics(self.recording_dir, self.history)
            if self._options.export:
                KernelMachineExporter(self.recording_dir).export(self.machine_dir)
        barrier()

    def release(self) -> None:
        """Leave no hook behind."""
        self.recorder.capture.detach()
        for handle in self._handles:
            handle.remove()


class _Clock:
    """Our own work: on the clock, and in full precision, for a step by hand may be within the step's autocast.

    Args:
        device: Type of device that the fit runs on.

    Attributes:
        seconds: Time spent so far, wall clock.
    """

    def __init__(self, device: str) -> None:
        self.seconds = 0.0
        self._device = device
        self._started = 0.0
        self._full: torch.autocast | None = None

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if torch.is_autocast_enabled(self._device):  # making the context costs more than most of what we do
            self._full = torch.autocast(self._device, enabled=False)
            self._full.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._full is not None:
            self._full.__exit__(*error)
            self._full = None
        self.seconds += time.perf_counter() - self._started


def _unscales_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _check_size(ids: Sequence[Tensor], positions: int) -> None:
    if positions and any(len(part) and int(part.max()) >= 2**53 // positions for part in ids):
        raise FitError(
            f"positions={positions} gives position j of example i the id i * {positions} + j, and an example's id is "
            "too large for that: string ids cannot be used with positions, integer ones must be small."
        )


def _check_not_compiled(module: nn.Module) -> None:
    names = compiled_modules(module)
    if names:
        raise FitError(
            f"PathKernelCallback does not support compiled modules, whose graphs do not call hooks: found "
            f"{', '.join(map(repr, names))}. Fit the module itself, without torch.compile."
        )


def _check_forward(network: Network, probes: object) -> None:
    try:
        network.outputs(probes)
    except Exception as error:
        raise FitError(
            f"the network's outputs could not be had on a validation batch: {error}. Pass forward_fn=, a function "
            "(pl_module, batch) -> outputs [n, K]."
        ) from error
