"""The manifest of an artifact: every file, its size and sha256, and what the machine is of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.publish import sha256_of

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST", "file_table", "read_manifest", "verify"]

MANIFEST = "manifest.json"
FORMAT = "lightning_pathkernel.machine"
FORMAT_VERSION = [0, 1]
_MANIFEST_LIMIT = 16 << 20


def file_table(directory: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file of a directory but the manifest."""
    files = sorted(p for p in directory.iterdir() if p.name != MANIFEST)
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}


def _plain_name(name: str) -> bool:
    return bool(name) and PurePosixPath(name).name == name and "\\" not in name and name not in (".", "..")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check a manifest, without reading the files it lists.

    Args:
        directory: The artifact.

    Returns:
        The manifest.

    Raises:
        ArtifactError: If it is missing, malformed, of another format, or lists a file that is missing or has another
            size.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is not a kernel machine: it has no {MANIFEST}")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise ArtifactError(f"{MANIFEST}: larger than {_MANIFEST_LIMIT} bytes")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["version"]
        known = manifest["format"] == FORMAT and version[0] == FORMAT_VERSION[0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{MANIFEST}: malformed: {error!r}") from error
    if not known:
        raise ArtifactError(
            f"{MANIFEST}: format {manifest['format']!r} {version}, this version reads {FORMAT!r} {FORMAT_VERSION[0]}.x"
        )
    for name, facts in files.items():
        _check_size(directory, name, facts)
    return dict(manifest)


def _check_size(directory: Path, name: str, facts: dict[str, Any]) -> None:
    if not _plain_name(name):
        raise ArtifactError(f"{MANIFEST}: {name!r} is not a plain file name")
    path = directory / name
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{name}: listed in {MANIFEST}, but there is no such file")
    if path.stat().st_size != facts.get("bytes"):
        raise ArtifactError(f"{name}: {path.stat().st_size} bytes, {facts.get('bytes')} expected: truncated or altered")


def verify(path: str | Path, expected_sha256: str | None = None) -> None:
    """Read every byte of an artifact and compare it with its manifest.

    Args:
        path: The artifact's directory.
        expected_sha256: The sha256 that the manifest must have, if its author told you.

    Raises:
        ArtifactError: Naming the first bad file.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if expected_sha256 is not None:
        found = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
        if found != expected_sha256:
            raise ArtifactError(f"{MANIFEST}: sha256 {found}, {expected_sha256} expected: another machine or altered")
    for name, facts in sorted(manifest["files"].items()):
        if sha256_of(directory / name) != facts.get("sha256"):
            raise ArtifactError(f"{name}: its sha256 is not the manifest's: damaged or altered")
    extra = {p.name for p in directory.iterdir()} - set(manifest["files"]) - {MANIFEST}
    if extra:
        raise ArtifactError(f"{min(extra)}: not listed in {MANIFEST}")
