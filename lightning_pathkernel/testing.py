"""Proofs for rules: use them for your own layers, optimisers and sketches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture import GradientCapture, PerExampleGradient, RowGroup, plan_capture
from lightning_pathkernel.capture.gradients import DenseGradient
from lightning_pathkernel.optim import ParameterUpdate, optimizer_rule
from lightning_pathkernel.sketch import KroneckerSketch, SideMoments, SketchSettings, fit_sketch

__all__ = ["assert_layer_rule", "assert_optimizer_rule", "assert_sketch", "captured_gradients"]


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
    true displacement.

    Args:
        make: Builds the optimiser from parameters.
        steps: Optimiser steps.
        rtol: Tolerance relative to the displacement's largest entry.

    Raises:
        AssertionError: At the first step that does not fit.
    """
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    optimizer = make([parameter])
    rule = optimizer_rule(optimizer)
    buffers = torch.zeros(4, 7, dtype=torch.float64)
    for step in range(steps):
        rows = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        before = parameter.detach().clone()
        parameter.grad = rows.sum(0)
        optimizer.step()
        group, state = optimizer.param_groups[0], optimizer.state[parameter]
        update = rule.update(group, state, step == 0)
        pulled = torch.cat([update.sign * rows, update.coupled_decay * before.unsqueeze(0)])
        buffers = update.keep * buffers + update.inject * pulled
        direction = update.from_buffer * buffers + update.from_gradient * pulled
        shares = -update.rate * direction * _preconditioner(rule, group, state, parameter)
        found = shares.sum(0) - update.decay_rate * before
        _close(f"step {step}, displacement", found, parameter.detach() - before, rtol)
        _check_buffer(rule.buffer(state), update, buffers, step, rtol)


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


def _preconditioner(rule: Any, group: Mapping[str, Any], state: Mapping[str, Any], like: Tensor) -> Tensor:
    if not rule.diagonal:
        return torch.ones_like(like)
    denominator: Tensor = rule.denominators(group, [state])[0]
    return denominator.reciprocal()


def _check_buffer(buffer: Tensor | None, update: ParameterUpdate, rows: Tensor, step: int, rtol: float) -> None:
    if buffer is not None and update.from_buffer:
        _close(f"step {step}, momentum buffer", rows.sum(0), buffer, rtol)
