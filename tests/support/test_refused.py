"""What the table refuses is refused before a weight has moved, and says why."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.capture import CaptureError
from lightning_pathkernel.optim import optimizer_rules
from lightning_pathkernel.trainer_checks import FitError, check_trainer
from tests.support.fitting import dataset, quiet_trainer
from tests.support.refusals import REFUSED, SPLIT_NETWORKS, By, sgd
from tests.support.table import NETWORKS, OPTIMIZERS

ROWS = [(table, name) for table, rows in REFUSED.items() for name in rows]
ERRORS = {"MisconfigurationException": MisconfigurationException, "CaptureError": CaptureError}


@pytest.mark.filterwarnings("ignore:nodes=.* is more than")
@pytest.mark.parametrize(("table", "name"), ROWS)
def test_refused_before_the_first_step(table: str, name: str, tmp_path: Path) -> None:
    row, network = REFUSED[table][name], NETWORKS["mlp"]
    torch.manual_seed(0)
    module = row.learner(network.make()) if row.learner else By(network.make(), sgd)
    before = copy.deepcopy(module.state_dict())
    callback = PathKernelCallback(str(tmp_path / "run"), nodes=8, probes=0, example_ids=row.example_ids)
    options = {"limit_val_batches": 0, **row.trainer()}
    trainer = quiet_trainer(tmp_path, [callback, *row.callbacks()], **options)
    examples = dataset(network, 22, 0, torch.float32)
    loader = row.loader(examples) if row.loader else DataLoader(examples, 4)
    with pytest.raises(ERRORS[row.error], match=re.escape(row.message)):
        begin(trainer, module, loader, callback, row.setup)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key].to(value)), key
    assert trainer.global_step == 0


def begin(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader, callback: PathKernelCallback, setup: bool
) -> None:
    """Fit, or as much of it as there is before processes start."""
    if setup:
        callback.setup(trainer, module, "fit")
    else:
        trainer.fit(module, loader, loader)


@pytest.mark.filterwarnings("ignore:nodes=.* is more than")
@pytest.mark.parametrize("name", ["ASGD", "Adafactor", "Muon"])
def test_an_optimiser_without_a_rule_may_be_left_unattributed(name: str, tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    module = REFUSED["optimisers"][name].learner(network.make())
    callback = PathKernelCallback(str(tmp_path / "run"), nodes=8, probes=0, unattributed="allow")
    examples = dataset(network, 22, 0, torch.float32)
    quiet_trainer(tmp_path, [callback], limit_val_batches=0).fit(module, DataLoader(examples, 4), DataLoader(examples))
    machine = KernelMachine.load(callback.machine_dir, module)
    assert machine.fidelity([examples.tensors[0]])["error_unattributed"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", SPLIT_NETWORKS)
def test_networks_split_among_devices_are_refused_by_the_strategys_name(name: str) -> None:
    with pytest.raises(FitError, match=f"does not support the strategy {name}: train on one device"):
        check_trainer(SimpleNamespace(strategy=type(name, (), {})()))


def test_every_optimiser_of_torch_is_in_the_table() -> None:
    kinds = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {torch.optim.Optimizer}
    assert {row.kind for row in OPTIMIZERS.values()} == set(optimizer_rules())
    assert {kind.__name__ for kind in kinds} == {k.__name__ for k in optimizer_rules()} | set(REFUSED["optimisers"])
