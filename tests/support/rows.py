"""What a row of the table of support is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel.reference_optimizers import ReferenceOptimizer
from tests.support import learners


@dataclass(frozen=True)
class OptimizerRow:
    """An optimiser with a rule.

    Attributes:
        what: How the page calls it.
        kind: torch's class.
        options: Its options, the learning rate among them.
        reference: Its counterpart, written out from torch's documentation.
        unattributed: Share of the learned change that the ledger calls unattributed; 0 where all is attributed.
        divides: By a gradient's own size, with next to nothing added: rounding errors are steps like any others.
    """

    what: str
    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    reference: ReferenceOptimizer
    unattributed: float = 0.0
    divides: bool = False

    @property
    def lr(self) -> float:
        """The learning rate."""
        return float(self.options["lr"])

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimiser of these parameters or groups of them."""
        return self.kind(parameters, **self.options)


@dataclass(frozen=True)
class FeatureRow:
    """Something that a training loop does.

    Attributes:
        what: How the page calls it.
        trainer: Arguments of the Trainer.
        learner: The LightningModule that does it.
        callbacks: Makes callbacks of the fit.
        max_norm: Norm that gradients are clipped to, for the judge.
        tolerance: Of single contributions, relative to the largest.
        rounding: Of the judge's gradients against those that the optimiser received, relative.
        unattributed: Share of the learned change that the ledger calls unattributed, by optimiser; empty where none is.
        network: Its only network; None for any.
        steps: Optimiser steps of the fit.
    """

    what: str
    trainer: Mapping[str, Any] = field(default_factory=dict)
    learner: Callable[..., Any] = learners.Learner
    callbacks: Callable[[], list[Any]] = list
    max_norm: float | None = None
    tolerance: float = 1e-6
    rounding: float = 1e-6
    unattributed: Mapping[str, float] = field(default_factory=dict)
    network: str | None = None
    steps: int = 6

    @property
    def double(self) -> bool:
        """Whether it is judged in float64."""
        return "precision" not in self.trainer and "plugins" not in self.trainer


@dataclass(frozen=True)
class NetworkRow:
    """A network.

    Attributes:
        what: How the page calls it.
        make: Builds it.
        data: ``(n, generator) -> (inputs, targets)``.
        forward_fn: Its outputs as ``[n, K]``, where they are not.
        inexact: Why an example has no gradient of its own to compare with; empty where it has.
        idle: Has weights whose gradient is nothing but rounding.
    """

    what: str
    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    forward_fn: Callable[[Any, Any], Tensor] | None = None
    inexact: str = ""
    idle: bool = False


@dataclass(frozen=True)
class RefusedRow:
    """Something that is refused before the first step.

    Attributes:
        what: How the page calls it.
        message: What the error says, word for word.
        remedy: What to do instead.
        trainer: Makes the arguments of the Trainer.
        learner: Makes the LightningModule out of a network.
        callbacks: Makes callbacks of the fit.
        setup: Judged where a Trainer sets its callbacks up: no fit can be begun on the machine at hand.
        loader: Makes the training loader out of a dataset; None for the usual one.
        example_ids: What the callback is told of them.
        error: Name of the exception.
    """

    what: str
    message: str
    remedy: str
    trainer: Callable[[], Mapping[str, Any]] = dict
    learner: Callable[[nn.Module], Any] | None = None
    callbacks: Callable[[], list[Any]] = list
    setup: bool = False
    loader: Callable[[Any], Any] | None = None
    example_ids: Callable[[Any], Any] | None = None
    error: str = "MisconfigurationException"
