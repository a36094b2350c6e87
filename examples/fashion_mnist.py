"""Clothes: which training images made a small CNN call a shirt a shirt.

Fashion-MNIST as Debian's package `dataset-fashion-mnist` has it (`apt install dataset-fashion-mnist`), the first 3,000
images; pass another directory of the `*-ubyte.gz` files as the only argument. It writes to
`examples/out/fashion_mnist`.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_pathkernel import Explanation, KernelMachine, PathKernelCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "fashion_mnist"
PACKAGE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def read(directory: Path, part: str, n: int) -> TensorDataset:
    """The first images and labels of a part, pixels in [0, 1]."""
    with gzip.open(directory / f"{part}-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(16 + 784 * n), np.uint8, offset=16).reshape(n, 1, 28, 28)
    with gzip.open(directory / f"{part}-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(8 + n), np.uint8, offset=8)
    return TensorDataset(torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(np.int64)))


class Clothes(pl.LightningModule):
    """Convolutions with 8 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
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
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def draw(why: Explanation, x: Tensor, predicted: Tensor, training: TensorDataset, path: Path) -> None:
    """Each query beside the three training images most for its predicted class and the three most against it."""
    images, labels = training.tensors
    columns = 1 + why.example_ids.shape[1]
    figure, axes = plt.subplots(len(x), columns, figsize=(1.5 * columns, 1.9 * len(x)), layout="constrained")
    for q, row in enumerate(axes):
        row[0].imshow(x[q, 0], cmap="gray_r")
        row[0].set_title(f"{CLASSES[int(predicted[q])]}?\nlogit {float(why.prediction[q]):.2f}", fontsize=9)
        for axis, i, c in zip(row[1:], why.example_ids[q], why.contributions[q], strict=True):
            axis.imshow(images[i, 0], cmap="gray_r")
            axis.set_title(f"{CLASSES[int(labels[i])]}\n{float(c):+.2f}", fontsize=9,
                           color="#1a7f37" if c > 0 else "#b3261e")  # fmt: skip
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("Query, three training images most for it, three most against it")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train, export, explain; returns the exit status."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    if not directory.is_dir():
        print(f"{directory} is not there: apt install dataset-fashion-mnist, or name a directory", file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    training, validation = read(directory, "train", 3000), read(directory, "t10k", 500)
    pl.seed_everything(0)
    module = Clothes()
    path_kernel = PathKernelCallback(dirpath=str(OUT / "run"), nodes=16, probes=64, prog_bar=True)
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(training, 64, shuffle=True), DataLoader(validation, 250))
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    for name, value in machine.fidelity(DataLoader(Subset(validation, range(125)), 125)).items():
        print(f"  {name:20s} {value:9.4f}")
    x = validation.tensors[0][:4]
    predicted = machine.predict(x).argmax(1)
    draw(machine.explain(x, target=predicted, top_k=3), x, predicted, training, OUT / "fashion_mnist.png")
    print(f"\nPicture: {OUT / 'fashion_mnist.png'}\nMachine: {path_kernel.machine_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
