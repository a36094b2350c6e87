"""Time of a training step through a Trainer, with the callback over without, in fits that take turns.

    python -m benchmarks.trainer_time

A step lasts from one call of ``training_step`` to the next, so that it has in it all that Lightning and the callback
do: hooks, the loader, the optimiser. The figures are the ratio of the medians over all steps but the first of each fit
and those around nodes, and the ratio of the whole: all steps, with nodes, storage and probes, but for the first twenty.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import NETWORKS
from benchmarks.step_time import OPTIMIZERS, rows
from lightning_pathkernel import PathKernelCallback
from lightning_pathkernel.path import node_schedule


class _Timed(pl.LightningModule):
    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.starts: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.starts.append(time.perf_counter())
        logits = self(batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Called once before training: the validation loader is there for its probes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        return optimizer


def _outputs(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One row per example, of networks too that have one for each position."""
    return rows(module(batch[0]))


def _steps(
    network: str, optimizer: str, recorded: bool, sketch_dim: int, steps: int, nodes: int
) -> tuple[list[float], float]:
    """Seconds of every step of one fit but the first twenty and those around nodes, and of all but the first twenty."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[network]()
    data = TensorDataset(*(v.repeat(4, *[1] * (v.dim() - 1)) for v in (x, y)))
    module = _Timed(model, optimizer)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = []
        if recorded:
            callbacks.append(
                PathKernelCallback(directory, sketch_dim, nodes, probes=64, export=False, forward_fn=_outputs)
            )
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=1, check_val_every_n_epoch=steps,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, len(x), shuffle=True), DataLoader(data, len(x)))
    gaps = [b - a for a, b in zip(module.starts, module.starts[1:], strict=False)]
    at = node_schedule(steps, nodes)[1:]
    usual = [gap for i, gap in enumerate(gaps) if i > 20 and all(abs(i - node) > 2 for node in at)]
    return usual, sum(gaps[20:])


def measure(
    network: str, optimizer: str, sketch_dim: int, fits: int, steps: int, nodes: int
) -> tuple[float, float, float, float]:
    """Median step without the callback, in ms, the ratio, its spread from pair to pair of fits, and the whole ratio."""
    pairs = [[_steps(network, optimizer, r, sketch_dim, steps, nodes) for r in (False, True)] for _ in range(fits)]
    plain, recorded = ([step for pair in pairs for step in pair[side][0]] for side in (0, 1))
    ratios = [statistics.median(b[0]) / statistics.median(a[0]) for a, b in pairs]
    return (
        1e3 * statistics.median(plain),
        statistics.median(recorded) / statistics.median(plain),
        statistics.pstdev(ratios),
        statistics.median(b[1] / a[1] for a, b in pairs),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--fits", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="*", default=["sgd", "adamw"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.fits} pairs of fits of {args.steps} steps")
    print("| network | optimiser | plain step, ms | recorded / plain | spread | whole fit |\n|---|---|---|---|---|---|")
    for network in args.networks:
        for optimizer in args.optimizers:
            plain, ratio, spread, whole = measure(
                network, optimizer, args.sketch_dim, args.fits, args.steps, args.nodes
            )
            print(f"| {network} | {optimizer} | {plain:.2f} | {ratio:.3f} | {spread:.3f} | {whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
