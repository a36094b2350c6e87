"""Fidelity and contributions of the sketched machine against brute force, at default settings.

Networks, optimisers and data are those of `benchmarks.cases`, exact contributions those of `benchmarks.brute_force`.
Needs Fashion-MNIST, for example of Debian's package dataset-fashion-mnist, in the directory given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.brute_force import Listener, exact_contributions, train
from benchmarks.cases import CASES
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings


class Recording(Listener):
    """A recorder that is told of a training run."""

    def __init__(self, recorder: PathRecorder) -> None:
        self.recorder = recorder
        recorder.capture.attach()

    def begin_batch(self, rows: Tensor) -> None:
        """A batch of these examples comes."""
        self.recorder.begin_batch(rows)

    def before_backward(self) -> None:
        """Its gradients come."""
        self.recorder.before_backward()

    def after_backward(self) -> None:
        """They are all in."""
        self.recorder.after_backward()

    def before_step(self) -> None:
        """The optimiser's gradients are complete."""
        self.recorder.before_step()

    def after_step(self) -> None:
        """It has moved the weights."""
        self.recorder.after_step()

    def end_batch(self) -> None:
        """The batch is over."""
        self.recorder.end_batch()


def measure(name: str, seed: int, sketch_dim: int, directory: Path) -> str:
    """One row of the table."""
    case = CASES[name]
    data = case.data(directory)
    chords: list[Chord] = []
    told: list[Recording] = []

    def listeners(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Recording]:
        settings = RecorderSettings(node_schedule(steps, case.nodes), sketch_dim, seed=seed)
        network = Network(module, plan_capture(module))
        told.append(Recording(PathRecorder(network, optimizer, settings, data.probes, chords.append)))
        return told

    run = train(case, seed, data, listeners)
    told[0].recorder.capture.detach()
    machine, exact = KernelMachine(run.module, chords), exact_contributions(run)
    found, influence = machine.contributions(data.queries, exact.target), machine.self_influence()
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, exact.contributions, strict=True)]
    alike = float(torch.corrcoef(torch.stack([influence, exact.own]))[0, 1])
    share = float(influence.sum() / exact.own.sum())
    metrics = machine.fidelity([data.unseen])
    pearson = float(torch.stack(pairs).mean())
    return (
        f"| {name} | {seed} | {metrics['fidelity']:.4f} | {pearson:.4f} | {metrics['agreement']:.3f} | {alike:.4f} | "
        f"{share:.3f} | {exact.unexplained:.1g} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the *-ubyte.gz files are")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sketch-dim", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(
        "| case | seed | fidelity | Pearson | agreement | self-influence: Pearson | self-influence: share kept | "
        "brute force misses |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.case or CASES:
        for seed in range(options.seeds):
            print(measure(name, seed, options.sketch_dim, options.directory), flush=True)


if __name__ == "__main__":
    main()
