"""Kernels of a trained network in scikit-learn: path kernel, tangent kernel at the start and the end, and RBF.

Does the architecture carry knowledge of the target? Each kernel of handwritten digits is asked for its alignment with
the labels, and for the accuracy of a support vector machine on images that neither it nor the network has seen;
centred kernel alignment compares networks. With a number of seeds as its argument each architecture is trained with
every one, and nothing is drawn: `examples/kernels.py 5` prints what docs/kernels.md has.

Run it from a bare checkout with `.venv/bin/python examples/kernels.py`, after `make demo` or `make test` have set the
environment up. Everything it writes goes to `examples/out/kernels`.
"""

from __future__ import annotations

import shutil
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import (
    KernelMachine,
    PathKernelCallback,
    centered_kernel_alignment,
    kernel_target_alignment,
)
from lightning_pathkernel.sklearn import PathKernel

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "out" / "kernels"
TRAIN, TEST = 400, 200
NETWORKS = [("MLP", 0), ("MLP", 1), ("CNN", 0)]
KERNELS = {"tangent, start": ("tangent", 0), "tangent, end": ("tangent", -1), "path": ("path", -1)}


def network(kind: str) -> nn.Module:
    if kind == "MLP":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class Digits(pl.LightningModule):
    """Nothing in it knows of the path kernel."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = network(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def load() -> tuple[Tensor, Tensor]:
    """600 digits ``[n, 1, 8, 8]`` and their labels: 400 to train on, 200 to test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: TRAIN + TEST]
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def train(kind: str, seed: int, x: Tensor, y: Tensor) -> tuple[KernelMachine, float]:
    """A network's kernel machine, and the network's own accuracy on the test images."""
    pl.seed_everything(seed, verbose=False)
    module = Digits(kind)
    root = OUT / f"{kind}-{seed}"
    path_kernel = PathKernelCallback(dirpath=str(root), sketch_dim=64, nodes=8, probes=32)
    trainer = pl.Trainer(
        max_epochs=20, callbacks=[path_kernel], accelerator="cpu", logger=False, enable_checkpointing=False,
        default_root_dir=str(OUT), enable_model_summary=False, enable_progress_bar=False, limit_val_batches=1,
    )  # fmt: skip
    data = TensorDataset(x[:TRAIN], y[:TRAIN])
    trainer.fit(module, DataLoader(data, 32, shuffle=True), DataLoader(data, 32))
    machine = KernelMachine.load(path_kernel.machine_dir, module, quadrature_points=2)
    return machine, float((machine.network_outputs(x[TRAIN:]).argmax(1) == y[TRAIN:]).float().mean())


def svm(gram: np.ndarray, y: np.ndarray) -> float:
    """Accuracy on the test images of a support vector machine fitted to the training images."""
    fitted = SVC(C=10, kernel="precomputed").fit(gram[:TRAIN, :TRAIN], y[:TRAIN])
    return float(fitted.score(gram[TRAIN:, :TRAIN], y[TRAIN:]))


def draw(rows: list[tuple[str, float, float]], alike: dict[str, np.ndarray], names: list[str], path: Path) -> None:
    """Alignment against accuracy, and how alike the networks' kernels are."""
    figure, axes = plt.subplots(1, 1 + len(alike), figsize=(4.2 + 3 * len(alike), 3.6), layout="constrained")
    kinds = list(dict.fromkeys(name.partition(", ")[2] for name, _, _ in rows))
    for name, alignment, accuracy in rows:
        owner, _, kind = name.partition(", ")
        marker = {"MLP 0": "o", "MLP 1": "s", "CNN 0": "^"}.get(owner, "*")
        axes[0].scatter(alignment, accuracy, marker=marker, color=f"C{kinds.index(kind)}", s=45, label=name)
    axes[0].set(xlabel="alignment with the labels, unseen images", ylabel="accuracy of an SVM, unseen images")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    for axis, (title, values) in zip(axes[1:], alike.items(), strict=True):
        axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
        axis.set(title=f"CKA, {title}", xticks=range(len(names)), yticks=range(len(names)))
        axis.set_xticklabels(names)
        axis.set_yticklabels(names)
        for i, j in np.ndindex(values.shape):
            axis.text(j, i, f"{values[i, j]:.2f}", ha="center", color="w" if values[i, j] < 0.6 else "k")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Train three networks, or more, and compare their kernels; returns the exit status."""
    networks = NETWORKS if len(sys.argv) < 2 else list(product(("MLP", "CNN"), range(int(sys.argv[1]))))
    shutil.rmtree(OUT, ignore_errors=True)
    x, y = load()
    flat, labels, unseen = x.flatten(1).numpy(), y.numpy(), slice(TRAIN, None)
    grams: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KERNELS}
    rbf = rbf_kernel(flat, gamma=1 / (flat.shape[1] * flat.var()))
    rows = [("RBF", kernel_target_alignment(torch.tensor(rbf)[unseen, unseen], y[unseen]), svm(rbf, labels))]
    names = [f"{kind} {seed}" for kind, seed in networks]
    for (kind, seed), name in zip(networks, names, strict=True):
        machine, accuracy = train(kind, seed, x, y)
        print(f"{name}: the network itself is right on {accuracy:.3f} of the unseen images")
        for title, (kernel, node) in KERNELS.items():
            estimator = PathKernel(machine, kernel=kernel, node=node, input_shape=(1, 8, 8), scaled=True)
            gram = grams[title][name] = estimator.fit_transform(flat)
            alignment = kernel_target_alignment(torch.tensor(gram)[unseen, unseen], y[unseen])
            rows.append((f"{name}, {title}", alignment, svm(gram, labels)))
    print(f"\n{'kernel':24s}{'alignment':>12s}{'SVM':>8s}   on {TEST} images that no network has seen")
    for title, alignment, accuracy in rows:
        print(f"{title:24s}{alignment:12.3f}{accuracy:8.3f}")
    alike = {}
    for title, found in grams.items():
        blocks = [torch.tensor(gram)[unseen, unseen] for gram in found.values()]
        pairs = [[centered_kernel_alignment(a, b, unbiased=True) for b in blocks] for a in blocks]
        alike[title] = np.array(pairs)
        shown = ", ".join(
            f"{names[i]} and {names[j]} {pairs[i][j]:.3f}" for i in range(len(names)) for j in range(i + 1, len(names))
        )
        print(f"CKA, {title}: {shown}")
    if networks == NETWORKS:
        draw(rows, alike, names, OUT / "kernels.png")
        print(f"\nPicture: {OUT / 'kernels.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
