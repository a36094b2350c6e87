"""Weights that are computed from others, random numbers inside a layer, and other ways to be no plain layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.testing import assert_layer_rule, captured_gradients

N = 5
F64 = {"dtype": torch.float64}


class Scaled(nn.Module):
    """A custom parametrisation with a parameter and a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1))
        self.mix = nn.Linear(4, 4)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mix(weight.sin()) * self.scale


class SymmetricHead(nn.Module):
    """A module with children whose own parameter is parametrised."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.metric = nn.Parameter(torch.randn(4, 4))
        parametrize.register_parametrization(self, "metric", _Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.metric


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


def custom() -> nn.Module:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def both() -> nn.Module:
    """Two parametrisations on one weight, and one on the bias."""
    layer = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 3)))
    return parametrizations.weight_norm(layer, "bias", dim=None)


def pruned() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.3)
    return layer


PARAMETRISED = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (N, 4)),
    "weight norm of a convolution": (lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), (N, 2, 5)),
    "weight norm of a recurrent layer": (
        lambda: parametrizations.weight_norm(nn.GRU(4, 3, batch_first=True), "weight_hh_l0"),
        (N, 6, 4),
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (N, 4)),
    "spectral norm of a convolution": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)), (N, 2, 4, 4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), (N, 4)),
    "orthogonal by Cayley": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), (N, 4)),
    "custom": (custom, (N, 4)),
    "custom, on a module with children": (SymmetricHead, (N, 4)),
    "several": (both, (N, 4)),
    "spectral norm by a hook": (lambda: spectral_norm(nn.Linear(4, 3)), (N, 4)),
    "pruning": (pruned, (N, 4)),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_layers_answer_for_what_their_weight_is_computed_from(name: str) -> None:
    make, shape = PARAMETRISED[name]
    torch.manual_seed(0)
    layer = make().double().eval()
    assert_layer_rule(layer, (torch.randn(shape, **F64),))
    layer.train()
    assert_layer_rule(layer, (torch.randn(shape, **F64),), mixes_rows=True)  # every pass may iterate
    owners = {owner.module for owner in plan_capture(layer).layers if owner.rule is None}
    assert layer in owners


def test_old_style_weight_norm() -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = weight_norm(nn.Linear(4, 3)).double()
    assert_layer_rule(layer, (torch.randn(N, 4, **F64),))
    assert type(layer.weight) is Tensor
    assert layer.weight.sum().isfinite()  # no wrapped tensor of the second run is left in its place


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_iterates_as_often_as_without_hooks(norm: object) -> None:
    """Called twice in one pass, it has different singular vectors in each call; both are met."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(N, 4, **F64)
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(x)
    plain = {name: b.clone() for name, b in model.named_buffers()}
    for name, b in model.named_buffers():
        b.copy_(before[name])
    rows, whole = captured_gradients(model, (x,), lambda out: out.sin().sum(), N)
    for name, b in model.named_buffers():
        assert torch.equal(b, plain[name]), name
    for name, value in whole.items():
        torch.testing.assert_close(rows[name].sum(0), value, rtol=1e-10, atol=1e-13)
    assert all(module.training for module in model.modules())


class WithDropout(nn.Module):
    """A bare parameter puts the whole module in the fallback's hands, with its dropout and its batch norm."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(x) * self.scale, 0.4, self.training).sin()


class Attends(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


RANDOM = {
    "dropout beside a bare parameter": lambda: WithDropout(norm=False),
    "batch norm and dropout beside a bare parameter": lambda: WithDropout(norm=True),
    "attention, its weights returned": lambda: Attends(weights=True),
    "attention": lambda: Attends(weights=False),
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.4, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_inside_a_layer_without_a_rule_is_drawn_again(name: str) -> None:
    """Rows add up, and each is the gradient of its own share of the loss under the same random numbers."""
    torch.manual_seed(0)
    model = RANDOM[name]().double().train()
    x = torch.randn((N, 4) if isinstance(model, WithDropout) else (N, 3, 4), **F64)
    buffers = {key: b.clone() for key, b in model.named_buffers()}

    def loss(output: object, row: int | None = None) -> Tensor:
        tensor = output[0] if isinstance(output, tuple) else output
        return (tensor if row is None else tensor[row]).sin().sum()

    torch.manual_seed(1)
    rows, whole = captured_gradients(model, (x,), loss, N)
    after = torch.get_rng_state()
    for i in range(N):
        for key, b in model.named_buffers():
            b.copy_(buffers[key])
        torch.manual_seed(1)
        found = torch.autograd.grad(loss(model(x), i), list(model.parameters()))
        assert torch.equal(after, torch.get_rng_state())
        for (key, _), g in zip(model.named_parameters(), found, strict=True):
            torch.testing.assert_close(rows[key][i], g, rtol=1e-10, atol=1e-12)
    for key, value in whole.items():
        torch.testing.assert_close(rows[key].sum(0), value, rtol=1e-10, atol=1e-12)
