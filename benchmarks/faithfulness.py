"""Fidelity and contributions of the sketched machine against brute force on Fashion-MNIST.

Brute force: one chord per optimiser step with 6 Gauss points, every per-example gradient whole, by `torch.func`;
momentum and Adam's second moments followed step by step. It uses nothing of the package. Needs the images, for example
of Debian's package dataset-fashion-mnist, in the directory given.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.networks import mlp
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings

TRAIN, BATCH, EPOCHS, PROBES, QUERIES = 2000, 64, 5, 256, 24
Weights = dict[str, Tensor]


def cnn() -> nn.Module:
    """Convolutions with 8 and 16 channels, 27k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, its optimiser, nodes, norm to clip at, batches per step, and warm-up of a cosine schedule."""

    network: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    nodes: int
    clip: float | None = None
    accumulate: int = 1
    warm_up: int | None = None

    def rates(self, steps: int) -> list[float]:
        """What every step's learning rate is multiplied with."""
        if self.warm_up is None:
            return [1.0] * steps
        falling = [0.5 + 0.5 * math.cos(math.pi * s / (steps - self.warm_up)) for s in range(steps - self.warm_up)]
        return [(s + 1) / self.warm_up for s in range(self.warm_up)] + falling


CASES = {
    "MLP, SGD": Case(mlp, lambda p: torch.optim.SGD(p, lr=0.1), 16),
    "CNN, SGD": Case(cnn, lambda p: torch.optim.SGD(p, lr=0.05), 16),
    "CNN, momentum, clipping": Case(cnn, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), 16, 1.0),
    "MLP, AdamW": Case(mlp, lambda p: torch.optim.AdamW(p, lr=1e-3), 24),
    "CNN, AdamW": Case(cnn, lambda p: torch.optim.AdamW(p, lr=1e-3), 24),
    "MLP, AdamW, clipping, accumulation, cosine": Case(mlp, lambda p: torch.optim.AdamW(p, lr=1e-3), 24, 1.0, 2, 10),
}


def images(directory: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images ``[n, 1, 28, 28]`` in [0, 1] and their labels."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((directory / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    x = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)[:count].copy()).float() / 255
    return x, torch.from_numpy(labels[:count].copy()).long()


@dataclass
class Run:
    """A recorded training run, with what brute force needs of it: weights of every step and clipping factors."""

    case: Case
    machine: KernelMachine
    options: dict[str, Any]
    rates: list[float]
    batches: list[Tensor]
    weights: list[Weights]
    factors: list[float]


def record(case: Case, seed: int, sketch_dim: int, data: tuple[Tensor, Tensor], probes: Tensor) -> Run:
    """Train and record."""
    x, y = data
    torch.manual_seed(seed)
    module = case.network()
    optimizer = case.optimizer(module.parameters())
    generator = torch.Generator().manual_seed(seed)
    size = BATCH * case.accumulate
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(x), generator=generator).split(size)]
    rates = [factor * optimizer.param_groups[0]["lr"] for factor in case.rates(len(batches))]
    chords: list[Chord] = []
    network = Network(module, plan_capture(module))
    settings = RecorderSettings(node_schedule(len(batches), case.nodes), sketch_dim, seed=seed)
    recorder = PathRecorder(network, optimizer, settings, probes, chords.append)
    recorder.capture.attach()
    weights, factors = [network.weights()], []
    for rows, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for part in rows.split(BATCH):
            recorder.begin_batch(part)
            loss = F.cross_entropy(module(x[part]), y[part], reduction="sum") / len(rows)
            recorder.before_backward()
            loss.backward()
            recorder.after_backward()
        recorder.before_step()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), case.clip or float("inf")))
        factors.append(min(1.0, case.clip / (norm + 1e-6)) if case.clip else 1.0)
        optimizer.step()
        recorder.after_step()
        recorder.end_batch()
        weights.append(network.weights())
    recorder.capture.detach()
    return Run(case, KernelMachine(module, chords), optimizer.param_groups[0], rates, batches, weights, factors)


def _flat(tensors: Weights) -> Tensor:
    return torch.cat([t.flatten(1) for t in tensors.values()], dim=1)


