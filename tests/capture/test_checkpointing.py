"""Activation checkpointing recomputes forward passes; per-example gradients are exactly those without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pathkernel.capture import CaptureError
from lightning_pathkernel.testing import captured_gradients

N = 5
F64 = {"dtype": torch.float64}


class Positions(nn.Module):
    """Its table is not called with the batch: this module answers for it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(3)).sin()


BLOCKS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.ReLU(inplace=True), nn.Linear(6, 4)),
    "fallback": lambda: nn.Sequential(nn.LayerNorm(4), nn.PReLU()),
    "fallback, random": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True),
    "positions": lambda: nn.Sequential(Positions(), nn.Linear(4, 4)),
    "positions last": lambda: nn.Sequential(nn.Linear(4, 4), Positions()),
}


class Stack(nn.Module):
    def __init__(self, block: nn.Module, mode: bool | None, shared: bool) -> None:
        super().__init__()
        self.first, self.last, self.block = nn.Linear(4, 4), nn.Linear(4, 2), block
        self.mode, self.times = mode, 2 if shared else 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.block(x) if self.mode is None else checkpoint(self.block, x, use_reentrant=self.mode)
        return self.last(x)


@pytest.mark.parametrize("shared", [False, True], ids=["once", "shared"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_without_checkpointing(name: str, reentrant: bool, shared: bool) -> None:
    torch.manual_seed(0)
    model, x = Stack(BLOCKS[name](), None, shared).double(), torch.randn(N, 3, 4, **F64)
    sides = []
    for mode in (None, reentrant):
        model.mode = mode
        torch.manual_seed(1)
        sides.append(captured_gradients(model, (x,), lambda out: out.sin().sum(), N))
    (plain, plain_whole), (rows, whole) = sides
    assert set(rows) == set(plain) == set(whole)
    for key, value in rows.items():
        assert torch.equal(whole[key], plain_whole[key]), key
        torch.testing.assert_close(value, plain[key], rtol=1e-12, atol=1e-14, msg=key)


class Inside(nn.Module):
    """The region that runs again has no module that is called with the batch; this one answers, checkpoint and all."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.table, self.mix, self.reentrant = nn.Embedding(3, 4), nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.reentrant:
            return x * checkpoint(self.table, torch.arange(3), use_reentrant=False).cos()
        return checkpoint(self.mix, x * self.table(torch.arange(3)), use_reentrant=True)


def test_checkpointing_inside_a_module_that_answers_for_others() -> None:
    torch.manual_seed(0)
    model, x = Inside(reentrant=False).double(), torch.randn(N, 3, 4, **F64)
    rows, whole = captured_gradients(model, (x,), lambda out: out.sin().sum(), N)
    torch.testing.assert_close(rows["table.weight"].sum(0), whole["table.weight"], rtol=1e-12, atol=1e-14)
    with pytest.raises(CaptureError, match=r"Inside that answers for 'table.weight' cannot be run again: .*reentrant"):
        captured_gradients(Inside(reentrant=True).double(), (x,), lambda out: out.sin().sum(), N)
