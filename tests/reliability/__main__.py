"""Runs campaigns and prints what docs/reliability.md says of them: ``python -m tests.reliability NAME [--count N]``.

A process of its own, which never runs a backward pass: campaigns fork, and autograd cannot be forked after one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.reliability import audit, damage, faults, hostile, kills, sharing
from tests.reliability.counts import COUNTS
from tests.reliability.crashes import crashes
from tests.reliability.full_disk import full_disk
from tests.reliability.fuzz.plain import plain
from tests.reliability.limits import set_minutes, set_part
from tests.reliability.sample import made

__all__ = ["CAMPAIGNS"]


def _audit(root: Path, count: int | None, seed: int) -> Any:
    return audit.campaign(made(root / "sound") / "machine")


CAMPAIGNS: dict[str, Callable[[Path, int | None, int], Any]] = {
    "kills": lambda root, count, seed: kills.campaign(root, count or 1, seed),
    "kills-two-ranks": lambda root, count, seed: kills.campaign(root, count or 1, seed, ranks=2),
    "faults-recording": faults.recording,
    "faults-stopping": faults.stopping,
    "faults-exporting": faults.exporting,
    "faults-resuming": faults.resuming,
    "crashes": crashes,
    "full-disk": full_disk,
    "flips": lambda root, count, seed: damage.flips(root, count or 1, seed, 2500),
    "truncations": lambda root, count, seed: damage.truncations(root, count or 1, seed, 2500),
    "hostile": hostile.campaign,
    "fuzz": lambda root, count, seed: plain(root, count or 1, seed),
    "audit": _audit,
    "readers": lambda root, count, seed: sharing.readers(root, count or 1, seed),
    "writers": lambda root, count, seed: sharing.writers(root, count or 1, seed),
}


def _versions() -> str:
    names = ("torch", "pytorch-lightning", "safetensors", "numpy")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or os.environ.get("RELIABILITY_COMMIT", "no commit")


def _run(name: str, count: int, seed: int, root: Path | None) -> tuple[dict[str, Any], float]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="reliability-", dir=root or memory) as place:
        os.environ["TMPDIR"] = place
        report = dataclasses.asdict(CAMPAIGNS[name](Path(place), count or None, seed))
    return report, time.perf_counter() - started


def _print(name: str, count: int, seed: int, report: dict[str, Any], seconds: float) -> None:
    print(f"{name}: --count {count} --seed {seed}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s")
    print(f"  {_versions()}, commit {_commit()}")
    for key, value in report.items():
        if key != "wrong":
            print(f"  {key}: {sorted(value) if isinstance(value, set) else value}")
    print(f"  findings: {len(report['wrong'])}")
    for line in report["wrong"]:
        print(f"    {line}", flush=True)


def main() -> int:
    """Run campaigns, one after another.

    Returns:
        0 if they found nothing wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=CAMPAIGNS, metavar="NAME", help=", ".join(CAMPAIGNS))
    parser.add_argument("--count", type=int, help="how many; 0 for all there are; default: the full figure")
    parser.add_argument("--sample", action="store_true", help="as few as the quick suite runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="for each: what is reached by then is reported")
    parser.add_argument("--part", default="1/1", help="of faults and crashes: 2/3 is the second of three parts")
    parser.add_argument("--root", type=Path, help="a directory for its files; default: a temporary one, in memory")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = 0
    set_part(options.part)
    for name in options.names:
        set_minutes(options.minutes)
        count = COUNTS[name].sample if options.sample else COUNTS[name].full
        count = count if options.count is None else options.count
        report, seconds = _run(name, count, options.seed, options.root)
        found += len(report["wrong"])
        if options.json:
            print(json.dumps({"name": name, "count": count, **report}, default=sorted), flush=True)
        else:
            _print(name, count, options.seed, report, seconds)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
