"""Doors to the room of reports, the machine's and the callback's; it is not entered before it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_pathkernel.network import ForwardFn

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

__all__ = ["log_fit_figures", "report"]


def report(self: KernelMachine, path: str | Path, x: Any = None, target: Tensor | None = None, **options: Any) -> Path:
    """Write a report: one HTML page that needs nothing else, not even a network.

    Args:
        self: The machine.
        path: Where; what is there already is replaced.
        x: Queries to explain, as for `explain`; None for a page about training and examples alone.
        target: What is explained of each, ``[Q]``; None for the predicted class, or the only output.
        options: Fields of `lightning_pathkernel.report.ReportOptions`: ``examples`` (the training set, to show its
            images, texts or table rows), ``labels``, ``columns``, ``class_names``, ``top_k`` and others.

    Returns:
        The page's path.

    Raises:
        ValueError: If the examples given lack one that the machine was trained on, or an option is out of range.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> tiny_machine().report(tempfile.mkdtemp() + "/report.html", torch.eye(2), class_names=["a", "b", "c"]).name
        'report.html'
    """
    from lightning_pathkernel.report.write import write_report

    return write_report(self, path, x, target, **options)


def log_fit_figures(
    loggers: Iterable[Any], history: list[dict[str, float]], directory: Path | None, module: nn.Module,
    forward_fn: ForwardFn | None,
) -> None:  # fmt: skip
    """Hand the figures of a fit to its loggers, that of the path where the machine was exported.

    Args:
        loggers: The Trainer's.
        history: What was logged.
        directory: Where the machine is to be; None, or nothing there, where it was not exported.
        module: The network.
        forward_fn: As in training.
    """
    from lightning_pathkernel.machine import KernelMachine
    from lightning_pathkernel.report.loggers import log_figures

    exported = directory is not None and directory.is_dir()
    log_figures(loggers, history, KernelMachine.load(directory, module, forward_fn) if directory and exported else None)
