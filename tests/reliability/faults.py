"""Every operation on files in a recorded fit and in an export is made to fail, and every crash is played.

- `recording`: in a fit with ``on_store_error="raise"`` operation after operation fails. Either the fit ends as if
  nothing had been, or its error says what failed; no file at a final path is torn, nothing temporary is left, and the
  run goes on from its latest checkpoint to the recording that nobody disturbed.
- `stopping`: the same with ``on_store_error="stop_recording"``: the network is trained to the end, to the same weights,
  and what was recorded up to then can be exported.
- `exporting`: the same of an export alone.
- `crashes`: all prefixes of the log, with all, none or some of what was not synced.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pathkernel import verify
from tests.reliability.crash import KEPT, Disk, written
from tests.reliability.exports import export
from tests.reliability.forks import Ended, forked
from tests.reliability.limits import part_of, time_left
from tests.reliability.shim import FAULTS, Operation, Shim
from tests.reliability.training import checkpoints, train
from tests.reliability.trees import differences, final, torn, tree

__all__ = ["FaultReport", "crashes", "exporting", "full_disk", "recording", "stopping"]


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


def _logged(work: Callable[[Shim], Any], shim: Shim, out: Path) -> Ended:
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
    return lambda shim: train(root, resume, on_checkpoint=lambda path: shim.mark(path.name), **{**_SHORT, **options})


_SHORT: dict[str, Any] = {"epochs": 1, "nodes": 2}
"""A fit that has every place of a longer one, and fewer operations."""


class _Fits:
    """An undisturbed fit, and ones that are disturbed."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root, self.options, self.report, self.part = root, options, FaultReport(), part_of()
        (root / "reference" / "run").mkdir(parents=True)
        shim = Shim(root / "reference" / "run")
        self.ended = _logged(_fit(root / "reference", **options), shim, root / "log")
        if self.ended.error or self.ended.signal:
            raise RuntimeError(f"the undisturbed run failed: {self.ended}")
        self.log: list[Operation] = pickle.loads((root / "log").read_bytes())[0]
        self.expected = tree(root / "reference" / "run")
        replayed = replay(self.log)
        seen = {n: c for n, c in replayed.files().items() if not n.endswith("/")}
        there = _contents(root / "reference" / "run")
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

    def disturbed(self, number: int, fault: str) -> tuple[Path, Ended, Operation | None]:
        run = self.root / f"run-{number}-{fault.replace(' ', '-')}"
        (run / "run").mkdir(parents=True)
        ended = _logged(_fit(run, **self.options), Shim(run / "run", number, fault), self.root / "log")
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


