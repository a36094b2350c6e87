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
FORMAT_VERSION = [1, 0]
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
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: malformed: {error!r}") from error
    if not known:
        raise ArtifactError(
            f"{MANIFEST}: format {manifest['format']!r} {version}, this version reads {FORMAT!r} {FORMAT_VERSION[0]}.x"
        )
    _check_contents(manifest)
    for name, facts in files.items():
        _check_size(directory, name, facts)
    return dict(manifest)


def _check_contents(manifest: dict[str, Any]) -> None:
    """Refuse a manifest that lacks what a machine needs, or lists it in another form."""
    files, chords, module = manifest["files"], manifest.get("chords"), manifest.get("module")
    wrong = None
    if manifest.get("required_features") != []:
        wrong = f"required_features {manifest.get('required_features')!r}, this version has none"
    elif not isinstance(files, dict):
        wrong = "files is not a table"
    elif bad := [name for name, facts in files.items() if not isinstance(facts, dict)]:
        wrong = f"no facts of {min(bad)}"
    elif (
        not isinstance(chords, list)
        or not chords
        or chords != [f"chord-{i:06d}.safetensors" for i in range(len(chords))]
    ):
        wrong = "chords is not the list of all chords in order"
    elif sorted(chords) != sorted(n for n in files if n.startswith("chord-")) or "constants.safetensors" not in files:
        wrong = "the chords or the constants are not those of the table of files"
    elif not isinstance(module, dict) or not all(_described(module.get(kind)) for kind in ("parameters", "buffers")):
        wrong = "module does not describe parameters and buffers"
    elif not all("trainable" in facts for facts in module["parameters"].values()):
        wrong = "module does not say which parameters are trainable"
    if wrong:
        raise ArtifactError(f"{MANIFEST}: malformed: {wrong}")


def _described(tensors: object) -> bool:
    return isinstance(tensors, dict) and all(
        isinstance(facts, dict) and {"shape", "dtype"} <= facts.keys() for facts in tensors.values()
    )


def _check_size(directory: Path, name: str, facts: dict[str, Any]) -> None:
    if not _plain_name(name):
        raise ArtifactError(f"{MANIFEST}: {name!r} is not a plain file name")
    path = directory / name
    try:
        there = path.is_file() and not path.is_symlink()
    except OSError:
        there = False
    if not there:
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
