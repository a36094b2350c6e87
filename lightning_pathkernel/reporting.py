"""`KernelMachine.report`: the machine's door to the room of reports, which is not entered before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

__all__ = ["report"]


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
    """
    from lightning_pathkernel.report.write import write_report

    return write_report(self, path, x, target, **options)
