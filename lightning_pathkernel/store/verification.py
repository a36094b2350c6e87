"""`verify`: every byte of an artifact against its manifest."""

from __future__ import annotations

from pathlib import Path

from lightning_pathkernel.store.manifest import read_manifest
from lightning_pathkernel.store.remote import local_copy

__all__ = ["verify"]


def verify(path: str | Path, expected_sha256: str | None = None) -> None:
    """Read every byte of an artifact and compare it with its manifest.

    Args:
        path: The artifact's directory, or an fsspec URL of one, which is downloaded for it and deleted afterwards.
        expected_sha256: The sha256 that the manifest must have, if its author told you.

    Raises:
        ArtifactError: Naming the first bad file, and the first bad chunk of it.
        ValueError: If ``expected_sha256`` is no sha256.

    Examples:
        >>> import tempfile
        >>> from lightning_pathkernel import verify
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> verify(tiny_machine().save(tempfile.mkdtemp()))  # says nothing where all is well
    """
    with local_copy(path) as directory:
        read_manifest(directory, expected_sha256).verify()
