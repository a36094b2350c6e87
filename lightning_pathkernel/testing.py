"""Proofs for rules: use them for your own layers, optimisers and sketches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture import GradientCapture, PerExampleGradient, RowGroup, plan_capture
from lightning_pathkernel.capture.gradients import DenseGradient
from lightning_pathkernel.optim import OptimizerRule, ParameterUpdate, optimizer_rule
from lightning_pathkernel.sketch import KroneckerSketch, SideMoments, SketchSettings, fit_sketch
from lightning_pathkernel.tiny import tiny_machine

__all__ = ["assert_layer_rule", "assert_optimizer_rule", "assert_sketch", "captured_gradients", "tiny_machine"]


def captured_gradients(
    model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor], n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per-example gradients by the hooks and whole gradients by autograd, from one backward pass.

    Args:
        model: The model.
        args: Its arguments.
        loss: Output of the model -> scalar.
        n: Number of examples.

    Returns:
        Parameter -> ``[n, *shape]`` and parameter -> ``p.grad``; gradients are cleared.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_pathkernel.testing import captured_gradients
        >>> rows, whole = captured_gradients(nn.Linear(2, 1), (torch.eye(2),), torch.sum, n=2)
        >>> rows["weight"], whole["weight"]
        (tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 1.]]]), tensor([[1., 1.]]))
    """
    parts: dict[str, Tensor] = {}

    def sink(group: int, name: str, gradient: PerExampleGradient) -> None:
        value = gradient.project(None, None)
        parts[name] = parts[name] + value if name in parts else value

    plan = plan_capture(model)
    capture = GradientCapture(model, plan).attach()
    try:
        capture.begin([RowGroup(n)])
        value = loss(model(*args))
        capture.listen(sink)
        value.backward()
        capture.check()
    finally:
        capture.detach()
    whole = {name: p.grad.clone() for name, p in plan.parameters.items() if p.grad is not None}
    model.zero_grad()
    return {name: value.reshape(n, *plan.parameters[name].shape) for name, value in parts.items()}, whole


def _by_torch_func(
    model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor], dims: tuple[int | None, ...]
) -> Mapping[str, Tensor]:
    """Per-example gradients by a loop of whole backward passes over batches of one."""
    n = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(n):
        one = [a if d is None else a.narrow(d, i, 1) for a, d in zip(args, dims, strict=True)]
        found = torch.autograd.grad(loss(model(*one)), list(parameters.values()), allow_unused=True)
        pairs = zip(found, parameters.values(), strict=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(parameters)}


def assert_layer_rule(
    model: nn.Module,
    args: tuple[Any, ...],
    dims: tuple[int | None, ...] = (0,),
    rtol: float | None = None,
    mixes_rows: bool = False,
) -> None:
    """Prove that the captured per-example gradients of a model are right.

    They must equal those of batches of one, and add up to ``p.grad``. The loss is a fixed random quadratic of all
    outputs, summed over the examples.

    Args:
        model: A layer, or a model that contains it.
        args: Arguments for a batch.
        dims: For every argument the dimension that holds the examples, or None.
        rtol: Tolerance relative to a parameter's largest entry; None for 1e-5 in float32 and 1e-10 in float64.
        mixes_rows: The forward pass mixes rows, as batch norm does: only the sum is compared.

    Raises:
        AssertionError: Naming the parameter, the index, both values and their ratio.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_pathkernel.testing import assert_layer_rule
        >>> assert_layer_rule(nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 8),))
    """
    n = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    double = next(model.parameters()).dtype == torch.float64
    rtol = rtol if rtol is not None else (1e-10 if double else 1e-5)

    def loss(output: Any) -> Tensor:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        return torch.stack([(t.sin() + 0.5 * t**2).sum() for t in tensors]).sum()

    rows, whole = captured_gradients(model, args, loss, n)
    for name, gradient in whole.items():
        if name not in rows:
            raise AssertionError(f"{name}: no per-example gradient was captured")
        _close(name, rows[name].sum(0), gradient, 10 * rtol)
    if mixes_rows:
        return
    for name, expected in _by_torch_func(model, args, loss, dims).items():
        if name in rows or bool(expected.any()):
            _close(name, rows[name], expected, rtol)


