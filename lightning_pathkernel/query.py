"""Questions to a list of chords: sums, contributions and kernels. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient, matrix_shape
from lightning_pathkernel.chord import QueryBuffer
from lightning_pathkernel.chord_path import ChordPath, PathChord
from lightning_pathkernel.ledger import LEDGER_TERMS, chord_terms
from lightning_pathkernel.network import Functional, Network, batch_size
from lightning_pathkernel.path import QuadratureRule, gauss_legendre, integrate
from lightning_pathkernel.ranking import ChordShare

__all__ = ["kernel", "ledger", "query_features", "rule_within", "shares", "sums"]


def sums(network: Network, batch: object, chord: PathChord, rule: QuadratureRule) -> tuple[Tensor, Tensor]:
    """Sum of all contributions of a chord, and its part of the bias (decay and buffers), ``[n, K]`` each."""
    directions = [chord.examples_direction(), *([chord.decay] if chord.decay else [])]
    totals: list[Tensor] = []
    for t, w in zip(rule.points, rule.weights, strict=True):
        slopes = [w * s for s in network.jvps(batch, chord.weights(t), chord.end_buffers, directions)]
        totals = [a + b for a, b in zip(totals, slopes, strict=True)] if totals else slopes
    bias = totals[1] if chord.decay else torch.zeros_like(totals[0])
    if chord.end_buffers:
        after = network.outputs(batch, chord.start, chord.end_buffers)
        bias = bias + after - network.outputs(batch, chord.start, chord.start_buffers)
    return totals[0], bias


def rule_within(network: Network, batch: object, chord: PathChord, rtol: float) -> QuadratureRule:
    """The Gauss-Legendre rule that integrates ``J . delta`` along a chord to a tolerance, on these inputs.

    Args:
        network: The network.
        batch: Queries.
        chord: The chord.
        rtol: Tolerance of the embedded error estimate, relative to the norm of the integral over the whole batch.

    Returns:
        The rule, of at most 64 points.
    """

    def slope(t: float) -> Tensor:
        return network.jvps(batch, chord.weights(t), chord.end_buffers, [chord.delta])[0]

    return gauss_legendre(integrate(slope, rtol).points)


def query_features(
    network: Network, batch: object, chord: PathChord, rule: QuadratureRule, functional: Functional
) -> Tensor:
    """Sketch of ``D . integral of grad h(f(x))`` along a chord, ``[n, k]``: the query side of eq. (8)."""
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
    batch: object,
    path: ChordPath,
    rules: Sequence[QuadratureRule],
    functional: Functional,
    gaps: Sequence[Tensor] | None = None,
) -> list[ChordShare]:
    """What the contributions ``c_i(x)`` of eq. (7) are made of, chord by chord, before any example is read.

    Args:
        network: The network.
        batch: Queries.
        path: The path.
        rules: Quadrature along each chord.
        functional: The scalar that is explained.
        gaps: For each chord, what its sketch lost of the sum of contributions, ``[n]``: shared out by the control
            variate of docs/theory.md section 4. None for contributions as they are stored.

    Returns:
        Each chord's share.
    """
    lost = [None] * len(path) if gaps is None else gaps
    return [
        ChordShare(query_features(network, batch, chord, rule, functional), chord.examples, gap)
        for chord, rule, gap in zip(path, rules, lost, strict=True)
    ]


def ledger(
    network: Network,
    batch: object,
    path: ChordPath,
    rules: Sequence[QuadratureRule],
    functional: Functional | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All terms of eq. (7) for the outputs of a batch, or for a scalar of them.

    Args:
        network: The network.
        batch: Queries.
        path: The path.
        rules: Quadrature along each chord.
        functional: The scalar that is accounted for; None for the outputs.

    Returns:
        Term -> ``[n, K]`` (``[n, 1]`` for a scalar), adding up to the network's own; and the sketch term of each chord.
    """
    first = next(iter(path))
    initial = network.outputs(batch, first.start, first.start_buffers, functional)
    terms = {name: torch.zeros_like(initial) for name in LEDGER_TERMS}
    terms["initial"] = initial
    gaps = []
    for chord, rule in zip(path, rules, strict=True):
        found = chord_terms(network, batch, chord.span(), rule, functional)
        gaps.append(found["sketch"])
        for name, value in found.items():
            terms[name] = terms[name] + value
    return terms, gaps


class _Whole:
    """Collects a backward pass's per-example gradients, formed whole and scaled by the square root of D."""

    def __init__(self, chord: PathChord) -> None:
        self._chord = chord
        self.parts: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: PerExampleGradient) -> None:
        if name not in self._chord.delta:  # frozen at the time
            return
        part = gradient.dense()
        if name in self._chord.preconditioner:
            diagonal = self._chord.preconditioner[name]
            part = part * diagonal.reshape(matrix_shape(diagonal.shape)).sqrt()
        part = part.flatten(1)
        self.parts[name] = self.parts[name] + part if name in self.parts else part


def _roots(network: Network, batch: object, chord: PathChord, t: float, functional: Functional) -> Mapping[str, Tensor]:
    whole = _Whole(chord)
    network.per_example_gradients(batch, functional, whole, chord.weights(t), chord.end_buffers)
    return whole.parts


def kernel(
    network: Network,
    first: tuple[object, Functional],
    second: tuple[object, Functional] | None,
    path: ChordPath,
    rules: Sequence[QuadratureRule],
) -> Tensor:
    """The path kernel ``sum_c learning_time_c * integral of J D J'^T`` between two batches, ``[n, n2]``.

    Computed from whole gradients on both sides: no sketch, no stored example; symmetric and positive semi-definite
    when ``second`` is None.

    Args:
        network: The network.
        first: Queries and the scalar of each that is meant.
        second: The same of the other side; None for the first one again.
        path: The path.
        rules: Quadrature along each chord.

    Returns:
        The kernel matrix.

    Raises:
        ValueError: If there are no chords.
    """
    out: Tensor | None = None
    for chord, rule in zip(path, rules, strict=True):
        for t, w in zip(rule.points, rule.weights, strict=True):
            one = _roots(network, *first[:1], chord, t, first[1])
            two = one if second is None else _roots(network, second[0], chord, t, second[1])
            gram = torch.stack([one[name] @ two[name].T for name in one if name in two]).sum(0)
            part = w * chord.learning_time * gram
            out = part if out is None else out + part
    if out is None:
        raise ValueError("a machine without chords")
    return out
