"""Segments written by a thread behind the training loop's back, within bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_pathkernel.store.errors import StoreError
from lightning_pathkernel.store.segments import Groups, SegmentHeader, segment_name, write_segment

__all__ = ["Head", "SegmentWriter", "Stamp"]

_LIMIT = 256 << 20
"""Bytes handed over and not yet written, at most; a single segment may be larger if nothing else waits."""


@dataclass(frozen=True)
class Stamp:
    """What all segments of one process have in common."""

    run_id: str
    rank: int
    configuration: str


@dataclass(frozen=True)
class Head:
    """The end of a chain: how many segments, and the sha256 of the last one, or of what the first one follows."""

    segments: int
    sha256: str


@dataclass(frozen=True)
class _Job:
    kind: str
    index: int
    steps: tuple[int, int]
    facts: Mapping[str, Any]
    groups: Groups
    bytes: int


class SegmentWriter:
    """Writes segments in the order in which they are handed over, each with the hash of the one before.

    The thread lives while there is something to write: an interpreter that exits waits for that, and for nothing else.
    What is handed over must not be changed any more.

    Args:
        directory: Of the process' segments.
        stamp: What they have in common.
        head: The end of the chain so far.
        limit: Bytes that may wait; `put` blocks beyond.
    """

    def __init__(self, directory: Path, stamp: Stamp, head: Head, limit: int = _LIMIT) -> None:
        self._directory = directory
        self._stamp = stamp
        self._head = head
        self._limit = limit
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._opened = ("", "")
        self.next_index = head.segments

    def put(
        self, kind: str, steps: tuple[int, int], facts: Mapping[str, Any], groups: Groups, index: int | None = None
    ) -> None:
        """Hand a segment over; waits where too much is waiting already.

        Args:
            kind: Of the segment; ``open`` is written beside the chain, after all that was handed over before.
            steps: Optimiser steps before and after it.
            facts: JSON-able.
            groups: Its tensors; those on a device are copied to the CPU at once.
            index: Its number, for an open one; the next of the chain otherwise.

        Raises:
            StoreError: If something handed over before could not be written.
        """
        here = {group: {name: t.detach().to("cpu") for name, t in named.items()} for group, named in groups.items()}
        size = sum(_nbytes(t) for named in here.values() for t in named.values())
        with self._changed:
            while self._waiting and self._waiting + size > self._limit and self._error is None:
                self._changed.wait()
            self._raise()
            if index is None:
                index, self.next_index = self.next_index, self.next_index + 1
            self._jobs.append(_Job(kind, index, steps, facts, here, size))
            self._waiting += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pathkernel-writer")
                self._thread.start()

    def flush(self) -> tuple[Head, tuple[str, str]]:
        """Wait until all is written and durable.

        Returns:
            The end of the chain, and name and sha256 of the last open segment.

        Raises:
            StoreError: If something could not be written.
        """
        with self._changed:
            while self._thread is not None:
                self._changed.wait()
            self._raise()
            return self._head, self._opened

    def check(self) -> None:
        """Raise what went wrong, without waiting.

        Raises:
            StoreError: If something could not be written.
        """
        if self._error is not None:
            with self._changed:
                self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise StoreError.of(self._error, self._directory, self._head.segments)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._jobs[0]
            try:
                self._write(job)
            except BaseException as error:  # it surfaces in the training thread; a failed file is not tried again
                with self._changed:
                    self._error, self._thread, self._waiting = error, None, 0
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._jobs.popleft()
                self._waiting -= job.bytes
                self._changed.notify_all()
            del job

    def _write(self, job: _Job) -> None:
        stamp, (first, last) = self._stamp, job.steps
        header = SegmentHeader(
            stamp.run_id, stamp.rank, job.kind, job.index, first, last, stamp.configuration, self._head.sha256,
            job.facts,
        )  # fmt: skip
        digest = write_segment(self._directory, header, job.groups)
        if job.kind == "open":
            self._opened = segment_name(job.kind, job.index), digest
        else:
            self._head = Head(job.index + 1, digest)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
