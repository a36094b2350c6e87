"""Fidelity and contributions against the numbers stored per example and the number of nodes.

    python -m benchmarks.grid IMAGES CACHE --case "MLP, SGD" --seed 0

One training run of each case feeds a recorder for every number of nodes and size of the first stage; brute force is
that of `benchmarks.sketches`, kept in the same directory. Lines of ``CACHE/grid.jsonl`` are what `benchmarks.plots`
draws; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.brute_force import train
from benchmarks.cases import CASES
from benchmarks.page import read_lines
from benchmarks.sketches import Candidate, Heard, Judge, exact
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.sketch import SketchSettings

DIMS = (32, 64, 128, 256, 512, 1024, 2048)
NODES = (4, 8, 16, 32, 64)
NETWORKS = ("MLP", "CNN", "ResNet", "rows")
OPTIMIZERS = ("SGD", "momentum", "AdamW")

Line = dict[str, Any]


def firsts(dims: Sequence[int]) -> dict[int, list[int]]:
    """First stages to record, by their least number of features, and the sketch dimensions that each serves."""
    least = SketchSettings().features or 0
    small = [k for k in dims if k <= least]
    return ({least: small} if small else {}) | {k: [k] for k in dims if k > least}


def measure(
    name: str, seed: int, nodes: Sequence[int], dims: Sequence[int], images: Path, cache: Path
) -> Iterator[Line]:
    """All numbers of nodes and all sizes, on one training run of one case.

    Args:
        name: Of the case.
        seed: Of the run.
        nodes: Numbers of nodes.
        dims: Numbers stored per example and chord.
        images: Where Fashion-MNIST's files are.
        cache: Where exact contributions are kept.

    Yields:
        One line for each number of nodes and size.
    """
    case = CASES[name]
    data = case.data(images)
    known, _ = exact(name, seed, data, cache)
    heard: dict[tuple[int, int], Heard] = {}

    def listeners(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Heard]:
        for count in nodes:
            for features in firsts(dims):
                candidate, path = Candidate(SketchSettings(features=features)), node_schedule(steps, count)
                heard[count, features] = Heard(module, optimizer, path, candidate, data.probes, seed)
        for each in heard.values():
            each.others = [other for other in heard.values() if other is not each]
        return list(heard.values())

    run = train(case, seed, data, listeners, keep=False)
    network, _, optimizer = name.partition(", ")
    for (count, features), each in heard.items():
        each.close()
        judge = Judge(run.module, each.fitter.kept, data, known)
        for k in firsts(dims)[features]:
            found = judge.measure(k, SketchSettings())
            line = {"case": network, "optimizer": optimizer, "nodes": count, "sketch_dim": k, "seed": seed}
            yield {**line, **{key: found[key] for key in ("fidelity", "pearson", "agreement")}}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="where Fashion-MNIST's *-ubyte.gz files are")
    parser.add_argument("cache", type=Path, help="where results are kept, outside the repository")
    parser.add_argument("--case", choices=CASES, action="append", help="default: four networks, three optimisers")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1 and 2")
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES)
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(exist_ok=True)
    file = options.cache / "grid.jsonl"
    lines = read_lines(file) if file.exists() else []
    known = {(f"{line['case']}, {line['optimizer']}", line["seed"], line["nodes"]) for line in lines}
    for seed in options.seed or (0, 1, 2):
        for name in options.case or [f"{network}, {optimizer}" for network in NETWORKS for optimizer in OPTIMIZERS]:
            nodes = [count for count in options.nodes if (name, seed, count) not in known]
            with file.open("a") as out:
                for line in measure(name, seed, nodes, options.dims, options.images, options.cache) if nodes else ():
                    print(json.dumps(line), flush=True)
                    out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
