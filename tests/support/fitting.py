"""Fits of one combination of the table: one with a witness and one with the callback, alike bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from tests.support.data import DataRow
from tests.support.judge import POINTS, Judge, Witness
from tests.support.learners import Learner, TwoLoaders
from tests.support.rows import FeatureRow, NetworkRow, OptimizerRow

EXAMPLES, BATCH, QUERIES = 22, 4, 2


def dataset(row: NetworkRow, n: int, seed: int, dtype: torch.dtype, first: int = 0) -> TensorDataset:
    """Inputs, targets and ids."""
    x, target = row.data(n, torch.Generator().manual_seed(seed))
    return TensorDataset(x.to(dtype) if x.is_floating_point() else x, target, torch.arange(first, first + n))


@dataclass(frozen=True)
class Combination:
    """An optimiser, a feature of the loop and a network."""

    optimizer: OptimizerRow
    feature: FeatureRow
    network: NetworkRow
    data: DataRow | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.feature.double else torch.float32

    @property
    def exact(self) -> bool:
        """Whether every single contribution has a value of its own to compare with."""
        return not self.network.inexact and not (self.network.idle and self.optimizer.divides)

    def learner(self) -> Learner:
        """The LightningModule before training."""
        torch.manual_seed(3)
        module: Learner = self.feature.learner(self.network.make(), self.optimizer)
        return module.to(self.dtype)

    def loader(self) -> Any:
        """The training loader, or loaders."""
        if self.data is not None:
            return self.data.loader(dataset(self.network, EXAMPLES, 0, self.dtype), BATCH)
        one = DataLoader(dataset(self.network, EXAMPLES, 0, self.dtype), BATCH, shuffle=True)
        if self.feature.learner is not TwoLoaders:
            return one
        return {"one": one, "two": DataLoader(dataset(self.network, 10, 5, self.dtype, EXAMPLES), 2, shuffle=True)}

    def fit(self, root: Path, *callbacks: pl.Callback) -> Learner:
        """Train, seeded."""
        module = self.learner()
        pl.seed_everything(7, verbose=False)
        options = {key: value() if callable(value) else value for key, value in self.feature.trainer.items()}
        options = {k: [v] if k == "plugins" else v for k, v in options.items()}
        trainer = quiet_trainer(
            root, [*self.feature.callbacks(), *callbacks],
            limit_val_batches=int("val_check_interval" in options),
            **({"precision": "64-true"} if self.feature.double else {}), **options,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nodes=.* is more than")
            warnings.filterwarnings("ignore", "You are using `overfit_batches")
            warnings.filterwarnings("ignore", "You requested to overfit but")
            warnings.filterwarnings("ignore", "Consider setting `persistent_workers")
            trainer.fit(module, self.loader(), DataLoader(dataset(self.network, 4, 1, self.dtype), 4))
        return module


def quiet_trainer(root: Path, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A Trainer that leaves no files."""
    return pl.Trainer(
        **{
            "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root, **options,
        },
        callbacks=callbacks,
    )  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """What became of a combination.

    Attributes:
        plain: Trained without the callback, and watched by the witness.
        witness: The witness.
        recorded: Trained with the callback.
        machine: The exported machine.
        queries: Inputs that were not trained on.
        target: The output that is asked for of each.
    """

    combination: Combination
    plain: Learner
    witness: Witness
    recorded: Learner
    machine: KernelMachine
    queries: Tensor
    target: Tensor

    @cached_property
    def terms(self) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
        """The ledger of the queries, the network's own output, and the outputs' scale."""
        forward = self.combination.network.forward_fn or (lambda module, x: module(x))
        self.recorded.to(self.combination.dtype).eval()
        with torch.no_grad():
            outputs = forward(self.recorded, self.queries)
        ledger = self.machine.explain(self.queries, self.target, top_k=1).ledger
        return ledger, outputs.gather(1, self.target[:, None])[:, 0], outputs.abs().max()

    def _order(self) -> tuple[list[int], list[int]]:
        names = [int(name.split()[-1]) for name in self.machine.names_of(self.machine.example_ids)]
        order = sorted(range(len(names)), key=names.__getitem__)
        return order, [names[i] for i in order]

    def ids(self) -> list[int]:
        """The examples that the machine knows, sorted."""
        return self._order()[1]

    def contributions(self) -> Tensor:
        """Contributions by the machine, in the order of `ids`."""
        found = self.machine.contributions(self.queries, self.target).double()
        return found[:, self._order()[0]]

    def judged(self) -> tuple[list[int], Tensor]:
        """Contributions by the judge."""
        feature, network = self.combination.feature, self.combination.network
        rounding = None if feature.rounding == float("inf") else feature.rounding
        forward = network.forward_fn or (lambda module, x: module(x))
        judge = Judge(
            self.plain.net, self.witness.steps, self.combination.optimizer.reference, feature.max_norm, rounding,
            forward, together=not self.combination.exact,
        )  # fmt: skip
        return judge.contributions(self.queries, self.target)


def fitted(combination: Combination, root: Path) -> Fitted:
    """Fit with and without the callback."""
    witness = Witness()
    plain = combination.fit(root, witness)
    network = combination.network
    callback = PathKernelCallback(
        str(root / "run"),
        nodes=1000,
        sketch="identity",
        sketch_dim=10**6,
        probes=0,
        forward_fn=network.forward_fn,
        example_ids=None if combination.data is None else combination.data.example_ids,
    )
    recorded = combination.fit(root, callback)
    machine = KernelMachine.load(
        callback.machine_dir, combination.learner(), forward_fn=network.forward_fn, quadrature_points=POINTS
    )
    queries = dataset(network, QUERIES, 2, combination.dtype).tensors[0]
    return Fitted(combination, plain, witness, recorded, machine, queries, torch.tensor([0, 2]))
