"""Rows for every position: each equals the gradient of that position's own share of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import CaptureError, LayerCall, layer_rules, plan_capture
from lightning_pathkernel.capture.positions import by_position, check_positions, has_positions

N, S = 3, 4
F64 = {"dtype": torch.float64}

LAYERS = {
    "linear": (lambda: nn.Linear(5, 2), lambda: torch.randn(N, S, 5, **F64)),
    "linear, another dimension": (lambda: nn.Linear(5, 2), lambda: torch.randn(N, S, 2, 5, **F64)),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=1), lambda: torch.randint(0, 7, (N, S))),
    "embedding scaled by frequency": (
        lambda: nn.Embedding(7, 3, scale_grad_by_freq=True),
        lambda: torch.randint(0, 7, (N, S)),
    ),
    "layer norm": (lambda: nn.LayerNorm(5), lambda: torch.randn(N, S, 5, **F64)),
    "rms norm": (lambda: nn.RMSNorm(5), lambda: torch.randn(N, S, 5, **F64)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_gradients_of_single_positions(name: str) -> None:
    torch.manual_seed(0)
    layer, x = (make() for make in LAYERS[name])
    layer.double()
    check_positions(plan_capture(layer).layers)
    output = layer(x)
    (grad,) = torch.autograd.grad(output.sin().sum(), output, retain_graph=True)
    rows = layer_rules()[type(layer)](layer, by_position(LayerCall((x,), {}, 0, grad, True, N), S))
    for key, parameter in layer.named_parameters():
        found = rows[key].dense().reshape(N, S, *parameter.shape)
        for i in range(N):
            for j in range(S):
                only = torch.zeros_like(grad)
                only[i, j] = grad[i, j]
                (expected,) = torch.autograd.grad(output, parameter, only, retain_graph=True)
                torch.testing.assert_close(found[i, j], expected, rtol=1e-10, atol=1e-13)


def test_layers_that_mix_positions_are_all_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.LayerNorm((3, 4)), nn.PReLU())
    with pytest.raises(
        CaptureError,
        match=r"'1' \(Conv1d\), '2' \(BatchNorm1d\), '3' \(LayerNorm\), '4' \(PReLU\): only Embedding, Layer",
    ):
        check_positions(plan_capture(model).layers)
    check_positions(plan_capture(model.requires_grad_(False).append(nn.Linear(4, 2))).layers)


@pytest.mark.parametrize("shape", [(N, 5), (N, S + 1, 5), (N * S, 5)])
def test_a_call_without_positions_is_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    call = LayerCall((), {"input": x}, 0, torch.randn(*shape[:-1], 2), True, N)
    assert not has_positions(call, S)
    with pytest.raises(CaptureError, match=r"gradients by position need \[3, 4, \.\.\.\] in both"):
        by_position(call, S)


def test_keyword_arguments_are_rows_too() -> None:
    x, grad = torch.randn(N, S, 5), torch.randn(N, S, 2)
    call = by_position(LayerCall((), {"input": x}, 0, grad, True, N), S)
    assert call.n == N * S
    assert torch.equal(call.input, x.reshape(N * S, 5))
    assert isinstance(call.grad_output, Tensor)
