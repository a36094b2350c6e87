"""What is refused before the first step, each with what the error says and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from tests.support.data import Stream
from tests.support.learners import Learner, Manual
from tests.support.rows import RefusedRow


class By(Learner):
    """Trained by an optimiser made by a function of the parameters."""

    def __init__(self, net: nn.Module, make: Callable[[Any], Any]) -> None:
        super().__init__(net, None)
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.trained())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim == 2]


def _optimizer(name: str, make: Callable[[Any], Any], may_be_allowed: bool = True) -> RefusedRow:
    allow = ', or `unattributed="allow"`, which makes its share 1' if may_be_allowed else ""
    return RefusedRow(
        f"`{name}`", f"No optimiser rule for {name}. Supported: Adadelta, Adagrad, Adam",
        f"one of those above, a rule of your own (`@register_optimizer_rule`){allow}",
        learner=lambda net: By(net, make),
    )  # fmt: skip


class Direct(Manual):
    """A backward pass past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.loss(batch).backward()
        self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return sgd(self.trained())


class Outside(By):
    """Uses a weight outside its layer's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.net[:4](x), self.net[4].weight, self.net[4].bias)


class Steepened(By):
    """Gradients doubled by hand after the backward pass, one layer's alone."""

    def on_after_backward(self) -> None:
        self.net[0].weight.grad.mul_(2)


def compiled(net: nn.Module) -> Learner:
    return By(torch.compile(net, backend="eager"), sgd)


def frozen(net: nn.Module) -> Learner:
    return By(net.requires_grad_(False), lambda _: sgd([torch.zeros(1, requires_grad=True)]))


def embedded(**options: Any) -> Callable[[nn.Module], Learner]:
    def make(net: nn.Module) -> Learner:
        return By(nn.Sequential(Cut(), nn.Embedding(11, 3, **options), nn.Flatten(), nn.Linear(18, 3)), sgd)

    return make


class Cut(nn.Module):
    """Numbers as words."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().long().clamp(max=10)


def _by(kind: type[By]) -> Callable[[nn.Module], Learner]:
    return lambda net: kind(net, sgd)


REFUSED: dict[str, dict[str, RefusedRow]] = {
    "optimisers": {
        "ASGD": _optimizer("ASGD", torch.optim.ASGD),
        "Adafactor": _optimizer("Adafactor", torch.optim.Adafactor),
        "Muon": _optimizer("Muon", lambda parameters: torch.optim.Muon(matrices(parameters))),
        "LBFGS": _optimizer("LBFGS", torch.optim.LBFGS, False),
        "SparseAdam": _optimizer("SparseAdam", torch.optim.SparseAdam, False),
    },
    "loops": {
        "swa": RefusedRow(
            "`StochasticWeightAveraging`", "does not support StochasticWeightAveraging", "average in a fit of its own",
            callbacks=lambda: [StochasticWeightAveraging(0.01)],
        ),
        "averaging": RefusedRow(
            "`WeightAveraging`", "does not support WeightAveraging", "average in a fit of its own",
            callbacks=lambda: [WeightAveraging()],
        ),
        "bf16-true": RefusedRow(
            "`precision=\"bf16-true\"`", "precision='bf16-true', whose weights are rounded in every step",
            "`precision=\"bf16-mixed\"`", lambda: {"precision": "bf16-true"},
        ),
        "16-true": RefusedRow(
            "`precision=\"16-true\"`", "precision='16-true', whose weights are rounded in every step",
            "`precision=\"16-mixed\"`", lambda: {"precision": "16-true"}, setup=True,
        ),
        "endless stream": RefusedRow(
            "a loader without a length, and no `max_steps`", "max_steps where the loader has no length", "`max_steps`",
            loader=lambda d: DataLoader(Stream(d), 4), example_ids=lambda batch: batch[2],
        ),
        "endless": RefusedRow(
            "a fit without an end", "give the Trainer max_epochs or max_steps", "`max_epochs` or `max_steps`",
            lambda: {"max_epochs": -1},
        ),
        "direct backward": RefusedRow(
            "a backward pass past Lightning in manual optimisation",
            "the hooks did not fire. Call self.manual_backward",
            "`self.manual_backward(loss)`", learner=lambda net: Direct(net, None), error="CaptureError",
        ),
        "gradients by hand": RefusedRow(
            "gradients changed by hand after the backward pass", "do not add up to the gradient for 'net.0.weight'",
            "put the factor into the loss, or clip", learner=_by(Steepened), error="CaptureError",
        ),
    },
    "networks": {
        "compiled": RefusedRow(
            "`torch.compile`", "does not support compiled modules, whose graphs do not call hooks",
            "fit the module itself, without `torch.compile`", learner=compiled,
        ),
        "outside": RefusedRow(
            "a weight used outside its layer's `forward`", "do not add up to the gradient for 'net.4.weight'",
            "call the layer, or `unattributed=\"allow\"`", learner=_by(Outside), error="CaptureError",
        ),
        "sparse": RefusedRow(
            "`Embedding(sparse=True)`", "sparse gradients are not supported", "`sparse=False`",
            learner=embedded(sparse=True),
        ),
        "max_norm": RefusedRow(
            "`Embedding(max_norm=...)`", "max_norm changes weights outside the optimiser", "`max_norm=None`",
            learner=embedded(max_norm=1.0),
        ),
        "frozen": RefusedRow(
            "a network without a trainable parameter", "The model has no trainable parameter", "unfreeze something",
            learner=frozen,
        ),
    },
    "data": {
        "stream": RefusedRow(
            "an `IterableDataset`", "IterableDataset, which has no indices. Pass example_ids=", "`example_ids=`",
            loader=lambda d: DataLoader(Stream(d), 4),
        ),
        "no batches": RefusedRow(
            "`batch_size=None`", "it has batch_size=None", "`example_ids=`",
            loader=lambda d: DataLoader(d, batch_size=None),
        ),
        "rows dropped": RefusedRow(
            "a collate function that drops or adds rows", "its collate function drops or adds rows. Pass example_ids=",
            "`example_ids=`",
            loader=lambda d: DataLoader(d, 4, collate_fn=lambda rows: default_collate(rows[1:])),
        ),
    },
    "processes": {
        "ddp_spawn": RefusedRow(
            "`strategy=\"ddp_spawn\"`", "processes started by 'spawn'", "`strategy=\"ddp\"`",
            lambda: {"strategy": "ddp_spawn", "devices": 2}, setup=True,
        ),
        "ddp_fork": RefusedRow(
            "`strategy=\"ddp_fork\"`, `\"ddp_notebook\"`", "processes started by 'fork'", "`strategy=\"ddp\"`",
            lambda: {"strategy": "ddp_fork", "devices": 2}, setup=True,
        ),
    },
}  # fmt: skip

SPLIT_NETWORKS = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy")
"""Strategies that split a network among devices: refused by their class's name."""
