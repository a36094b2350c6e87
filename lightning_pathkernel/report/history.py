"""The metrics that were logged in training: read from an artifact, and what each of them means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_pathkernel.store import ArtifactError

__all__ = ["METRICS", "History", "Metric", "read_history", "thinned", "tidy"]

History = Sequence[Mapping[str, float | None]]
"""Entries of ``metrics.json``: name -> value, with ``step`` among them; None where a value was not finite."""


@dataclass(frozen=True)
class Metric:
    """What a logged number is called and what it says.

    Attributes:
        label: Its name for people.
        meaning: One line: scale, sign, and what is good.
        share: Whether it is written in percent.
    """

    label: str
    meaning: str
    share: bool = False


METRICS = {
    "fidelity": Metric(
        "Fidelity",
        "R² of the learned change: 1 is perfect, 0 is no better than the bias alone. 0.93 means that the machine's "
        "squared error is 7 % of the squared change that training made to the outputs.",
    ),
    "agreement": Metric(
        "Agreement",
        "Share of inputs on which machine and network decide alike: the same class, or the sign of a single output.",
        share=True,
    ),
    "error_quadrature": Metric(
        "Quadrature error",
        "Norm of what the integration along the path misses, relative to the learned change. 0 is best.",
        share=True,
    ),
    "error_sketch": Metric(
        "Sketch error",
        "Norm of what is lost by keeping few numbers per example, relative to the learned change. 0 is best.",
        share=True,
    ),
    "error_unattributed": Metric(
        "Unattributed",
        "Norm of what no training example accounts for, relative to the learned change. 4 % means that changes of "
        "4 % of its size came from elsewhere.",
        share=True,
    ),
    "fidelity_left": Metric(
        "Left end", "Fidelity of the left-end rule: the paper's literal sum where every step has a node."
    ),
    "fidelity_linearized": Metric(
        "Linearised",
        "Fidelity of the tangent kernel at initialisation: near 1, the network only used the features it began with.",
    ),
    "kernel_velocity": Metric(
        "Kernel velocity",
        "1 \N{MINUS SIGN} cosine of the tangent kernels at the last two nodes: 0 means that features no longer change.",
    ),
    "overhead": Metric("Overhead", "Share of training time that recording took.", share=True),
}


def tidy(history: History) -> list[dict[str, float | None]]:
    """A history with floats in it, None for what is not finite, in the order of its steps.

    Args:
        history: As `read_history` gives it, or as the callback keeps it.

    Returns:
        The entries; a step that is missing is the entry's number.
    """
    out: list[dict[str, float | None]] = []
    for number, entry in enumerate(history):
        found = {name: _finite(value) for name, value in entry.items()}
        step = found.get("step")
        out.append({**found, "step": float(number) if step is None else step})
    return sorted(out, key=lambda entry: entry["step"] or 0.0)


def thinned(history: Sequence[dict[str, float | None]], most: int) -> list[dict[str, float | None]]:
    """At most so many entries of a history, evenly spread, the last among them."""
    count = len(history)
    if count <= most:
        return list(history)
    return [history[round(k * (count - 1) / (most - 1))] for k in range(most)]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def read_history(directory: str | Path) -> list[dict[str, float | None]]:
    """The metrics of an artifact or a recording.

    Args:
        directory: Where it is.

    Returns:
        Its entries; none where nothing was logged.

    Raises:
        ArtifactError: If its ``metrics.json`` is malformed.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel.report import read_history
        >>> read_history(tempfile.mkdtemp())  # nothing was logged
        []
    """
    path = Path(directory) / "metrics.json"
    if not path.is_file():
        return []
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))["history"]
        found = tidy(entries) if isinstance(entries, list) and all(_is_entry(entry) for entry in entries) else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{path.name}: malformed: {error!r}") from error
    if found is None:
        raise ArtifactError(f"{path.name}: malformed: its history is no list of tables of numbers")
    return found


def _is_entry(entry: Any) -> bool:
    numbers = int | float | None
    return isinstance(entry, dict) and all(isinstance(v, numbers) and not isinstance(v, bool) for v in entry.values())
