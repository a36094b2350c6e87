"""Two processes: each records the rows of its own examples, and the machine has those of both.

Scikit-learn's digits on two CPU processes with `strategy="ddp"`. What is exported is compared with what the network
says. It writes to `examples/out/ddp`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback

OUT = Path(__file__).parent / "out" / "ddp"


class Digits(pl.LightningModule):
    """A multilayer perceptron; nothing in it knows of processes or of the path kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def load() -> tuple[TensorDataset, TensorDataset]:
    """Digits in a fixed order, pixels in [0, 1]: 1,436 to train on and 360 to validate."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return TensorDataset(x[:1436], y[:1436]), TensorDataset(x[1436:1796], y[1436:1796])


def main() -> int:
    """Train on two processes, then ask the machine in the first one; returns the exit status."""
    training, validation = load()
    pl.seed_everything(0)
    module = Digits()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), sketch_dim=128, nodes=12, probes=64)
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[path_kernel], accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(OUT),
    )  # fmt: skip
    if trainer.is_global_zero and trainer.local_rank == 0:
        shutil.rmtree(OUT, ignore_errors=True)
    trainer.fit(module, DataLoader(training, 32, shuffle=True), DataLoader(validation, 180))
    if trainer.is_global_zero:
        machine = KernelMachine.load(path_kernel.machine_dir, module)
        print(f"{len(machine.example_ids)} training examples of {trainer.world_size} processes")
        for name, value in machine.fidelity(DataLoader(validation, 180)).items():
            print(f"  {name:20s} {value:9.4f}")
        print(f"Machine: {path_kernel.machine_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
