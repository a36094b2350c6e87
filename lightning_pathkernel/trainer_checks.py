"""What a Trainer says about the fit to come: whether it can be recorded, its nodes, and where the recording goes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning_pathkernel.path import NodeBudget, node_schedule
from lightning_pathkernel.recording.received import Changes

__all__ = [
    "FitError",
    "check_begin",
    "check_trainer",
    "clips_by_itself",
    "gradient_changes",
    "loss_scaler",
    "output_directory",
    "rounding_of",
    "skipped_validation",
    "thaws_later",
    "training_nodes",
    "unused",
    "within_batch",
]

_ROUNDING = {"32-true": 1e-3, "64-true": 1e-6, "bf16-mixed": 5e-2, "16-mixed": 1e-2}
"""Precision -> share of a gradient that rounding may make up."""


class FitError(ValueError):
    """A fit that cannot be recorded, and why."""


def check_trainer(trainer: Any) -> None:
    """Refuse by name what is not supported yet.

    Args:
        trainer: The Trainer of the fit.

    Raises:
        FitError: With what was found, and the remedy.
    """
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise FitError(
            f"PathKernelCallback does not support the strategy {strategy}: train on one device (strategy='auto', "
            "devices=1) or with strategy='ddp'."
        )
    started = getattr(trainer.strategy, "_start_method", "popen")
    if started != "popen":
        raise FitError(
            f"PathKernelCallback does not support processes started by {started!r} (strategy 'ddp_{started}'), from "
            "which the callback does not come back: use strategy='ddp'."
        )
    if trainer.strategy.root_device.type == "mps":
        raise FitError("PathKernelCallback does not support MPS, which lacks float64: train with accelerator='cpu'.")
    if str(trainer.precision) not in _ROUNDING:
        raise FitError(
            f"PathKernelCallback does not support precision={trainer.precision!r}, whose weights are rounded in every "
            f"step: use one of {', '.join(map(repr, _ROUNDING))}."
        )
    count = len(_callbacks(trainer, "PathKernelCallback"))
    if count > 1:
        raise FitError(
            f"found {count} PathKernelCallbacks in one Trainer: keep one, each would record the other's work."
        )
    averaging = _callbacks(trainer, "StochasticWeightAveraging", "WeightAveraging")
    if averaging:
        raise FitError(
            f"PathKernelCallback does not support {', '.join(averaging)}: it puts averages in the place of the weights "
            "at the end, which are no point of the recorded path. Average in a fit of its own."
        )


def _callbacks(trainer: Any, *names: str) -> list[str]:
    """Class names of the trainer's callbacks of these classes, whichever namespace they come from, or derived ones."""
    return [type(c).__name__ for c in trainer.callbacks if any(base.__name__ in names for base in type(c).__mro__)]


def check_begin(trainer: Any, resumes: bool = False) -> None:
    """Refuse what shows only when training begins.

    Args:
        trainer: The Trainer, its optimisers set up.
        resumes: Whether it goes on from a checkpoint that has a state of the recording.

    Raises:
        FitError: With what was found, and the remedy.
    """
    if trainer.global_step and not resumes:
        raise FitError(
            f"PathKernelCallback cannot begin in mid-path: {trainer.global_step} optimiser steps were made before "
            "this fit, by an earlier fit of this Trainer or a checkpoint without a state of the recording. Begin with "
            "a new Trainer, and resume only from checkpoints of recorded fits."
        )
    if not trainer.optimizers:
        raise FitError("PathKernelCallback needs an optimiser: configure_optimizers returned none.")


def skipped_validation(trainer: Any) -> bool:
    """Whether a validation was due when the checkpoint was written that a fit resumes from: Lightning leaves it out.

    Args:
        trainer: The Trainer, in ``on_train_start``.

    Returns:
        Whether the checkpoint was written at the end of a batch after which a validation was to come.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarted_on_train_batch_end or not trainer.enable_validation:
        return False
    every, progress, interval = trainer.check_val_every_n_epoch, loop.batch_progress, trainer.val_check_batch
    if every is not None and trainer.fit_loop.epoch_progress.current.ready % every:
        return False
    if interval is None or interval == float("inf"):
        return bool(progress.is_last_batch)
    done = progress.total.ready if every is None else progress.current.ready
    return bool(done % interval == 0)


def within_batch(trainer: Any) -> bool:
    """Whether a batch has begun and is not over: a fit that resumes from here runs it again."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(current.ready != current.processed)


