"""Children by fork: a process that has imported everything starts another run in milliseconds.

The parent must never have run a backward pass: torch's autograd cannot be forked after one.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Child", "Ended", "Phase", "forked", "measured"]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        value: What its work returned, after JSON; None if it raised or died.
        error: The exception's type and text, None if there was none.
        signal: The signal that ended it, 0 if none did.
        seconds: From the fork to the end.
        cpu: Seconds of processor time that it used.
        grown: Bytes by which its resident memory grew at most while it worked.
    """

    value: Any
    error: tuple[str, str] | None
    signal: int
    seconds: float
    cpu: float
    grown: int = 0


class Phase:
    """One byte shared with children: how far a run has come."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def value(self) -> int:
        return self._page[0]

    @value.setter
    def value(self, phase: int) -> None:
        self._page[0] = phase


def _peak() -> int:
    """Most memory that was resident, in bytes, since `_reset_peak`."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measured(work: Callable[[], Any]) -> tuple[Exception | None, float, int]:
    """Do something.

    Args:
        work: What.

    Returns:
        The exception that it raised, seconds of this process's own time, and bytes by which its resident memory grew at
        most meanwhile.
    """
    error = None
    _reset_peak()
    before, started = _peak(), time.process_time()
    try:
        work()
    except Exception as raised:
        error = raised
    return error, time.process_time() - started, _peak() - before


class Child:
    """A forked process at work.

    Args:
        work: What it does; its result must be JSON-able.
        memory: Bytes of address space that it may have beyond the parent's; None for any number.
        quiet: Send its standard output and error to /dev/null.
    """

    def __init__(self, work: Callable[[], Any], memory: int | None = None, quiet: bool = True) -> None:
        self._read, write = os.pipe()
        self._started = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            self._work(work, write, memory, quiet)
        os.close(write)

    @staticmethod
    def _work(work: Callable[[], Any], write: int, memory: int | None, quiet: bool) -> None:
        answer: dict[str, Any] = {"value": None, "error": None}
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.settrace(None)
            if quiet:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
            if memory is not None:
                with open("/proc/self/statm") as file:
                    space = int(file.read().split()[0]) * mmap.PAGESIZE
                resource.setrlimit(resource.RLIMIT_AS, (space + memory, resource.RLIM_INFINITY))
            _reset_peak()
            before = _peak()
            try:
                answer["value"] = work()
            except BaseException as error:
                text = str(error) or "".join(traceback.format_exception(error))
                answer["error"] = [type(error).__name__, text]
            answer["grown"] = _peak() - before
            with os.fdopen(write, "w") as file:
                json.dump(answer, file)
        finally:
            os._exit(0)

    def wait(self, timeout: float = 120.0) -> Ended:
        """Wait for the end.

        Args:
            timeout: Seconds after which it is killed, and SIGKILL reported.
        """
        chunks: list[bytes] = []
        deadline = time.perf_counter() + timeout
        while True:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.perf_counter()))
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                break
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
        os.close(self._read)
        _, status, used = os.wait4(self.pid, 0)
        cpu = used.ru_utime + used.ru_stime
        seconds = time.perf_counter() - self._started
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if died:
            return Ended(None, None, died, seconds, cpu)
        answer = json.loads(b"".join(chunks))
        error = answer["error"] and (answer["error"][0], answer["error"][1])
        return Ended(answer["value"], error, 0, seconds, cpu, answer["grown"])

    def alive(self) -> bool:
        """Whether it has not said its last word yet."""
        return not select.select([self._read], [], [], 0)[0]

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # what clock_getcpuclockid(3) gives on Linux
        except OSError:
            return float("inf")  # it has ended

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        os.kill(self.pid, signal.SIGKILL)


def forked(work: Callable[[], Any], timeout: float = 120.0, memory: int | None = None, quiet: bool = True) -> Ended:
    """Do something in a child and wait for it; arguments as in `Child`."""
    return Child(work, memory, quiet).wait(timeout)
