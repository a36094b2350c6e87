"""One file of an artifact: what is used of it was checked against the manifest first, chunk by chunk."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import google_crc32c

from lightning_pathkernel.store.errors import ArtifactError

__all__ = ["CHUNK", "CheckedFile", "file_facts", "open_regular"]

CHUNK = 1 << 20
"""Bytes that share a CRC32C; a file's last chunk may be shorter."""
_OPEN_MAPS = 64
"""So many files are mapped at once; the least recently used one is given up."""


def open_regular(path: Path) -> int:
    """A descriptor for reading a regular file: no link is followed, no device or pipe is waited for.

    Args:
        path: The file.

    Returns:
        The descriptor.

    Raises:
        OSError: If there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file: a directory, a pipe or a device")
    return descriptor


def chunks_of(descriptor: int) -> Iterator[bytes]:
    """A file's chunks, from its beginning."""
    while True:
        pieces, wanted = [], CHUNK
        while wanted and (piece := os.read(descriptor, wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        if pieces:
            yield b"".join(pieces)
        if wanted:
            return


def file_facts(path: Path) -> dict[str, str | int]:
    """What a manifest says of a file: its size, its sha256, and the CRC32C of every chunk, eight digits each."""
    whole, sums, size = hashlib.sha256(), [], 0
    descriptor = open_regular(path)
    try:
        for chunk in chunks_of(descriptor):
            whole.update(chunk)
            sums.append(f"{google_crc32c.value(chunk):08x}")
            size += len(chunk)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": whole.hexdigest(), "crc32c": "".join(sums)}


class _Maps:
    """The files that are mapped at the moment, by the object that reads them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._open: OrderedDict[int, tuple[CheckedFile, mmap.mmap, int]] = OrderedDict()

    def get(self, file: CheckedFile) -> tuple[mmap.mmap, int]:
        """Its map and its descriptor; called, and used, under the lock."""
        found = self._open.get(id(file))
        if found is None:
            descriptor = file.opened()
            try:
                found = file, mmap.mmap(descriptor, file.size, access=mmap.ACCESS_READ), descriptor
            except OSError as error:
                os.close(descriptor)
                raise ArtifactError(f"{file.name}: cannot be mapped: {error}", file.name) from error
            self._open[id(file)] = found
            while len(self._open) > _OPEN_MAPS:
                self.drop(next(iter(self._open.values()))[0])
        self._open.move_to_end(id(file))
        return found[1:]

    def drop(self, file: CheckedFile) -> None:
        """Give its map up."""
        _, mapped, descriptor = self._open.pop(id(file))
        mapped.close()
        os.close(descriptor)

    def close(self, files: list[CheckedFile]) -> None:
        """Give the maps of these files up, where they have any."""
        with self.lock:
            for file in files:
                if id(file) in self._open:
                    self.drop(file)


_MAPS = _Maps()


class CheckedFile:
    """Reads parts of a file, which stays mapped; every chunk is checked before its first byte is used.

    A file that was changed since it was last read is checked again; one that was replaced or resized is refused.

    Args:
        path: The file.
        facts: What the manifest says of it, its form checked: ``bytes``, ``sha256`` and ``crc32c``; without the last
            the whole file is read for its sha256 before anything of it is used. None where nothing vouches for it.

    Attributes:
        name: Its name, for messages.
        size: Its bytes.

    Raises:
        ArtifactError: If there is no such file, or it has another size.
    """

    def __init__(self, path: Path, facts: dict[str, str | int] | None = None) -> None:
        self.path, self.name = path, path.name
        self.facts = facts
        try:
            descriptor = open_regular(path)
            known = os.fstat(descriptor)
            os.close(descriptor)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path.name}: cannot be read: {error}", path.name) from error
        self.size = known.st_size
        self._identity = known.st_dev, known.st_ino, known.st_size
        self._changed = known.st_mtime_ns, known.st_ctime_ns
        if facts is not None and self.size != facts["bytes"]:
            raise ArtifactError(
                f"{self.name}: {self.size} bytes, {facts['bytes']} expected: truncated or altered", self.name
            )
        self._checked = bytearray(-(-self.size // CHUNK))

    def opened(self) -> int:
        """A descriptor of the file that was there when this object was made."""
        try:
            descriptor = open_regular(self.path)
        except OSError as error:
            raise ArtifactError(f"{self.name}: cannot be read: {error}", self.name) from error
        try:
            self._check_identity(descriptor)
        except ArtifactError:
            os.close(descriptor)
            raise
        return descriptor

    def _check_identity(self, descriptor: int) -> None:
        """Just before a map is read: reading beyond the end of a file that has shrunk would end the process."""
        now = os.fstat(descriptor)
        if (now.st_dev, now.st_ino, now.st_size) != self._identity:
            raise ArtifactError(
                f"{self.name}: replaced or resized since it was opened: load the machine again", self.name
            )
        if (now.st_mtime_ns, now.st_ctime_ns) != self._changed:
            self._changed = now.st_mtime_ns, now.st_ctime_ns
            self._checked = bytearray(len(self._checked))

    def read(self, start: int, stop: int) -> bytearray:
        """A copy of the bytes ``[start, stop)``.

        Args:
            start: First byte.
            stop: The one behind the last; at most the file's size.

        Returns:
            The bytes.

        Raises:
            ArtifactError: If a chunk that holds some of them is not the manifest's; it is named.
        """
        if not 0 <= start <= stop <= self.size:
            raise ArtifactError(f"{self.name}: bytes {start} to {stop} of {self.size}: truncated or altered", self.name)
        if start == stop:
            return bytearray()
        with _MAPS.lock:
            mapped, descriptor = _MAPS.get(self)
            try:
                self._check_identity(descriptor)
                self._check(mapped, start // CHUNK, -(-stop // CHUNK))
                with memoryview(mapped) as view:
                    out = bytearray(view[start:stop])
                page = start - start % mmap.ALLOCATIONGRANULARITY
                mapped.madvise(mmap.MADV_DONTNEED, page, stop - page)  # the process need not hold what was copied
            except ArtifactError:
                _MAPS.drop(self)
                raise
        return out

    def _check(self, mapped: mmap.mmap, first: int, last: int) -> None:
        if self.facts is None:
            return
        sums = self.facts.get("crc32c")
        if not isinstance(sums, str):
            self._check_whole(mapped)
            return
        for index in range(first, last):
            if self._checked[index]:
                continue
            start = index * CHUNK
            found = f"{google_crc32c.value(mapped[start : start + CHUNK]):08x}"
            mapped.madvise(mmap.MADV_DONTNEED, start, min(CHUNK, self.size - start))
            if found != sums[8 * index : 8 * index + 8]:
                _refuse_chunk(self.name, index, self.size)
            self._checked[index] = 1

    def _check_whole(self, mapped: mmap.mmap) -> None:
        if all(self._checked):
            return
        digest = hashlib.sha256()
        for start in range(0, self.size, CHUNK):
            digest.update(mapped[start : start + CHUNK])
        if self.facts is not None and digest.hexdigest() != self.facts["sha256"]:
            raise ArtifactError(f"{self.name}: its sha256 is not the manifest's: damaged or altered", self.name)
        self._checked = bytearray(b"\1" * len(self._checked))

    def verify(self) -> None:
        """Read every byte and compare it with the manifest.

        Raises:
            ArtifactError: Naming the first bad chunk.
        """
        if self.facts is None:
            return
        sums, whole, size = self.facts.get("crc32c"), hashlib.sha256(), 0
        descriptor = self.opened()
        try:
            for index, chunk in enumerate(chunks_of(descriptor)):
                whole.update(chunk)
                size += len(chunk)
                if isinstance(sums, str) and f"{google_crc32c.value(chunk):08x}" != sums[8 * index : 8 * index + 8]:
                    _refuse_chunk(self.name, index, self.size)
        except OSError as error:
            raise ArtifactError(f"{self.name}: cannot be read: {error}", self.name) from error
        finally:
            os.close(descriptor)
        if size != self.size or whole.hexdigest() != self.facts["sha256"]:
            raise ArtifactError(f"{self.name}: its sha256 is not the manifest's: damaged or altered", self.name)

    def close(self) -> None:
        """Give the map up; reading again makes a new one."""
        _MAPS.close([self])


def _refuse_chunk(name: str, index: int, size: int) -> NoReturn:
    start, stop = index * CHUNK, min((index + 1) * CHUNK, size)
    raise ArtifactError(
        f"{name}: its sha256 is not the manifest's, and the first chunk whose CRC32C is not is {index}, "
        f"bytes {start} to {stop - 1}: damaged or altered",
        name,
        index,
    )
