"""Artifacts behind fsspec URLs: brought here, read here, deleted; or put there, the manifest last."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.manifest import MANIFEST, parse_manifest, plain_name
from lightning_pathkernel.store.strict_json import TEXT_LIMIT

__all__ = ["LocalCopy", "download", "is_url", "local_copy", "upload"]

_PIECE = 1 << 20


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL for fsspec, such as ``s3://bucket/machine``; ``file://`` ones are too."""
    return isinstance(path, str) and "://" in path


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """The directory of an artifact; one behind a URL is downloaded, and deleted afterwards.

    Args:
        path: A directory or a URL.

    Yields:
        The directory.
    """
    if not is_url(path):
        yield Path(path)
        return
    copy = download(str(path))
    try:
        yield copy.path
    finally:
        copy.delete()


class LocalCopy:
    """An artifact that was brought here; deleted when told so, or with this object.

    Args:
        path: Where it is; None for a new private directory.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(tempfile.mkdtemp(prefix="pathkernel-"))
        own = self.path if path is None else None
        self.delete = weakref.finalize(self, _delete, own)


def _delete(directory: Path | None) -> None:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def download(url: str) -> LocalCopy:
    """Bring an artifact here: the manifest, then what it lists, and of each file no more bytes than it lists.

    Args:
        url: Where it is.

    Returns:
        A copy in a private directory; for ``file://`` the directory itself.

    Raises:
        ArtifactError: If something cannot be had, is malformed, or has another size than the manifest says.
        ImportError: If fsspec needs a package for this kind of URL.
        ValueError: If fsspec does not know this kind of URL.
    """
    system, root = _located(url)
    if "file" in _protocols(system):
        return LocalCopy(Path(root))
    target = LocalCopy()
    try:
        data = _read_all(system, _within(root, MANIFEST), url)
        sizes = _sizes(parse_manifest(data))
        free = shutil.disk_usage(target.path).free
        if sum(sizes.values()) > free:
            raise ArtifactError(f"{url}: {sum(sizes.values())} bytes, and {free} are free in {target.path}")
        _check_listing(system, root, set(sizes))
        for name, size in sizes.items():
            with open(target.path / name, "xb") as out:
                _copy(system, _within(root, name), name, size, out)
        (target.path / MANIFEST).write_bytes(data)
    except BaseException:
        target.delete()
        raise
    return target


def _located(url: str) -> tuple[Any, str]:
    import fsspec  # here, because a local artifact needs none of it

    system, root = fsspec.core.url_to_fs(url)
    return system, root


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _within(root: str, name: str) -> str:
    """A file of the directory; what follows a question mark in an HTTP URL stays at the end."""
    if root.startswith(("http://", "https://")):
        parts = urlsplit(root)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def _opened(system: Any, path: str, name: str) -> Iterator[Any]:
    try:
        with system.open(path, "rb") as source:
            yield source
    except ArtifactError:
        raise
    except Exception as error:  # a driver's own kinds: aiohttp's, botocore's, huggingface_hub's
        raise ArtifactError(f"{name}: cannot be read from {path}: {type(error).__name__}: {error}") from error


def _read_all(system: Any, path: str, url: str) -> bytes:
    pieces, left = [], TEXT_LIMIT + 1
    try:
        with _opened(system, path, MANIFEST) as source:
            while left and (piece := source.read(min(_PIECE, left))):
                pieces.append(piece)
                left -= len(piece)
    except ArtifactError as error:
        raise ArtifactError(f"{url} is not a kernel machine: it has no {MANIFEST} ({error})") from error
    if not left:
        raise ArtifactError(f"{MANIFEST}: larger than {TEXT_LIMIT} bytes")
    return b"".join(pieces)


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of every file that may be downloaded."""
    sizes: dict[str, int] = {}
    for name, facts in manifest["files"].items():
        if not plain_name(name):
            raise ArtifactError(f"{MANIFEST}: {name[:200]!r} is not a plain file name")
        size = facts.get("bytes") if isinstance(facts, dict) else None
        if type(size) is not int or size < 0:
            raise ArtifactError(f"{MANIFEST}: malformed: bytes of {name}")
        sizes[name] = size
    return sizes


def _check_listing(system: Any, root: str, known: set[str]) -> None:
    """Refuse what the manifest does not list, where the file system can list a directory (HTTP cannot)."""
    if set(_protocols(system)) & {"http", "https"}:
        return
    try:
        found = {path.rpartition("/")[2] for path in _listed(system, root)}
    except Exception as error:
        raise ArtifactError(f"{root}: cannot be listed: {type(error).__name__}: {error}") from error
    extra = found - known - {MANIFEST}
    if extra:
        raise ArtifactError(f"{min(extra)[:200]}: not listed in {MANIFEST}")


def _listed(system: Any, root: str) -> list[str]:
    """What is in a directory; an object that stands for the directory itself is not."""
    system.invalidate_cache()
    found = [str(path).rstrip("/") for path in system.ls(root, detail=False)]
    return [path for path in found if path.strip("/") != root.strip("/")]


def _copy(system: Any, path: str, name: str, size: int, out: Any) -> None:
    with _opened(system, path, name) as source:
        left = size
        while left and (piece := source.read(min(_PIECE, left))):
            out.write(piece)
            left -= len(piece)
        if left or source.read(1):
            found = f"{size - left}" if left else f"more than {size}"
            raise ArtifactError(f"{name}: {found} bytes, {size} expected: truncated or altered")


def upload(directory: Path, url: str) -> str:
    """Put an artifact's files there, the manifest last: until then nobody takes them for a machine.

    Args:
        directory: The artifact.
        url: Where it is to be; there must be nothing.

    Returns:
        ``url``.

    Raises:
        FileExistsError: If there is something.
        OSError: If a file cannot be written; then those written before it are removed, as far as that is possible.
    """
    system, root = _located(url)
    if _occupied(system, root):
        raise FileExistsError(f"{url} exists and is not empty: choose another place for the machine")
    names = sorted(p.name for p in directory.iterdir() if p.name != MANIFEST)
    written: list[str] = []
    try:
        system.makedirs(root, exist_ok=True)
        for name in [*names, MANIFEST]:
            written.append(_within(root, name))
            system.put_file(str(directory / name), written[-1])
    except BaseException:
        _remove(system, written)
        raise
    return url


def _occupied(system: Any, root: str) -> bool:
    try:
        return bool(_listed(system, root))
    except FileNotFoundError:
        return False


def _remove(system: Any, paths: list[str]) -> None:
    for path in reversed(paths):
        try:
            system.rm_file(path)
        except Exception:  # the first error is the one to be told
            continue
