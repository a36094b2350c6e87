"""The paper's literal sum and the linearised network beside the exact form and the machine.

    python -m benchmarks.literal DIRECTORY

Fidelity (R squared of the learned change) on unseen images of five predictions of one trained network: the literal sum
``sum_s J(w_s) delta_s``, gradients at the left end of every optimiser step; the same sum at the nodes of the machine,
which the callback logs as ``fidelity_left``; the network linearised at its first weights, ``J(w_0) (w_T - w_0)``; the
corrected form with one chord per step and 2 Gauss points; and the sketched machine. DIRECTORY holds Fashion-MNIST's
``*-ubyte.gz`` files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from benchmarks.brute_force import Weights
from benchmarks.cases import PROBES, TRAIN, Case, Data, cnn, images
from benchmarks.networks import mlp
from benchmarks.page import command, conditions, emit, table
from benchmarks.recorded import data_of, record
from lightning_pathkernel.functional import kernel_machine_fidelity
from lightning_pathkernel.path import QuadratureRule, gauss_legendre, node_schedule

__all__ = ["CASES", "Fidelities", "measure"]

NODES = 24
LEFT = QuadratureRule("left end", (0.0,), (1.0,))
CASES = {
    f"{name}, {optimizer}": Case(network, build, NODES)
    for name, network in (("MLP", mlp), ("CNN", cnn))
    for optimizer, build in (
        ("SGD 0.1", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("SGD 0.02, momentum 0.9", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
        ("AdamW 1e-3", lambda p: torch.optim.AdamW(p, lr=1e-3)),
    )
}


@dataclass(frozen=True)
class Fidelities:
    """Fidelity of five predictions of one network.

    Attributes:
        literal: Left end of every optimiser step.
        left: Left end of every chord of the machine.
        linearized: The network linearised at its first weights.
        exact: One chord per step, 2 Gauss points.
        machine: The sketched machine.
    """

    literal: float
    left: float
    linearized: float
    exact: float
    machine: float


def _change(module: nn.Module, path: Sequence[Weights], rule: QuadratureRule, x: Tensor) -> Tensor:
    """``sum over the path's pieces of integral J . delta`` by a rule, ``[n, K]``."""
    total = torch.zeros(1)
    for start, end in pairwise(path):
        delta = {name: end[name] - w for name, w in start.items()}
        for t, weight in zip(rule.points, rule.weights, strict=True):
            at = {name: w + t * delta[name] for name, w in start.items()}
            total = total + weight * jvp(lambda w: functional_call(module, w, (x,)), (at,), (delta,))[1]
    return total


def measure(case: Case, seed: int, sketch_dim: int, data: Data) -> Fidelities:
    """Train, record and compare.

    Args:
        case: Network and optimiser.
        seed: Of the first weights and the order of the examples.
        sketch_dim: Of the machine.
        data: Training examples, probes, and the queries on which fidelity is taken.

    Returns:
        The five fidelities.
    """
    run = record(case, seed, sketch_dim, data)
    queries, module, weights = data.queries, case.network(), run.training.states
    with torch.no_grad():
        initial = functional_call(module, weights[0], (queries,))
        target = functional_call(module, weights[-1], (queries,))
        nodes = [weights[step] for step in node_schedule(len(run.training.batches), case.nodes)]
        changes = [
            _change(module, weights, LEFT, queries),
            _change(module, nodes, LEFT, queries),
            _change(module, [weights[0], weights[-1]], LEFT, queries),
            _change(module, weights, gauss_legendre(2), queries),
        ]
    found = [float(kernel_machine_fidelity(initial + change, target, initial)) for change in changes]
    return Fidelities(*found, run.machine.fidelity([queries])["fidelity"])


def _cell(values: Sequence[float]) -> str:
    """Median, and the range over seeds."""
    middle = f"{statistics.median(values):.4f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the *-ubyte.gz files are")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few images, one seed: does it run?")
    parser.add_argument("--docs", type=Path, help="page to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, probes = TRAIN, PROBES
    if args.quick:
        train, probes, args.seeds, args.queries = 192, 32, 1, 16
    unseen = images(args.directory, "t10k", probes + args.queries)[0]
    data = data_of(images(args.directory, "train", train), unseen, probes)
    rows = []
    for name in args.case or CASES:
        found = [measure(CASES[name], s, args.sketch_dim, data) for s in range(args.seeds)]
        columns = [_cell([getattr(f, column) for f in found]) for column in Fidelities.__dataclass_fields__]
        rows.append([name, *columns])
        print(" | ".join(rows[-1]), flush=True)
    header = ["network, optimiser", "literal, per step", f"literal, {NODES} nodes", "linearised",
              "one chord per step, 2 points", f"machine, {NODES} nodes, {args.sketch_dim}"]  # fmt: skip
    emit("literal", command("literal", sys.argv[1:]), [conditions(), "", *table(header, rows)], args.docs)


if __name__ == "__main__":
    main()
