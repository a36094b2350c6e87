"""A machine, or an artifact alone, as a page on disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_pathkernel.report.examples import ExampleSource
from lightning_pathkernel.report.history import read_history, thinned, tidy
from lightning_pathkernel.report.options import ReportOptions
from lightning_pathkernel.report.overview import Suspects, cards, chord_rows, path_chart, suspects, training_charts
from lightning_pathkernel.report.page import Page, render
from lightning_pathkernel.report.queries import query_part
from lightning_pathkernel.store import read_manifest

if TYPE_CHECKING:
    from lightning_pathkernel.machine import KernelMachine

MOST_ENTRIES = 400
"""Entries of the history that are drawn and written."""

__all__ = ["report_directory", "write_report"]


def write_report(
    machine: KernelMachine, path: str | Path, x: Any = None, target: Tensor | None = None, **options: Any
) -> Path:
    """Write a machine's report: one HTML page that needs nothing else.

    Args:
        machine: The machine.
        path: Where; written whole or not at all, and what is there already is replaced.
        x: Queries to explain, as for `KernelMachine.explain`; None for a page about training and examples alone.
        target: What is explained of each query, ``[Q]``; None for the predicted class, or the only output.
        options: Fields of `ReportOptions`, such as ``examples``, ``labels``, ``class_names``, ``top_k``.

    Returns:
        The page's path.

    Raises:
        ValueError: If the examples given lack one that the machine was trained on, or an option is out of range.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel.report import write_report
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> write_report(tiny_machine(), tempfile.mkdtemp() + "/report.html", title="Three steps").name
        'report.html'
    """
    chosen = ReportOptions(**options)
    manifest = read_manifest(machine.directory).contents if machine.directory is not None else {}
    history = chosen.history
    if history is None:
        history = read_history(machine.directory) if machine.directory is not None else []
    return _publish(Path(path), render(_page(machine, x, target, chosen, tidy(history), manifest)))


def report_directory(directory: str | Path, path: str | Path | None = None, title: str = ReportOptions.title) -> Path:
    """Write what an artifact says without its network: the metrics logged in training.

    Args:
        directory: The artifact.
        path: Where; None for ``report.html`` beside the artifact's directory.
        title: Heading of the page.

    Returns:
        The page's path.

    Raises:
        ArtifactError: If there is no artifact, or it is damaged.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel.report import report_directory
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> directory = tiny_machine().save(tempfile.mkdtemp() + "/machine")
        >>> report_directory(directory).name
        'report.html'
    """
    place = Path(directory)
    manifest, history = read_manifest(place).contents, read_history(place)
    drawn = thinned(history, MOST_ENTRIES)
    last = max([entry["step"] or 0.0 for entry in history], default=0.0)
    page = Page(
        title, _facts(manifest), cards(history, {}), drawn, training_charts(drawn, last), None, [], 0, None,
        Suspects([], False), 0, True, len(history),
    )  # fmt: skip
    return _publish(Path(path) if path is not None else place.parent / "report.html", render(page))


def _page(
    machine: KernelMachine, x: Any, target: Tensor | None, options: ReportOptions,
    history: list[dict[str, float | None]], manifest: Mapping[str, Any],
) -> Page:  # fmt: skip
    positions = int((manifest.get("settings") or {}).get("positions") or 0)
    source = ExampleSource(
        options.examples, options.labels, options.columns, machine.example_names, positions, options.show
    )
    labels = source.label_vector(machine.example_ids)
    queries = None if x is None else query_part(machine, x, target, source, labels, options)
    rows = chord_rows(machine.path)
    count, drawn = len(machine.example_ids), thinned(history, MOST_ENTRIES)
    facts = {
        **_facts(manifest),
        "training examples": f"{count:,}",
        "optimiser steps": f"{rows[-1].last:,}",
        "chords": str(len(rows)),
    }
    return Page(
        options.title, facts, cards(history, queries.fidelity if queries else {}), drawn,
        training_charts(drawn, rows[-1].last), path_chart(rows), rows[: options.max_chords], len(rows), queries,
        suspects(machine, source, labels, options), count, options.complete, len(history),
    )  # fmt: skip


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest says of the run, as far as it does."""
    out = {}
    optimizer, settings = manifest.get("optimizer"), manifest.get("settings")
    if isinstance(optimizer, Mapping) and "name" in optimizer:
        out["optimiser"] = str(optimizer["name"])
    if isinstance(settings, Mapping) and "sketch_dim" in settings:
        out["numbers per example and chord"] = f"at most {settings['sketch_dim']}"
    return out


def _publish(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path
