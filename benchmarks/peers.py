"""Time and memory of a training step with per-example gradients: ours beside Opacus, BackPACK, vmap(grad) and dattri.

    python -m benchmarks.peers

All contenders train their own copy of one network with AdamW and take turns, step by step, in one process; the ratio is
the median over rounds of a contender's step to the plain step of the same round. Peak memory is taken in a process
of its own for each: the high-water mark of the resident set over the steps beyond what was resident before the network
was built. A contender that cannot run is listed with its own error.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contenders import CONTENDERS, DISTRIBUTIONS, PLAIN, RECORDED, Settings, Step, missing
from benchmarks.memory import high_water, reset_high_water, resident
from benchmarks.networks import NETWORKS
from benchmarks.page import command, conditions, emit, table

__all__ = ["Cost", "costs", "factor", "peak_memory"]

WARM_UP, PROBES, MEMORY_STEPS = 5, 256, 12
WHOLE = ("Opacus", "BackPACK", "vmap(grad)")
"""Peers that give whole per-example gradients of every layer they support."""


@dataclass
class Cost:
    """What a contender's step costs on one network.

    Attributes:
        error: Why it does not run, or None.
        step: Median step, in seconds.
        ratio: Median over rounds of its step to the plain one's.
        low: Lower quartile of the ratio.
        high: Upper quartile of the ratio.
        beyond: Median over rounds of its step less the plain one's, in seconds.
        node: The longest of the steps that closed a chord, in seconds; 0 for the others.
    """

    error: str | None = None
    step: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    beyond: float = 0.0
    node: float = 0.0


def _begin(name: str, settings: Settings) -> Step | str:
    """A contender after its first steps, or why there is none."""
    reason = missing(name)
    if reason is not None:
        return reason
    try:
        step = CONTENDERS[name](settings)
        for _ in range(WARM_UP):
            step()
    except Exception as error:  # whatever a peer raises is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return step


def costs(network: str, rounds: int, sketch_dim: int, probes: int = PROBES) -> dict[str, Cost]:
    """Time a step of every contender, in turns.

    Args:
        network: Which network.
        rounds: Steps of each contender.
        sketch_dim: Numbers per example and step of those that keep any.
        probes: Probes of our recorder.

    Returns:
        Contender -> its cost.
    """
    half = WARM_UP + rounds // 2
    settings = Settings(network, sketch_dim, [0, 2, half, half + 10 * rounds], probes)
    begun = {name: _begin(name, settings) for name in CONTENDERS}
    out = {name: Cost(error=step) for name, step in begun.items() if isinstance(step, str)}
    steps = {name: step for name, step in begun.items() if not isinstance(step, str)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    plain = times[PLAIN]
    for name, found in times.items():
        ratios = sorted(a / b for a, b in zip(found, plain, strict=True))
        beyond = statistics.median(a - b for a, b in zip(found, plain, strict=True))
        out[name] = Cost(
            None, statistics.median(found), statistics.median(ratios), ratios[len(ratios) // 4],
            ratios[3 * len(ratios) // 4], beyond, max(found) if name == RECORDED else 0.0,
        )  # fmt: skip
    return {name: out[name] for name in CONTENDERS}


def factor(found: dict[str, Cost]) -> tuple[str, float] | None:
    """The cheapest of the peers that give every layer's gradients, and its time beyond the plain step over ours."""
    able = {name: found[name].beyond for name in WHOLE if name in found and found[name].error is None}
    if not able:
        return None
    best = min(able, key=lambda name: able[name])
    return best, able[best] / found[RECORDED].beyond


# memory


def _child(name: str, network: str, sketch_dim: int, probes: int) -> None:
    """Print what is resident before the network is built, and what one contender takes at its peak, in MB."""
    if missing(name) is not None:
        print("nan nan")
        return
    before = resident()
    reset_high_water()
    step = CONTENDERS[name](Settings(network, sketch_dim, [0, 2, MEMORY_STEPS, 100 * MEMORY_STEPS], probes))
    for _ in range(MEMORY_STEPS):
        step()
    print(before, high_water() - before)


def peak_memory(name: str, network: str, sketch_dim: int, threads: int, probes: int = PROBES) -> tuple[float, float]:
    """High-water mark of the resident set over a few steps.

    Args:
        name: The contender; one that cannot run gives nan.
        network: Which network.
        sketch_dim: Numbers per example and step of those that keep any.
        threads: Of torch.
        probes: Probes of our recorder.

    Returns:
        MB resident before the network was built, and MB at the mark beyond that.

    Raises:
        RuntimeError: If the process ends with an error.
    """
    child = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--child", name, "--networks", network]
    child += ["--sketch-dim", str(sketch_dim), "--threads", str(threads), "--probes", str(probes)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} on {network}: {done.stderr.strip().splitlines()[-1]}")
    before, beyond = done.stdout.split()[-2:]
    return float(before), float(beyond)


# the table


def _rows(network: str, found: dict[str, Cost], memory: dict[str, tuple[float, float]]) -> list[list[str]]:
    rows = []
    for name, cost in found.items():
        if cost.error is not None:
            rows.append([network, name, cost.error, "", "", "", "", ""])
            continue
        compared = f"{cost.beyond / found[RECORDED].beyond:.1f}" if name not in (PLAIN, RECORDED) else ""
        rows.append([
            network, name, f"{1e3 * cost.step:.2f}", f"{cost.ratio:.3f}", f"{cost.low:.3f}-{cost.high:.3f}",
            f"{1e3 * cost.beyond:.2f}" if name != PLAIN else "", compared,
            f"{memory[name][1]:.0f}",
        ])  # fmt: skip
    return rows


def report(networks: list[str], rounds: dict[str, int], sketch_dim: int, threads: int, probes: int) -> list[str]:
    """The table of all networks, and the factor for each."""
    rows, notes = [], []
    for network in networks:
        found = costs(network, rounds[network], sketch_dim, probes)
        memory = {
            name: peak_memory(name, network, sketch_dim, threads, probes)
            for name, cost in found.items()
            if cost.error is None
        }
        rows += _rows(network, found, memory)
        best = factor(found)
        versus = "none of the peers ran" if best is None else f"{best[1]:.1f} times ours, with {best[0]}"
        ours, plain = memory[RECORDED], memory[PLAIN]
        notes.append(
            f"- {network}, {rounds[network]} rounds: the least time beyond the plain step among "
            f"{', '.join(WHOLE)} is {versus}. A step that closes a chord took {found[RECORDED].node:.2f} s. "
            f"Whole process at its peak, recorded over plain: {sum(ours) / sum(plain):.2f}."
        )
    header = ["network", "contender", "step, ms", "step / plain, median", "quartiles", "beyond plain, ms",
              "beyond plain, over ours", "peak, MB"]  # fmt: skip
    return [*table(header, rows), "", *notes]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of the MLP and the CNN; the transformer: a sixth")
    parser.add_argument("--sketch-dim", type=int, default=256)
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="a few rounds of the MLP: does it run?")
    parser.add_argument("--docs", type=Path, help="page to write the table to")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.child:
        _child(args.child, args.networks[0], args.sketch_dim, args.probes)
        return
    if args.quick:
        args.rounds, args.networks, args.probes = 6, ["mlp"], 32
    rounds = {name: max(args.rounds // 6, 5) if name == "transformer" else args.rounds for name in args.networks}
    lines = report(args.networks, rounds, args.sketch_dim, args.threads, args.probes)
    emit("peers", command("peers", sys.argv[1:]), [conditions(*DISTRIBUTIONS), "", *lines], args.docs)


if __name__ == "__main__":
    main()
