"""One writer per directory."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

__all__ = ["HeldError", "WriterLock"]

LOCK = "lock"


class HeldError(RuntimeError):
    """Somebody else is writing there."""


class WriterLock:
    """The right to write to a directory, given up when the process ends, however it ends.

    Args:
        directory: The directory; it gets an empty file ``lock``.

    Raises:
        HeldError: At once, if somebody holds it, in this process or in another.
        OSError: If the file system fails.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.forget()
            raise HeldError(f"{directory / LOCK} is held by another writer") from None
        except OSError:
            self.forget()
            raise
        _held.add(self)

    def release(self) -> None:
        """Give it up, for children that were forked meanwhile too; may be called again."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close the file without giving the lock up for others that share it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A worker of a data loader must not hold what its parent held, after the parent's death."""
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_let_go_in_child)
