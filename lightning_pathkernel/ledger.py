"""Where every part of a prediction came from: the terms of eq. (7), each computed, none left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_pathkernel.functional import kernel_machine_agreement, kernel_machine_fidelity
from lightning_pathkernel.network import Functional, Network, Tensors
from lightning_pathkernel.path import QuadratureRule

__all__ = [
    "BIAS_TERMS",
    "ERROR_TERMS",
    "LEDGER_TERMS",
    "ChordSpan",
    "bias",
    "chord_prediction",
    "chord_terms",
    "error_budget",
    "fidelity_metrics",
    "weights_along",
]

ERROR_TERMS = ("quadrature", "sketch", "unattributed")
BIAS_TERMS = ("initial", "decay", "buffers")
LEDGER_TERMS = ("initial", "examples", "decay", "buffers", *ERROR_TERMS)


def bias(terms: Mapping[str, Tensor]) -> Tensor:
    """``b(x)`` of eq. (7): what no training example accounts for."""
    return torch.stack([terms[name] for name in BIAS_TERMS]).sum(0)


def error_budget(terms: Mapping[str, Tensor], outputs: Tensor) -> dict[str, float]:
    """What a prediction misses, by cause: norms relative to that of the learned change ``f - b``.

    Args:
        terms: Term of `LEDGER_TERMS` -> ``[n, K]``.
        outputs: The network's outputs, ``[n, K]``.

    Returns:
        ``error_quadrature``, ``error_sketch`` and ``error_unattributed``.
    """
    change = (outputs - bias(terms)).norm().clamp_min(1e-30)
    return {f"error_{name}": float(terms[name].norm() / change) for name in ERROR_TERMS}


def fidelity_metrics(terms: Mapping[str, Tensor], outputs: Tensor) -> dict[str, float]:
    """How well bias and examples reproduce the network, by the terms of its ledger.

    Args:
        terms: Term of `LEDGER_TERMS` -> ``[n, K]``.
        outputs: The network's outputs, ``[n, K]``.

    Returns:
        ``fidelity``, ``agreement`` and the `error_budget`.
    """
    base = bias(terms)
    prediction = base + terms["examples"]
    return {
        "fidelity": float(kernel_machine_fidelity(prediction, outputs, base)),
        "agreement": float(kernel_machine_agreement(prediction, outputs)),
        **error_budget(terms, outputs),
    }


def weights_along(start: Tensors, delta: Tensors, end: Tensors, t: float) -> dict[str, Tensor]:
    """Weights on the way from one node to the next.

    Args:
        start: At the first node.
        delta: Displacement of those that move.
        end: At the last node, where ``start + delta`` does not give them to the last bit.
        t: Where, in [0, 1].

    Returns:
        All weights.
    """
    if t == 1.0 and end:
        return {**start, **end}
    return {name: w + t * delta[name] if name in delta else w for name, w in start.items()}


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
        end: Weights at its last node, where ``start + delta`` does not give them to the last bit.
    """

    start: Tensors
    delta: Tensors
    start_buffers: Tensors
    end_buffers: Tensors
    examples: Tensors
    decay: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    end: Tensors = field(default_factory=dict)

    def weights(self, t: float) -> dict[str, Tensor]:
        """Weights at ``t`` in [0, 1] along the chord."""
        return weights_along(self.start, self.delta, self.end, t)


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


def chord_prediction(network: Network, batch: object, span: ChordSpan, rule: QuadratureRule) -> tuple[Tensor, Tensor]:
    """What one chord adds to the prediction and to the bias, at the least cost: one derivative per point of the rule.

    The prediction's part is that of `chord_terms`, its examples and its decay taken as one direction. Decay's part of
    the bias is taken at the middle of the chord only: the bias is what fidelity measures the learned change from.

    Args:
        network: The network.
        batch: Queries.
        span: The chord.
        rule: Quadrature along it.

    Returns:
        Prediction's and bias's part, ``[n, K]`` each.
    """
    both = {name: d + span.decay[name] if name in span.decay else d for name, d in span.examples.items()}
    both = {**span.decay, **both}
    total = torch.zeros(())
    for t, w in zip(rule.points, rule.weights, strict=True) if both else ():
        total = total + w * network.jvps(batch, span.weights(t), span.end_buffers, [both])[0]
    base = torch.zeros(())
    if span.decay:
        base = network.jvps(batch, span.weights(0.5), span.end_buffers, [span.decay])[0]
    if span.end_buffers:
        after = network.outputs(batch, span.start, span.end_buffers)
        buffers = after - network.outputs(batch, span.start, span.start_buffers)
        total, base = total + buffers, base + buffers
    return total, base
