"""Handwritten digits: train a small CNN, log fidelity, export its kernel machine, explain images, write a report.

Run it from a bare checkout with `make demo`. Everything it writes goes to `examples/out/digits`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import Explanation, KernelMachine, PathKernelCallback
from lightning_pathkernel.report import plot_examples, plot_ledger

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "digits"


class Digits(pl.LightningModule):
    """A small convolutional network; nothing in it knows of the path kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 4, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def load() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's digits, 8 x 8 pixels in [0, 1], in a fixed order: 1,437 to train on and 360 to validate."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def train(training: TensorDataset, validation: TensorDataset) -> tuple[Digits, PathKernelCallback]:
    """Train as always, with one callback more."""
    pl.seed_everything(0)
    module = Digits()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), sketch_dim=256, nodes=24, probes=256, prog_bar=True)
    trainer = pl.Trainer(
        max_epochs=8, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        module,
        DataLoader(training, batch_size=64, shuffle=True),
        DataLoader(validation, batch_size=180),
    )
    print("\nLogged at the last validation epoch:")
    for name in sorted(n for n in trainer.callback_metrics if n.startswith("pathkernel/")):
        print(f"  {name:36s} {float(trainer.callback_metrics[name]):9.4f}")
    return module, path_kernel


def print_fidelity(machine: KernelMachine, validation: TensorDataset) -> None:
    """The kernel machine against the network on all validation images."""
    found = machine.fidelity(DataLoader(validation, batch_size=180))
    print("\nThe exported machine on all validation images:")
    for name, value in found.items():
        print(f"  {name:36s} {value:9.4f}")


def print_explanation(why: Explanation, queries: Tensor, labels: Tensor, train_labels: Tensor) -> None:
    """Each query's ledger, and the training examples most for and most against its predicted class."""
    for q, query in enumerate(queries.tolist()):
        terms = ", ".join(f"{name} {float(value[q]):+.3f}" for name, value in why.ledger.items())
        logit = f"logit of {int(why.target[q])} {float(why.network[q]):.3f}"
        print(f"\nvalidation image {query}, a {int(labels[q])}: {logit} = {terms}")
        print(f"  the machine, without the last three: {float(why.prediction[q]):.3f}")
        half = why.example_ids.shape[1] // 2
        for side, start in (("for", 0), ("against", half)):
            shown = [
                f"id {int(i)} (a {int(train_labels[i])}) {float(c):+.3f}"
                for i, c in zip(why.example_ids[q, start : start + half], why.contributions[q, start : start + half],
                                strict=True)
            ]  # fmt: skip
            print(f"  most {side:7s} " + ", ".join(shown))


def draw(why: Explanation, training: TensorDataset, path: Path) -> None:
    """The first query's ledger, and the training images for and against it."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_ledger(why, ax=axes[0])
    plot_examples(why, training, ax=axes[1])
    figure.savefig(path, dpi=120)


def main() -> int:
    """Train, export, explain; returns the exit status."""
    shutil.rmtree(OUT, ignore_errors=True)
    training, validation = load()
    module, path_kernel = train(training, validation)
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    print_fidelity(machine, validation)
    queries = torch.arange(5)
    x, labels = validation.tensors[0][queries], validation.tensors[1][queries]
    why = machine.explain(x, top_k=3)
    print_explanation(why, queries, labels, training.tensors[1])
    draw(why, training, OUT / "digits.png")
    asked = [tensor[:40] for tensor in validation.tensors]
    report = machine.report(OUT / "report.html", asked, examples=training, title="Handwritten digits")
    print(f"\nReport: {report}\nPicture: {OUT / 'digits.png'}\nMachine: {path_kernel.machine_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
