"""Compiled modules are named, in whatever way they were compiled."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import GradientCapture, RowGroup, compiled_modules, plan_capture


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).sum()


def compiled_child() -> nn.Module:
    model = Model()
    model.net = torch.compile(model.net, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = Model()
    model.net[0].compile(backend="eager")
    model.compile(backend="eager")
    return model


def compiled_forward() -> nn.Module:
    model = Model()
    model.head.forward = torch.compile(model.head.forward, backend="eager")
    return model


def compiled_by_lightning() -> nn.Module:
    from pytorch_lightning.utilities.compile import _maybe_unwrap_optimized

    return _maybe_unwrap_optimized(torch.compile(Model(), backend="eager"))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Model, []),
        (compiled_child, ["net"]),
        (compiled_in_place, ["(the model)", "net.0"]),
        (compiled_forward, ["head"]),
        (lambda: torch.compile(Model(), backend="eager"), ["(the model)"]),
        (compiled_by_lightning, ["(the model)"]),
    ],
)
def test_compiled_modules_are_named(make: object, names: list[str]) -> None:
    assert compiled_modules(make()) == names


def test_a_compiled_part_that_is_frozen_is_no_obstacle() -> None:
    model = compiled_child()
    model.net.requires_grad_(False)
    assert compiled_modules(model) == []
    x, seen = torch.randn(5, 4), {}
    model(x)
    capture = GradientCapture(model, plan_capture(model)).attach()
    capture.begin([RowGroup(5)])
    capture.listen(lambda group, name, gradient: seen.update({name: gradient.total()}))
    model(x).sin().sum().backward()
    assert sorted(seen) == ["head.bias", "head.weight"]
    torch.testing.assert_close(seen["head.weight"], model.head.weight.grad)


def test_a_graph_compiled_before_the_hooks_never_calls_them() -> None:
    """Why compiled modules are refused; whoever makes torch guard against it may lift the refusal."""
    model, x, seen = compiled_child(), torch.randn(5, 4), {}
    model(x).sum().backward()
    capture = GradientCapture(model, plan_capture(model)).attach()
    capture.begin([RowGroup(5)])
    capture.listen(lambda group, name, gradient: seen.update({name: gradient.total()}))
    model(x).sin().sum().backward()
    assert sorted(seen) == ["head.bias", "head.weight"]
