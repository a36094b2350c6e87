"""Wrong labels found by the kernel machine, beside training loss and confidence.

    python -m benchmarks.label_errors FASHION_MNIST --json build/label-errors.jsonl [--seeds 1 2 3] [--quick]
    python -m benchmarks.label_errors FASHION_MNIST --json build/label-errors.jsonl --docs docs

The first form measures and appends one JSON object per fit and score; the second draws docs/plots/label-errors.svg from
them and prints the table of docs/label-errors.md. 10 % of the labels are changed to another class, drawn
evenly; each score ranks the training examples, and what counts is the share of the changed ones among the first 20 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import images
from benchmarks.page import read_lines
from lightning_pathkernel import KernelMachine, PathKernelCallback

__all__ = ["flipped", "found", "measure"]

DATA = ("digits", "Fashion-MNIST")
CASES = tuple(product(("MLP", "CNN"), ("SGD", "AdamW")))
EPOCHS = {"digits": 20, "Fashion-MNIST": 10}
SCORES = {
    "label_errors(labels)": "gradients in the artifact",
    "label_errors(labels, x)": "loss averaged over the path",
    "self_influence()": "self-influence",
    "training loss, mean": "loss averaged over training",
    "training loss, end": "loss at the end",
    "confidence, cross-validated": "confidence, 3 folds",
}
FOLDS = 3
POINTS = [round(0.05 * k, 2) for k in range(21)]


def pictures(name: str, directory: Path, seed: int, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, h, w]`` in [0, 1] and their true labels, a sample drawn with the seed."""
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    else:
        x, y = images(directory, "train", 20_000)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: min(count, 1437 * len(x) // 1797)]
    return x[order], y[order]


def flipped(labels: Tensor, seed: int, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Labels with a share of them changed to another of ten classes, and which, ``[n]`` each."""
    generator = torch.Generator().manual_seed(1000 + seed)
    n = len(labels)
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: round(share * n)]] = True
    other = (labels + torch.randint(1, 10, (n,), generator=generator)) % 10
    return torch.where(wrong, other, labels), wrong


def found(scores: Tensor, wrong: Tensor) -> list[float]:
    """Share of the wrong labels found, for every share of the examples inspected in `POINTS`."""
    hits = wrong[scores.argsort(descending=True, stable=True)].double().cumsum(0) / wrong.sum()
    return [0.0 if p == 0 else float(hits[round(p * len(wrong)) - 1]) for p in POINTS]


def network(kind: str, width: int) -> nn.Module:
    """For images ``width`` x ``width``, ten classes."""
    if kind == "MLP":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(width**2, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * (width // 4) ** 2, 10),
    )  # fmt: skip


class _Classifier(pl.LightningModule):
    """Notes the loss of every training example as it is trained on."""

    def __init__(self, net: nn.Module, optimizer: str, rate: float, n: int) -> None:
        super().__init__()
        self.net, self.choice, self.rate = net, optimizer, rate
        self.losses, self.visits = torch.zeros(n), torch.zeros(n)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, ids = batch
        losses = F.cross_entropy(self(x), y, reduction="none")
        self.losses[ids] += losses.detach()
        self.visits[ids] += 1
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.choice == "SGD" else torch.optim.AdamW
        return kind(self.parameters(), lr=self.rate)


def _fit(
    case: tuple[str, str], x: Tensor, y: Tensor, epochs: int, seed: int, callback: PathKernelCallback | None
) -> _Classifier:
    kind, optimizer = case
    rate = 0.1 if optimizer == "SGD" else 3e-3 if x.shape[-1] == 8 else 1e-3
    pl.seed_everything(seed, verbose=False)
    module = _Classifier(network(kind, x.shape[-1]), optimizer, rate, len(x))
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
            callbacks=[] if callback is None else [callback], limit_val_batches=0 if callback is None else 1,
        )  # fmt: skip
        data = TensorDataset(x, y, torch.arange(len(x)))
        trainer.fit(module, DataLoader(data, 64, shuffle=True), DataLoader(data, 128))
    return module.eval()


def _out_of_sample(case: tuple[str, str], x: Tensor, y: Tensor, epochs: int, seed: int) -> Tensor:
    """1 - probability of the given label by networks that did not see the example, ``[n]``."""
    doubt = torch.zeros(len(x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for fold in range(FOLDS):
        held = torch.zeros(len(x), dtype=torch.bool)
        held[order[fold::FOLDS]] = True
        module = _fit(case, x[~held], y[~held], epochs, seed, None)
        with torch.no_grad():
            doubt[held] = 1 - module(x[held]).softmax(1).gather(1, y[held].unsqueeze(1)).squeeze(1)
    return doubt


def _in_order(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.empty_like(scores).index_copy_(0, ids, scores)


def measure(
    name: str, directory: Path, case: tuple[str, str], seed: int, epochs: int | None = None, nodes: int = 12,
    count: int = 2000,
) -> dict[str, list[float]]:  # fmt: skip
    """Curves of all scores on one fit.

    Args:
        name: The data.
        directory: Of Fashion-MNIST.
        case: Network and optimiser.
        seed: Of sample, labels, network and batches.
        epochs: Passes over the data; None for those of the table.
        nodes: Chords.
        count: Images.

    Returns:
        Score -> share of the wrong labels found, by `POINTS`.
    """
    x, truth = pictures(name, directory, seed, count)
    y, wrong = flipped(truth, seed)
    epochs = EPOCHS[name] if epochs is None else epochs
    with tempfile.TemporaryDirectory() as root:
        callback = PathKernelCallback(dirpath=root, sketch_dim=128, nodes=nodes, probes=64)
        module = _fit(case, x, y, epochs, seed, callback)
        machine = KernelMachine.load(callback.machine_dir, module)
        stored, along = machine.label_errors(y), machine.label_errors(y, x)
    with torch.no_grad():
        end = F.cross_entropy(module(x), y, reduction="none")
    scores = {
        "label_errors(labels)": _in_order(stored.example_ids, stored.scores),
        "label_errors(labels, x)": _in_order(along.example_ids, along.scores),
        "self_influence()": -machine.self_influence(),
        "training loss, mean": module.losses / module.visits,
        "training loss, end": end,
        "confidence, cross-validated": _out_of_sample(case, x, y, epochs, seed),
    }
    return {score: found(values, wrong) for score, values in scores.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Share found among the first 20 %: mean over seeds, and the least."""
    yield "| data, network, optimiser | seeds | " + " | ".join(SCORES) + " |"
    yield "|---" * (2 + len(SCORES)) + "|"
    for name, (kind, optimizer) in product(DATA, CASES):
        mine = [r for r in rows if (r["data"], r["network"], r["optimizer"]) == (name, kind, optimizer)]
        cells = []
        for score in SCORES:
            values = [r["found"][POINTS.index(0.2)] for r in mine if r["score"] == score]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f})" if values else "")
        yield f"| {name}, {kind}, {optimizer} | {len({r['seed'] for r in mine})} | " + " | ".join(cells) + " |"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Found against inspected, mean over networks, optimisers and seeds, one panel for each data set."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(DATA), sharey=True)
    for axis, name in zip(axes, DATA, strict=True):
        for k, score in enumerate(SCORES):
            curves = [r["found"] for r in rows if r["data"] == name and r["score"] == score]
            if curves:
                mean = torch.tensor(curves).mean(0).tolist()
                axis.plot(POINTS, mean, label=score, color=f"C{k}", linewidth=2.2 if k == 0 else 1.2,
                          linestyle="-" if k < 2 else "--")  # fmt: skip
        axis.plot([0, 0.1, 1], [0, 1, 1], color="0.75", linewidth=0.8, label="perfect")
        axis.set(title=name, xlabel="share of the examples inspected", xlim=(0, 0.6), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the wrong labels found")
    axes[1].legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure, or write the page's table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true", help="one short fit of every case")
    args = parser.parse_args()
    if args.docs:
        rows = read_lines(args.json)
        draw(rows, args.docs / "plots" / "label-errors.svg")
        print("\n".join(table(rows)))
        return
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for seed, name, case in product(args.seeds[:1] if args.quick else args.seeds, DATA, CASES):
        short = {"epochs": 2, "nodes": 4, "count": 300} if args.quick else {}
        for score, curve in measure(name, args.directory, case, seed, **short).items():
            row = {"data": name, "network": case[0], "optimizer": case[1], "seed": seed, "score": score, "found": curve}
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(name, *case, seed, score, f"{curve[POINTS.index(0.2)]:.3f}", flush=True)


if __name__ == "__main__":
    main()