def _close(name: str, found: Tensor, expected: Tensor, rtol: float) -> None:
    scale = float(expected.abs().max())
    gap = (found - expected).abs()
    if float(gap.max()) <= rtol * max(scale, 1e-12):
        return
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    raise AssertionError(
        f"{name}{list(at)}: found {float(found[at]):.10g}, expected {float(expected[at]):.10g}, ratio "
        f"{float(found[at] / expected[at]):.6g}, tolerance {rtol:g} of {scale:.6g}"
    )


def assert_optimizer_rule(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 8, rtol: float = 1e-5
) -> None:
    """Prove, step by step, that a rule's scalars and preconditioner give the displacement that the optimiser makes.

    Every example's gradient passes through a momentum buffer of its own; the sum over examples plus decay must be the
    true displacement. There are three parameters, one of which has no gradient in every third step; every parameter has
    a coordinate whose gradient is always 0; and all learning rates are halved midway.

    Args:
        make: Builds the optimiser from parameters.
        steps: Optimiser steps.
        rtol: Tolerance relative to the displacement's largest entry.

    Raises:
        AssertionError: At the first step that does not fit.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.testing import assert_optimizer_rule
        >>> assert_optimizer_rule(lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1))
    """
    generator = torch.Generator().manual_seed(0)
    followed = [_Followed(i, shape, generator) for i, shape in enumerate([(7,), (3, 2), (4,)])]
    optimizer = make([one.parameter for one in followed])
    rule = optimizer_rule(optimizer)
    for step in range(steps):
        if step == steps // 2:
            _halve_rates(optimizer)
        for one in followed:
            one.receive(generator, idle=one is followed[-1] and step % 3 == 1)
        optimizer.step()
        for group in optimizer.param_groups:
            ids = {id(p) for p in group["params"] if p.grad is not None}
            _prove_step(rule, optimizer, group, [one for one in followed if id(one.parameter) in ids], step, rtol)


def _halve_rates(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.5)
        else:
            group["lr"] *= 0.5


class _Followed:
    """A parameter, three examples' gradients and their own momentum buffers; weight decay is the fourth of each."""

    def __init__(self, number: int, shape: tuple[int, ...], generator: torch.Generator) -> None:
        self.name = f"parameter {number}"
        self.parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.buffers = torch.zeros(4, *shape, dtype=torch.float64)
        self.first = True
        self.before = self.pulled = torch.empty(0)
        self.rows = torch.empty(0)

    def receive(self, generator: torch.Generator, idle: bool) -> None:
        """New gradients, before a step."""
        self.before = self.parameter.detach().clone()
        self.rows = torch.randn(3, *self.before.shape, generator=generator, dtype=torch.float64)
        self.rows[:, -1] = 0
        self.parameter.grad = None if idle else self.rows.sum(0)

    def direction(self, update: ParameterUpdate) -> Tensor:
        """What D multiplies, by the header of `lightning_pathkernel.optim.rules`."""
        self.first = False
        self.pulled = torch.cat([update.sign * self.rows, update.coupled_decay * self.before.unsqueeze(0)])
        if update.before_buffer:
            return self.pulled.sum(0)
        self.buffers = update.keep * self.buffers + update.inject * self.pulled
        return (self._mixed(update) if update.from_gradient else self.buffers).sum(0)

    def _mixed(self, update: ParameterUpdate) -> Tensor:
        return update.from_buffer * self.buffers + update.from_gradient * self.pulled

    def displacements(self, update: ParameterUpdate, preconditioner: Tensor) -> Tensor:
        """Every example's part of the step, and that of coupled decay."""
        if not update.before_buffer:
            return -update.rate * preconditioner * self._mixed(update)
        self.pulled = preconditioner * self.pulled
        self.buffers = update.keep * self.buffers + update.inject * self.pulled
        return -update.rate * self._mixed(update)


