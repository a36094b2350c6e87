"""`pathkernel verify`: is an artifact whole?"""

from __future__ import annotations

from lightning_pathkernel import store
from lightning_pathkernel.commands.answer import answer, told

__all__ = ["verify"]


def verify(directory: str, expected_sha256: str | None = None, json: bool = False) -> int:
    """Check that a machine is whole: every byte is read.

    The exit status is 0 if it is, and 1 if not: then the first bad file and chunk are named.

    Args:
        directory: The machine: its directory, or an fsspec URL.
        expected_sha256: The sha256 that manifest.json must have, as its author told you.
        json: Print one line of JSON.

    Returns:
        The exit status.
    """
    try:
        with store.local_copy(directory) as path:
            manifest = store.read_manifest(path, expected_sha256)
            manifest.verify()
    except store.ArtifactError as error:
        found: dict[str, object] = {"ok": False, "error": str(error), "file": error.file, "chunk": error.chunk}
        return answer(found, told(directory, error), json, status=1)
    sizes = [file.size for file in manifest.files.values()]
    found = {"ok": True, "files": len(sizes), "bytes": sum(sizes), "sha256": manifest.sha256}
    text = f"{directory}: whole, {len(sizes)} files, {sum(sizes):,} bytes\nsha256 of manifest.json: {manifest.sha256}"
    return answer(found, text, json)
