"""A machine to where the Trainer's loggers keep artifacts: WandB and MLflow; TensorBoard gets its card as text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["upload_machine"]

_NAME = "kernel-machine"


def upload_machine(directory: Path | None, loggers: Iterable[Any], step: int) -> list[str]:
    """Hand an exported machine to every logger that can take it.

    An upload that fails, a logger that takes none, and a machine that is not there (nothing was learned, or
    ``export=False``) is a warning that says so; a machine stays where it is.

    Args:
        directory: The artifact.
        loggers: The Trainer's.
        step: Optimiser steps of the fit.

    Returns:
        What became of it, logger by logger, in words.
    """
    told: list[str] = []
    if directory is None or not (directory / "manifest.json").is_file():
        warnings.warn("PathKernelCallback: log_artifact=True, but no machine was exported.", stacklevel=2)
        return told
    for logger in loggers:
        name = type(logger).__name__
        send = _way(logger)
        if send is None:
            warnings.warn(
                f"PathKernelCallback: {name} takes no artifacts (WandbLogger, MLFlowLogger and TensorBoardLogger do): "
                f"the machine is in {directory} only.",
                stacklevel=2,
            )
            continue
        try:
            told.append(f"{name}: {send(logger, directory, step)}")
        except Exception as error:  # a service's own kinds; none of them may cost the fit
            warnings.warn(
                f"PathKernelCallback: the machine could not be uploaded by {name}: {type(error).__name__}: {error}. "
                f"It is complete in {directory}.",
                stacklevel=2,
            )
    return told


def _way(logger: Any) -> Callable[[Any, Path, int], str] | None:
    """By the names of the logger's classes: neither Lightning nor a service need be imported to know them."""
    known = {kind.__name__ for kind in type(logger).__mro__}
    return next((send for name, send in _WAYS.items() if name in known), None)


def _wandb(logger: Any, directory: Path, step: int) -> str:
    import wandb

    artifact = wandb.Artifact(_NAME, type=_NAME, metadata={"step": step})
    artifact.add_dir(str(directory))
    logger.experiment.log_artifact(artifact)
    return f"artifact {_NAME}"


def _mlflow(logger: Any, directory: Path, step: int) -> str:
    logger.experiment.log_artifacts(logger.run_id, str(directory), artifact_path=_NAME)
    return f"artifacts {_NAME} of run {logger.run_id}"


def _tensorboard(logger: Any, directory: Path, step: int) -> str:
    """TensorBoard shows no files: the card with the fidelity table is logged as text, and says where the machine is."""
    card = (directory / "README.md").read_text(encoding="utf-8")
    logger.experiment.add_text("pathkernel/machine", f"{card}\nThe machine: `{directory}`\n", step)
    return "the card as text; TensorBoard keeps no artifacts"


_WAYS: Mapping[str, Callable[[Any, Path, int], str]] = {
    "WandbLogger": _wandb, "MLFlowLogger": _mlflow, "TensorBoardLogger": _tensorboard,
}  # fmt: skip
