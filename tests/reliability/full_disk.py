"""Files that may not grow any more, by a limit of the kernel's own."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.reliability.faults import SHORT, FaultReport, Fits, contents, exportable
from tests.reliability.forks import forked
from tests.reliability.limits import time_left
from tests.reliability.training import train
from tests.reliability.trees import torn

__all__ = ["full_disk"]


def full_disk(root: Path, count: int | None, seed: int) -> FaultReport:
    """A limit of the kernel's own, without the shim: no file may grow beyond a size drawn at random (RLIMIT_FSIZE).

    Args:
        root: An empty directory.
        count: Limits to try, half of them with ``on_store_error="stop_recording"``; None for 20.
        seed: Of the limits.
    """
    fits, rng = Fits(root), random.Random(seed)
    largest = max(len(content) for content in contents(root / "reference" / "run").values())
    for number in range(20 if count is None else count):
        if not time_left():
            break
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
            wrong += exportable(run)
        fits.report.wrong += [f"files of at most {limit} bytes: {line}" for line in wrong]
        shutil.rmtree(run)
    return fits.report


def _limited(run: Path, limit: int, stopping: bool) -> Any:
    """A fit in which no file of the recording may grow beyond a limit; no checkpoints are written."""
    (run / "run").mkdir(parents=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return train(run, checkpoint=False, **SHORT, on_store_error="stop_recording" if stopping else "raise")
