"""Every operation on files in a recorded fit and in an export is made to fail.

- `recording`: in a fit with ``on_store_error="raise"`` operation after operation fails. Either the fit ends as if
  nothing had been, or its error says what failed; no file at a final path is torn, nothing temporary is left, and the
  run goes on from its latest checkpoint to the recording that nobody disturbed.
- `stopping`: the same with ``on_store_error="stop_recording"``: the network is trained to the end, to the same weights,
  and what was recorded up to then can be exported.
- `exporting`: the same of an export alone.
- `resuming`: the same of what a resumed fit does with the files it finds, before it writes any.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.crash import Disk
from tests.reliability.exports import export
from tests.reliability.forks import Ended, forked
from tests.reliability.limits import part_of, time_left
from tests.reliability.shim import FAULTS, Operation, Shim
from tests.reliability.training import checkpoints, train
from tests.reliability.trees import differences, final, finished, torn, tree

__all__ = [
    "SHORT",
    "FaultReport",
    "Fits",
    "contents",
    "exportable",
    "exporting",
    "goes_on",
    "logged",
    "recording",
    "resuming",
    "stopping",
]


@dataclass
class FaultReport:
    """What a campaign found.

    Attributes:
        sites: Operations in an undisturbed run.
        places: Where in the package they are: ``file.py:line kind``.
        planned: Faults to be injected, or crashes to be played, of all parts together.
        injected: How many were.
        raised: How many of them ended in an error.
        wrong: Every finding, empty if all went well.
    """

    sites: int = 0
    places: set[str] = field(default_factory=set)
    planned: int = 0
    injected: int = 0
    raised: int = 0
    wrong: list[str] = field(default_factory=list)


def logged(work: Callable[[Shim], Any], shim: Shim, out: Path) -> Ended:
    """Do it in a child with the shim between, and leave the log in a file."""

    def child() -> Any:
        shim.install()
        try:
            return work(shim)
        finally:
            shim.root = Path(shim.root)
            out.write_bytes(pickle.dumps((shim.log, shim.fired)))

    return forked(child)


def _fit(root: Path, resume: Path | None = None, **options: Any) -> Callable[[Shim], Any]:
    return lambda shim: train(root, resume, on_checkpoint=lambda path: shim.mark(path.name), **{**SHORT, **options})


SHORT: dict[str, Any] = {"epochs": 1, "nodes": 2}
"""A fit that has every place of a longer one, and fewer operations."""


class Fits:
    """An undisturbed fit, and ones that are disturbed."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root, self.options, self.report, self.part = root, options, FaultReport(), part_of()
        (root / "reference" / "run").mkdir(parents=True)
        shim = Shim(root / "reference" / "run")
        self.ended = logged(_fit(root / "reference", **options), shim, root / "log")
        if self.ended.error or self.ended.signal:
            raise RuntimeError(f"the undisturbed run failed: {self.ended}")
        self.log: list[Operation] = pickle.loads((root / "log").read_bytes())[0]
        self.expected = tree(root / "reference" / "run")
        replayed = replay(self.log)
        seen = {n: c for n, c in replayed.files().items() if not n.endswith("/")}
        there = contents(root / "reference" / "run")
        if seen != there:
            raise RuntimeError(f"something went past the shim: {sorted(seen.items() ^ there.items())[:1]}")
        operations = [op for op in self.log if op.kind != "mark"]
        self.report.sites = len(operations)
        self.report.places = {f"{op.place} {op.kind}" for op in operations}

    def sites(self, count: int | None, seed: int) -> list[tuple[int, str]]:
        """All operations with all faults that fit them, or some."""
        operations = [op for op in self.log if op.kind != "mark"]
        found = [
            (number, fault)
            for number, op in enumerate(operations)
            for fault in FAULTS
            if (fault != "short write" or len(op.data) > 1) and not (fault == "ENOSPC" and op.kind == "rmdir")
        ]
        random.Random(seed).shuffle(found)
        self.report.planned = len(found) if count is None else min(count, len(found))
        part, parts = self.part
        return found[: self.report.planned][part::parts]

    def each(self, count: int | None, seed: int) -> Iterator[tuple[Path, Ended, str, list[str]]]:
        """A fit for every fault: its directory, how it ended, the fault, and what is wrong with what it left."""
        for number, fault in self.sites(count, seed):
            if not time_left():
                return
            run, ended, fired = self.disturbed(number, fault)
            if fired is None:
                self.report.wrong.append(f"operation {number} was not reached in another run: {ended.error}")
            else:
                where = f"{fault} at operation {number}, {fired.place} {fired.kind} {fired.path}"
                wrong = _disturbed(run, self.expected, fired.kind in ("unlink", "rmdir"))
                self.report.injected += 1
                yield run, ended, fault, wrong
                self.report.wrong += [f"{where}: {line}" for line in wrong]
            shutil.rmtree(run)

    def disturbed(self, number: int, fault: str) -> tuple[Path, Ended, Operation | None]:
        run = self.root / f"run-{number}-{fault.replace(' ', '-')}"
        (run / "run").mkdir(parents=True)
        ended = logged(_fit(run, **self.options), Shim(run / "run", number, fault), self.root / "log")
        return run, ended, pickle.loads((self.root / "log").read_bytes())[1]


def replay(log: list[Operation]) -> Disk:
    """A disk on which everything of a log was done."""
    disk = Disk()
    for operation in log:
        disk.apply(operation)
    return disk


def _clear(ended: Ended, fault: str) -> str | None:
    """What is unclear about an error."""
    if ended.signal:
        return f"ended by signal {ended.signal}"
    text = ended.error[1] if ended.error else ""
    if os.strerror(FAULTS[fault]) not in text:
        return f"the error does not say {os.strerror(FAULTS[fault])!r}: {text[:300]}"
    return None


