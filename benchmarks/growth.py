"""What grows with the number of examples, steps, parameters and layers, and what does not.

    python -m benchmarks.growth

A network is fitted to random images through a Trainer, once without and once with the callback, under AdamW; one of
four sizes is changed at a time. Each point is a process of its own. Measured are the median training step with and
without the callback (steps at which a chord closes are not among them), such a step's time, peak memory, bytes of
the recording and of the artifact, and the time of one question to the machine. The last row of each part is the power
of the size with which a column grows over the part, a straight line through the logarithms: 0 is constant, 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory import high_water, reset_high_water, resident
from benchmarks.page import command, conditions, emit, table
from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.path import node_schedule

__all__ = ["COLUMNS", "SWEEPS", "Point", "in_a_process", "power", "run"]

ROWS = ("rows", "example_ids", "self_inner")
BATCH, INPUTS, CLASSES, QUERIES = 64, 256, 10, 16


@dataclass(frozen=True)
class Point:
    """Sizes of one fit.

    Attributes:
        examples: Training examples.
        steps: Optimiser steps.
        width: Of every hidden layer.
        layers: Hidden layers.
        nodes: Chords.
        sketch_dim: Numbers per visit.
    """

    examples: int = 4000
    steps: int = 400
    width: int = 128
    layers: int = 3
    nodes: int = 16
    sketch_dim: int = 256

    def network(self) -> nn.Sequential:
        """ReLU layers of one width."""
        sizes = [INPUTS, *[self.width] * self.layers]
        hidden: list[nn.Module] = []
        for a, b in pairwise(sizes):
            hidden += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], CLASSES))


SWEEPS: dict[str, tuple[int, ...]] = {
    "examples": (1000, 4000, 16000, 64000),
    "steps": (200, 800, 3200),
    "width": (64, 256, 1024),
    "layers": (2, 4, 8, 16),
}
COLUMNS = {
    "parameters": "parameters",
    "plain_ms": "plain step, ms",
    "recorded_ms": "recorded step, ms",
    "node_ms": "step that closes a chord, ms",
    "plain_mb": "peak without, MB",
    "recorded_mb": "peak with, MB",
    "recording_mb": "recording, MB",
    "artifact_mb": "artifact, MB",
    "rows_mb": "of it rows of examples, MB",
    "query_ms": f"question of {QUERIES}, ms",
}


class _Module(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.starts: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.starts.append(time.perf_counter())
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """There for the probes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _size(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


def _rows(directory: Path) -> float:
    """MB of what an artifact keeps of each visited example."""
    total = 0
    for path in directory.glob("chord-*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name.rpartition("/")[2] in ROWS]  # noqa: SIM118  # no mapping
            total += sum(t.numel() * t.element_size() for t in map(file.get_tensor, names))
    return total / 1e6


def _fit(
    point: Point, callbacks: list[pl.Callback], data: TensorDataset, probes: TensorDataset
) -> tuple[_Module, float]:
    """The module after the fit, and MB of the resident set's high-water mark beyond what was there before."""
    torch.manual_seed(0)
    module = _Module(point.network())
    trainer = pl.Trainer(
        max_steps=point.steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, num_sanity_val_steps=0,
        val_check_interval=point.steps, check_val_every_n_epoch=None,
    )  # fmt: skip
    before = resident()
    reset_high_water()
    trainer.fit(module, DataLoader(data, BATCH, shuffle=True, drop_last=True), DataLoader(probes, BATCH))
    return module, high_water() - before


def _step_times(module: _Module, point: Point) -> tuple[float, float]:
    """Median over steps away from nodes, and over those that close a chord, in ms."""
    gaps = [1e3 * (b - a) for a, b in pairwise(module.starts)]
    ends = {n - 1 for n in node_schedule(point.steps, point.nodes)[1:]}
    near = {end + k for end in ends for k in range(3)}  # a chord's basis is fitted in the step after its node
    plain = [gap for i, gap in enumerate(gaps) if i > 5 and i not in near]
    closing = [gap for i, gap in enumerate(gaps) if i > 5 and i in ends]
    return statistics.median(plain), statistics.median(closing) if closing else float("nan")


def run(point: Point) -> dict[str, float]:
    """Measure one point.

    Args:
        point: Its sizes.

    Returns:
        One number for each of `COLUMNS`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(point.examples + 256, INPUTS, generator=generator)
    y = (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(1)
    data, probes = TensorDataset(x[:-256], y[:-256]), TensorDataset(x[-256:], y[-256:])
    plain, plain_mb = _fit(point, [], data, probes)
    with tempfile.TemporaryDirectory() as folder:
        callback = PathKernelCallback(folder, point.sketch_dim, nodes=point.nodes, probes=128)
        recorded, recorded_mb = _fit(point, [callback], data, probes)
        if callback.recording_dir is None or callback.machine_dir is None:
            raise RuntimeError("the fit wrote no machine")
        recording, artifact = callback.recording_dir, callback.machine_dir
        machine = KernelMachine.load(artifact, recorded)
        start = time.perf_counter()
        machine.contributions(x[-QUERIES:], y[-QUERIES:])
        query = time.perf_counter() - start
        sizes = _size(recording), _size(artifact), _rows(artifact)
    step, node = _step_times(recorded, point)
    return {
        "parameters": sum(p.numel() for p in plain.parameters()), "plain_ms": _step_times(plain, point)[0],
        "recorded_ms": step, "node_ms": node, "plain_mb": plain_mb, "recorded_mb": recorded_mb,
        "recording_mb": sizes[0], "artifact_mb": sizes[1], "rows_mb": sizes[2], "query_ms": 1e3 * query,
    }  # fmt: skip


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms: the power with which values grow; 0 where they do not."""
    if min(values) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def in_a_process(point: Point, threads: int) -> dict[str, float]:
    """`run` in a process of its own, so that no point inherits another's heap.

    Args:
        point: Its sizes.
        threads: Of torch.

    Returns:
        What `run` returns.

    Raises:
        RuntimeError: If the process ends with an error.
    """
    child = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--point", json.dumps(asdict(point))]
    done = subprocess.run(
        [*child, "--threads", str(threads)], capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def sweep_table(size: str, found: Mapping[int, Mapping[str, float]]) -> list[str]:
    """One part of the table: a row per point and the powers of growth below."""
    rows = [[str(value), *[f"{columns[key]:.4g}" for key in COLUMNS]] for value, columns in found.items()]
    sizes = [columns["parameters"] if size == "width" else value for value, columns in found.items()]
    powers = [power(sizes, [columns[key] for columns in found.values()]) for key in COLUMNS]
    last = "power of parameters" if size == "width" else f"power of {size}"
    return table([size, *COLUMNS.values()], [*rows, [last, *[f"{p:+.2f}" for p in powers]]])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two small points of one size: does it run?")
    parser.add_argument("--docs", type=Path, help="page to write the tables to")
    parser.add_argument("--json", type=Path, help="file for the points, for benchmarks.plots")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if args.point:
        print(json.dumps(run(Point(**json.loads(args.point)))))
        return
    base, sweeps = Point(), {size: SWEEPS[size] for size in args.sweeps}
    if args.quick:
        base, sweeps = Point(500, 30, 32, 2, 4, 32), {"width": (16, 64)}
    lines, points = [conditions(), "", f"Unless said: {base}, batches of {BATCH}.", ""], []
    for size, values in sweeps.items():
        found = {value: in_a_process(replace(base, **{size: value}), args.threads) for value in values}
        points += [{"sweep": size, "value": value, **columns} for value, columns in found.items()]
        lines += [*sweep_table(size, found), ""]
        print("\n".join(lines[-len(found) - 4 :]), flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")
    emit("growth", command("growth", sys.argv[1:]), lines[:-1], args.docs)


if __name__ == "__main__":
    main()
