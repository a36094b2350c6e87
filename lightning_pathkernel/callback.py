"""`PathKernelCallback`: Lightning's hooks, translated for the recorder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_pathkernel.capture import CaptureError, plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import write_chord
from lightning_pathkernel.exporter import KernelMachineExporter, open_recording, record_metrics
from lightning_pathkernel.identity import IdentityError, TrainingIds
from lightning_pathkernel.network import ForwardFn, Network
from lightning_pathkernel.optim import UnsupportedOptimizerError, optimizer_rule
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.probe_batch import collect_probes
from lightning_pathkernel.probes import ProbeTracker
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SKETCHES, SketchSettings
from lightning_pathkernel.trainer_checks import (
    FitError,
    check_trainer,
    clips_by_itself,
    output_directory,
    training_nodes,
)

__all__ = ["PathKernelCallback"]

if not TYPE_CHECKING and find_spec("lightning") is not None:
    # both names of Lightning may be installed, and LightningCLI asks for a Callback of its own
    import lightning.pytorch

    class _Callback(pl.Callback, lightning.pytorch.Callback):
        pass

else:
    _Callback = pl.Callback


class PathKernelCallback(_Callback):
    """Record the path kernel of a fit, log how faithful the kernel machine is, and export it.

    Args:
        dirpath: Where recording and machine are written; None resolves as `ModelCheckpoint`'s does: the first logger's
            directory, else the trainer's ``default_root_dir``, with ``pathkernel`` added.
        sketch_dim: Numbers stored per training example and chord, all layers together, whatever the kind of sketch.
        nodes: Chords of the coarse-grained path; more of them share the total more finely among examples.
        probes: Validation examples followed during training for the logged metrics.
        example_ids: None for dataset indices, found without your help; or a function ``batch -> ids``: a LongTensor
            ``[n]``, an integer array, or a list of n integers or n strings, one for each row; strings are kept in the
            machine (``example_names``). With several loaders it gets the whole combined batch and returns a list with
            the ids of each loader's part, in the loaders' order, without those that gave None.
        forward_fn: ``(pl_module, batch) -> outputs [n, K]``; default: the module called on the batch, or on its first
            element when the batch is a tuple or a list.
        seed: Seed of the private random generator of the sketches; the global one is never touched.
        export: Write the machine when fitting ends.
        prog_bar: Show the fidelity in the progress bar.
        sketch: Kind of sketch: ``balanced``, ``deflated``, ``random`` or ``identity``.

    Raises:
        ValueError: If a number is not positive, or there is no such sketch.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        sketch_dim: int = 256,
        nodes: int = 32,
        probes: int = 256,
        example_ids: Callable[[Any], Any] | None = None,
        forward_fn: ForwardFn | None = None,
        seed: int = 0,
        export: bool = True,
        prog_bar: bool = False,
        sketch: str = "balanced",
    ) -> None:
        for name, value in (("sketch_dim", sketch_dim), ("nodes", nodes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if probes < 0:
            raise ValueError(f"probes must not be negative, found {probes}")
        if sketch not in SKETCHES:
            raise ValueError(f"sketch must be one of {', '.join(sorted(SKETCHES))}, found {sketch!r}")
        self.dirpath = dirpath
        self.sketch_dim = sketch_dim
        self.nodes = nodes
        self.probes = probes
        self.example_ids = example_ids
        self.forward_fn = forward_fn
        self.seed = seed
        self.export = export
        self.prog_bar = prog_bar
        self.sketch = sketch
        self.machine_dir: Path | None = None
        self.recording_dir: Path | None = None
        self._forget()

    def _forget(self) -> None:
        self._recorder: PathRecorder | None = None
        self._tracker: ProbeTracker | None = None
        self._handles: list[RemovableHandle] = []
        self._training_ids: TrainingIds | None = None
        self._history: list[dict[str, float]] = []
        self._active = False
        self._own_seconds = 0.0
        self._step_seconds = 0.0
        self._batch_started = 0.0

    # before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked, and hook in where the training loader is processed."""
        if stage != "fit":
            return
        self._release(trainer)
        self._active = not getattr(trainer, "fast_dev_run", False)
        if not self._active:
            rank_zero_info("PathKernelCallback: fast_dev_run, nothing is recorded.")
            return
        try:
            check_trainer(trainer)
        except FitError as error:
            raise MisconfigurationException(str(error)) from error
        self._training_ids = TrainingIds(self.example_ids)
        self._training_ids.watch(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is there now: optimiser, loaders, weights. Begin the recording."""
        if not self._active:
            return
        try:
            self._begin(trainer, pl_module)
        except (CaptureError, FitError, IdentityError, UnsupportedOptimizerError) as error:
            self._release(trainer)
            raise MisconfigurationException(str(error)) from error

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"PathKernelCallback records one optimiser, found {len(trainer.optimizers)}: use a single optimiser "
                "with parameter groups."
            )
        if trainer.global_step:
            raise MisconfigurationException(
                f"PathKernelCallback cannot begin in mid-path: {trainer.global_step} optimiser steps were made before "
                "this fit, by a checkpoint or an earlier fit. Begin with a new Trainer and without ckpt_path."
            )
        optimizer = trainer.optimizers[0]
        optimizer_rule(optimizer)
        self._ids_of_fit().begin(trainer)
        schedule = training_nodes(trainer, self.nodes)
        network = Network(pl_module, plan_capture(pl_module), self.forward_fn)
        probes = collect_probes(trainer, self.probes)
        if probes is not None:
            self._check_forward(network, probes)
        directory = output_directory(trainer, self.dirpath, used_before=self.recording_dir is not None)
        self.recording_dir, self.machine_dir = directory / "recording", directory / "machine"
        open_recording(self.recording_dir, pl_module, self._facts(pl_module, optimizer, schedule))
        if probes is not None:
            self._tracker = ProbeTracker(network, probes, gauss_legendre(4), self.seed)
        clipping = bool(trainer.gradient_clip_val) or clips_by_itself(pl_module)
        settings = RecorderSettings(schedule, self.sketch_dim, SketchSettings(self.sketch), self.seed, clipping)
        self._recorder = PathRecorder(network, optimizer, settings, probes, self._on_chord)
        self._recorder.capture.attach()
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _facts(
        self, module: pl.LightningModule, optimizer: torch.optim.Optimizer, schedule: list[int]
    ) -> dict[str, Any]:
        return {
            "module_class": type(module).__name__,
            "optimizer": {"name": type(optimizer).__name__},
            "ids": self._ids_of_fit().facts(),
            "settings": {
                "sketch_dim": self.sketch_dim,
                "nodes": schedule,
                "seed": self.seed,
                "sketch": self.sketch,
            },
        }

    def _check_forward(self, network: Network, probes: object) -> None:
        try:
            network.outputs(probes)
        except Exception as error:
            raise MisconfigurationException(
                f"the network's outputs could not be had on a validation batch: {error}. Pass forward_fn=, a function "
                "(pl_module, batch) -> outputs [n, K]."
            ) from error

    # every batch and step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the recorder which examples are coming."""
        if self._recorder is None:
            return
        self._batch_started = start = time.perf_counter()
        self._recorder.begin_batch(self._ids(trainer, batch))
        self._own_seconds += time.perf_counter() - start

    def _ids(self, trainer: pl.Trainer, batch: Any) -> Tensor:
        try:
            rows = self._ids_of_fit().rows(trainer, batch)
        except IdentityError as error:
            raise MisconfigurationException(str(error)) from error
        if len(rows) != 1:
            raise MisconfigurationException(
                "PathKernelCallback records one loader, but training draws from several loaders: join their datasets."
            )
        return rows[0].ids

    def _ids_of_fit(self) -> TrainingIds:
        if self._training_ids is None:
            raise RuntimeError("setup('fit') was not called")
        return self._training_ids

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The batch's gradients are all in."""
        if self._recorder is not None:
            self._recorder.end_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete, but not clipped."""
        if self._recorder is not None:
            start = time.perf_counter()
            self._recorder.before_step()
            self._own_seconds += time.perf_counter() - start

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._recorder is not None:
            start = time.perf_counter()
            self._recorder.after_step()
            self._own_seconds += time.perf_counter() - start

    def _on_chord(self, chord: Chord) -> None:
        if self.recording_dir is None:
            raise RuntimeError("a chord closed before the recording was opened")
        chord = replace(chord, names=self._ids_of_fit().new_names())
        write_chord(self.recording_dir, chord)
        if self._tracker is not None:
            self._tracker.advance(chord)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is over, with a backward pass or without; keep the share of the time spent recording."""
        if self._recorder is not None:
            self._recorder.skip_batch()
            self._step_seconds += time.perf_counter() - self._batch_started

    # metrics

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how faithful the kernel machine is at this moment of training."""
        if self._recorder is None or trainer.sanity_checking or self._recorder.steps == 0:
            return
        values = {"overhead": self._overhead()}
        if self._tracker is not None:
            values.update(self._tracker.metrics(self._recorder.snapshot()))
        named = {f"pathkernel/{name}": value for name, value in values.items()}
        for name, value in named.items():
            pl_module.log(name, value, prog_bar=self.prog_bar and name == "pathkernel/fidelity")
        self._history.append({"step": float(self._recorder.steps), **values})

    def _overhead(self) -> float:
        """Share of the training steps' time spent recording."""
        if self._recorder is None or self._step_seconds == 0:
            return 0.0
        return (self._own_seconds + self._recorder.capture.seconds) / self._step_seconds

    # the end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last chord and export."""
        if self._recorder is None or self.recording_dir is None or self.machine_dir is None:
            return
        self._recorder.close_chord()
        record_metrics(self.recording_dir, self._history)
        if self.export:
            KernelMachineExporter(self.recording_dir).export(self.machine_dir)
        self._release(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; chords closed so far stay exportable."""
        self._release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: pl.Trainer) -> None:
        if self._recorder is not None:
            self._recorder.capture.detach()
        for handle in self._handles:
            handle.remove()
        if self._training_ids is not None:
            self._training_ids.release(trainer)
        self._forget()
