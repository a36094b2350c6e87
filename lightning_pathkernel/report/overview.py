"""The page's parts that need no query: summary, charts of training, chords of the path, suspected label errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_pathkernel.report.charts import Chart, bar_chart, line_chart, value_text
from lightning_pathkernel.report.classes import class_name, ordered
from lightning_pathkernel.report.examples import ExampleSource, Label
from lightning_pathkernel.report.history import METRICS
from lightning_pathkernel.report.items import Shown
from lightning_pathkernel.report.numbers import decimals_for, percent, plain, signed
from lightning_pathkernel.report.options import ReportOptions

if TYPE_CHECKING:
    from lightning_pathkernel.chord_path import ChordPath, PathChord
    from lightning_pathkernel.machine import KernelMachine

__all__ = [
    "Card",
    "ChordRow",
    "Suspect",
    "Suspects",
    "cards",
    "chord_rows",
    "path_chart",
    "suspects",
    "training_charts",
]

_CARDS = (
    "fidelity", "agreement", "error_quadrature", "error_sketch", "error_unattributed", "kernel_velocity", "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """One number of the summary: on the probes, and on the page's own queries."""

    name: str
    label: str
    value: str
    queries: str
    meaning: str


def cards(history: Sequence[Mapping[str, float | None]], queries: Mapping[str, float]) -> list[Card]:
    """The summary's numbers.

    Args:
        history: Logged metrics, tidy.
        queries: `KernelMachine.fidelity` of the queries; empty where there are none.

    Returns:
        One card for each number that is known.
    """
    last = history[-1] if history else {}
    out = []
    for name in _CARDS:
        if name not in last and name not in queries:
            continue
        own = value_text(name, queries[name]) if name in queries else ""
        logged = value_text(name, last[name]) if name in last else ""
        out.append(Card(name, METRICS[name].label, logged, own, METRICS[name].meaning))
    return out


def training_charts(history: Sequence[Mapping[str, float | None]], steps: float) -> list[Chart]:
    """Fidelity, error budget and kernel velocity over training.

    Args:
        history: Logged metrics, tidy.
        steps: Optimiser steps of the whole fit.

    Returns:
        Those charts for which there is a number.
    """
    found = [
        line_chart(
            "fidelity", "Fidelity", "R² of the learned change on the probes: 1 is perfect, 0 no better than the bias.",
            history, ("fidelity", "fidelity_left", "fidelity_linearized"), 1.0, -0.25, steps,
        ),
        line_chart(
            "errors", "Error budget", "Norms relative to the learned change: what the machine misses, by cause.",
            history, ("error_sketch", "error_quadrature", "error_unattributed"),
            until=steps,
        ),
        line_chart(
            "velocity", "Kernel velocity", METRICS["kernel_velocity"].meaning, history, ("kernel_velocity",),
            until=steps,
        ),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


@dataclass(frozen=True)
class ChordRow:
    """One chord of the path: its steps, learning time, displacement of the weights, and examples."""

    number: int
    first: int
    last: int
    learning_time: float
    displacement: float
    examples: int

    @property
    def displacement_text(self) -> str:
        """The displacement in percent."""
        return percent(self.displacement)

    @property
    def learning_time_text(self) -> str:
        """The learning time with four significant digits."""
        return plain(self.learning_time, decimals_for([self.learning_time]))


def chord_rows(path: ChordPath) -> list[ChordRow]:
    """What the page says of the path."""
    return [
        ChordRow(k + 1, c.first_step, c.last_step, float(c.learning_time), _displacement(c), len(c.examples))
        for k, c in enumerate(path)
    ]


def _displacement(chord: PathChord) -> float:
    moved = sum(float(d.double().square().sum()) for d in chord.delta.values())
    weights = sum(float(w.double().square().sum()) for w in chord.start.values())
    return float((moved / weights) ** 0.5) if weights else 0.0


def path_chart(rows: Sequence[ChordRow]) -> Chart:
    """The chords as bars: how far the weights moved between the nodes."""
    return bar_chart(
        "path", "Nodes along the path",
        "Each bar is a chord between two nodes; its height is the distance the weights moved, relative to their norm.",
        [(row.first, row.last) for row in rows], [row.displacement for row in rows],
    )  # fmt: skip


@dataclass(frozen=True)
class Suspect:
    """A training example whose label may be wrong.

    Attributes:
        rank: Its place in the ranking.
        id: Its id.
        name: What the page calls it.
        shown: How it is shown.
        label: Its label, or nothing.
        score: What it is ranked by, as a number and as text.
        influence: Its self-influence, as a number and as text.
        width: Its bar, in percent of the first one's.
    """

    rank: int
    id: int
    name: str
    shown: Shown
    label: str
    score: tuple[float, str]
    influence: tuple[float, str]
    width: float


@dataclass(frozen=True)
class Suspects:
    """The most suspicious examples, and what they are ranked by: the machine's suspicion, or self-influence."""

    rows: list[Suspect]
    by_suspicion: bool


def suspects(
    machine: KernelMachine, source: ExampleSource, labels: Sequence[Label] | None, options: ReportOptions
) -> Suspects:
    """Training examples whose labels may be wrong, most suspicious first.

    Args:
        machine: The machine; where it ranks labels itself (`label_errors`), its ranking is taken.
        source: The training examples.
        labels: Their labels in the order of ``machine.example_ids``; None where they are not known, and the size of
            self-influence ranks.
        options: What the user asked for.

    Returns:
        The first of them.
    """
    influence = machine.self_influence()
    rank = getattr(machine, "label_errors", None)
    if rank is not None and labels is not None and not any(isinstance(label, float) for label in labels):
        code = {label: k for k, label in enumerate(ordered(labels))}
        found = rank(torch.tensor([code[label] for label in labels]))
        order = torch.searchsorted(machine.example_ids, found.example_ids[: options.max_suspects])
        scores, by_suspicion = found.scores, True
    else:
        order = influence.abs().argsort(descending=True, stable=True)[: options.max_suspects]
        scores, by_suspicion = influence[order], False
    largest = max((abs(v) for v in scores[: len(order)].tolist() if math.isfinite(v)), default=0.0) or 1.0
    digits, decimals = decimals_for([largest]), decimals_for(influence.tolist())
    rows = []
    for place, (at, score) in enumerate(zip(order.tolist(), scores.tolist(), strict=False), start=1):
        example, own = int(machine.example_ids[at]), float(influence[at])
        rows.append(
            Suspect(
                place, example, source.name(example), source.look(example),
                class_name(source.label(example), options.class_names),
                (score, plain(score, digits) if by_suspicion else signed(score, digits)), (own, signed(own, decimals)),
                100 * min(1.0, abs(score) / largest) if math.isfinite(score) else 0.0,
            )
        )  # fmt: skip
    return Suspects(rows, by_suspicion)
