"""Label errors: flip 10 % of the labels of handwritten digits, train, and let the kernel machine find them.

Run it from a bare checkout with `.venv/bin/python examples/label_errors.py`, after `make demo` or `make test` have set
the environment up. Everything it writes goes to `examples/out/label_errors`.
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

from lightning_pathkernel import KernelMachine, PathKernelCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "label_errors"


class Digits(pl.LightningModule):
    """A small convolutional network; nothing in it knows of the path kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 4, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def load() -> tuple[Tensor, Tensor, Tensor]:
    """1,437 digits ``[n, 1, 8, 8]``, their labels with every tenth one wrong, and the true ones."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[:1437]
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    truth = torch.tensor(labels)[order]
    given = truth.clone()
    wrong = torch.randperm(len(truth), generator=generator)[: len(truth) // 10]
    given[wrong] = (truth[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return x, given, truth


def train(x: Tensor, y: Tensor) -> tuple[Digits, KernelMachine]:
    """Train on the labels as they are given."""
    pl.seed_everything(0)
    module = Digits()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), sketch_dim=128, nodes=12, probes=64)
    trainer = pl.Trainer(
        max_epochs=15, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False, enable_progress_bar=False, limit_val_batches=1,
    )  # fmt: skip
    data = TensorDataset(x, y)
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True), DataLoader(data, batch_size=64))
    return module, KernelMachine.load(path_kernel.machine_dir, module)


def curve(ranking: Tensor, wrong: Tensor) -> Tensor:
    """Share of the wrong labels among the first 1, 2, ... of a ranking, ``[n]``."""
    return wrong[ranking].double().cumsum(0) / wrong.sum()


def draw(curves: dict[str, Tensor], suspects: Tensor, x: Tensor, given: Tensor, truth: Tensor, path: Path) -> None:
    """How much is found, and the twenty most suspicious images."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    axis = left.subplots()
    for name, values in curves.items():
        axis.plot(torch.arange(1, len(values) + 1) / len(values), values, label=name)
    axis.set(xlabel="share of the images inspected", ylabel="share of the wrong labels found", xlim=(0, 0.6))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    for axis, i in zip(right.subplots(4, 5).flat, suspects.tolist(), strict=False):
        axis.imshow(x[i, 0], cmap="gray_r")
        right_label = given[i] == truth[i]
        axis.set_title(f"labelled {int(given[i])}", fontsize=9, color="#1a7f37" if right_label else "#b3261e")
        axis.set_xticks([])
        axis.set_yticks([])
    right.suptitle("Most suspicious first; green: the label was right")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Flip, train, find; returns the exit status."""
    shutil.rmtree(OUT, ignore_errors=True)
    x, given, truth = load()
    wrong = given != truth
    module, machine = train(x, given)
    found = machine.label_errors(given)
    with torch.no_grad():
        logits = module.eval()(x)
    rankings = {
        "label_errors(labels)": found.example_ids,
        "label_errors(labels, x)": machine.label_errors(given, x).example_ids,
        "self-influence": machine.self_influence().argsort(),
        "training loss at the end": F.cross_entropy(logits, given, reduction="none").argsort(descending=True),
    }
    curves = {name: curve(ranking, wrong) for name, ranking in rankings.items()}
    print(f"\n{int(wrong.sum())} of {len(x)} labels are wrong. Share of them found in the first")
    print(f"  {'':26s}" + "".join(f"{p:6d} %" for p in (5, 10, 20, 30)))
    for name, values in curves.items():
        print(f"  {name:26s}" + "".join(f"{float(values[len(x) * p // 100 - 1]):8.3f}" for p in (5, 10, 20, 30)))
    draw(curves, found.example_ids[:20], x, given, truth, OUT / "label_errors.png")
    print(f"\nPicture: {OUT / 'label_errors.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
