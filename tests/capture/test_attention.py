"""The rule for multi-head attention against whole backward passes, one row of the output at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.testing import assert_layer_rule, captured_gradients

N, S, T = 4, 3, 5
F64 = {"dtype": torch.float64}

LAYERS = {
    "plain": {},
    "dropout": {"dropout": 0.4},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 2},
    "a zero attended to": {"add_zero_attn": True, "dropout": 0.4},
    "biases attended to": {"add_bias_kv": True, "dropout": 0.4},
}
CALLS = {
    "weights of every head": {"need_weights": True, "average_attn_weights": False},
    "output only": {"need_weights": False},
    "masks": {"key_padding_mask": True, "attn_mask": True},
}


class Attends(nn.Module):
    """Cross attention between two sequences, or self-attention."""

    def __init__(self, batch_first: bool, options: dict, call: dict, cross: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.call, self.cross = dict(call), cross
        widths = [8, self.attention.kdim, self.attention.vdim]
        self.maps = nn.ModuleList(nn.Linear(8, width) for width in widths).requires_grad_(False)
        length = T if cross else S
        if "attn_mask" in self.call:
            self.call["attn_mask"] = torch.randn(S, length, **F64)
            hidden = torch.arange(length).expand(N, -1) == length - 1
            self.call["key_padding_mask"] = torch.zeros(N, length, **F64).masked_fill(hidden, -torch.inf)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        other = torch.cat([x, x.sin()], 1)[:, :T] if self.cross else x
        separate = self.attention.in_proj_weight is None
        query, key, value = x, other, other.cos() if self.cross else other
        if separate:
            query, key, value = (f(v) for f, v in zip(self.maps, (query, key, value), strict=True))
        if not self.attention.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
            if not self.cross and not separate:
                key = value = query
        out, weights = self.attention(query, key, value, **self.call)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return (out,) if weights is None else (out, weights)


@pytest.mark.parametrize(("cross", "batch_first"), [(False, True), (True, False)], ids=["self", "cross, time first"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_gradients_of_each_rows_loss(name: str, call: str, batch_first: bool, cross: bool) -> None:
    torch.manual_seed(0)
    model = Attends(batch_first, LAYERS[name], CALLS[call], cross).double()
    x = torch.randn(N, S, 8, **F64)

    def loss(outputs: tuple[Tensor, ...], row: int | None = None) -> Tensor:
        return torch.stack([(t if row is None else t[row]).sin().square().sum() for t in outputs]).sum()

    torch.manual_seed(1)
    rows, whole = captured_gradients(model, (x,), loss, N)
    names = {key for key, p in model.named_parameters() if p.requires_grad}
    assert set(rows) == set(whole) == names
    for i in range(N):
        torch.manual_seed(1)
        outputs = model(x)
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        for key, g in zip(parameters, torch.autograd.grad(loss(outputs, i), parameters.values()), strict=True):
            torch.testing.assert_close(rows[key][i], g, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    for key, g in whole.items():
        torch.testing.assert_close(rows[key].sum(0), g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("of", ["attention", "its output projection"])
def test_a_parametrised_projection_takes_the_fallback(of: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.3)
    assert plan_capture(attention).layers[0].rule is not None
    if of == "attention":
        nn.utils.parametrizations.weight_norm(attention, "in_proj_weight")
    else:
        nn.utils.parametrizations.weight_norm(attention.out_proj)
    (owner,) = plan_capture(attention).layers
    assert owner.rule is None

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    rows, whole = captured_gradients(Self().double(), (torch.randn(N, S, 4, **F64),), lambda out: out.sin().sum(), N)
    for key, g in whole.items():
        torch.testing.assert_close(rows[key].sum(0), g, rtol=1e-9, atol=1e-12)


def test_an_unbatched_call_whose_length_is_the_batch_size_belongs_to_the_module_around_it() -> None:
    """Four examples, attended to one by one, with as many positions as there are examples."""

    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.attend(row, row, row)[0] for row in x])

    torch.manual_seed(0)
    assert_layer_rule(OneByOne().double(), (torch.randn(4, 4, 4, dtype=torch.float64),))
