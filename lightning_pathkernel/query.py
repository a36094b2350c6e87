"""Questions to a list of chords: sums and contributions. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.chord import QueryBuffer
from lightning_pathkernel.chord_path import Chords, PathChord
from lightning_pathkernel.explanation import OutputFn, functional_of
from lightning_pathkernel.ledger import LEDGER_TERMS, ChordSpan, chord_terms
from lightning_pathkernel.network import Functional, Network, batch_size, take_rows
from lightning_pathkernel.path import QuadratureRule, gauss_legendre, integrate
from lightning_pathkernel.ranking import ChordShare

__all__ = ["Question", "RowRules", "everywhere", "ledger", "query_features", "rules_within", "shares", "sums"]

RowRules = Sequence[tuple[slice | Tensor, QuadratureRule]]
"""Which rows of a batch take which quadrature rule along a chord; every row is there once."""


@dataclass(frozen=True)
class Question:
    """Queries, and what is asked about each of them.

    Attributes:
        batch: Queries.
        target: Which of the outputs, or what an output function makes of it, ``[n]``; None for all outputs.
        output_fn: ``(outputs [n, K], target [n]) -> [n]``; None for the output ``target``.
    """

    batch: Any
    target: Tensor | None = None
    output_fn: OutputFn | None = None

    @property
    def functional(self) -> Functional | None:
        """The scalar that is asked about, as a function of the outputs alone; None for the outputs."""
        return None if self.target is None else functional_of(self.output_fn, self.target)

    def take(self, rows: slice | Tensor) -> Question:
        """Some of the queries."""
        target = None if self.target is None else self.target[rows]
        return Question(take_rows(self.batch, rows), target, self.output_fn)


def everywhere(rule: QuadratureRule) -> RowRules:
    """One rule for all rows."""
    return [(slice(None), rule)]


def rules_within(network: Network, batch: object, chord: PathChord, rtol: float) -> RowRules:
    """The Gauss-Legendre rules that integrate ``J . delta`` along a chord to a tolerance, row by row.

    Args:
        network: The network.
        batch: Queries.
        chord: The chord.
        rtol: Tolerance of a row's embedded error estimate, relative to the norm of its integral.

    Returns:
        The rules, of at most 64 points each.
    """

    def slope(t: float, rows: Tensor) -> Tensor:
        return network.jvps(take_rows(batch, rows), chord.weights(t), chord.end_buffers, [chord.delta])[0]

    if not batch_size(batch):
        return everywhere(gauss_legendre(1))
    points = integrate(slope, batch_size(batch), rtol).points
    return [((points == count).nonzero().flatten(), gauss_legendre(int(count))) for count in points.unique()]


def _by_rows(
    question: Question, rules: RowRules, answer: Callable[[Question, QuadratureRule], Sequence[Tensor]]
) -> list[Tensor]:
    """Answers of a row each, ``[n, ...]``, with every row's own rule."""
    n, out = batch_size(question.batch), list[Tensor]()
    for rows, rule in rules:
        parts = answer(question.take(rows), rule)
        out = out or [part.new_zeros(n, *part.shape[1:]) for part in parts]
        for whole, part in zip(out, parts, strict=True):
            whole[rows] = part
    return out


def sums(network: Network, batch: object, chord: PathChord, rules: RowRules) -> tuple[Tensor, Tensor]:
    """Sum of all contributions of a chord, and its part of the bias (decay and buffers), ``[n, K]`` each."""
    directions = [chord.examples_direction(), *([chord.decay] if chord.decay else [])]

    def answer(part: Question, rule: QuadratureRule) -> list[Tensor]:
        totals: list[Tensor] = []
        for t, w in zip(rule.points, rule.weights, strict=True):
            slopes = [w * s for s in network.jvps(part.batch, chord.weights(t), chord.end_buffers, directions)]
            totals = [a + b for a, b in zip(totals, slopes, strict=True)] if totals else slopes
        return totals

    totals = _by_rows(Question(batch), rules, answer)
    bias = totals[1] if chord.decay else torch.zeros_like(totals[0])
    if chord.end_buffers:
        after = network.outputs(batch, chord.start, chord.end_buffers)
        bias = bias + after - network.outputs(batch, chord.start, chord.start_buffers)
    return totals[0], bias


def query_features(
    network: Network, batch: object, chord: PathChord, rule: QuadratureRule, functional: Functional
) -> Tensor:
    """Sketch of ``D . integral of grad h(f(x))`` along a chord, ``[n, k]``: the query side of eq. (8)."""
    if not batch_size(batch):  # layers' rules need a row
        return next(iter(chord.start.values())).new_zeros(0, chord.examples.width)
    total: Tensor | None = None
    for t, w in zip(rule.points, rule.weights, strict=True):
        buffer = QueryBuffer(chord.sketches, chord.preconditioner, batch_size(batch))
        network.per_example_gradients(batch, functional, buffer, chord.weights(t), chord.end_buffers)
        part = w * buffer.features()
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a quadrature rule without points")
    return total if chord.second_stage is None else total @ chord.second_stage.T


def shares(
    network: Network,
    question: Question,
    path: Chords,
    rules: Sequence[RowRules],
    gaps: Sequence[Tensor] | None = None,
) -> Iterator[ChordShare]:
    """What the contributions ``c_i(x)`` of eq. (7) are made of, chord by chord, before any example is read.

    Args:
        network: The network.
        question: Queries, and the scalar of each that is explained.
        path: The path.
        rules: Quadrature along each chord.
        gaps: For each chord, what its sketch lost of the sum of contributions, ``[n]``: shared out by the control
            variate of docs/theory.md section 4. None for contributions as they are stored.

    Yields:
        Each chord's share.

    Raises:
        ValueError: If the question is about no scalar.
    """
    lost = [None] * len(path) if gaps is None else gaps
    for chord, rule, gap in zip(path, rules, lost, strict=True):

        def answer(part: Question, rule: QuadratureRule, chord: PathChord = chord) -> list[Tensor]:
            if part.functional is None:
                raise ValueError("contributions are to a scalar: give a target")
            return [query_features(network, part.batch, chord, rule, part.functional)]

        share = ChordShare(_by_rows(question, rule, answer)[0], chord.examples)
        yield share if gap is None else share.completed(gap)


def ledger(
    network: Network, question: Question, path: Chords, rules: Sequence[RowRules]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All terms of eq. (7) for the outputs of a batch, or for a scalar of them.

    Args:
        network: The network.
        question: Queries, and what of them is accounted for.
        path: The path.
        rules: Quadrature along each chord.

    Returns:
        Term -> ``[n, K]`` (``[n, 1]`` for a scalar), adding up to the network's own; and the sketch term of each chord.
    """
    first = next(iter(path))
    initial = network.outputs(question.batch, first.start, first.start_buffers, question.functional)
    terms = {name: torch.zeros_like(initial) for name in LEDGER_TERMS}
    terms["initial"] = initial
    names = [name for name in LEDGER_TERMS if name != "initial"]
    gaps = []
    for chord, rule in zip(path, rules, strict=True):
        span = chord.span()

        def answer(part: Question, rule: QuadratureRule, span: ChordSpan = span) -> list[Tensor]:
            found = chord_terms(network, part.batch, span, rule, part.functional)
            return [found[name] for name in names]

        found = dict(zip(names, _by_rows(question, rule, answer), strict=True))
        gaps.append(found["sketch"])
        for name, value in found.items():
            terms[name] = terms[name] + value
    return terms, gaps