class BruteForce:
    """Whole per-example gradients of a run, step by step."""

    def __init__(self, run: Run, data: tuple[Tensor, Tensor]) -> None:
        self.run, (self.x, self.y) = run, data
        self.module = run.case.network()
        self.adam = "betas" in run.options

    def _loss(self, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.module, weights, (x[None],)), y[None])

    def _output(self, weights: Weights, x: Tensor, target: Tensor) -> Tensor:
        return functional_call(self.module, weights, (x[None],))[0].gather(0, target[None])[0]

    def _gradients(self, step: int) -> Tensor:
        rows, run = self.run.batches[step], self.run
        found = vmap(grad(self._loss), (None, 0, 0))(run.weights[step], self.x[rows], self.y[rows])
        return _flat(found) * run.factors[step] / len(rows)

    def _scales(self) -> list[Tensor]:
        """Rate times D of every step, with the bias correction of Adam's momentum."""
        options, out, second = self.run.options, [], torch.zeros(1)
        for step in range(len(self.run.batches)):
            if not self.adam:
                out.append(torch.tensor(self.run.rates[step]))
                continue
            first, beta = options["betas"]
            second = beta * second + (1 - beta) * self._gradients(step).sum(0).square()
            root = (second / (1 - beta ** (step + 1))).sqrt() + options["eps"]
            out.append(self.run.rates[step] * (1 - first) / (1 - first ** (step + 1)) / root)
        return out

    def _mean_gradient(self, step: int, queries: Tensor, target: Tensor) -> Tensor:
        start, end = self.run.weights[step], self.run.weights[step + 1]
        nodes, parts = np.polynomial.legendre.leggauss(6)
        total = torch.zeros(1)
        for t, w in zip((nodes + 1) / 2, parts / 2, strict=True):
            weights = {name: a + float(t) * (end[name] - a) for name, a in start.items()}
            found = vmap(grad(self._output), (None, 0, 0))(weights, queries, target)
            total = total + float(w) * _flat(found)
        return total

    def contributions(self, queries: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Exact contributions ``[Q, N]`` and self-influences ``[N]``, both summed backwards over the steps."""
        keep = self.run.options["betas"][0] if self.adam else self.run.options["momentum"]
        exact, own = torch.zeros(len(queries), len(self.x)), torch.zeros(len(self.x))
        pulled, moved = torch.zeros(1), torch.zeros(1)
        scales = self._scales()
        for step in reversed(range(len(self.run.batches))):
            rows = self.run.batches[step]
            pulled = keep * pulled + scales[step] * self._mean_gradient(step, queries, target)
            moved = keep * moved + scales[step]
            gradients = self._gradients(step)
            exact.index_add_(1, rows, -pulled @ gradients.T)
            own.index_add_(0, rows, -(gradients.square() * moved).sum(1) * len(rows))
        return exact, own


def measure(name: str, seed: int, sketch_dim: int, directory: Path) -> str:
    """One row of the table."""
    data = images(directory, "train", TRAIN)
    unseen = images(directory, "t10k", PROBES + QUERIES)[0]
    run = record(CASES[name], seed, sketch_dim, data, unseen[:PROBES])
    queries = unseen[PROBES:]
    target = run.machine.network_outputs(queries).argmax(1)
    exact, own = BruteForce(run, data).contributions(queries, target)
    found = run.machine.contributions(queries, target)
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, exact, strict=True)]
    influence = run.machine.self_influence()
    alike = float(torch.corrcoef(torch.stack([influence, own]))[0, 1])
    share = float(influence.sum() / own.sum())
    fidelity = run.machine.fidelity([queries])["fidelity"]
    pearson = float(torch.stack(pairs).mean())
    return f"| {name} | {seed} | {fidelity:.4f} | {pearson:.4f} | {alike:.4f} | {share:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the *-ubyte.gz files are")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sketch-dim", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(2)
    print("| case | seed | fidelity | Pearson | self-influence: Pearson | self-influence: share kept |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.case or CASES:
        for seed in range(options.seeds):
            print(measure(name, seed, options.sketch_dim, options.directory), flush=True)


if __name__ == "__main__":
    main()
