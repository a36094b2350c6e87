"""A shim between the package and the operating system: counts every operation on files, and makes one of them fail.

It stands in Python, where operations have a stack that names their place: `os`, `open` and safetensors' own writer,
which is written in another language and is replaced by one that writes through `open`. `Disk.files` of `crash` replays
the log: that it gives the directory to the byte proves that nothing went past the shim.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

__all__ = ["FAULTS", "Operation", "Shim"]

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "short write": 0}
_GROWING = {"open", "write", "mkdir", "link", "rename", "truncate"}
"""What a full disk refuses from then on; removing, syncing and changing modes go on."""


@dataclass(frozen=True)
class Operation:
    """One call that changes, or makes durable, something under the root.

    Attributes:
        kind: ``open``, ``write``, ``truncate``, ``fsync``, ``link``, ``rename``, ``unlink``, ``mkdir``, ``rmdir``,
            ``chmod``, or ``mark`` for what a test wants to remember.
        path: On what, relative to the root.
        other: The new path, of a link or a renaming; or the mark.
        data: The bytes written.
        offset: Where they were written; the length, of a truncation.
        place: ``file.py:line`` in the package.
        failed: Whether it was made to fail.
    """

    kind: str
    path: str
    other: str = ""
    data: bytes = b""
    offset: int = 0
    place: str = ""
    failed: bool = False


@dataclass
class Shim:
    """Watches the files under a directory, from `install` to the end of the process.

    Args:
        root: The directory.
        at: Number of the operation that fails, counted from 0; None for none.
        fault: One of `FAULTS`. A disk stays full; another error comes once.
    """

    root: Path
    at: int | None = None
    fault: str = "EIO"
    log: list[Operation] = field(default_factory=list)
    fired: Operation | None = None

    def __post_init__(self) -> None:
        self._root = os.path.realpath(self.root)
        self._lock = threading.RLock()
        self._full = False
        self._count = 0

    # counting and failing

    def mark(self, text: str) -> None:
        """Remember a moment."""
        with self._lock:
            self.log.append(Operation("mark", "", text))

    def under(self, path: Any) -> str | None:
        """The path relative to the root; None outside, and for what is no path."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        try:
            name = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return None
        real = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        return real[len(self._root) + 1 :] if (real + "/").startswith(self._root + "/") else None

    def step(self, kind: str, path: str, other: str = "", data: bytes = b"", offset: int = 0) -> bool:
        """Count an operation; raise what it is to fail with.

        Returns:
            Whether half of it is to be done.
        """
        number, self._count = self._count, self._count + 1
        now = self.at is not None and number == self.at
        fails = now or (self._full and kind in _GROWING)
        half = now and self.fault == "short write" and kind == "write" and len(data) > 1
        if half:
            data = data[: len(data) // 2]
        error = FAULTS[self.fault] if fails and self.fault != "short write" else 0
        operation = Operation(kind, path, other, data, offset, _place(), bool(error))
        self.log.append(operation)
        if now and (half or error):
            self.fired = operation
            self._full = self.fault == "ENOSPC"
        if error:
            raise OSError(error, os.strerror(error), os.path.join(self._root, path))
        return half

    # standing in between

    def install(self) -> None:
        """Replace `os`'s functions, `open` and safetensors' writer, for good: only in a child."""
        for name in ("unlink", "remove", "mkdir", "rmdir", "chmod"):
            self._one_path(name)
        for name in ("link", "rename", "replace"):
            self._two_paths(name)
        self._descriptors()
        self._files()
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        for name, module in list(sys.modules.items()):
            if name.startswith("lightning_pathkernel"):
                for key, value in list(vars(module).items()):
                    if value is safetensors.torch.save_file:
                        setattr(module, key, _save_file)

    def _one_path(self, name: str) -> None:
        real, kind = getattr(os, name), {"remove": "unlink"}.get(name, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            with self._lock:
                inside = self.under(path)
                possible = os.path.lexists(path) != (kind == "mkdir") and os.path.isdir(os.path.dirname(path) or ".")
                if inside is not None and possible:
                    self.step(kind, inside)
                return real(path, *args, **options)

        setattr(os, name, call)

    def _two_paths(self, name: str) -> None:
        real, kind = getattr(os, name), "link" if name == "link" else "rename"

        def call(source: Any, target: Any, *args: Any, **options: Any) -> Any:
            with self._lock:
                inside = self.under(target)
                if inside is not None and not (kind == "link" and os.path.lexists(target)):
                    self.step(kind, self.under(source) or f"outside:{os.fspath(source)}", inside)
                return real(source, target, *args, **options)

        setattr(os, name, call)

    def _descriptors(self) -> None:
        fsync, write, opened, truncate = os.fsync, os.write, os.open, os.truncate

        def syncing(descriptor: Any) -> None:
            with self._lock:
                inside = self.under(descriptor if isinstance(descriptor, int) else descriptor.fileno())
                if inside is not None:
                    self.step("fsync", inside)
                fsync(descriptor)

        def writing(descriptor: int, data: Any) -> int:
            with self._lock:
                inside = self.under(descriptor)
                if inside is not None and not os.path.isfile(os.path.join(self._root, inside)):
                    inside = None
                if inside is not None:
                    whole = bytes(data)
                    half = self.step("write", inside, data=whole, offset=os.lseek(descriptor, 0, os.SEEK_CUR))
                    data = whole[: len(whole) // 2] if half else whole
                return write(descriptor, data)

        def opening(path: Any, flags: int, *args: Any, **options: Any) -> int:
            with self._lock:
                inside = self.under(path) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
                if inside is not None:
                    self.step("open", inside, other="new" if flags & os.O_TRUNC or not os.path.exists(path) else "")
                return opened(path, flags, *args, **options)

        def truncating(path: Any, length: int) -> None:
            with self._lock:
                inside = self.under(path)
                if inside is not None:
                    self.step("truncate", inside, offset=length)
                truncate(path, length)

        os.fsync, os.write, os.open, os.truncate = syncing, writing, opening, truncating
        os.fdatasync = syncing

    def _files(self) -> None:
        real, shim = io.open, self

        class Raw(io.FileIO):
            """A file under the root, each of whose writes is an operation."""

            def write(self, data: Any) -> int:
                with shim._lock:
                    inside = shim.under(self.fileno())
                    whole = bytes(data)
                    half = inside is not None and shim.step("write", inside, data=whole, offset=self.tell())
                    return super().write(whole[: len(whole) // 2] if half else whole)

            def truncate(self, size: int | None = None) -> int:
                with shim._lock:
                    length = self.tell() if size is None else size
                    inside = shim.under(self.fileno())
                    if inside is not None:
                        shim.step("truncate", inside, offset=length)
                    return super().truncate(length)

        def opening(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            inside = None if isinstance(file, int) or not set(mode) & set("wax+") else shim.under(file)
            if inside is None:
                return real(file, mode, buffering, *args, **options)
            with shim._lock:
                fresh = "w" in mode or not os.path.exists(file)
                if fresh or "r" not in mode:
                    shim.step("open", inside, other="new" if fresh else "")
                raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **options)

        io.open = opening
        builtins.open = opening


def _save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
    """`safetensors.torch.save_file`, in Python."""
    with open(filename, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/lightning_pathkernel/" in name and "/tests/" not in name:
            return f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def installed(shim: Shim) -> Callable[[str], None]:
    """Install a shim, and hand out its way to mark moments."""
    shim.install()
    return shim.mark