def loss_scaler(trainer: Any) -> Any | None:
    """The gradient scaler of fp16 mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def rounding_of(trainer: Any) -> float:
    """Share of a gradient that rounding may keep captured rows from adding up to, by the fit's precision."""
    return _ROUNDING[str(trainer.precision)]


def gradient_changes(trainer: Any, pl_module: Any) -> Changes:
    """What may happen to gradients between the backward pass and the step.

    Args:
        trainer: The Trainer.
        pl_module: Its module.

    Returns:
        Nothing, a common factor (clipping by norm, loss scaling), or anything (clipping by value, by the module's own
        method, or under manual optimisation).
    """
    by_value = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
    if by_value or clips_by_itself(pl_module) or not pl_module.automatic_optimization:
        return "any"
    return "factor" if trainer.gradient_clip_val or loss_scaler(trainer) is not None else "none"


def thaws_later(trainer: Any) -> bool:
    """Whether parameters are frozen now and may learn later: an optimiser has them, or a callback will add them."""
    if any(not p.requires_grad for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
        return True
    return bool(_callbacks(trainer, "BaseFinetuning"))


def clips_by_itself(pl_module: Any) -> bool:
    """Whether a LightningModule, of whichever namespace, has a gradient clipping of its own.

    Args:
        pl_module: The module.

    Returns:
        Whether ``configure_gradient_clipping`` is not Lightning's.
    """
    owner = str(pl_module.configure_gradient_clipping.__module__)
    return not owner.startswith(("pytorch_lightning.", "lightning.pytorch."))


def training_nodes(
    trainer: Any, nodes: int, optimizers: int = 1, tolerance: float | None = None
) -> list[int] | NodeBudget:
    """Where chords end, over the whole fit.

    Args:
        trainer: The Trainer, its loaders set up.
        nodes: Chords asked for.
        optimizers: Steps that every batch is expected to make.
        tolerance: Drift at which a chord ends, ``nodes`` then being the most chords; None for a schedule.

    Returns:
        The optimiser steps of a schedule, the first one 0; every step where fewer are to come than chords were asked
        for, with a warning. With a tolerance, that and the budget.

    Raises:
        FitError: If a schedule is asked for and the fit has no end.
    """
    steps = trainer.estimated_stepping_batches * optimizers
    if trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps)
    unknown = steps == float("inf") or steps < 1
    if tolerance is not None:
        return NodeBudget(tolerance, nodes, None if unknown else int(steps))
    if unknown:
        raise FitError(
            "PathKernelCallback places its nodes over the whole fit: give the Trainer max_epochs or max_steps; "
            "max_steps where the loader has no length. With tolerance= the end need not be known."
        )
    if nodes > steps:
        warnings.warn(
            f"nodes={nodes} is more than the {steps} optimiser steps: every step gets its own node.", stacklevel=2
        )
    return node_schedule(int(steps), nodes)


def output_directory(trainer: Any, dirpath: str | None, used_before: bool) -> Path:
    """Where this fit writes, the same on every rank; a directory with anything in it is never written to.

    Args:
        trainer: The Trainer of the fit.
        dirpath: The user's choice, or None for the first logger's directory, else ``default_root_dir``.
        used_before: Whether an earlier fit of the same callback wrote to ``dirpath``: then a number is added to it.

    Returns:
        The directory, empty or not there yet.

    Raises:
        FitError: If the user's choice has something in it already.
    """
    found = _chosen(trainer, dirpath, used_before) if trainer.is_global_zero else None
    path, wrong = trainer.strategy.broadcast(found)  # one process looks, for another may have begun to write
    if wrong is not None:
        raise FitError(wrong)
    return Path(path)


def _chosen(trainer: Any, dirpath: str | None, used_before: bool) -> tuple[str, str | None]:
    """The directory, and what is wrong with it."""
    if dirpath is not None:
        base = Path(dirpath)
        if not used_before and base.exists() and any(base.iterdir()):
            return dirpath, (
                f"dirpath {str(base)!r} is not empty (it has {min(p.name for p in base.iterdir())!r}): nothing is "
                "overwritten. Choose another dirpath, or remove it."
            )
    elif trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        base = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / "pathkernel"
    else:
        base = Path(trainer.default_root_dir) / "pathkernel"
    return str(unused(base)), None


def unused(base: Path) -> Path:
    """``base``, or ``base-v1``, ``base-v2``, ... where there is something already."""
    candidate, version = base, 0
    while candidate.exists() and any(candidate.iterdir()):
        version += 1
        candidate = base.with_name(f"{base.name}-v{version}")
    return candidate
