"""The reference against closed forms and against torch's own optimisers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.optim import optimizer_rules
from lightning_pathkernel.reference import (
    ReferenceAdadelta,
    ReferenceAdagrad,
    ReferenceAdam,
    ReferenceAdamax,
    ReferenceNAdam,
    ReferencePathKernel,
    ReferenceRAdam,
    ReferenceRMSprop,
    ReferenceRprop,
    ReferenceSGD,
)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).sum()


def first(output: Tensor) -> Tensor:
    return output[0]


def data(n: int = 6, d: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(d, 1, generator=generator, dtype=torch.float64)


def test_kernel_of_a_linear_model_is_the_gram_matrix_times_training_time() -> None:
    x, y = data()
    rates = [0.1, 0.05, 0.2, 0.1]
    batches = [(range(6), x, y)] * 4
    path = ReferencePathKernel(nn.Linear(3, 1, bias=False), squared, batches, ReferenceSGD(0.1), rates, points=1)
    torch.testing.assert_close(path.kernel(x, x, first, first), sum(rates) * x @ x.T, rtol=1e-12, atol=0)


def test_machine_of_a_linear_model_is_the_trained_model() -> None:
    x, y = data()
    batches = [(range(0, 3), x[:3], y[:3]), (range(3, 6), x[3:], y[3:])] * 5
    path = ReferencePathKernel(nn.Linear(3, 1), squared, batches, ReferenceSGD(0.1, momentum=0.9), points=1)
    unseen = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(path.predict(unseen, first), path.output(unseen, first), rtol=1e-12, atol=1e-13)


def test_contributions_of_a_linear_model_are_residuals_times_inner_products() -> None:
    """One full-batch step from zero: c_i(x) = lr / N * y_i * <x, x_i>, the dual form of gradient descent."""
    x, y = data()
    linear = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(linear.weight)
    path = ReferencePathKernel(linear, squared, [(range(6), x, y)], ReferenceSGD(0.3), points=1)
    unseen = torch.randn(2, 3, dtype=torch.float64)
    expected = 0.3 / 6 * (unseen @ x.T) * y.T
    torch.testing.assert_close(path.contributions(unseen, first), expected, rtol=1e-12, atol=1e-14)


SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    {"maximize": True, "weight_decay": 0.05, "momentum": 0.5},
]
ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.9)},
    {"maximize": True, "weight_decay": 0.1},
]
OPTIMIZERS: dict[str, tuple[type, Any, list[dict]]] = {
    "SGD": (torch.optim.SGD, ReferenceSGD, SGD_OPTIONS),
    "Adam": (torch.optim.Adam, partial(ReferenceAdam, decoupled=False), ADAM_OPTIONS),
    "AdamW": (torch.optim.AdamW, ReferenceAdam, [{"weight_decay": 0.0}, *ADAM_OPTIONS[1:]]),
    "NAdam": (
        torch.optim.NAdam,
        partial(ReferenceNAdam, decoupled=False),
        [{"weight_decay": 0.1}, {"momentum_decay": 0.1, "betas": (0.8, 0.9), "maximize": True}],
    ),
    "RAdam": (
        torch.optim.RAdam,
        partial(ReferenceRAdam, decoupled=False),
        [{"weight_decay": 0.1}, {"betas": (0.8, 0.7), "maximize": True}],
    ),
    "Adamax": (
        torch.optim.Adamax,
        partial(ReferenceAdamax, decoupled=False),
        [{"weight_decay": 0.1}, {"betas": (0.8, 0.7), "maximize": True}],
    ),
    "Adagrad": (
        torch.optim.Adagrad,
        ReferenceAdagrad,
        [{}, {"lr_decay": 0.3, "weight_decay": 0.1}, {"initial_accumulator_value": 0.5, "maximize": True}],
    ),
    "RMSprop": (
        torch.optim.RMSprop,
        ReferenceRMSprop,
        [
            {"alpha": 0.8, "weight_decay": 0.1},
            {"alpha": 0.8, "centered": True, "maximize": True},
            {"alpha": 0.8, "momentum": 0.9},
            {"alpha": 0.8, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-2},
        ],
    ),
    "Adadelta": (
        torch.optim.Adadelta,
        ReferenceAdadelta,
        [{}, {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}],
    ),
    "Rprop": (
        torch.optim.Rprop,
        ReferenceRprop,
        [{}, {"etas": (0.2, 3.0), "step_sizes": (0.02, 0.1)}, {"maximize": True}],
    ),
}
LR = 0.03


def both(name: str, options: dict) -> tuple[ReferencePathKernel, nn.Module]:
    """The reference's path, and torch's own, over two batches in turn with gradients clipped."""
    torch.manual_seed(0)
    x, y = data(8)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [(range(4 * (s % 2), 4 * (s % 2) + 4), x[4 * (s % 2) :][:4], y[4 * (s % 2) :][:4]) for s in range(7)]
    kind, spec, _ = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=LR, **options)
    path = ReferencePathKernel(model, squared, batches, spec(LR, **options), max_norm=0.5, points=6)
    for _, bx, by in batches:
        optimizer.zero_grad()
        (0.5 * F.mse_loss(model(bx), by)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return path, model


CASES = [(name, options) for name, (_, _, several) in OPTIMIZERS.items() for options in several]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_updates_are_torchs_own(name: str, options: dict) -> None:
    path, model = both(name, options)
    final = torch.cat([p.detach().flatten() for p in model.parameters()])
    # torch keeps NAdam's product of momenta in float32
    rtol = 1e-6 if name == "NAdam" else 1e-10
    torch.testing.assert_close(path.weights[-1], final, rtol=rtol, atol=rtol * 0.1)


def test_every_optimiser_with_a_rule_has_a_reference() -> None:
    assert {kind for kind, _, _ in OPTIMIZERS.values()} == set(optimizer_rules())


def test_a_gradient_in_rmsprops_buffer_keeps_the_preconditioner_of_its_own_step() -> None:
    """Example 0 is seen at the first step only: its parts fall by the momentum and by nothing else."""
    x, y = data(3)
    batches = [([i], x[i : i + 1], y[i : i + 1]) for i in (0, 1, 2, 1)]
    linear = nn.Linear(3, 1, bias=False)
    path = ReferencePathKernel(linear, squared, batches, ReferenceRMSprop(0.1, momentum=0.5), points=1)
    gradient = (x[0] @ linear.weight[0].double().detach() - y[0]) * x[0]
    for step, shares in enumerate(path.shares):
        expected = -0.1 * 0.5**step * gradient / (0.1 * gradient.abs() + 1e-8)
        torch.testing.assert_close(shares[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("AdamW", {"weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.9, "alpha": 0.8, "weight_decay": 0.1}),
        ("Adadelta", {"weight_decay": 0.1}),
        ("Rprop", {}),
    ],
)
def test_a_smooth_network_is_its_kernel_machine(name: str, options: dict) -> None:
    path, _ = both(name, options)
    unseen = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(path.predict(unseen, first), path.output(unseen, first), rtol=1e-9, atol=1e-10)


def test_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="no place for buffers"):
        ReferencePathKernel(nn.BatchNorm1d(3), squared, [], ReferenceSGD(0.1))
