"""Small modules, loaders and trainers for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel.recorder import PathRecorder


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's digits: 320 to train on, 100 to validate."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return TensorDataset(x[:320], y[:320]), TensorDataset(x[320:420], y[320:420])


class Classifier(pl.LightningModule):
    """A small network; the optimiser is the test's."""

    def __init__(self, optimizer: str = "sgd", net: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.choice, self.options = optimizer, options

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.choice == "adamw":
            return torch.optim.AdamW(self.parameters(), **{"lr": 3e-3, **self.options})
        return torch.optim.SGD(self.parameters(), **{"lr": 0.1, **self.options})


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)
    )


def fit(
    module: pl.LightningModule, callbacks: list[pl.Callback], root: Path, workers: int = 0, batch_size: int = 32,
    validate: bool = True, loader: Any = None, lightning: Any = pl, **options: Any,
) -> pl.Trainer:  # fmt: skip
    """Fit on digits, seeded, without files but the callback's, by a Trainer of this or another name of Lightning."""
    training, validation = digits()
    lightning.seed_everything(7, verbose=False)
    trainer: pl.Trainer = lightning.Trainer(
        **{
            "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root, **options,
        },
        callbacks=callbacks,
    )  # fmt: skip
    if loader is None:
        loader = DataLoader(training, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    trainer.fit(module, loader, DataLoader(validation, 50) if validate else None)
    return trainer


def recorded_step(
    recorder: PathRecorder, optimizer: torch.optim.Optimizer, ids: Tensor, loss: Callable[[], Tensor],
    clip: float | None = None,
) -> None:  # fmt: skip
    """One optimiser step of a raw training loop, as the callback drives the recorder."""
    recorder.begin_batch(ids)
    optimizer.zero_grad()
    value = loss()
    recorder.before_backward()
    value.backward()
    recorder.after_backward()
    recorder.before_step()
    if clip is not None:
        nn.utils.clip_grad_norm_(recorder.network.parameters.values(), clip)
    optimizer.step()
    recorder.after_step()
    recorder.end_batch()