def _prove_step(
    rule: OptimizerRule,
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    followed: list[_Followed],
    step: int,
    rtol: float,
) -> None:
    """Parameters with equal scalars are asked for together, as a recorder asks."""
    alike: dict[ParameterUpdate, list[_Followed]] = {}
    for one in followed:
        alike.setdefault(rule.update(group, optimizer.state[one.parameter], one.first), []).append(one)
    for update, several in alike.items():
        states = [optimizer.state[one.parameter] for one in several]
        directions = [one.direction(update) for one in several]
        denominators = (
            rule.denominators(group, states, directions) if rule.diagonal else [torch.ones(()) for _ in several]
        )
        for one, state, denominator in zip(several, states, denominators, strict=True):
            where = f"{one.name}, step {step}"
            parts = one.displacements(update, denominator.reciprocal()).sum(0)
            moved = one.parameter.detach() - one.before
            _close(f"{where}, displacement", parts - update.decay_rate * one.before, moved, rtol)
            buffer = rule.buffer(state)
            if buffer is not None and update.from_buffer:
                _close(f"{where}, momentum buffer", one.buffers.sum(0), buffer, rtol)
            if rule.diagonal and bool((parts != 0)[~rule.moved(group, state)].any()):
                raise AssertionError(f"{where}: weights have moved that the mask of moved weights leaves out")
            # a caller may overwrite them: if they are the optimiser's state, the next step shows it
            denominator.fill_(torch.nan)


def assert_sketch(kind: str, width: int = 6, exact: bool = True, rtol: float = 1e-8) -> None:
    """Prove what every registered sketch must give: exactness or unbiasedness, reproducibility, privacy.

    Gradients ``[5, 9, 11]`` whose rows and columns span 2 dimensions are fitted with ``width`` rows per factor, in
    float64. Inner products must come out exactly, or right on average; the same seed must give the same factors; the
    global random state must stay as it is; and bringing features back must be the adjoint of the query side.

    Args:
        kind: Key of the registry of sketches.
        width: Rows of a thin factor; at least 2, so that the gradients' span fits.
        exact: Whether the fitted span must be kept exactly; else the mean over 400 seeds must be right to 5 standard
            errors, as for purely random factors.
        rtol: Tolerance relative to the largest inner product.

    Raises:
        AssertionError: With the first property that does not hold.

    Examples:
        >>> from lightning_pathkernel.testing import assert_sketch
        >>> assert_sketch("balanced")
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(d, 2, generator=generator, dtype=torch.float64) for d in (9, 11))
    train, query = left @ torch.randn(2, 5, 2, 2, generator=generator, dtype=torch.float64) @ right.T
    state = torch.get_rng_state()
    one, two = (_fitted(kind, train, query, width, seed=1) for _ in range(2))
    if not torch.equal(torch.get_rng_state(), state):
        raise AssertionError(f"sketch {kind!r} draws from the global random generator")
    for name, factor in one.tensors().items():
        if not torch.equal(factor, two.tensors()[name]):
            raise AssertionError(f"sketch {kind!r}: {name} differs between two fits from one seed")
    found, expected = _products(one, query, train), query.flatten(1) @ train.flatten(1).T
    back = one.synthesise(one.train(DenseGradient(train))).flatten(1)
    _close(f"sketch {kind!r}, adjoint", query.flatten(1) @ back.T, found, rtol)
    if exact:
        _close(f"sketch {kind!r}, inner products", found, expected, rtol)
        return
    draws = torch.stack([_products(_fitted(kind, train, query, width, seed), query, train) for seed in range(400)])
    if bool(((draws.mean(0) - expected).abs() > 5 * draws.std(0) / len(draws) ** 0.5).any()):
        raise AssertionError(f"sketch {kind!r} is biased: means {draws.mean(0)} for inner products {expected}")


def _fitted(kind: str, train: Tensor, query: Tensor, width: int, seed: int) -> KroneckerSketch:
    (rows, columns), (query_rows, query_columns) = (DenseGradient(side).moments() for side in (train, query))
    settings = SketchSettings(kind, width, ridge=1e-12)
    sides = SideMoments(rows, query_rows), SideMoments(columns, query_columns)
    return fit_sketch(*sides, settings, torch.Generator().manual_seed(seed))


def _products(sketch: KroneckerSketch, query: Tensor, train: Tensor) -> Tensor:
    return sketch.query(DenseGradient(query)) @ sketch.train(DenseGradient(train)).T
