"""One way to write a file or a directory so that others see all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "fsync_directory",
    "make_directory",
    "publish",
    "publish_json",
    "publish_tensors",
    "remove_temporaries",
    "sha256_of",
    "taken_back",
]


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links say: FAT, many network mounts."""


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory where there is none, and those above it, so that a power cut loses none of them."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        fsync_directory(each.parent)


@contextmanager
def taken_back(undo: Callable[[], object]) -> Iterator[None]:
    """Undo what was published where the file system does not say that it will last: all of it is there, or nothing."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            undo()
        raise


def publish(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, make it durable and rename it into place.

    Args:
        path: Where the file is to be; it must not exist.
        write: Given the temporary path, writes the whole file.

    Returns:
        ``path``.

    Raises:
        FileExistsError: If ``path`` exists; nothing is overwritten.
        OSError: If the file system fails; then nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already and is not overwritten")
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise FileExistsError(f"{path} exists already and is not overwritten") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    with taken_back(path.unlink):
        fsync_directory(path.parent)
    return path


def remove_temporaries(directory: Path) -> list[str]:
    """Remove what `publish` left behind where it was killed; only for whoever alone writes there.

    Args:
        directory: Where.

    Returns:
        The names of the files removed.
    """
    found = sorted(p.name for p in directory.glob(".*.tmp") if p.is_file())
    for name in found:
        (directory / name).unlink(missing_ok=True)
    return found


def publish_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Publish strict JSON, UTF-8, sorted keys."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return publish(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Publish a safetensors file; tensors are brought to the CPU and made contiguous."""
    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    return publish(path, lambda temporary: save_file(plain, str(temporary), dict(metadata)))


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
