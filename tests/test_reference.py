"""The reference against closed forms and against torch's own optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.reference import ReferenceAdam, ReferencePathKernel, ReferenceSGD


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


def both(options: dict, adam: str | None) -> tuple[ReferencePathKernel, nn.Module]:
    torch.manual_seed(0)
    x, y = data(8)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [(range(4 * (s % 2), 4 * (s % 2) + 4), x[4 * (s % 2) :][:4], y[4 * (s % 2) :][:4]) for s in range(7)]
    if adam is None:
        spec, optimizer = ReferenceSGD(0.1, **options), torch.optim.SGD(model.parameters(), lr=0.1, **options)
    else:
        spec = ReferenceAdam(0.03, decoupled=adam == "AdamW", **options)
        optimizer = getattr(torch.optim, adam)(model.parameters(), lr=0.03, **{"weight_decay": 0, **options})
    path = ReferencePathKernel(model, squared, batches, spec, max_norm=0.5, points=6)
    for _, bx, by in batches:
        optimizer.zero_grad()
        (0.5 * F.mse_loss(model(bx), by)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return path, model


CASES = [(o, None) for o in SGD_OPTIONS] + [(o, k) for o in ADAM_OPTIONS for k in ("Adam", "AdamW")]


@pytest.mark.parametrize(("options", "adam"), CASES)
def test_updates_are_torchs_own(options: dict, adam: str | None) -> None:
    path, model = both(options, adam)
    final = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(path.weights[-1], final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("options", "adam"), [({"momentum": 0.9}, None), ({"weight_decay": 0.1}, "AdamW")])
def test_a_smooth_network_is_its_kernel_machine(options: dict, adam: str | None) -> None:
    path, _ = both(options, adam)
    unseen = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(path.predict(unseen, first), path.output(unseen, first), rtol=1e-9, atol=1e-10)


def test_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="no place for buffers"):
        ReferencePathKernel(nn.BatchNorm1d(3), squared, [], ReferenceSGD(0.1))