def _disturbed(run: Path, expected: dict[str, str], removing: bool) -> list[str]:
    """What is torn at a final path, and what was left behind."""
    left = [name for name in tree(run / "run") if any(part.endswith(".tmp") for part in Path(name).parts)]
    return torn(run / "run", expected) + [f"{name} was left behind" for name in left if not removing]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def exportable(run: Path) -> list[str]:
    ended = forked(lambda: export(run / "run" / "recording", run / "exported"))
    return [] if ended.value is not None else [f"cannot be exported: {ended.error or ended.signal}"]


def recording(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in a fit that ends when its recording cannot be written.

    Args:
        root: An empty directory.
        count: Faults to inject; None for all.
        seed: Of the choice among them.
    """
    fits = Fits(root)
    for run, ended, fault, wrong in fits.each(count, seed):
        if ended.error or ended.signal:
            fits.report.raised += 1
            wrong += filter(None, [_clear(ended, fault)])
            wrong += goes_on(run, fits.expected)
        else:
            wrong += differences(final(tree(run / "run")), final(fits.expected)) if fault == "short write" else []
            wrong += goes_on(run, fits.expected) if fault != "short write" else []
    return fits.report


def goes_on(run: Path, expected: dict[str, str], found: list[Path] | None = None) -> list[str]:
    """Resume from the latest checkpoint, or the last of some, undisturbed; without one begin anew.

    Args:
        run: The run.
        expected: What an undisturbed run leaves.
        found: The checkpoints.

    Returns:
        What went wrong.
    """
    found = checkpoints(run) if found is None else found
    if not found:
        shutil.rmtree(run, ignore_errors=True)
    ended = forked(lambda: train(run, found[-1] if found else None, **SHORT))
    if ended.error or ended.signal:
        return [f"cannot be resumed: {ended.error or ended.signal}"]
    return [f"resumed: {line}" for line in finished(run / "run", expected)]


def stopping(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in a fit whose training is worth more than its recording; arguments as in `recording`."""
    fits = Fits(root, on_store_error="stop_recording")
    for run, ended, _, wrong in fits.each(count, seed):
        if ended.value != fits.ended.value:
            fits.report.raised += 1
            wrong.append(f"training did not go on to the same weights: {ended.error or ended.signal}")
        wrong += exportable(run)
    return fits.report


def exporting(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in an export; arguments as in `recording`."""
    fits = Fits(root)
    recorded = root / "reference" / "run" / "recording"
    (root / "out").mkdir()
    shim = Shim(root / "out")
    logged(lambda shim: export(recorded, root / "out" / "machine"), shim, root / "log")
    log = pickle.loads((root / "log").read_bytes())[0]
    fits.log, expected = log, tree(root / "out")
    fits.report.sites, fits.report.places = len(log), {f"{op.place} {op.kind}" for op in log}
    for number, fault in fits.sites(count, seed):
        if not time_left():
            break
        shutil.rmtree(root / "out")
        (root / "out").mkdir()
        shim = Shim(root / "out", number, fault)
        ended = logged(lambda shim: export(recorded, root / "out" / "machine"), shim, root / "log")
        fired = pickle.loads((root / "log").read_bytes())[1]
        if fired is None:
            fits.report.wrong.append(f"operation {number} was not reached in another export")
            continue
        fits.report.injected += 1
        fits.report.raised += ended.value is None
        wrong = [_clear(ended, fault)] if ended.value is None else []
        removing = fired.kind in ("unlink", "rmdir")
        left = [name for name in tree(root / "out") if not name.startswith("machine/")]
        wrong += [f"{name} was left behind" for name in left if not removing]
        if (root / "out" / "machine").exists():
            wrong += differences({n: d for n, d in tree(root / "out").items() if n not in left}, expected)
        elif ended.value is not None:
            wrong.append("no error, and no machine")
        else:
            again = forked(lambda: export(recorded, root / "out" / "machine"))
            wrong += [] if again.value == "exported" else [f"cannot be exported again: {again.error}"]
        where = f"{fault} at operation {number}, {fired.place} {fired.kind} {fired.path}"
        fits.report.wrong += [f"{where}: {line}" for line in filter(None, wrong)]
    return fits.report


def resuming(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults while a fit that goes on from an older checkpoint puts later segments aside; as in `recording`."""
    fits = Fits(root)

    def prepared(run: Path) -> Path:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(root / "reference", run)
        shutil.rmtree(run / "run" / "machine")
        for later in checkpoints(run)[1:]:
            later.unlink()
        return checkpoints(run)[0]

    run = root / "again"
    resume = prepared(run)
    logged(_fit(run, resume), Shim(run / "run"), root / "log")
    log: list[Operation] = pickle.loads((root / "log").read_bytes())[0]
    new = next(number for number, op in enumerate(log) if op.kind == "open" and op.path.endswith(".tmp"))
    fits.log = log[:new]
    fits.report.sites, fits.report.places = new, {f"{op.place} {op.kind}" for op in fits.log}
    for number, fault in fits.sites(count, seed):
        if not time_left():
            break
        resume = prepared(run)
        ended = logged(_fit(run, resume), Shim(run / "run", number, fault), root / "log")
        fired = pickle.loads((root / "log").read_bytes())[1]
        fits.report.injected += fired is not None
        fits.report.raised += ended.value is None
        wrong = [] if ended.value is not None else list(filter(None, [_clear(ended, fault)]))
        wrong += goes_on(run, fits.expected, checkpoints(run)[:1]) if ended.value is None else []
        where = (
            f"{fault} at operation {number}" if fired is None else f"{fault} at {fired.place} {fired.kind} {fired.path}"
        )
        fits.report.wrong += [f"{where}: {line}" for line in wrong]
    return fits.report
