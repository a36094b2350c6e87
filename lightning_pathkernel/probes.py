"""Validation examples followed during training: their running prediction by the kernel machine, and its errors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.functional import kernel_machine_fidelity
from lightning_pathkernel.ledger import LEDGER_TERMS, bias, chord_terms, fidelity_metrics
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.recording.basis import probe_gradients, random_cotangent

__all__ = ["ProbeTracker"]

_VELOCITY_PROBES = 32


class ProbeTracker:
    """Keeps the ledger of a batch of probes up to date, chord by chord.

    Args:
        network: The network in training, at its first weights.
        probes: A batch of validation examples.
        rule: Quadrature along each chord: the kernel machine's.
        seed: Seed of the fixed cotangents under which tangent kernels are compared.
    """

    def __init__(self, network: Network, probes: object, rule: QuadratureRule, seed: int) -> None:
        self._network = network
        self._probes = probes
        self._rule = rule
        self._seed = seed
        self._start, self._start_buffers = network.weights(), network.buffers()
        self._initial = network.outputs(probes)
        self._terms = {name: torch.zeros_like(self._initial) for name in LEDGER_TERMS}
        self._terms["initial"] = self._initial
        self._left = self._initial.clone()
        self._tangent_kernel = self._kernel_matrix()
        self._velocity = 0.0

    def advance(self, chord: Chord) -> None:
        """Take in a closed chord; the network stands at its last node."""
        self._terms, self._left = self._after(chord)
        now = self._kernel_matrix()
        cosine = torch.nn.functional.cosine_similarity(now.flatten(), self._tangent_kernel.flatten(), dim=0)
        self._velocity, self._tangent_kernel = float(1 - cosine), now

    def _after(self, chord: Chord) -> tuple[dict[str, Tensor], Tensor]:
        for name, weight in chord.start.items():  # one that was frozen until now begins where it stood
            self._start.setdefault(name, weight)
        found = chord_terms(self._network, self._probes, chord.span(), self._rule)
        terms = {name: self._terms[name] + found.get(name, 0) for name in LEDGER_TERMS}
        slope = self._network.jvps(self._probes, chord.start, chord.start_buffers, [chord.delta])[0]
        return terms, self._left + slope + found["buffers"]

    def _kernel_matrix(self) -> Tensor:
        """Tangent kernel of a few probes under fixed random cotangents, whole gradients, ``[m, m]``."""
        generator = torch.Generator().manual_seed(self._seed)
        blocks = probe_gradients(self._network, self._probes, random_cotangent(generator), rows=_VELOCITY_PROBES)
        gram: Tensor | None = None
        for uses in blocks.values():
            whole = torch.stack([use.dense() for use in uses]).sum(0).flatten(1)
            gram = whole @ whole.T if gram is None else gram + whole @ whole.T
        if gram is None:
            raise RuntimeError("the probes' gradients are empty")
        return gram

    def metrics(self, open_chord: Chord | None) -> dict[str, float]:
        """The metrics at this moment of training.

        Args:
            open_chord: The chord in progress as if it ended here, or None right after a node.

        Returns:
            Name -> value: ``fidelity``, ``agreement``, the error budget (norms relative to the learned change
            ``f - b``), ``fidelity_left``, ``fidelity_linearized`` and ``kernel_velocity``.
        """
        terms, left = (self._terms, self._left) if open_chord is None else self._after(open_chord)
        now = self._network.outputs(self._probes)
        direction = {name: w - self._start[name] for name, w in self._network.weights().items()}
        slope = self._network.jvps(self._probes, self._start, self._start_buffers, [direction])[0]
        return {
            **fidelity_metrics(terms, now),
            "fidelity_left": float(kernel_machine_fidelity(left, now, bias(terms))),
            "fidelity_linearized": float(kernel_machine_fidelity(self._initial + slope, now, self._initial)),
            "kernel_velocity": self._velocity,
        }
