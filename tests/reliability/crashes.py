"""Every crash of a recorded fit is played: all prefixes of its log, with all, none or some of what was not synced."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from lightning_pathkernel import verify
from tests.reliability.crash import KEPT, Disk, written
from tests.reliability.exports import export
from tests.reliability.faults import FaultReport, Fits, contents, goes_on
from tests.reliability.forks import forked
from tests.reliability.limits import time_left

__all__ = ["crashes"]


def crashes(root: Path, count: int | None, seed: int, resumed: int = 20) -> FaultReport:
    """Crashes after every operation, with every choice of what was kept.

    Args:
        root: An empty directory.
        count: Crashes to play; None for all.
        seed: Of the choice among them, and of what is kept by chance.
        resumed: After how many of them the run is resumed and compared with the undisturbed one.
    """
    fits, rng = Fits(root), random.Random(seed)
    expected = contents(root / "reference" / "run")
    moments = [(number, kept) for number in range(len(fits.log) + 1) for kept in KEPT]
    planned = len(moments) if count is None else min(count, len(moments))
    chosen = set(rng.sample(moments, planned)[fits.part[0] :: fits.part[1]])
    fits.report.planned = planned
    resuming = set(rng.sample(sorted(chosen), min(resumed, len(chosen))))
    disk, committed, mark, known = Disk(), dict[str, bytes](), "", dict[int, list[str]]()
    for number in range(len(fits.log) + 1):
        if number:
            disk.apply(fits.log[number - 1])
            if fits.log[number - 1].kind == "mark":
                mark, committed = fits.log[number - 1].other, _final(disk.files())
        for kept in KEPT:
            if (number, kept) not in chosen or not time_left():
                continue
            files = disk.files(kept, seed + number)
            fits.report.injected += 1
            key = hash(tuple(files.items()))
            if key not in known:
                known[key] = _survived(files, expected, root)
            lost = [f"{n} was there at {mark} and is lost" for n, c in committed.items() if files.get(n) != c]
            wrong = known[key] + lost
            if (number, kept) in resuming:
                wrong = wrong + _after_crash(files, mark, fits, root)
            fits.report.wrong += [f"crash after operation {number}, {kept} kept: {line}" for line in wrong]
    return fits.report


def _final(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files that are not temporary, without the metrics, which newer ones replace, and the lock."""
    return {
        name: content
        for name, content in files.items()
        if not name.endswith("/") and ".tmp" not in name and "metrics" not in name and "lock" not in name
    }


def _survived(files: dict[str, bytes], expected: dict[str, bytes], root: Path) -> list[str]:
    """What is torn at a final path, or cannot be read."""
    wrong = [f"{n} is torn" for n, c in _final(files).items() if n in expected and c != expected[n]]
    written(files, root / "crashed")
    machine = root / "crashed" / "machine"
    if machine.exists():
        ended = forked(lambda: verify(machine))
        wrong += [f"machine: {ended.error}"] if ended.error else []
    if (root / "crashed" / "recording").exists():
        ended = forked(lambda: export(root / "crashed" / "recording", root / "crashed" / "again"))
        wrong += [f"export: {ended.error}"] if ended.error else []
    shutil.rmtree(root / "crashed")
    return wrong


def _after_crash(files: dict[str, bytes], mark: str, fits: Fits, root: Path) -> list[str]:
    """Resume from the latest checkpoint; it is taken to be whole, for Lightning writes it."""
    run = root / "after"
    if mark.endswith(".ckpt"):
        written(files, run / "run")
        (run / "checkpoints").mkdir()
        shutil.copy(root / "reference" / "checkpoints" / mark, run / "checkpoints" / mark)
    wrong = goes_on(run, fits.expected)
    shutil.rmtree(run)
    return wrong
