"""Validation examples followed during training: their running prediction by the kernel machine, and its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.functional import kernel_machine_agreement, kernel_machine_fidelity
from lightning_pathkernel.ledger import LEDGER_TERMS, ChordSpan, bias, chord_prediction, chord_terms, error_budget
from lightning_pathkernel.network import Network, Tensors, in_parts, take_rows
from lightning_pathkernel.pass_size import rows_at_once
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.recording.basis import ProbePasses, random_cotangent
from lightning_pathkernel.sketch import KroneckerSketch, SideMoments, SketchSettings, fit_sketch

__all__ = ["LEDGER_PROBES", "ProbeTracker"]

LEDGER_PROBES = 32
"""So many of the probes have a whole ledger, term by term; of the others only prediction and bias are followed."""
_CHUNK = 64
"""Most probes in one pass: more of them leave the processor's caches."""


@dataclass(frozen=True)
class Account:
    """What is known of the probes at a node.

    Attributes:
        terms: Term of `LEDGER_TERMS` -> ``[m, K]``, of the first probes.
        left: Prediction by the left-end rule, ``[m, K]``.
        others: Prediction and bias of all other probes, chunk by chunk, ``[n, K]`` each.
    """

    terms: dict[str, Tensor]
    left: Tensor
    others: list[tuple[Tensor, Tensor]]

    def prediction(self) -> Tensor:
        """Of all probes, ``[N, K]``."""
        return torch.cat([bias(self.terms) + self.terms["examples"], *(found for found, _ in self.others)])

    def bias(self) -> Tensor:
        """Of all probes, ``[N, K]``."""
        return torch.cat([bias(self.terms), *(base for _, base in self.others)])


