"""`PathKernelCallback`: Lightning's hooks, translated for the recorder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_pathkernel.capture import CaptureError
from lightning_pathkernel.fit_resume import committed_by
from lightning_pathkernel.fit_session import FitSession, SessionOptions
from lightning_pathkernel.fit_store import ON_STORE_ERROR
from lightning_pathkernel.identity import BatchRows, IdentityError, TrainingIds
from lightning_pathkernel.network import ForwardFn
from lightning_pathkernel.optim import UnsupportedOptimizerError
from lightning_pathkernel.reporting import log_fit_figures
from lightning_pathkernel.sketch import SKETCHES
from lightning_pathkernel.store import ArtifactError, HeldError
from lightning_pathkernel.trainer_checks import FitError, check_trainer
from lightning_pathkernel.uploads import upload_machine

__all__ = ["PathKernelCallback"]

_log = logging.getLogger(__name__)

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
        nodes: Chords of the coarse-grained path; more of them share the total more finely among examples. With a
            ``tolerance``, the most there may be.
        probes: Validation examples followed during training for the logged metrics: fidelity and agreement of all of
            them, the error budget of the first 32.
        example_ids: None for dataset indices, found without your help; or a function ``batch -> ids``: a LongTensor
            ``[n]``, an integer array, or a list of n integers or n strings, one for each row; strings are kept in the
            machine (``example_names``). With several loaders it gets the whole combined batch and returns a list with
            the ids of each loader's part, in the loaders' order, without those that gave None.
        forward_fn: ``(pl_module, batch) -> outputs [n, K]``; default: the module called on the batch, or on its first
            element when the batch is a tuple or a list.
        seed: Seed of the private random generator of the sketches; the global one is never touched.
        export: Write the machine when fitting ends.
        prog_bar: Show the fidelity in the progress bar.
        sketch: Kind of sketch: ``balanced``, ``deflated``, ``random`` or ``identity``. The middle two do not know
            what queries look like and keep less: ``random`` much less, as ``error_sketch`` shows (docs/sketches.md).
        unattributed: ``refuse`` what cannot be attributed to training examples (an optimiser without a rule, a layer
            whose gradient cannot be split), or ``allow`` it: then it goes to the ledger's ``unattributed`` term.
        positions: Record every position of a sequence (token) as a row of its own: the number of positions that all
            examples have. Position j of example i has the id ``i * positions + j``. 0 for whole examples.
        log_artifact: Upload the exported machine through the Trainer's loggers when fitting ends: as an artifact by
            `WandbLogger` and `MLFlowLogger`; `TensorBoardLogger`, which keeps no files, gets the machine's card as
            text. A logger that takes none, and an upload that fails, is a warning that names it.
        tolerance: Drift at which a chord ends; None for a schedule, dense in early training. The drift is a number
            without unit: the relative displacement of the weights since the node, ``|w - w_a| / |w_a|``, root mean
            square over the weight matrices, together with a tenth of the relative change of Adam's preconditioner.
            0.03 suits 24 nodes on a small network; the smaller, the more nodes are used. It pays where the path moves
            late, as under SGD; under Adam the schedule has shared out the total at least as well. By no step have more
            chords ended than the schedule would have ended, and no chord is longer than twice the schedule's last one:
            a tolerance that is always exceeded gives the schedule, and what is left of the budget always reaches to
            the end. Where the end of the fit is unknown (``max_time``), the tolerance rises as the budget goes instead.
        on_store_error: What becomes of the fit when the recording cannot be written (a full disk): ``raise`` stops it,
            ``stop_recording`` stops the recording only. What was written before stays exportable.
        log_figures: Hand figures of training (fidelity, error budget, kernel velocity and, where the machine is
            exported, its path) to TensorBoard and Weights & Biases when fitting ends; needs matplotlib.

    Raises:
        ValueError: If a number is not positive, or there is no such sketch.
        ModuleNotFoundError: If figures are to be logged and there is no matplotlib.

    Examples:
        >>> import tempfile
        >>> from pytorch_lightning import Trainer
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_pathkernel import PathKernelCallback
        >>> path_kernel = PathKernelCallback(dirpath=tempfile.mkdtemp(), nodes=2, probes=8)
        >>> no = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
        >>> Trainer(max_steps=4, callbacks=[path_kernel], **no).fit(BoringModel())
        >>> path_kernel.machine_dir.name
        'machine'
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
        unattributed: str = "refuse",
        positions: int = 0,
        tolerance: float | None = None,
        on_store_error: str = "raise",
        log_artifact: bool = False,
        log_figures: bool = False,
    ) -> None:
        for name, value in (("sketch_dim", sketch_dim), ("nodes", nodes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        for name, value in (("probes", probes), ("positions", positions)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance must be positive, or None for a schedule of nodes, found {tolerance}")
        if sketch not in SKETCHES:
            raise ValueError(f"sketch must be one of {', '.join(sorted(SKETCHES))}, found {sketch!r}")
        if unattributed not in ("refuse", "allow"):
            raise ValueError(f"unattributed must be 'refuse' or 'allow', found {unattributed!r}")
        if on_store_error not in ON_STORE_ERROR:
            raise ValueError(f"on_store_error must be one of {', '.join(ON_STORE_ERROR)}, found {on_store_error!r}")
        if log_figures and find_spec("matplotlib") is None:
            raise ModuleNotFoundError("log_figures needs matplotlib: pip install 'lightning-pathkernel[report]'")
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
        self.unattributed = unattributed
        self.positions = positions
        self.tolerance = tolerance
        self.on_store_error = on_store_error
        self.log_artifact = log_artifact
        self.log_figures = log_figures
        self.machine_dir: Path | None = None
        self.recording_dir: Path | None = None
        self._saved: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._read_state = False
        self._forget()

    def _forget(self) -> None:
        self._session: FitSession | None = None
        self._training_ids: TrainingIds | None = None
        self._active = False

    def __getstate__(self) -> dict[str, Any]:
        """A pickle or a copy of the callback has its arguments and directories, not the fit in progress."""
        fit = dict.fromkeys(("_session", "_training_ids", "_resumed"))
        return {**self.__dict__, **fit, "_active": False, "_saved": {}}

    # before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked, and hook in where the training loader is processed."""
        if stage != "fit":
            return
        self._release(trainer)
        self._saved, self._resumed, self._read_state = {}, None, False
        self._active = not getattr(trainer, "fast_dev_run", False)
        if not self._active:
            rank_zero_info("PathKernelCallback: fast_dev_run, nothing is recorded.")
            return
        with _translated():
            check_trainer(trainer)
        self._training_ids = TrainingIds(self.example_ids)
        self._training_ids.watch(trainer)

    # checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:  # fmt: skip
        """Say what the checkpoint says of the recording, which is flushed for it; every process takes part.

        Not in ``state_dict``: the Trainer would refuse two callbacks that have one, before we could say why.
        """
        with _translated():
            state = dict(self._saved) if self._session is None else self._session.save()
        if state:
            checkpoint["callbacks"][self.state_key] = state

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:  # fmt: skip
        """Of a checkpoint that has states of callbacks at all."""
        self._read_state = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint says until training begins."""
        self._resumed = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a checkpoint that nothing can go on from before anything else of it is restored.

        Raises:
            MisconfigurationException: If the fit is to go on from one.
        """
        if not self._active or not trainer.ckpt_path:
            return
        if self._resumed is not None:
            with _translated():
                committed_by(self._resumed, trainer.world_size, trainer.global_rank)
            return
        self._release(trainer)
        what = "has no state of PathKernelCallback: it was written by a fit that was not recorded, or after its end"
        if not self._read_state:
            what = "has weights only (save_weights_only=True), and nothing that a fit could go on from"
        raise MisconfigurationException(
            f"PathKernelCallback cannot resume: the checkpoint {str(trainer.ckpt_path)!r} {what}. Resume from a full "
            "checkpoint of a recorded fit, or begin a new fit without ckpt_path."
        )

    # training begins

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is there now: optimiser, loaders, weights. Begin the recording."""
        if not self._active or self._training_ids is None:
            return
        options = SessionOptions(
            self.dirpath, self.sketch_dim, self.nodes, self.probes, self.forward_fn, self.seed, self.export,
            self.sketch, self.unattributed, self.positions, self.tolerance, self.on_store_error,
        )  # fmt: skip
        try:
            with _translated():
                self._session = FitSession(
                    trainer, pl_module, options, self._training_ids, self.recording_dir is not None, self._resumed
                )
        except (MisconfigurationException, OSError):
            self._release(trainer)
            raise
        self.recording_dir, self.machine_dir = self._session.recording_dir, self._session.machine_dir

    # every batch and step

    @property
    def _recording(self) -> FitSession | None:
        """The fit in progress while it is recorded; a store error may have stopped that."""
        session = self._session
        return session if session is not None and session.recording else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the recorder which examples are coming."""
        if (session := self._recording) is not None:
            with _translated():
                session.begin_batch(self._rows(trainer, batch))

    def _rows(self, trainer: pl.Trainer, batch: Any) -> list[BatchRows]:
        """The examples of a batch, loader by loader."""
        return [] if self._training_ids is None else self._training_ids.rows(trainer, batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Gradients are coming."""
        if (session := self._recording) is not None:
            session.before_backward()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients of a backward pass are all in."""
        if (session := self._recording) is not None:
            session.after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete, but not clipped."""
        if (session := self._recording) is not None:
            session.before_step(getattr(optimizer, "optimizer", optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is over, with a backward pass or without."""
        if self._session is not None:
            self._session.end_batch()

    # metrics

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how faithful the kernel machine is at this moment of training."""
        if self._recording is None or trainer.sanity_checking or self._recording.recorder.steps == 0:
            return
        for name, value in self._recording.metrics().items():
            shown = self.prog_bar and name == "fidelity"
            pl_module.log(f"pathkernel/{name}", value, prog_bar=shown, sync_dist=trainer.world_size > 1)

    # the end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last chord and export."""
        if self._session is not None:
            saved = self._session.finish()
            if self.log_figures and trainer.is_global_zero:
                log_fit_figures(trainer.loggers, self._session.history, self.machine_dir, pl_module, self.forward_fn)
            self._release(trainer)
            self._saved = saved
            if self.log_artifact and trainer.is_global_zero:
                for told in upload_machine(self.machine_dir, trainer.loggers, trainer.global_step):
                    rank_zero_info(f"PathKernelCallback: machine uploaded by {told}.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind, and a recording that can be exported up to here."""
        if self._session is not None:
            self._saved, failed = self._session.interrupt()
            if failed is not None:
                _log.warning("PathKernelCallback could not write the end of the recording: %s", failed)
        self._release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: pl.Trainer) -> None:
        if self._session is not None:
            self._session.release()
        if self._training_ids is not None:
            self._training_ids.release(trainer)
        self._forget()


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what the package says of a fit as Lightning's own error."""
    try:
        yield
    except (ArtifactError, CaptureError, FitError, HeldError, IdentityError, UnsupportedOptimizerError) as error:
        raise MisconfigurationException(str(error)) from error
