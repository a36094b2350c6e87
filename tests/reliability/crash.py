"""What a file system may have kept after a crash, from the log of a `Shim`: ALICE (Pillai et al., OSDI 2014).

Contents become durable with an fsync of the file, names with an fsync of their directory; what was not synced may be
there, be there in part, or not. A journal keeps names in order; worse file systems do not, and are played too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.reliability.shim import Operation

__all__ = ["KEPT", "Disk"]

KEPT = ("nothing", "everything", "names", "contents", "some in order", "some")
"""What of the unsynced is kept: `names` without their contents is how renamed files come to be empty."""


@dataclass(eq=False)
class _Inode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    entries: dict[str, _Inode] | None = None
    names: dict[str, _Inode] = field(default_factory=dict)
    """Names that are durable, of a directory."""
    pending: list[tuple[tuple[str, _Inode | None], ...]] = field(default_factory=list)
    """Changes of names that are not, each of them of one call."""


class Disk:
    """Replays a log, operation by operation.

    Args:
        outside: Contents of files outside the root that were linked into it, by path.
    """

    def __init__(self, outside: dict[str, bytes] | None = None) -> None:
        self._root = _Inode(entries={})
        self._outside = outside or {}

    def _find(self, path: str) -> _Inode | None:
        node: _Inode | None = self._root
        for part in PurePosixPath(path).parts:
            node = None if node is None or node.entries is None else node.entries.get(part)
        return node

    def _at(self, path: str) -> _Inode:
        node = self._find(path)
        if node is None:
            raise KeyError(f"{path} is not there: an operation went past the shim")
        return node

    def _change(self, path: str, node: _Inode | None) -> tuple[_Inode, tuple[str, _Inode | None]]:
        place = PurePosixPath(path)
        parent = self._at(str(place.parent) if str(place.parent) != "." else "")
        if parent.entries is None:
            raise NotADirectoryError(path)
        if node is None:
            parent.entries.pop(place.name, None)
        else:
            parent.entries[place.name] = node
        return parent, (place.name, node)

    def apply(self, operation: Operation) -> None:
        """Do one operation; failed ones and marks change nothing."""
        if operation.failed or operation.kind in ("mark", "chmod"):
            return
        kind, path = operation.kind, operation.path
        if kind in ("open", "mkdir"):
            self._create(operation)
        elif kind == "write":
            data, end = self._at(path).data, operation.offset + len(operation.data)
            data.extend(b"\0" * (end - len(data)))
            data[operation.offset : end] = operation.data
        elif kind == "truncate":
            data = self._at(path).data
            data[:] = bytes(data[: operation.offset]).ljust(operation.offset, b"\0")
        elif kind == "fsync":
            self._sync(self._at(path))
        elif kind in ("unlink", "rmdir"):
            parent, change = self._change(path, None)
            parent.pending.append((change,))
        else:
            self._move(operation)

    def _create(self, operation: Operation) -> None:
        node = self._find(operation.path)
        if node is None:
            new = _Inode(entries={} if operation.kind == "mkdir" else None)
            parent, change = self._change(operation.path, new)
            parent.pending.append((change,))
        elif operation.other == "new":
            node.data.clear()

    def _sync(self, node: _Inode) -> None:
        if node.entries is None:
            node.durable = bytes(node.data)
        else:
            node.names, node.pending = dict(node.entries), []

    def _move(self, operation: Operation) -> None:
        if operation.path.startswith("outside:"):
            content = self._outside[operation.path.removeprefix("outside:")]
            node = _Inode(bytearray(content), content)
        else:
            node = self._at(operation.path)
        parent, added = self._change(operation.other, node)
        if operation.kind == "link":
            parent.pending.append((added,))
            return
        source, removed = self._change(operation.path, None)
        if source is parent:
            parent.pending.append((removed, added))
        else:
            parent.pending.append((added,))
            source.pending.append((removed,))

    # what is left

    def files(self, kept: str = "everything", seed: int = 0) -> dict[str, bytes]:
        """Relative path -> content of every file after a crash.

        Args:
            kept: One of `KEPT`.
            seed: Of what is kept by chance.
        """
        rng = random.Random(seed)
        return dict(sorted(self._walk(self._root, "", kept, rng)))

    def _walk(self, node: _Inode, prefix: str, kept: str, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        for name, child in sorted(_names(node, kept, rng).items()):
            if child.entries is None:
                yield prefix + name, _content(child, kept, rng)
            else:
                yield prefix + name + "/", b""
                yield from self._walk(child, f"{prefix}{name}/", kept, rng)


def _names(node: _Inode, kept: str, rng: random.Random) -> dict[str, _Inode]:
    if kept in ("everything", "names"):
        return node.entries or {}
    names, pending = dict(node.names), node.pending
    if kept in ("nothing", "contents"):
        return names
    if kept == "some in order":
        chosen: Sequence[tuple[tuple[str, _Inode | None], ...]] = pending[: rng.randint(0, len(pending))]
    else:
        chosen = [change for change in pending if rng.random() < 0.5]
    for change in chosen:
        for name, child in change:
            if child is None:
                names.pop(name, None)
            else:
                names[name] = child
    return names


def _content(node: _Inode, kept: str, rng: random.Random) -> bytes:
    now = bytes(node.data)
    if kept in ("everything", "contents") or now == node.durable:
        return now
    if kept in ("nothing", "names"):
        return node.durable
    end = rng.randint(0, len(now))
    return rng.choice([node.durable, now, now[:end], now[:end].ljust(len(now), b"\0")])


def written(files: dict[str, bytes], root: Path) -> Path:
    """Put files where a test can read them; the directory is new."""
    root.mkdir(parents=True)
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root
