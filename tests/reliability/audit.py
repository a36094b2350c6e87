"""What Python does while an artifact is verified, loaded and asked, seen by an audit hook.

A hook cannot be removed: all of this runs in a child. It sees what Python does, not what a library in another language
does past it.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import lightning_pathkernel
from lightning_pathkernel import verify
from tests.reliability.forks import Ended, forked
from tests.reliability.sample import answers
from tests.store.artifacts import edit, network

__all__ = ["DEEDS", "FORBIDDEN", "AuditReport", "audited", "campaign"]

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
        except ModuleNotFoundError:
            pass
        finally:
            hook.on = False
        return [dict(hook.seen), hook.wrong]

    return forked(child)


@dataclass
class AuditReport:
    """What the hook saw.

    Attributes:
        events: How many events of which name, while an artifact was verified, loaded and asked.
        shown: Forbidden deeds, each done on purpose, that the hook reported.
        wrong: Every finding, empty if all went well.
    """

    events: dict[str, int] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


DEEDS: dict[str, Callable[[Path], object]] = {
    "unpickling": lambda machine: pickle.loads(pickle.dumps(PurePath("x"))),
    "a command": lambda machine: os.system("true"),
    "a process": lambda machine: subprocess.run(["true"], check=True),
    "a socket": lambda machine: socket.socket().close(),
    "eval": lambda machine: eval("1 + 1"),
    "an import": lambda machine: __import__("this_module_is_named_in_the_artifact"),
    "a file elsewhere": lambda machine: open("/etc/hostname").close(),
    "a file beside it": lambda machine: open(machine.parent / "x", "a").close(),
    "a change of it": lambda machine: open(machine / "README.md", "a").close(),
}
"""What a loader must not do; each is done once, to see that the hook would tell."""


def campaign(machine: Path) -> AuditReport:
    """Watch an artifact being read whose every text names a module that lies in wait, and its like.

    Args:
        machine: A sound artifact; it is changed.
    """
    report = AuditReport()
    _baited(machine)
    ended = audited(machine)
    if ended.value is None:
        report.wrong.append(f"reading: {ended.error or ended.signal}")
    else:
        report.events, report.wrong = ended.value
    for name, deed in DEEDS.items():
        found = audited(machine, lambda deed=deed: deed(machine))  # type: ignore[misc]
        if found.value is not None and found.value[1]:
            report.shown.append(name)
        else:
            report.wrong.append(f"{name} went unseen")
    return report


def _baited(machine: Path) -> None:
    """Import paths and commands wherever a manifest has words that nothing checks."""
    bait = "this_module_is_named_in_the_artifact"
    words = {
        "module_class": f"{bait}.Machine",
        "loader": f"{bait}:load",
        "_target_": f"{bait}.run",
        "command": "os.system",
    }
    edit(machine, lambda manifest: manifest.update(words))
    edit(machine, lambda manifest: manifest["settings"].update(words))
    edit(machine, lambda manifest: manifest["libraries"].update({bait: "1"}))
