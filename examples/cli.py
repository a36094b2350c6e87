"""LightningCLI: the path kernel from a YAML file, tumours told apart by logistic features of a small network.

    python examples/cli.py fit --config examples/cli.yaml

Scikit-learn's breast cancer set, 569 tumours, 30 measurements. Nothing here imports lightning_pathkernel: the callback
is named in `cli.yaml` alone, and `pathkernel export` or `KernelMachine.load` read what it wrote to `examples/out/cli`.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Tumours(pl.LightningDataModule):
    """455 tumours to train on and 114 to validate; every measurement in standard deviations of the training set.

    Args:
        batch_size: Of the training loader.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        values, labels = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(values, dtype=torch.float32)[order], torch.tensor(labels)[order]
        x = (x - x[:455].mean(0)) / x[:455].std(0)
        self.batch_size = batch_size
        self.training, self.validation = TensorDataset(x[:455], y[:455]), TensorDataset(x[455:], y[455:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, 114)


class TumourNet(pl.LightningModule):
    """A multilayer perceptron with two outputs.

    Args:
        hidden: Its width.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)


if __name__ == "__main__":
    LightningCLI(TumourNet, Tumours, save_config_callback=None)
