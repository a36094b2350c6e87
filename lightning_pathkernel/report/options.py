"""What a user may say about a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pathkernel.explanation import OutputFn
from lightning_pathkernel.report.history import History

__all__ = ["ReportOptions"]


@dataclass(frozen=True)
class ReportOptions:
    """Everything about a report that has a default.

    Attributes:
        examples: The training set, to show its examples: a tensor or array with a row per id, a torch Dataset or any
            sequence indexed by id, a data frame, or a mapping from id or name to example; None for ids alone.
        labels: Labels of the training examples by id; None for those that ``examples`` bring along.
        columns: Names of the columns where examples are rows of a table.
        class_names: Names of the classes, by number.
        show: Turns an example, or a query, into a string, an image or a mapping, where it does not show itself.
        query_items: What the queries look like, one per row of ``x``, such as their texts; None for ``x`` itself.
        query_labels: True labels of the queries; None for the second part of ``x`` where that is a tensor of integers.
        query_names: Names of the queries; None for their numbers.
        output_fn: The scalar that is explained, as in `KernelMachine.explain`.
        output_name: What that scalar is called; None for the class's or the only output.
        top_k: Examples shown for and against each query.
        complete: As in `KernelMachine.explain`.
        max_queries: Queries shown one by one; all of ``x`` counts for the heat map and the fidelity.
        max_suspects: Suspected label errors shown.
        max_chords: Rows of the table of chords.
        title: Heading of the page.
        history: Entries of logged metrics; None for those of the machine's artifact.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> from lightning_pathkernel.report import ReportOptions
        >>> ReportOptions(class_names=["cat", "dog"], top_k=3).max_queries
        12
    """

    examples: Any = None
    labels: Any = None
    columns: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    show: Callable[[Any], Any] | None = None
    query_items: Sequence[Any] | None = None
    query_labels: Any = None
    query_names: Sequence[str] | None = None
    output_fn: OutputFn | None = None
    output_name: str | None = None
    top_k: int = 8
    complete: bool = True
    max_queries: int = 12
    max_suspects: int = 24
    max_chords: int = 128
    title: str = "Kernel machine report"
    history: History | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "max_queries", "max_suspects", "max_chords"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
