"""Exact contributions by brute force. Uses nothing of the package.

One chord per optimiser step with Gauss points along it, every per-example gradient whole; momentum and Adam's second
moments are followed step by step. The gradient of a row of a batch is its share ``sum_t g_t a_t^T`` of the batch's
gradient, from hooks on the layers of a forward pass in training mode, so that batch norm may mix the rows; the shares
must add up to ``p.grad``. Queries are in evaluation mode, with the buffers that the step leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import BATCH, EPOCHS, Case, Data

__all__ = ["Exact", "Training", "exact_contributions", "train"]

TOGETHER = 24
Weights = dict[str, Tensor]


class Listener:
    """What wants to know of a training run's batches and steps; does nothing."""

    def begin_batch(self, rows: Tensor) -> None:
        """A batch of these examples comes."""

    def before_backward(self) -> None:
        """Its gradients come."""

    def after_backward(self) -> None:
        """They are all in."""

    def before_step(self) -> None:
        """The optimiser's gradients are complete."""

    def after_step(self) -> None:
        """It has moved the weights."""

    def end_batch(self) -> None:
        """The batch is over."""


@dataclass
class Training:
    """A training run: the trained network, and state and clipping factor of every step."""

    case: Case
    data: Data
    module: nn.Module
    options: dict[str, Any]
    rates: list[float]
    batches: list[Tensor]
    states: list[Weights]
    received: list[Weights]
    factors: list[float]


def _state(module: nn.Module) -> Weights:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().clone() for name, value in named.items() if value.is_floating_point()}


def train(
    case: Case, seed: int, data: Data, listeners: Callable[..., Sequence[Listener]] = lambda *_: (), keep: bool = True
) -> Training:
    """Train a case.

    Args:
        case: Which.
        seed: Of the weights and the order of the batches.
        data: Its data.
        listeners: ``(module, optimizer, steps)`` -> who is told of every batch and step.
        keep: Whether every step's weights and gradients are kept, or the last weights only.

    Returns:
        The run.
    """
    torch.manual_seed(seed)
    module = case.network().train()
    optimizer = case.optimizer(module.parameters())
    generator = torch.Generator().manual_seed(seed)
    size = BATCH * case.accumulate
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(data.x), generator=generator).split(size)]
    rates = [factor * optimizer.param_groups[0]["lr"] for factor in case.rates(len(batches))]
    told = listeners(module, optimizer, len(batches))
    states, received, factors = [_state(module)], [], []
    for rows, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for part in rows.split(BATCH):
            for each in told:
                each.begin_batch(part)
            loss = F.cross_entropy(module(data.x[part]), data.y[part], reduction="sum") / len(rows)
            for each in told:
                each.before_backward()
            loss.backward()
            for each in told:
                each.after_backward()
        for each in told:
            each.before_step()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), case.clip or float("inf")))
        factors.append(min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0)
        if keep:
            received.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        optimizer.step()
        for each in told:
            each.after_step()
            each.end_batch()
        states = [*states, _state(module)] if keep else [_state(module)]
    return Training(case, data, module, optimizer.param_groups[0], rates, batches, states, received, factors)


