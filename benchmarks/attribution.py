"""Contributions against TracIn's and TRAK's at equal query time and equal bytes, on a run that brute force knows.

    python -m benchmarks.attribution DIRECTORY

One network is trained and recorded. Every method explains the log-odds of the same unseen images: the package, captum's
TracInCP and TRAK over as many checkpoints of the run as take the time, or the bytes, of the package's answer.
Compared are the correlation with the exact contributions (brute force, one chord per step) and the linear
datamodelling score over retrainings on random halves. DIRECTORY holds Fashion-MNIST's ``*-ubyte.gz`` files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import attributors
from benchmarks.attributors import Answer
from benchmarks.cases import CASES, PROBES, TRAIN, Data, images
from benchmarks.page import command, conditions, emit, table
from benchmarks.recorded import Run, data_of, record
from benchmarks.retraining import bootstrap, halves, retrained, scores

__all__ = ["Verdict", "compare"]

PACKAGES = ("captum", "traker")
TRAK_MOST = 10
"""Most checkpoints of TRAK, whose features of one cost as much as an epoch of training."""
LEAST = 128
"""Least numbers per example of TRAK: with up to 100, its projector for the CPU (0.3.2) loses its matrix too early."""


@dataclass
class Verdict:
    """One method's figures on one run.

    Attributes:
        answer: What it said.
        pearson: Mean over queries of the correlation with the exact contributions.
        spearman: The same of their ranks.
        lds: Linear datamodelling score.
        error: Its standard error over subsets and queries.
        gap: Its score less that of the first method.
        gap_error: Standard error of that.
    """

    answer: Answer
    pearson: float
    spearman: float
    lds: float
    error: float
    gap: float
    gap_error: float


def _correlation(found: Tensor, exact: Tensor) -> float:
    pairs = [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(found.double(), exact.double(), strict=True)]
    return float(torch.stack(pairs).mean())


def _ranked(values: Tensor) -> Tensor:
    return values.argsort(1).argsort(1)


def _fitting(one: float, budget: float, most: int) -> int:
    """How many checkpoints fit into a budget, at least one."""
    return max(1, min(most, round(budget / one)))


def _rivals(
    run: Run,
    queries: tuple[Tensor, Tensor],
    ours: Answer,
    proj_dim: int,
    folder: Path,
    most_checkpoints: int,
) -> tuple[list[Answer], list[str]]:
    """Answers of the peers that are installed, at equal time and at equal bytes, and why others are not there."""
    answers, notes, limit = [], [], min(len(run.training.batches), most_checkpoints)
    for name, most in (("tracin", limit), ("trak", min(limit, TRAK_MOST))):

        def ask(count: int, method: str = name) -> Answer:
            place = folder / f"{method}-{count}"
            if method == "tracin":
                return attributors.ask_tracin(run, queries, count, place)
            return attributors.ask_trak(run, queries, count, max(proj_dim, LEAST), place)

        try:
            found = {1: ask(1)}
        except ImportError as error:
            notes.append(f"{name} was left out: not installed ({error}).")
            continue
        by_time = _fitting(found[1].seconds, ours.seconds, most)
        by_bytes = _fitting(found[1].size, ours.size, most)
        for count in {by_time, by_bytes} - {1}:
            found[count] = ask(count)
        answers += [found[count] for count in sorted(found)]
        notes.append(
            f"{found[1].name.partition(',')[0]}: equal time is {by_time}, equal bytes {by_bytes} checkpoints "
            f"(at most {most})."
        )
    return answers, notes


def compare(
    case: str, seed: int, sketch_dims: Sequence[int], data: Data, subsets: int, most_checkpoints: int = 10**6
) -> tuple[list[Verdict], list[str]]:
    """All methods on one run.

    Args:
        case: Which network and optimiser.
        seed: Of the run, and of the subsets.
        sketch_dims: Of our machines, the first of which sets time and bytes for the peers.
        data: Training examples, probes and queries.
        subsets: Retrainings.
        most_checkpoints: Of a peer, where equal time or bytes would be more.

    Returns:
        A verdict per method, the exact contributions first, and notes.
    """
    runs = {dim: record(CASES[case], seed, dim, data) for dim in sketch_dims}
    run = runs[sketch_dims[0]]
    exact, target = attributors.exact_log_odds(run)
    queries = data.queries, target
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        answers = [
            attributors.ask_machine(f"path kernel, {dim}", each, queries, folder / f"machine-{dim}")
            for dim, each in runs.items()
        ]
        more, notes = _rivals(run, queries, answers[0], sketch_dims[0], folder, most_checkpoints)
    answers = [Answer("exact path kernel", exact, 0, 0.0), *answers, *more]
    keep = halves(subsets, len(data.x), 1000 + seed)
    outputs = retrained(CASES[case], seed, data, keep, target)
    errors = bootstrap([a.contributions for a in answers], keep, outputs)
    lds = [float(scores(a.contributions, keep, outputs).mean()) for a in answers]
    return [
        Verdict(
            a, _correlation(a.contributions, exact), _correlation(_ranked(a.contributions), _ranked(exact)),
            value, error, value - lds[0], gap_error,
        )
        for a, value, (error, gap_error) in zip(answers, lds, errors, strict=True)
    ], notes  # fmt: skip


def _row(case: str, seed: int, verdict: Verdict) -> list[str]:
    a, first = verdict.answer, verdict.answer.size == 0
    return [
        case, str(seed), a.name, "" if first else f"{a.size / 1e6:.1f}", "" if first else f"{a.seconds:.2f}",
        f"{verdict.pearson:.3f}", f"{verdict.spearman:.3f}", f"{verdict.lds:.3f} ± {verdict.error:.3f}",
        "" if first else f"{verdict.gap:+.3f} ± {verdict.gap_error:.3f}",
    ]  # fmt: skip


HEADER = ["case", "seed", "method", "MB", "query, s", "Pearson", "Spearman", "LDS", "LDS, less the exact one's"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the *-ubyte.gz files are")
    parser.add_argument("--case", choices=CASES, action="append", help="default: the MLP under SGD and under AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sketch-dims", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--subsets", type=int, default=200, help="retrainings on random halves")
    parser.add_argument("--most-checkpoints", type=int, default=10**6, help="of a peer; default: those of all steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few images, queries and retrainings: does it run?")
    parser.add_argument("--docs", type=Path, help="page to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, probes = TRAIN, PROBES
    if args.quick:
        train, probes, args.seeds, args.queries, args.subsets, args.sketch_dims = 192, 32, 1, 8, 6, [32]
    unseen = images(args.directory, "t10k", probes + args.queries)[0]
    data = data_of(images(args.directory, "train", train), unseen, probes)
    rows, notes = [], []
    for case in args.case or ("MLP, SGD", "MLP, AdamW"):
        for seed in range(args.seeds):
            verdicts, found = compare(case, seed, args.sketch_dims, data, args.subsets, args.most_checkpoints)
            rows += [_row(case, seed, verdict) for verdict in verdicts]
            notes += [f"- {case}, seed {seed}. {line}" for line in found]
            print("\n".join(table(HEADER, rows)[-len(verdicts) :]), flush=True)
    emit(
        "attribution",
        command("attribution", sys.argv[1:]),
        [conditions(*PACKAGES), "", *table(HEADER, rows), "", *notes],
        args.docs,
    )


if __name__ == "__main__":
    main()
