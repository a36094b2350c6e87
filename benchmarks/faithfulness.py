"""Fidelity and contributions of the sketched machine against brute force, at default settings.

Networks, optimisers and data are those of `benchmarks.cases`, exact contributions those of `benchmarks.brute_force`.
Needs Fashion-MNIST, for example of Debian's package dataset-fashion-mnist, in the directory given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.brute_force import exact_contributions
from benchmarks.cases import CASES
from benchmarks.recorded import record


def measure(name: str, seed: int, sketch_dim: int, directory: Path) -> str:
    """One row of the table."""
    case = CASES[name]
    data = case.data(directory)
    run = record(case, seed, sketch_dim, data)
    machine, exact = run.machine, exact_contributions(run.training)
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
