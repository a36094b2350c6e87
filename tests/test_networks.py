"""Networks of many kinds: gradients that add up, a fit left as it was, a machine that stands for the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.testing import assert_layer_rule, captured_gradients
from tests.networks import NETWORKS, Case, token_loss


class Learner(pl.LightningModule):
    """Cross entropy over all positions that the network has outputs for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        torch.manual_seed(3)
        self.net = case.make()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return token_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.case.lr < 0:
            return torch.optim.SGD(trained, lr=-self.case.lr, momentum=0.9)
        return torch.optim.AdamW(trained, lr=self.case.lr, weight_decay=0.01)


def data(case: Case, n: int, seed: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x, target = case.data(n, torch.Generator().manual_seed(seed))
    return TensorDataset(x.to(dtype) if x.is_floating_point() else x, target)


def fitted(case: Case, root: Path, callbacks: list[pl.Callback], dtype: torch.dtype = torch.float32) -> Learner:
    module = Learner(case)
    pl.seed_everything(7, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=callbacks,
        precision="64-true" if dtype == torch.float64 else "32-true",
    )  # fmt: skip
    training, validation = data(case, 48, 0, dtype), data(case, 16, 1, dtype)
    trainer.fit(module, DataLoader(training, 8, shuffle=True), DataLoader(validation, 16))
    return module


def recording(root: Path, case: Case, nodes: int = 3) -> PathKernelCallback:
    return PathKernelCallback(str(root / "run"), sketch_dim=1024, nodes=nodes, probes=16, forward_fn=case.forward_fn)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_add_up_and_are_those_of_batches_of_one(name: str) -> None:
    case = NETWORKS[name]
    torch.manual_seed(0)
    network = case.make().double()
    x, target = data(case, 5, 2, torch.float64).tensors
    if not case.mixes_rows:
        assert_layer_rule(network, (x,))
    rows, whole = captured_gradients(network, (x,), lambda out: token_loss(out, target), len(x))
    assert set(rows) == {key for key, p in network.named_parameters() if p.requires_grad}
    for key, gradient in whole.items():
        # a bias before a batch norm has a gradient of nothing but rounding
        gap = (rows[key].sum(0) - gradient).abs().max()
        assert gap <= 1e-10 * gradient.abs().max() + 1e-15, f"{key}: {float(gap):.3g} of {gradient.abs().max():.3g}"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recorded_fit_is_bit_identical_and_its_machine_stands_for_the_network(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    plain = fitted(case, tmp_path, [])
    after = torch.get_rng_state()
    callback = recording(tmp_path, case)
    module = fitted(case, tmp_path, [callback])
    assert torch.equal(after, torch.get_rng_state())
    for (key, a), b in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs by {(a - b).abs().max()}"
    assert_machine(callback, module, 1e-4)


@pytest.mark.parametrize("name", ["residual net", "weight norm", "language model"])
def test_the_ledger_adds_up_in_double_precision(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    callback = recording(tmp_path, case)
    module = fitted(case, tmp_path, [callback], torch.float64)
    assert_machine(callback, module, 1e-8, torch.float64)


def assert_machine(
    callback: PathKernelCallback, module: Learner, tolerance: float, dtype: torch.dtype = torch.float32
) -> None:
    """The exported machine's fidelity is above 0.9, and its ledger adds up to the network's outputs."""
    module = module.to(dtype)
    machine = KernelMachine.load(callback.machine_dir, module, forward_fn=module.case.forward_fn)
    x, _ = data(module.case, 16, 1, dtype).tensors
    found = machine.fidelity([x])
    assert found["fidelity"] > 0.9, found
    forward = module.case.forward_fn or (lambda m, batch: m(batch))
    with torch.no_grad():
        outputs = forward(module.eval(), x)
    ledger = machine.explain(x[:4], top_k=3).ledger
    gap = (sum(ledger.values()) - outputs[:4].max(1).values).abs().max()
    assert gap < tolerance * outputs.abs().max(), float(gap)
