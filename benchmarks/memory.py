"""Resident memory over a long fit: it must not grow with the number of steps.

Fits a network to scikit-learn's digits through a Trainer for many steps, with validation on the way, and reads the
process' resident set after every hundredth step. Reported is its range after a warm-up, in which allocators and
libraries take what they need.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import PathKernelCallback

EVERY = 100


def resident() -> float:
    """The process' resident set, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def reset_high_water() -> None:
    """Begin the high-water mark of the resident set anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def high_water() -> float:
    """The high-water mark of the process' resident set, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


class Network(pl.LightningModule):
    """A classifier of images ``[1, 8, 8]``."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        hidden: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        if convolutions:
            hidden = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*hidden, nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, 10]``."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing but the callback's metrics."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Memory(pl.Callback):
    """Notes the resident set, once the garbage of the step is collected."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """After every hundredth step."""
        if trainer.global_step % EVERY == 0:
            gc.collect()
            self.seen.append(resident())


def measure(convolutions: bool, steps: int, batch: int, recorded: bool) -> list[float]:
    """Resident sets, in MB, after every hundredth step."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        path_kernel = PathKernelCallback(str(Path(folder) / "run"), nodes=32, probes=128)
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, val_check_interval=250,
            check_val_every_n_epoch=None, default_root_dir=folder,
            callbacks=[memory, *([path_kernel] if recorded else [])],
        )  # fmt: skip
        pl.seed_everything(0, verbose=False)
        loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch, shuffle=True)
        trainer.fit(Network(convolutions), loader, DataLoader(TensorDataset(x[1500:], y[1500:]), 100))
    return memory.seen


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--networks", nargs="+", choices=("MLP", "CNN"), default=("MLP", "CNN"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| network | recorded | MB at the end of the warm-up | least | most | last | range / warm-up |")
    print("|---|---|---|---|---|---|---|")
    for name in options.networks:
        for recorded in (False, True):
            seen = measure(name == "CNN", options.steps, options.batch, recorded)[options.warm_up // EVERY - 1 :]
            spread = (max(seen) - min(seen)) / seen[0]
            columns = f"{seen[0]:.0f} | {min(seen):.0f} | {max(seen):.0f} | {seen[-1]:.0f} | {spread:.1%}"
            print(f"| {name} | {'yes' if recorded else 'no'} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
