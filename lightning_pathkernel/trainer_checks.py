"""What a Trainer says about the fit to come: whether it can be recorded, its nodes, and where the recording goes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning_pathkernel.path import node_schedule

__all__ = ["FitError", "check_trainer", "clips_by_itself", "output_directory", "training_nodes"]


class FitError(ValueError):
    """A fit that cannot be recorded, and why."""


def check_trainer(trainer: Any) -> None:
    """Refuse by name what is not supported yet.

    Args:
        trainer: The Trainer of the fit.

    Raises:
        FitError: With what was found, and the remedy.
    """
    if type(trainer.strategy).__name__ != "SingleDeviceStrategy":
        raise FitError(
            f"PathKernelCallback does not support the strategy {type(trainer.strategy).__name__}: train on one device "
            "(strategy='auto', devices=1)."
        )
    if trainer.strategy.root_device.type == "mps":
        raise FitError("PathKernelCallback does not support MPS, which lacks float64: train with accelerator='cpu'.")
    if str(trainer.precision) != "32-true" and str(trainer.precision) != "64-true":
        raise FitError(
            f"PathKernelCallback does not support precision={trainer.precision!r}: use '32-true' or '64-true'."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise FitError(
            "PathKernelCallback does not support gradient_clip_algorithm='value': clip by norm, which scales all "
            "gradients alike."
        )


def clips_by_itself(pl_module: Any) -> bool:
    """Whether a LightningModule, of whichever namespace, has a gradient clipping of its own.

    Args:
        pl_module: The module.

    Returns:
        Whether ``configure_gradient_clipping`` is not Lightning's.
    """
    owner = str(pl_module.configure_gradient_clipping.__module__)
    return not owner.startswith(("pytorch_lightning.", "lightning.pytorch."))


def training_nodes(trainer: Any, nodes: int) -> list[int]:
    """Optimiser steps at which chords end, over the whole fit.

    Args:
        trainer: The Trainer, its loaders set up.
        nodes: Chords asked for.

    Returns:
        Steps, the first one 0; every step where fewer are to come than chords were asked for, with a warning.

    Raises:
        FitError: If the fit has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise FitError(
            "PathKernelCallback places its nodes over the whole fit: give the Trainer max_epochs or max_steps."
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
    if dirpath is not None:
        base = Path(dirpath)
        if not used_before and base.exists() and any(base.iterdir()):
            raise FitError(
                f"dirpath {str(base)!r} is not empty (it has {min(p.name for p in base.iterdir())!r}): nothing is "
                "overwritten. Choose another dirpath, or remove it."
            )
    elif trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        base = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / "pathkernel"
    else:
        base = Path(trainer.default_root_dir) / "pathkernel"
    return _unused(Path(str(trainer.strategy.broadcast(str(base)))))


def _unused(base: Path) -> Path:
    """``base``, or ``base-v1``, ``base-v2``, ... where there is something already."""
    candidate, version = base, 0
    while candidate.exists() and any(candidate.iterdir()):
        version += 1
        candidate = base.with_name(f"{base.name}-v{version}")
    return candidate
