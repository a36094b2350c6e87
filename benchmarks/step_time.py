"""Time of a training step with recording over the plain step, interleaved in one process.

    python -m benchmarks.step_time

For each network and optimiser two copies are trained in turn, one plain and one recorded. Reported are the median over
pairs of steps of the ratio of their times, with quartiles, of steps between nodes; how long a node takes, at which a
chord closes, is written to disk, probes follow it and the next basis is fitted; and the ratio of the whole runs, with
all their nodes. Examples are random, so that the figures say nothing but times; identity is not among them:
`benchmarks.trainer_time` has all of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import write_chord
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import gauss_legendre, node_schedule
from lightning_pathkernel.probes import ProbeTracker
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
WARM_UP = 12


class Side:
    """A network in training, recorded or not.

    Args:
        network: Its name.
        optimizer: The optimiser's.
        settings: What to record; None for the plain side.
        probes: Examples that are followed.
        directory: Where chords are written.
    """

    def __init__(
        self, network: str, optimizer: str, settings: RecorderSettings | None, probes: int, directory: Path
    ) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.y = NETWORKS[network]()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.recorder: PathRecorder | None = None
        if settings is None:
            return
        # per example the networks' outputs, also where they have one for each position
        recorded = Network(self.model, plan_capture(self.model), lambda module, batch: rows(module(batch)))
        batch = self.x.repeat(-(-probes // len(self.x)), *[1] * (self.x.dim() - 1))[:probes] if probes else None
        tracker = None if batch is None else ProbeTracker(recorded, batch, gauss_legendre(4), 0)

        def on_chord(chord: Chord) -> None:
            write_chord(directory, chord)
            if tracker is not None:
                tracker.advance(chord)

        self.recorder = PathRecorder(recorded, self.optimizer, settings, batch, on_chord)
        self.recorder.capture.attach()

    def step(self) -> float:
        """Seconds that one training step takes."""
        start, rec = time.perf_counter(), self.recorder
        if rec is not None:
            rec.begin_batch(torch.arange(len(self.x)))
        self.optimizer.zero_grad()
        logits = self.model(self.x)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), self.y.flatten())
        if rec is not None:
            rec.before_backward()
        loss.backward()
        if rec is not None:
            rec.after_backward()
            rec.before_step()
        self.optimizer.step()
        if rec is not None:
            rec.after_step()
            rec.end_batch()
        return time.perf_counter() - start


def rows(outputs: Tensor) -> Tensor:
    """Outputs ``[n, K]``; the last position's where there is one for each."""
    return outputs if outputs.dim() == 2 else outputs[:, -1]


def measure(
    network: str, optimizer: str, steps: int, sketch_dim: int, width: int, nodes: int, probes: int
) -> dict[str, float]:
    """Times and ratios of one network under one optimiser."""
    schedule = [0, WARM_UP, *(WARM_UP + n for n in node_schedule(steps, nodes)[1:])]
    settings = RecorderSettings(schedule, sketch_dim, SketchSettings(width=width), changes="none")
    with tempfile.TemporaryDirectory() as directory:
        sides = [Side(network, optimizer, each, probes, Path(directory)) for each in (None, settings)]
        for _ in range(WARM_UP + 1):  # and the first step of a chord, which fits its basis
            for side in sides:
                side.step()
        pairs = [[side.step() for side in sides] for _ in range(steps - 1)]
    # a node is dear twice: at the last step of a chord, and at the first one of the next
    at_node = {i for n in schedule for i in (n - WARM_UP - 2, n - WARM_UP - 1)}
    between = [pair for i, pair in enumerate(pairs) if i not in at_node]
    plain, usual = (statistics.median(pair[side] for pair in between) for side in (0, 1))
    ratios = sorted(recorded / bare for bare, recorded in between)
    spent = sum(pair[1] - usual for i, pair in enumerate(pairs) if i in at_node)
    return {
        "plain_ms": 1e3 * plain,
        "ratio": statistics.median(ratios),
        "q1": ratios[len(ratios) // 4],
        "q3": ratios[3 * len(ratios) // 4],
        "node_ms": 1e3 * spent / nodes,
        "whole": sum(recorded for _, recorded in pairs) / sum(bare for bare, _ in pairs),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--width", type=int, default=SketchSettings().width)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.steps} pairs of steps, {args.nodes} nodes, "
        f"{args.probes} probes, sketch_dim={args.sketch_dim}, width={args.width}, load {os.getloadavg()[0]:.1f}"
    )
    print("| network | optimiser | plain step, ms | recorded / plain, median | quartiles | node, ms | whole run |")
    print("|---|---|---|---|---|---|---|")
    for network in args.networks:
        for optimizer in args.optimizers:
            r = measure(network, optimizer, args.steps, args.sketch_dim, args.width, args.nodes, args.probes)
            print(
                f"| {network} | {optimizer} | {r['plain_ms']:.2f} | {r['ratio']:.3f} | {r['q1']:.3f}-{r['q3']:.3f} "
                f"| {r['node_ms']:.0f} | {r['whole']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
