"""Passes of probes take no more memory than they may; that answers do not depend on it: tests/test_probes.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pathkernel import pass_size
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.network import Network, batch_size, in_parts
from lightning_pathkernel.pass_size import rows_at_once


def network(width: int) -> Network:
    model = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))
    return Network(model, plan_capture(model))


def test_what_a_row_saves_is_counted() -> None:
    """Inputs, and what ReLU hands to the last layer, once though both save it; no weights."""
    expected = pass_size._NUMBERS // (10 + 4000)
    assert rows_at_once(network(4000), torch.randn(5, 10), 10**9) == pytest.approx(expected, rel=0.01)


def test_it_is_kept_within_bounds() -> None:
    assert rows_at_once(network(4), torch.randn(5, 10), 64) == 64
    assert rows_at_once(network(4), torch.randn(1, 10), 64) == 64
    assert rows_at_once(network(1 << 22), torch.randn(5, 10), 64) == 8


def test_nothing_is_left_behind() -> None:
    net, before = network(8), torch.get_rng_state()
    net.module.train()
    rows_at_once(net, torch.randn(5, 10, generator=torch.Generator().manual_seed(0)), 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.module.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters.values())


def test_parts_of_a_batch() -> None:
    parts = in_parts((torch.arange(7), {"y": torch.arange(7)}), 3)
    assert [batch_size(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part[1]["y"] for part in parts]), torch.arange(7))
