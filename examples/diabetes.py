"""Tabular regression: which patients speak for a predicted progression of diabetes, in the data's own units.

Scikit-learn's diabetes set, 442 patients, 10 measurements; squared loss, SGD with momentum. It writes
to `examples/out/diabetes`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import Explanation, KernelMachine, PathKernelCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "diabetes"


class Patients(pl.LightningDataModule):
    """352 patients to train on and 90 to validate; the target in standard deviations of the training set."""

    def __init__(self) -> None:
        super().__init__()
        values, target = load_diabetes(return_X_y=True)
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(values, dtype=torch.float32)[order], torch.tensor(target, dtype=torch.float32)[order]
        x = (x - x[:352].mean(0)) / x[:352].std(0)
        self.mean, self.scale = y[:352].mean(), y[:352].std()
        y = (y - self.mean) / self.scale
        self.training, self.validation = TensorDataset(x[:352], y[:352]), TensorDataset(x[352:], y[352:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=90)


class Progression(pl.LightningModule):
    """A small multilayer perceptron with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x)[:, 0], y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("r2", 1 - F.mse_loss(self(x)[:, 0], y) / y.var(correction=0), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(data: Patients) -> tuple[Progression, PathKernelCallback]:
    """Train as always, with one callback more."""
    pl.seed_everything(0)
    module = Progression()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), sketch_dim=256, nodes=16, probes=90, prog_bar=True)
    trainer = pl.Trainer(
        max_epochs=15, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    print("\nLogged at the last validation epoch:")
    for name in sorted(n for n in trainer.callback_metrics if n == "r2" or n.startswith("pathkernel/")):
        print(f"  {name:36s} {float(trainer.callback_metrics[name]):9.4f}")
    return module, path_kernel


def print_explanation(why: Explanation, data: Patients) -> None:
    """Predictions and contributions in the data's own units: contributions are linear, so they scale."""
    targets = data.training.tensors[1] * data.scale + data.mean
    for q in range(len(why.prediction)):
        predicted = float(why.prediction[q] * data.scale + data.mean)
        terms = ", ".join(f"{name} {float(value[q] * data.scale):+.1f}" for name, value in why.ledger.items())
        print(f"\nvalidation patient {q}: predicted {predicted:.0f} = mean {float(data.mean):.0f}, {terms}")
        half = why.example_ids.shape[1] // 2
        for side, start in (("raising it", 0), ("lowering it", half)):
            pairs = zip(
                why.example_ids[q, start : start + half], why.contributions[q, start : start + half], strict=True
            )
            shown = [f"id {int(i)} (target {float(targets[i]):.0f}) {float(c * data.scale):+.1f}" for i, c in pairs]
            print(f"  most {side:12s}" + ", ".join(shown))


def draw(machine: KernelMachine, data: Patients, fidelity: float, path: Path) -> None:
    """The machine's predictions against the network's, and the patients that matter most to all of them."""
    x = data.validation.tensors[0]
    network, predicted = (t[:, 0] * data.scale + data.mean for t in (machine.network_outputs(x), machine.predict(x)))
    total = (machine.contributions(x) * data.scale).abs().mean(0)
    top = total.topk(10)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.axline((150, 150), slope=1, color="0.7", linewidth=1)
    left.scatter(network, predicted, s=14, color="#1f5fa8")
    left.set(
        xlabel="network", ylabel="bias + contributions", title=f"Progression, 90 patients; fidelity {fidelity:.4f}"
    )
    right.barh([f"id {int(i)}" for i in machine.example_ids[top.indices]][::-1], top.values.flip(0), color="#1f5fa8")
    right.set(xlabel="mean |contribution|", title="Training patients that matter most")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Train, export, explain; returns the exit status."""
    shutil.rmtree(OUT, ignore_errors=True)
    data = Patients()
    module, path_kernel = train(data)
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    found = machine.fidelity(data.val_dataloader())
    print("\nThe exported machine on all validation patients:")
    for name, value in found.items():
        print(f"  {name:36s} {value:9.4f}")
    print_explanation(machine.explain(data.validation.tensors[0][:3], top_k=5), data)
    draw(machine, data, found["fidelity"], OUT / "diabetes.png")
    print(f"\nPicture: {OUT / 'diabetes.png'}\nMachine: {path_kernel.machine_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