class ProbeTracker:
    """Keeps the ledger of a batch of probes up to date, chord by chord.

    Args:
        network: The network in training, at its first weights.
        probes: A batch of validation examples.
        rule: Quadrature along each chord: the kernel machine's.
        seed: Seed of the fixed cotangents and projections under which tangent kernels are compared.
    """

    def __init__(self, network: Network, probes: object, rule: QuadratureRule, seed: int) -> None:
        self._network = network
        self._at_once = rows_at_once(network, probes, _CHUNK)
        self._first = take_rows(probes, slice(LEDGER_PROBES))
        self._first_parts = in_parts(self._first, self._at_once)
        self._others = in_parts(take_rows(probes, slice(LEDGER_PROBES, None)), self._at_once)
        self._rule = rule
        self._seed = seed
        self._start, self._start_buffers = network.weights(), network.buffers()
        self._initial = self._outputs()
        first, *others = self._initial
        terms = {name: torch.zeros_like(first) for name in LEDGER_TERMS}
        self.account = Account({**terms, "initial": first}, first.clone(), [(each, each) for each in others])
        self._sketches = _random_sketches(network, seed)
        self._tangent_kernel = self.kernel_matrix()
        self._velocity = 0.0

    def state(self) -> dict[str, Any]:
        """What is known of the probes, as plain values and tensors; the probes themselves are not in it."""
        account = {"terms": self.account.terms, "left": self.account.left, "others": self.account.others}
        return {
            "start": self._start, "start_buffers": self._start_buffers, "initial": self._initial, "account": account,
            "tangent_kernel": self._tangent_kernel, "velocity": self._velocity,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the tracker of the same probes whose `state` this was."""
        account = state["account"]
        others = [(found, base) for found, base in account["others"]]
        self.account = Account(dict(account["terms"]), account["left"], others)
        self._start, self._start_buffers = dict(state["start"]), dict(state["start_buffers"])
        self._initial = list(state["initial"])
        self._tangent_kernel, self._velocity = state["tangent_kernel"], float(state["velocity"])

    def _outputs(self) -> list[Tensor]:
        """The network's outputs now, chunk by chunk."""
        return [self._network.outputs(chunk) for chunk in (self._first, *self._others)]

    def advance(self, chord: Chord) -> None:
        """Take in a closed chord; the network stands at its last node."""
        self.account = self._after(chord)
        now = self.kernel_matrix()
        cosine = torch.nn.functional.cosine_similarity(now.flatten(), self._tangent_kernel.flatten(), dim=0)
        self._velocity, self._tangent_kernel = float(1 - cosine), now

    def _after(self, chord: Chord) -> Account:
        for name, weight in chord.start.items():  # one that was frozen until now begins where it stood
            self._start.setdefault(name, weight)
        before, span = self.account, chord.span()
        each = [chord_terms(self._network, part, span, self._rule) for part in self._first_parts]
        found = {name: torch.cat([terms[name] for terms in each]) for name in each[0]}
        terms = {name: before.terms[name] + found.get(name, 0) for name in LEDGER_TERMS}
        slope = self._slope(self._first_parts, chord.start, chord.start_buffers, chord.delta)
        others = [self._further(*pair, span) for pair in zip(self._others, before.others, strict=True)]
        return Account(terms, before.left + slope + found["buffers"], others)

    def _further(self, chunk: object, known: tuple[Tensor, Tensor], span: ChordSpan) -> tuple[Tensor, Tensor]:
        prediction, base = chord_prediction(self._network, chunk, span, self._rule)
        return known[0] + prediction, known[1] + base

    def kernel_matrix(self) -> Tensor:
        """Tangent kernel of the first probes under fixed random cotangents and projections, ``[m, m]``."""
        generator = torch.Generator().manual_seed(self._seed)
        features: dict[str, list[Tensor]] = {}
        cotangent = random_cotangent(generator)
        for blocks in ProbePasses(self._network, self._first, cotangent, LEDGER_PROBES, self._at_once):
            for name, uses in blocks.items():
                found = torch.stack([self._sketches[name].train(use) for use in uses]).sum(0)
                features.setdefault(name, []).append(found)
        grams = [whole @ whole.T for whole in map(torch.cat, features.values())]
        if not grams:
            raise RuntimeError("the probes' gradients are empty")
        return torch.stack(grams).sum(0)

    def metrics(self, open_chord: Chord | None) -> dict[str, float]:
        """The metrics at this moment of training.

        Args:
            open_chord: The chord in progress as if it ended here, or None right after a node.

        Returns:
            Name -> value. Of all probes: ``fidelity``, ``agreement`` and ``fidelity_linearized``. Of the first
            `LEDGER_PROBES`: the error budget (norms relative to the learned change ``f - b``), ``fidelity_left`` and
            ``kernel_velocity``.
        """
        account = self.account if open_chord is None else self._after(open_chord)
        chunks = self._outputs()
        now, initial = torch.cat(chunks), torch.cat(self._initial)
        return {
            "fidelity": float(kernel_machine_fidelity(account.prediction(), now, account.bias())),
            "agreement": float(kernel_machine_agreement(account.prediction(), now)),
            **error_budget(account.terms, chunks[0]),
            "fidelity_left": float(kernel_machine_fidelity(account.left, chunks[0], bias(account.terms))),
            "fidelity_linearized": float(kernel_machine_fidelity(initial + self._linear(), now, initial)),
            "kernel_velocity": self._velocity,
        }

    def _linear(self) -> Tensor:
        """Change of all probes' outputs by the tangent kernel at the initial weights, ``[N, K]``."""
        direction = {name: w - self._start[name] for name, w in self._network.weights().items()}
        parts = [*self._first_parts, *self._others]
        return self._slope(parts, self._start, self._start_buffers, direction)

    def _slope(self, parts: Sequence[object], weights: Tensors, buffers: Tensors, direction: Tensors) -> Tensor:
        return torch.cat([self._network.jvps(part, weights, buffers, [direction])[0] for part in parts])


def _random_sketches(network: Network, seed: int) -> dict[str, KroneckerSketch]:
    """One random sketch per parameter, those that learn only later included; the same at all nodes."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, parameter in network.plan.parameters.items():
        rows, columns = (SideMoments(parameter.new_zeros(1, d)) for d in matrix_shape(parameter.shape))
        out[name] = fit_sketch(rows, columns, SketchSettings("random"), generator)
    return out