# shares of the rows of a batch


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> Weights:
    g, x = g.reshape(len(g), -1, g.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
    return {"weight": g.transpose(1, 2) @ x, "bias": g.sum(1)}


def _conv(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Weights:
    windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return {"weight": g.flatten(2) @ windows.transpose(1, 2), "bias": g.sum((2, 3))}


def _norm(layer: nn.BatchNorm2d | nn.LayerNorm, x: Tensor, g: Tensor) -> Weights:
    if isinstance(layer, nn.LayerNorm):
        seen = g * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        dims = tuple(range(1, g.dim() - 1))
    else:
        seen = g * F.batch_norm(x, None, None, training=True, eps=layer.eps)
        dims = (2, 3)
    return {"weight": seen.sum(dims), "bias": g.sum(dims)}


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> Weights:
    out = g.new_zeros(len(x), layer.num_embeddings, g.shape[-1])
    return {"weight": out.scatter_add_(1, x.unsqueeze(2).expand_as(g), g)}


SHARES: dict[type[nn.Module], Callable[..., Weights]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm,
    nn.LayerNorm: _norm,
    nn.Embedding: _embedding,
}


class _Shares:
    """Collects the shares of a backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.found: Weights = {}
        self._handles = [
            layer.register_forward_hook(self._watch(f"{name}.", SHARES[type(layer)]))
            for name, layer in module.named_modules()
            if type(layer) in SHARES
        ]

    def _watch(self, prefix: str, share: Callable[..., Weights]) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, own = inputs[0].detach(), dict(layer.named_parameters())

            def take(g: Tensor) -> None:
                for name, value in share(layer, x, g).items():
                    if name in own:
                        self.found[prefix + name] = value.flatten(1)

            output.register_hook(take)

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _flat(tensors: Weights, names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten(1) for name in names], 1)


class _Steps:
    """The run, step by step, with everything as flat rows of all weights."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self.module = run.case.network()
        self.names = [name for name, _ in self.module.named_parameters()]
        self.sizes = [p.numel() for p in self.module.parameters()]

    def gradients(self, step: int) -> Tensor:
        """Every row's share of the gradient that the optimiser received, ``[n, P]``."""
        run, module = self.run, self.module.train()
        module.load_state_dict(run.states[step], strict=False)
        module.zero_grad()
        parts = []
        for rows in run.batches[step].split(BATCH):
            shares = _Shares(module)
            loss = F.cross_entropy(module(run.data.x[rows]), run.data.y[rows], reduction="sum")
            (loss / len(run.batches[step])).backward()
            shares.close()
            parts.append(_flat(shares.found, self.names))
        found = torch.cat(parts) * run.factors[step]
        received = torch.cat([run.received[step][name].flatten() for name in self.names])
        gap = float((found.sum(0) - received).norm() / received.norm())
        if gap > 1e-4:
            raise AssertionError(f"rows of step {step} miss the gradient by {gap:.2g} of it, expected at most 1e-4")
        return found

    def scales(self) -> list[Tensor]:
        """Rate times D of every step, with the bias correction of Adam's momentum."""
        options, out, second = self.run.options, [], torch.zeros(1)
        for step, received in enumerate(self.run.received):
            if "betas" not in options:
                out.append(torch.tensor(self.run.rates[step]))
                continue
            first, beta = options["betas"]
            gradient = torch.cat([received[name].flatten() for name in self.names])
            second = beta * second + (1 - beta) * gradient.square()
            root = (second / (1 - beta ** (step + 1))).sqrt() + options["eps"]
            out.append(self.run.rates[step] * (1 - first) / (1 - first ** (step + 1)) / root)
        return out

    def mean_gradients(self, step: int, queries: Tensor, target: Tensor) -> Tensor:
        """Gradients of the queries' outputs averaged along the step, ``[Q, P]``."""
        start, end = self.run.states[step], self.run.states[step + 1]
        nodes, parts = np.polynomial.legendre.leggauss(self.run.case.points)
        module, total = self.module.eval(), torch.zeros(1)

        def output(weights: Weights, fixed: Weights, x: Tensor, wanted: Tensor) -> Tensor:
            return functional_call(module, {**weights, **fixed}, (x[None],))[0].gather(0, wanted[None])[0]

        fixed = {name: value for name, value in end.items() if name not in self.names}
        for t, w in zip((nodes + 1) / 2, parts / 2, strict=True):
            weights = {name: start[name] + float(t) * (end[name] - start[name]) for name in self.names}
            with sdpa_kernel(SDPBackend.MATH):
                found = vmap(grad(output), (None, None, 0, 0), chunk_size=TOGETHER)(weights, fixed, queries, target)
            total = total + float(w) * _flat(found, self.names)
        return total

    def bias(self, step: int, queries: Tensor, target: Tensor, tangent: Tensor) -> Tensor:
        """What weight decay and buffers do to the outputs in a step, ``[Q]``."""
        decay = self.run.rates[step] * self.run.options["weight_decay"]
        start, end = self.run.states[step], self.run.states[step + 1]
        weights = {name: start[name] for name in self.names}
        moved = {**end, **weights}
        out = -decay * (tangent @ torch.cat([w.flatten() for w in weights.values()]))
        if len(moved) == len(weights):
            return out
        after, before = self.outputs(moved, queries), self.outputs(start, queries)
        return out + (after - before).gather(1, target[:, None])[:, 0]

    def outputs(self, state: Weights, queries: Tensor) -> Tensor:
        """The network's outputs with these weights and buffers, ``[Q, K]``."""
        with torch.no_grad():
            out: Tensor = functional_call(self.module.eval(), state, (queries,))
        return out


@dataclass(frozen=True)
class Exact:
    """What brute force found.

    Attributes:
        contributions: ``[Q, N]``.
        own: Self-influences, ``[N]``.
        target: The output explained of each query, ``[Q]``.
        unexplained: What contributions, decay and buffers miss of the learned change, relative to it: the reference's
            own error.
    """

    contributions: Tensor
    own: Tensor
    target: Tensor
    unexplained: float


def exact_contributions(run: Training) -> Exact:
    """Contributions to the queries' largest outputs, summed backwards over the steps.

    Args:
        run: With weights and gradients kept.

    Returns:
        The contributions.
    """
    steps, queries, x = _Steps(run), run.data.queries, run.data.x
    last, first = steps.outputs(run.states[-1], queries), steps.outputs(run.states[0], queries)
    target = last.argmax(1)
    keep = run.options["betas"][0] if "betas" in run.options else run.options["momentum"]
    exact, own, bias = torch.zeros(len(queries), len(x)), torch.zeros(len(x)), torch.zeros(len(queries))
    pulled, moved, scales = torch.zeros(1), torch.zeros(1), steps.scales()
    for step in reversed(range(len(run.batches))):
        tangent = steps.mean_gradients(step, queries, target)
        pulled = keep * pulled + scales[step] * tangent
        moved = keep * moved + scales[step]
        gradients, rows = steps.gradients(step), run.batches[step]
        exact.index_add_(1, rows, -pulled @ gradients.T)
        own.index_add_(0, rows, -(gradients.square() * moved).sum(1) * len(rows))
        bias = bias + steps.bias(step, queries, target, tangent)
    change = (last - first).gather(1, target[:, None])[:, 0]
    missed = float((change - bias - exact.sum(1)).norm() / change.norm())
    return Exact(exact, own, target, missed)
