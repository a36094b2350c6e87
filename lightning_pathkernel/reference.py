"""The path kernel, slow and obviously right: loops, float64, one chord per optimiser step.

Imports none of the fast code and is its judge. The optimisers are written out from torch's documentation, and every
per-example gradient of every step is kept, so only small networks without buffers fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_pathkernel.reference_optimizers import (
    ReferenceAdadelta,
    ReferenceAdagrad,
    ReferenceAdam,
    ReferenceAdamax,
    ReferenceNAdam,
    ReferenceOptimizer,
    ReferenceRAdam,
    ReferenceResponse,
    ReferenceRMSprop,
    ReferenceRprop,
    ReferenceSGD,
)

__all__ = [
    "ReferenceAdadelta",
    "ReferenceAdagrad",
    "ReferenceAdam",
    "ReferenceAdamax",
    "ReferenceNAdam",
    "ReferencePathKernel",
    "ReferenceRAdam",
    "ReferenceRMSprop",
    "ReferenceRprop",
    "ReferenceSGD",
]

LossFn = Callable[[Tensor, Tensor], Tensor]
"""``(output [K], target) -> scalar``: the loss of one example."""
OutputFn = Callable[[Tensor], Tensor]
"""``output [K] -> scalar``: what is explained of one query."""
Batch = tuple[Sequence[int], Tensor, Tensor]
"""Ids, inputs and targets of one optimiser step."""


class ReferencePathKernel:
    """Trains a network by itself and keeps everything, eq. (4) to (7) of docs/theory.md with one chord per step.

    Args:
        module: The network, without buffers; a float64 copy is trained, in evaluation mode.
        loss: Loss of one example; a step's loss is its mean over the batch.
        batches: One per optimiser step.
        optimizer: The optimiser.
        learning_rates: Rate of every step; None for the optimiser's own.
        max_norm: Clip each step's gradient to this norm, as `torch.nn.utils.clip_grad_norm_` does.
        points: Gauss-Legendre points along each step.

    Raises:
        ValueError: If the module has buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFn,
        batches: Sequence[Batch],
        optimizer: ReferenceOptimizer,
        learning_rates: Sequence[float] | None = None,
        max_norm: float | None = None,
        points: int = 8,
    ) -> None:
        if next(module.buffers(), None) is not None:
            raise ValueError("the reference has no place for buffers: use a network without them")
        self.module = copy.deepcopy(module).double().eval()
        self.optimizer = optimizer
        schedule = learning_rates or [optimizer.lr] * len(batches)
        self.rates = [optimizer.rate(lr, step) for step, lr in enumerate(schedule)]
        nodes, quadrature = np.polynomial.legendre.leggauss(points)
        self._rule = list(zip((nodes + 1) / 2, quadrature / 2, strict=True))
        self.ids = sorted({int(i) for ids, _, _ in batches for i in ids})
        self.weights = [self._flat(self.module.parameters())]
        self.preconditioners: list[Tensor] = []
        self.decay: list[Tensor] = []
        self.shares: list[dict[int, Tensor]] = []
        self._response = ReferenceResponse(optimizer)
        for (ids, x, y), lr in zip(batches, schedule, strict=True):
            self._step(self._per_example(loss, ids, x, y, max_norm), lr)

    @staticmethod
    def _flat(tensors: object) -> Tensor:
        return torch.cat([t.detach().flatten() for t in tensors]).clone()  # type: ignore[attr-defined]

    def _load(self, flat: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(flat, self.module.parameters())

    def _gradient(self, scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(scalar, list(self.module.parameters()), allow_unused=True)
        pairs = zip(found, self.module.parameters(), strict=True)
        return self._flat([torch.zeros_like(p) if g is None else g for g, p in pairs])

    def _per_example(
        self, loss: LossFn, ids: Sequence[int], x: Tensor, y: Tensor, max_norm: float | None
    ) -> dict[int, Tensor]:
        """Each example's part of the step's gradient, after the mean and clipping, signed as it is descended."""
        sign = -1.0 if self.optimizer.maximize else 1.0
        rows: dict[int, Tensor] = {}
        for position, example in enumerate(ids):
            output = self.module(_double(x[position : position + 1]))[0]
            gradient = sign * self._gradient(loss(output, _double(y[position]))) / len(ids)
            rows[int(example)] = rows.get(int(example), 0) + gradient
        if max_norm is not None:
            coefficient = min(1.0, max_norm / (float(torch.stack(list(rows.values())).sum(0).norm()) + 1e-6))
            rows = {example: coefficient * row for example, row in rows.items()}
        return rows

    def _step(self, rows: dict[int, Tensor], lr: float) -> None:
        """One update, example by example."""
        received = torch.stack(list(rows.values())).sum(0)
        shares, decay, diagonal = self._response.step(rows, received, self.weights[-1], lr)
        self.shares.append({example: shares.get(example, torch.zeros_like(decay)) for example in self.ids})
        self.decay.append(decay)
        self.preconditioners.append(diagonal)
        self.weights.append(self.weights[-1] + torch.stack(list(shares.values())).sum(0) + decay)
        self._load(self.weights[-1])

    def output(self, x: Tensor, output_fn: OutputFn, step: int = -1) -> Tensor:
        """The explained scalar of each query at the weights of a step (-1: the last), ``[Q]``."""
        self._load(self.weights[step])
        return torch.stack([output_fn(self.module(_double(row.unsqueeze(0)))[0]).detach() for row in x])

    def _mean_gradient(self, row: Tensor, output_fn: OutputFn, step: int) -> Tensor:
        """The query's gradient averaged along one step, eq. (2)."""
        start, end = self.weights[step], self.weights[step + 1]
        total = torch.zeros_like(start)
        for t, w in self._rule:
            self._load(start + t * (end - start))
            total += w * self._gradient(output_fn(self.module(_double(row.unsqueeze(0)))[0]))
        return total

    def contributions(self, x: Tensor, output_fn: OutputFn) -> Tensor:
        """``c_i(x)`` of eq. (7), ``[Q, N]``, columns in the order of ``ids``."""
        out = torch.zeros(len(x), len(self.ids), dtype=torch.float64)
        for q, row in enumerate(x):
            for step, shares in enumerate(self.shares):
                gradient = self._mean_gradient(row, output_fn, step)
                for j, example in enumerate(self.ids):
                    out[q, j] += gradient @ shares[example]
        return out

    def bias(self, x: Tensor, output_fn: OutputFn) -> Tensor:
        """``b(x)`` of eq. (7): the initial model and weight decay, ``[Q]``."""
        out = self.output(x, output_fn, 0)
        for q, row in enumerate(x):
            for step, decay in enumerate(self.decay):
                if bool(decay.any()):
                    out[q] += self._mean_gradient(row, output_fn, step) @ decay
        return out

    def predict(self, x: Tensor, output_fn: OutputFn) -> Tensor:
        """``b(x) + sum_i c_i(x)``, ``[Q]``."""
        return self.bias(x, output_fn) + self.contributions(x, output_fn).sum(1)

    def kernel(self, x: Tensor, x2: Tensor, output_fn: OutputFn, output_fn2: OutputFn) -> Tensor:
        """The path kernel ``sum_s rate_s * integral of J D J'^T``, ``[Q, Q2]``."""
        out = torch.zeros(len(x), len(x2), dtype=torch.float64)
        for step, (rate, diagonal) in enumerate(zip(self.rates, self.preconditioners, strict=True)):
            start, end = self.weights[step], self.weights[step + 1]
            for t, w in self._rule:
                self._load(start + t * (end - start))
                one = [self._gradient(output_fn(self.module(_double(r.unsqueeze(0)))[0])) for r in x]
                two = [self._gradient(output_fn2(self.module(_double(r.unsqueeze(0)))[0])) for r in x2]
                for i, a in enumerate(one):
                    for j, b in enumerate(two):
                        out[i, j] += rate * w * (a * diagonal) @ b
        return out


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
