"""How long a machine takes for its answers once query features are there, and in how much memory.

    python -m benchmarks.queries [--repeats 3] [--directory DIR]

An MLP is recorded on random images; each chord's rows are then multiplied, by random shares that add up to what they
were, until all chords have visited every one of 60,000 examples, and the machine is saved with rows of 16 bits. Each
repeat is a process of its own that loads it and asks about 256 queries: it times the query features, the strongest
examples for and against out of them (first with the artifact's checksums still to be compared, then again), and the
matrix of all contributions. Memory is the growth of the resident set's high-water mark over the whole of each part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.memory import high_water, reset_high_water, resident
from benchmarks.networks import mlp
from benchmarks.page import command, conditions, emit, table
from benchmarks.recorded import data_of, record
from lightning_pathkernel import KernelMachine, query
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import HeldPath
from lightning_pathkernel.example_rows import ExampleRows
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.query import Question, everywhere
from lightning_pathkernel.ranking import all_contributions, strongest_contributions

__all__ = ["COLUMNS", "Multiplied", "measure", "write_machine"]

TOP_K = 10
COLUMNS = {
    "features": "query features",
    "explain_first": f"top {TOP_K} on each side, first time",
    "explain": f"top {TOP_K} on each side, again",
    "contributions": "all contributions",
}


class Multiplied:
    """A path with many examples in every chord, each a random share of one that was recorded; made chord by chord.

    Args:
        chords: The recorded chords.
        examples: How many examples each is to have.
    """

    def __init__(self, chords: Sequence[Chord], examples: int) -> None:
        self._chords, self._examples = chords, examples
        self.examples: Sequence[ExampleRows] = [chord.examples for chord in chords]

    def __len__(self) -> int:
        return len(self._chords)

    def __iter__(self) -> Iterator[Chord]:
        """The chords, one after another."""
        generator = torch.Generator().manual_seed(0)
        for chord in self._chords:
            which = torch.randperm(self._examples, generator=generator) % len(chord.rows)
            shares = torch.rand(self._examples, generator=generator)
            shares /= torch.zeros(len(chord.rows)).index_add_(0, which, shares)[which]
            rows, inner = chord.rows[which] * shares.unsqueeze(1), chord.self_inner[which] * shares
            yield replace(chord, example_ids=torch.arange(self._examples), rows=rows, self_inner=inner)

    def names(self) -> Iterator[Mapping[int, str]]:
        """The names that each chord brings: none."""
        return iter(())

    def without(self, gone: Tensor) -> HeldPath:
        """The path without some examples, in memory."""
        return HeldPath([chord.without(gone) for chord in self])


def write_machine(directory: Path, examples: int, nodes: int, sketch_dim: int) -> None:
    """Write an artifact of a recorded MLP with so many examples in each of so many chords, rows of 16 bits."""
    generator = torch.Generator().manual_seed(0)
    x, unseen = (torch.rand(n, 1, 28, 28, generator=generator) for n in (2000, 256))
    y = torch.randint(0, 10, (2000,), generator=generator)
    case = replace(CASES["MLP, AdamW"], network=mlp, nodes=nodes)
    found = record(case, 0, sketch_dim, data_of((x, y), unseen, 128))
    KernelMachine(found.training.module, Multiplied(found.machine.chords, examples)).save(directory)


def _timed(ask: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a question takes, and MB by which the resident set grew at most; the kernel counts in batches."""
    before = resident()
    reset_high_water()
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start, max(high_water() - before, 0.0)


def measure(directory: Path, queries: int) -> dict[str, tuple[float, float]]:
    """Ask a machine.

    Args:
        directory: Its artifact.
        queries: How many questions at once.

    Returns:
        For each of `COLUMNS` seconds, and growth of the high-water mark in MB.
    """
    machine = KernelMachine.load(directory, mlp())
    x = torch.rand(queries, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    question = Question(x, machine.network_outputs(x).argmax(1))
    rules = [everywhere(gauss_legendre(4))] * len(machine.path)
    shares: list[query.ChordShare] = []
    asked: dict[str, Callable[[], object]] = {
        "features": lambda: shares.extend(query.shares(machine._network, question, machine.path, rules)),
        "explain_first": lambda: strongest_contributions(shares, TOP_K),
        "explain": lambda: strongest_contributions(shares, TOP_K),
        "contributions": lambda: all_contributions(shares, machine.example_ids),
    }
    return {name: _timed(ask) for name, ask in asked.items()}


def _in_a_process(directory: Path, queries: int, threads: int) -> dict[str, tuple[float, float]]:
    child = [sys.executable, "-m", "benchmarks.queries", "--ask", str(directory)]
    child += ["--queries", str(queries), "--threads", str(threads)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=1200, check=True)
    found: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return found


def report(found: Sequence[dict[str, tuple[float, float]]]) -> list[str]:
    """The table: medians over processes, and their range."""
    rows = []
    for name, text in COLUMNS.items():
        seconds, megabytes = ([each[name][i] for each in found] for i in (0, 1))
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        rows.append([text, f"{statistics.median(seconds):.2f}", spread, f"{max(megabytes):.0f}"])
    return table(["part", "s, median", "range", "MB, most"], rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where the artifact, a gigabyte, is written for a while")
    parser.add_argument("--docs", type=Path, help="page whose section is written anew")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.ask is not None:
        print(json.dumps(measure(options.ask, options.queries)))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        machine = Path(folder) / "machine"
        write_machine(machine, options.examples, options.nodes, options.sketch_dim)
        size = sum(path.stat().st_size for path in machine.iterdir()) / 1e6
        found = [_in_a_process(machine, options.queries, options.threads) for _ in range(options.repeats)]
    sizes = (
        f"{options.queries} queries, {options.examples:,} examples, {options.nodes} chords, {options.sketch_dim} "
        f"numbers each: an artifact of {size:,.0f} MB. {options.repeats} processes; {conditions()}"
    )
    emit("queries", command("queries", sys.argv[1:]), [sizes, "", *report(found)], options.docs)


if __name__ == "__main__":
    main()
