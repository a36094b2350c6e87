"""Where every part of a prediction came from: the terms of eq. (7), each computed, none left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_pathkernel.network import Functional, Network, Tensors
from lightning_pathkernel.path import QuadratureRule

__all__ = ["ERROR_TERMS", "LEDGER_TERMS", "ChordSpan", "chord_terms"]

ERROR_TERMS = ("quadrature", "sketch", "unattributed")
LEDGER_TERMS = ("initial", "examples", "decay", "buffers", *ERROR_TERMS)


@dataclass(frozen=True)
class ChordSpan:
    """One chord of the path, and the parts its displacement is made of.

    Attributes:
        start: Weights at its first node.
        delta: Displacement to its last node.
        start_buffers: Floating-point buffers at its first node.
        end_buffers: The same at its last node.
        examples: What the stored examples add up to, back in weight space: the adjoint of the query sketch.
        decay: Displacement by weight decay; empty where there is none.
        residual: Displacement that no example and no decay accounts for; empty where there is none.
    """

    start: Tensors
    delta: Tensors
    start_buffers: Tensors
    end_buffers: Tensors
    examples: Tensors
    decay: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)

    def weights(self, t: float) -> dict[str, Tensor]:
        """Weights at ``t`` in [0, 1] along the chord."""
        return {name: w + t * self.delta[name] for name, w in self.start.items()}


def chord_terms(
    network: Network,
    batch: object,
    span: ChordSpan,
    rule: QuadratureRule,
    functional: Functional | None = None,
) -> Mapping[str, Tensor]:
    """The terms that one chord adds to the outputs of ``batch``, eq. (1) to (3) and (7) of docs/theory.md.

    Args:
        network: The network.
        batch: Queries.
        span: The chord.
        rule: Quadrature along it.
        functional: Scalar of the outputs that is accounted for; None for the outputs themselves.

    Returns:
        Term of `LEDGER_TERMS` (but ``initial``) -> ``[n, K]``; they add up to the change of the outputs.
    """
    directions = [span.examples, span.delta, span.decay, span.residual]
    wanted = [d for d in directions if d]
    sums = [torch.zeros(()) for _ in wanted]
    for t, w in zip(rule.points, rule.weights, strict=True):
        slopes = network.jvps(batch, span.weights(t), span.end_buffers, wanted, functional)
        sums = [total + w * slope for total, slope in zip(sums, slopes, strict=True)]
    found = iter(sums)
    examples, total, decay, residual = (next(found) if d else torch.zeros_like(sums[0]) for d in directions)
    first = network.outputs(batch, span.start, span.end_buffers, functional)
    buffers = torch.zeros_like(first)
    if span.end_buffers:
        buffers = first - network.outputs(batch, span.start, span.start_buffers, functional)
    change = network.outputs(batch, span.weights(1.0), span.end_buffers, functional) - first
    return {
        "examples": examples,
        "decay": decay,
        "buffers": buffers,
        "quadrature": change - total,
        "sketch": total - decay - residual - examples,
        "unattributed": residual,
    }
