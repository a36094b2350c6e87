"""What Python does while an artifact is verified, loaded and asked, seen by an audit hook.

A hook cannot be removed: all of this runs in a child. It sees what Python does, not what a library in another language
does past it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_pathkernel
from lightning_pathkernel import verify
from tests.reliability.forks import Ended, forked
from tests.reliability.sample import answers
from tests.store.artifacts import network

__all__ = ["FORBIDDEN", "audited"]

FORBIDDEN = (
    "pickle.find_class", "marshal.loads", "exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.forkpty",
    "os.posix_spawn", "os.spawn", "os.startfile", "os.putenv", "subprocess.Popen", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "socket.sendto", "socket.__new__", "urllib.Request", "ctypes.dlopen", "code.__new__",
    "os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate",
    "shutil.rmtree", "shutil.copyfile", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp",
)  # fmt: skip
"""Events that have no place in reading an artifact; imports that stand in a library's own code are let pass."""

_OWN = tuple(
    {os.path.realpath(path) + "/" for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix) if path}
    | {"/proc/self/", "/sys/", "/dev/null", "/dev/urandom"}
)
_PACKAGE = os.path.dirname(os.path.realpath(lightning_pathkernel.__file__)) + "/"


class _Hook:
    """Collects events; switched on while something is watched.

    Args:
        artifact: The directory that may be opened.
    """

    def __init__(self, artifact: Path) -> None:
        self.artifact = os.path.realpath(artifact)
        self.on = False
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.seen[event] += 1
        if event == "open":
            self._opened(args)
        elif event in FORBIDDEN and not self._lazy(event):
            self.wrong.append(f"{event} {args!r:.200}")

    def _opened(self, args: tuple[Any, ...]) -> None:
        path, mode, flags = args
        if isinstance(path, int):
            return
        name = os.path.realpath(os.fsdecode(path))
        inside = name == self.artifact or name.startswith(self.artifact + "/")
        writes = bool(isinstance(mode, str) and set(mode) & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
        if writes or not (inside or name.startswith(_OWN)):
            self.wrong.append(f"open {name} {mode} {flags}")

    def _lazy(self, event: str) -> bool:
        """Whether it is an import that stands in a library's code, or in the package's: these names are no data."""
        frame: Any = sys._getframe(2)
        while frame is not None and event in ("import", "exec", "compile", "marshal.loads", "ctypes.dlopen"):
            name = frame.f_code.co_filename
            if name.startswith("<frozen importlib"):
                return True
            if not name.startswith("<") and not os.path.realpath(name).startswith(_OWN):
                return event == "import" and os.path.realpath(name).startswith(_PACKAGE)
            frame = frame.f_back
        return False


def audited(machine: Path, work: Callable[[], Any] | None = None) -> Ended:
    """Verify, load and ask an artifact in a child, audited.

    Args:
        machine: The artifact.
        work: What is watched instead.

    Returns:
        How it ended; its value is the number of events by name, and what should not have been done.
    """

    def child() -> list[Any]:
        module = network()
        hook = _Hook(machine)
        sys.addaudithook(hook)
        hook.on = True
        try:
            if work is not None:
                work()
            else:
                verify(machine)
                answers(machine, module)
        finally:
            hook.on = False
        return [dict(hook.seen), hook.wrong]

    return forked(child)