def recording(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in a fit that ends when its recording cannot be written.

    Args:
        root: An empty directory.
        count: Faults to inject; None for all.
        seed: Of the choice among them.
    """
    fits = _Fits(root)
    for number, fault in fits.sites(count, seed):
        if not time_left():
            break
        run, ended, fired = fits.disturbed(number, fault)
        if fired is None:
            fits.report.wrong.append(f"operation {number} was not reached in another run")
            continue
        where = f"{fault} at operation {number}, {fired.place} {fired.kind} {fired.path}"
        fits.report.injected += 1
        wrong = _disturbed(run, fits.expected, fired.kind in ("unlink", "rmdir"))
        if ended.error or ended.signal:
            fits.report.raised += 1
            wrong += filter(None, [_clear(ended, fault)])
            wrong += _goes_on(run, fits.expected)
        else:
            wrong += differences(final(tree(run / "run")), final(fits.expected)) if fault == "short write" else []
            wrong += _goes_on(run, fits.expected) if fault != "short write" else []
        fits.report.wrong += [f"{where}: {line}" for line in wrong]
        shutil.rmtree(run)
    return fits.report


def _goes_on(run: Path, expected: dict[str, str]) -> list[str]:
    """Resume from the latest checkpoint, undisturbed."""
    found = checkpoints(run)
    if not found:
        shutil.rmtree(run, ignore_errors=True)
    ended = forked(lambda: train(run, found[-1] if found else None, **_SHORT))
    if ended.error or ended.signal:
        return [f"cannot be resumed: {ended.error or ended.signal}"]
    return [f"resumed: {line}" for line in differences(final(tree(run / "run")), final(expected))]


def stopping(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in a fit whose training is worth more than its recording; arguments as in `recording`."""
    fits = _Fits(root, on_store_error="stop_recording")
    for number, fault in fits.sites(count, seed):
        if not time_left():
            break
        run, ended, fired = fits.disturbed(number, fault)
        if fired is None:
            fits.report.wrong.append(f"operation {number} was not reached in another run")
            continue
        where = f"{fault} at operation {number}, {fired.place} {fired.kind} {fired.path}"
        fits.report.injected += 1
        wrong = _disturbed(run, fits.expected, fired.kind in ("unlink", "rmdir"))
        if ended.value != fits.ended.value:
            fits.report.raised += 1
            wrong.append(f"training did not go on to the same weights: {ended.error or ended.signal}")
        wrong += _exportable(run)
        fits.report.wrong += [f"{where}: {line}" for line in wrong]
        shutil.rmtree(run)
    return fits.report


def exporting(root: Path, count: int | None, seed: int) -> FaultReport:
    """Faults in an export; arguments as in `recording`."""
    fits = _Fits(root)
    recorded = root / "reference" / "run" / "recording"
    (root / "out").mkdir()
    shim = Shim(root / "out")
    _logged(lambda shim: export(recorded, root / "out" / "machine"), shim, root / "log")
    log = pickle.loads((root / "log").read_bytes())[0]
    fits.log, expected = log, tree(root / "out")
    fits.report.sites, fits.report.places = len(log), {f"{op.place} {op.kind}" for op in log}
    for number, fault in fits.sites(count, seed):
        if not time_left():
            break
        shutil.rmtree(root / "out")
        (root / "out").mkdir()
        shim = Shim(root / "out", number, fault)
        ended = _logged(lambda shim: export(recorded, root / "out" / "machine"), shim, root / "log")
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


def full_disk(root: Path, count: int | None, seed: int) -> FaultReport:
    """A limit of the kernel's own, without the shim: no file may grow beyond a size drawn at random (RLIMIT_FSIZE).

    Args:
        root: An empty directory.
        count: Limits to try, half of them with ``on_store_error="stop_recording"``; None for 20.
        seed: Of the limits.
    """
    fits, rng = _Fits(root), random.Random(seed)
    largest = max(len(content) for content in _contents(root / "reference" / "run").values())
    for number in range(20 if count is None else count):
        run, limit, stopping = root / f"run-{number}", rng.randrange(largest), number % 2 == 1
        ended = forked(lambda run=run, limit=limit, stopping=stopping: _limited(run, limit, stopping))  # type: ignore[misc]
        fits.report.injected += 1
        fits.report.raised += ended.value is None
        wrong = torn(run / "run", fits.expected)
        if ended.value is None:
            wrong += ["training did not go on"] if stopping else []
            wrong += [] if ended.error and "File too large" in ended.error[1] else [f"{ended.error or ended.signal}"]
        elif ended.value != fits.ended.value:
            wrong.append("other weights")
        if stopping:
            wrong += _exportable(run)
        fits.report.wrong += [f"files of at most {limit} bytes: {line}" for line in wrong]
        shutil.rmtree(run)
    return fits.report


def _limited(run: Path, limit: int, stopping: bool) -> Any:
    """A fit in which no file of the recording may grow beyond a limit; no checkpoints are written."""
    (run / "run").mkdir(parents=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return train(run, checkpoint=False, **_SHORT, on_store_error="stop_recording" if stopping else "raise")


def _exportable(run: Path) -> list[str]:
    ended = forked(lambda: export(run / "run" / "recording", run / "exported"))
    return [] if ended.value is not None else [f"cannot be exported: {ended.error or ended.signal}"]


# crashes


def crashes(root: Path, count: int | None, seed: int, resumed: int = 20) -> FaultReport:
    """Crashes after every operation, with every choice of what was kept.

    Args:
        root: An empty directory.
        count: Crashes to play; None for all.
        seed: Of the choice among them, and of what is kept by chance.
        resumed: After how many of them the run is resumed and compared with the undisturbed one.
    """
    fits, rng = _Fits(root), random.Random(seed)
    expected = _contents(root / "reference" / "run")
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


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


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


def _after_crash(files: dict[str, bytes], mark: str, fits: _Fits, root: Path) -> list[str]:
    """Resume from the latest checkpoint; it is taken to be whole, for Lightning writes it."""
    run = root / "after"
    if mark.endswith(".ckpt"):
        written(files, run / "run")
        (run / "checkpoints").mkdir()
        shutil.copy(root / "reference" / "checkpoints" / mark, run / "checkpoints" / mark)
    wrong = _goes_on(run, fits.expected)
    shutil.rmtree(run)
    return wrong
