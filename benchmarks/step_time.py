"""Time of a training step with recording over the plain step, interleaved in one process.

    python -m benchmarks.step_time

For each network and optimiser two copies are trained in turn, one plain and one recorded; the figure is the median over
pairs of steps of the ratio of their times, with quartiles. Node steps, at which a chord closes and a basis is fitted,
are timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.network import Network
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, rec: PathRecorder | None) -> float:
    start = time.perf_counter()
    if rec is not None:
        rec.begin_batch(torch.arange(len(x)))
    optimizer.zero_grad()
    logits = model(x)
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
    if rec is not None:
        rec.before_backward()
    loss.backward()
    if rec is not None:
        rec.after_backward()
        rec.before_step()
    optimizer.step()
    if rec is not None:
        rec.after_step()
        rec.end_batch()
    return time.perf_counter() - start


def measure(network: str, optimizer: str, steps: int, sketch_dim: int) -> dict[str, float]:
    """Ratios of one network under one optimiser."""
    sides = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model, x, y = NETWORKS[network]()
        opt = OPTIMIZERS[optimizer](model.parameters())
        rec = None
        if recorded:
            settings = RecorderSettings([0, 10, steps + 100], sketch_dim, SketchSettings(), changes="none")
            rec = PathRecorder(Network(model, plan_capture(model)), opt, settings, None, lambda chord: None)
            rec.capture.attach()
        sides.append((model, opt, x, y, rec))
    for _ in range(12):
        for side in sides:
            _step(*side)
    pairs = [[_step(*side) for side in sides] for _ in range(steps)]
    ratios = sorted(recorded / plain for plain, recorded in pairs)
    return {
        "plain_ms": 1e3 * statistics.median(p for p, _ in pairs),
        "ratio": statistics.median(ratios),
        "q1": ratios[len(ratios) // 4],
        "q3": ratios[3 * len(ratios) // 4],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.steps} pairs of steps")
    print("| network | optimiser | plain step, ms | recorded / plain, median | quartiles |\n|---|---|---|---|---|")
    for network in args.networks:
        for optimizer in args.optimizers:
            r = measure(network, optimizer, args.steps, args.sketch_dim)
            print(
                f"| {network} | {optimizer} | {r['plain_ms']:.2f} | {r['ratio']:.3f} | {r['q1']:.3f}-{r['q3']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
