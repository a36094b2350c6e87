"""Contributions computed again, from what a witness of an unrecorded fit has noted.

Knows nothing of the recorder: gradients of single rows by `torch.autograd.grad`, optimisers written out from torch's
documentation, clipping by its formula, and Gauss points along every single step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_pathkernel.reference_optimizers import ReferenceOptimizer, ReferenceResponse

POINTS = 6
Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Use:
    """What one backward pass brought to a network's outputs: ids, inputs, cotangents and the loss scale in them."""

    ids: list[int]
    x: Tensor
    cotangent: Tensor
    scale: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step: weights before and after, gradients received, options of every parameter, uses, buffers."""

    before: Weights
    after: Weights
    received: Weights
    options: Mapping[str, Mapping[str, Any]]
    uses: list[Use]
    buffers: Weights

    def blocks(self) -> dict[int, list[str]]:
        """Names of the parameters that have a gradient, by parameter group."""
        found: dict[int, list[str]] = {}
        for name in self.received:
            found.setdefault(self.options[name]["block"], []).append(name)
        return found


class Witness(pl.Callback):
    """Notes every optimiser step of a fit."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._pending: list[Use] = []
        self._before: Weights = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.witness, self._trainer, self._net = self, trainer, pl_module.net
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._enter)
            optimizer.register_step_post_hook(self._leave)

    def see(self, batch: Any, outputs: Tensor) -> None:
        if outputs.requires_grad:
            ids, x = batch[2].tolist(), batch[0].detach().clone()
            outputs.register_hook(lambda back: self._pending.append(Use(ids, x, back.clone(), self._scale())))

    def _scale(self) -> float:
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._pending = []

    def _weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self._net.named_parameters()}

    def _buffers(self) -> Weights:
        return {name: b.detach().clone() for name, b in self._net.named_buffers() if b.is_floating_point()}

    def _of(self, optimizer: Any) -> dict[str, Mapping[str, Any]]:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        return {name: groups[id(p)] for name, p in self._net.named_parameters() if id(p) in groups}

    def _enter(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before = self._weights()

    def _leave(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Lightning's closure makes the gradients within the step, so they are read after it."""
        options = {n: {**g, "block": id(g)} for n, g in self._of(optimizer).items()}
        named = self._net.named_parameters()
        received = {n: p.grad.detach().clone() for n, p in named if n in options and p.grad is not None}
        self.steps.append(Step(self._before, self._weights(), received, options, self._pending, self._buffers()))
        self._pending = []


@dataclasses.dataclass(frozen=True)
class Judge:
    """Contributions of a fit, from a witness's notes.

    Attributes:
        net: The network.
        steps: The notes.
        reference: The optimiser.
        max_norm: Norm that gradients were clipped to.
        rounding: Of single rows' sum against what the optimiser received, relative; None to leave that unchecked.
        forward_fn: Outputs of queries, ``(module, batch) -> [n, K]``.
        together: Take all examples for one, of id 0, whose gradient is the whole: for networks that mix rows.
    """

    net: nn.Module
    steps: Sequence[Step]
    reference: ReferenceOptimizer
    max_norm: float | None = None
    rounding: float | None = 1e-6
    forward_fn: Callable[[Any, Any], Tensor] = lambda module, x: module(x)
    together: bool = False

    def contributions(self, x: Tensor, target: Tensor) -> tuple[list[int], Tensor]:
        """Ids of all examples, sorted, and ``c_i(x)``, ``[Q, N]``."""
        net, responses = copy.deepcopy(self.net).double().eval(), dict[str, ReferenceResponse]()
        parts: dict[int, Tensor] = {}
        for step in self.steps:
            rows = self._rows(net, step)
            tangents = self._mean_gradients(net, step, x, target, list(rows))
            for names in step.blocks().values():
                tangent = torch.cat([tangents[name].flatten(1) for name in names], 1)
                for example, share in self._shares(step, rows, names, responses).items():
                    parts[example] = parts.get(example, 0) + tangent @ share
        return sorted(parts), torch.stack([parts[example] for example in sorted(parts)], 1)

    def _rows(self, net: nn.Module, step: Step) -> dict[str, dict[int, Tensor]]:
        """Parameter -> example -> its part of the gradient, after clipping."""
        if self.together:
            return {name: {0: gradient.double()} for name, gradient in step.received.items()}
        names, weights = list(step.received), _double(step.before)
        for name in names:
            weights[name].requires_grad_()
        rows: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for use in step.uses:
            for i, example in enumerate(use.ids):
                output = functional_call(net, weights, (_double_input(use.x[i : i + 1]),))
                back = use.cotangent[i : i + 1].double() / use.scale
                found = torch.autograd.grad(output, [weights[n] for n in names], back, allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        rows[name][example] = rows[name].get(example, 0) + gradient
        if self.max_norm is not None:
            whole = torch.cat([sum(found.values()).flatten() for found in rows.values() if found])
            factor = min(1.0, self.max_norm / (float(whole.norm()) + 1e-6))
            rows = {name: {example: factor * g for example, g in found.items()} for name, found in rows.items()}
        return rows

    def _shares(
        self, step: Step, rows: dict[str, dict[int, Tensor]], names: list[str], responses: dict[str, ReferenceResponse]
    ) -> dict[int, Tensor]:
        """Example -> its part of the displacement of a block of parameters, all of them flat."""
        options, before = step.options[names[0]], _flat(step.before, names)
        received = _flat(step.received, names)
        flat = {
            example: torch.cat([rows[n].get(example, torch.zeros_like(step.before[n])).flatten() for n in names])
            for example in {example for name in names for example in rows[name]}
        }
        if names[0] not in responses:
            own = {key: options[key] for key in ("lr", "weight_decay") if hasattr(self.reference, key)}
            responses[names[0]] = ReferenceResponse(dataclasses.replace(self.reference, **own))
        sign = -1.0 if self.reference.maximize else 1.0
        signed = {example: sign * row for example, row in flat.items()}
        shares, decay, _ = responses[names[0]].step(signed, sign * received, before, options["lr"])
        if self.rounding is not None:
            _assert_close(sum(flat.values()), received, self.rounding, "the gradient")
            moved = _flat(step.after, names) - before
            _assert_close(sum(shares.values()) + decay, moved, 10 * self.rounding, "the step")
        return shares

    def _mean_gradients(self, net: nn.Module, step: Step, x: Tensor, target: Tensor, names: list[str]) -> Weights:
        """Gradients of the queries' outputs averaged along the step, by Gauss-Legendre points, ``[Q, *shape]``."""
        nodes, quadrature = np.polynomial.legendre.leggauss(POINTS)
        before, after = _double(step.before), _double(step.after)
        out = {name: torch.zeros(len(x), *before[name].shape, dtype=torch.float64) for name in names}
        for t, w in zip((nodes + 1) / 2, quadrature / 2, strict=True):
            weights = {name: torch.lerp(before[name], after[name], float(t)) for name in before}
            for name in names:
                weights[name].requires_grad_()
            state = {**weights, **_double(step.buffers)}
            outputs = self.forward_fn(lambda batch, at=state: functional_call(net, at, (batch,)), _double_input(x))
            for q in range(len(x)):
                found = torch.autograd.grad(
                    outputs[q, target[q]], [weights[n] for n in names], retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(names, found, strict=True):
                    out[name][q] += 0 if gradient is None else w * gradient
        return out


def _flat(weights: Weights, names: Sequence[str]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in names])


def _assert_close(found: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    gap = float((found - expected).norm() / expected.norm())
    assert gap <= rtol, f"the judge's rows miss {what} by {gap:.2g}"


def _double(weights: Weights) -> Weights:
    return {name: value.double().clone() for name, value in weights.items()}


def _double_input(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
