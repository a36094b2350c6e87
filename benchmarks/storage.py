"""What storage costs: time in the training thread, and bytes, at 64 KiB of rows per step.

A loop of steps of about a millisecond hands over a segment at every node, as the callback does, and writes the state of
what is open at every checkpoint. It runs with and without storage in turns, block by block. The thread that writes
shares the processor with the training it stands for: what it takes from that shows in the total.

    python -m benchmarks.storage [--blocks 12] [--directory DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_pathkernel.store import Head, SegmentWriter, Stamp

_ROW_BYTES = 64 << 10
_PER_CHORD = 50
_PER_CHECKPOINT = 250
_STEPS = 500


def _step(weights: Tensor) -> None:
    """Stands for a training step: about a millisecond of products."""
    for _ in range(4):
        torch.mm(weights, weights)


def _rows() -> dict[str, Tensor]:
    """What a chord of `_PER_CHORD` steps keeps, 64 KiB for each: sketches, ids and self-influences of its rows."""
    rows = _PER_CHORD * _ROW_BYTES // (4 * 256 + 12)
    return {"rows": torch.randn(rows, 256), "example_ids": torch.arange(rows), "self_inner": torch.randn(rows)}


def block(writer: SegmentWriter | None, weights: Tensor, first: int) -> tuple[list[float], list[float], float]:
    """Seconds of each hand-over, of each checkpoint, and of the whole block."""
    handed, saved, rows = [], [], {"rows": _rows()}
    begun = time.perf_counter()
    for step in range(first, first + _STEPS):
        _step(weights)
        if writer is None:
            continue
        start = time.perf_counter()
        if (step + 1) % _PER_CHORD == 0:
            writer.put("chord", (step + 1 - _PER_CHORD, step + 1), {"index": step}, rows)
        handed.append(time.perf_counter() - start)
        if (step + 1) % _PER_CHECKPOINT == 0:
            start = time.perf_counter()
            writer.put("open", (step, step + 1), {}, {"state": {"0": weights}}, step)
            writer.flush()
            saved.append(time.perf_counter() - start)
    if writer is not None:
        start = time.perf_counter()
        writer.flush()
        saved.append(time.perf_counter() - start)
    return handed, saved, time.perf_counter() - begun


def measure(directory: Path, blocks: int, show: Callable[[str], None]) -> None:
    """Run blocks in turns and print the figures."""
    torch.set_num_threads(1)
    weights = torch.randn(256, 256)
    writer = SegmentWriter(directory, Stamp("0" * 32, 0, "0" * 64), Head(0, "0" * 64))
    block(None, weights, 0)
    plain, whole, handed, saved = [], [], [], []
    for number in range(blocks):
        plain.append(block(None, weights, 0)[2])
        own, checkpoints, total = block(writer, weights, number * _STEPS)
        handed += own
        saved += checkpoints
        whole.append(total)
    payload = sum(t.numel() * t.element_size() for t in _rows().values()) * blocks * _STEPS // _PER_CHORD
    written = sum(p.stat().st_size for p in directory.glob("segment-*"))
    in_thread = 1e3 * (sum(handed) + sum(saved)) / (blocks * _STEPS)
    amortised = [1e3 * sum(handed[i : i + _PER_CHORD]) / _PER_CHORD for i in range(0, len(handed), _PER_CHORD)]
    flushes = 1e3 * sum(saved) / (blocks * _STEPS)
    difference = [1e3 * (a - b) / _STEPS for a, b in zip(whole, plain, strict=True)]
    show("| at 64 KiB per step | figure |")
    show("|---|---|")
    show(f"| median step without storage | {1e3 * statistics.median(plain) / _STEPS:.3f} ms |")
    median = statistics.median(amortised)
    show(f"| handing over, in the training thread, amortised over a chord: median | {median:.4f} ms |")
    show(f"| the same and every flush (checkpoints each {_PER_CHECKPOINT} steps): mean | {in_thread:.4f} ms |")
    show(f"| of it the flushes | {flushes:.4f} ms |")
    show(f"| a checkpoint's flush: median | {1e3 * statistics.median(saved):.2f} ms |")
    show(f"| growth of the whole loop per step, the writing thread's share included: median | "
         f"{statistics.median(difference):.3f} ms |")  # fmt: skip
    show(f"| bytes of the chain over its payload | {100 * (written / payload - 1):.3f} % |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        measure(Path(folder), options.blocks, print)


if __name__ == "__main__":
    main()
