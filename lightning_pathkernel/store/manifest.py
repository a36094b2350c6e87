"""The manifest of an artifact: every file, its size and checksums, and what the machine is of."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_pathkernel.store.checked_file import CHUNK, CheckedFile, file_facts, open_regular
from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.migrations import current
from lightning_pathkernel.store.strict_json import TEXT_LIMIT, parse_json
from lightning_pathkernel.store.tensor_file import TensorFile

__all__ = ["CONSTANTS", "MANIFEST", "Manifest", "file_table", "parse_manifest", "plain_name", "read_manifest"]

MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
_SIZE_LIMIT = 1 << 50


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read, and the files that it lists.

    Attributes:
        directory: Where they are.
        sha256: Of the manifest's own bytes.
        contents: What it says, as of this version of the format.
        files: Name -> file; each is there and has its size, none was read.
    """

    directory: Path
    sha256: str
    contents: dict[str, Any]
    files: dict[str, CheckedFile]

    def verify(self) -> None:
        """As the function of this name, once the manifest was read."""
        for name, file in sorted(self.files.items()):
            file.verify()
            if name.endswith(".safetensors"):
                TensorFile(file)
                file.close()
        extra = {p.name for p in self.directory.iterdir()} - set(self.files) - {MANIFEST}
        if extra:
            raise ArtifactError(f"{min(extra)}: not listed in {MANIFEST}", min(extra))


def file_table(directory: Path) -> dict[str, dict[str, str | int]]:
    """Size in bytes and checksums of every file of a directory but the manifest."""
    return {p.name: file_facts(p) for p in sorted(directory.iterdir()) if p.name != MANIFEST}


def plain_name(name: object) -> bool:
    """Whether a name from a manifest may be a file's: letters, digits, dots, underscores and hyphens, no dot first."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and name != MANIFEST


def read_manifest(directory: Path, expected_sha256: str | None = None) -> Manifest:
    """Read and check a manifest, without reading the files it lists.

    Args:
        directory: The artifact.
        expected_sha256: The sha256 that it must have; None for any. Checked before anything that it says is used.

    Returns:
        The manifest.

    Raises:
        ArtifactError: If it is missing, malformed, of another format, or lists a file that is missing or has another
            size.
    """
    data = _manifest_bytes(directory)
    digest = hashlib.sha256(data).hexdigest()
    _check_digest(digest, expected_sha256)
    contents = parse_manifest(data)
    files: dict[str, CheckedFile] = {}
    for name, facts in contents["files"].items():
        files[name] = _listed(directory, name, facts, contents["version"])
    _check_contents(contents)
    return Manifest(directory, digest, contents, files)


def _check_digest(found: str, expected: str | None) -> None:
    if expected is not None and found != _digest(expected):
        raise ArtifactError(f"{MANIFEST}: sha256 {found}, {_digest(expected)} expected: another machine or altered")


def _manifest_bytes(directory: Path) -> bytes:
    try:
        descriptor = open_regular(directory / MANIFEST)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory} is not a kernel machine: it has no {MANIFEST} ({error})") from error
    try:
        if os.fstat(descriptor).st_size > TEXT_LIMIT:
            raise ArtifactError(f"{MANIFEST}: larger than {TEXT_LIMIT} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(TEXT_LIMIT + 1)
    finally:
        os.close(descriptor)


def parse_manifest(data: bytes) -> dict[str, Any]:
    """What a manifest says, its format and version checked, and its table of files to be there.

    Args:
        data: Its bytes.

    Returns:
        Its contents, as of this version of the format; nothing else of it is checked.

    Raises:
        ArtifactError: If it is malformed, or of another format.
    """
    try:
        contents = parse_json(data)
        files, _ = contents["files"], contents["version"]
        contents = current(contents)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{MANIFEST}: malformed: {error!r}") from error
    if not isinstance(files, dict):
        raise ArtifactError(f"{MANIFEST}: malformed: files is not a table")
    return contents


def _listed(directory: Path, name: str, facts: Any, version: list[int]) -> CheckedFile:
    """A file of the table, which is there and has its size."""
    if not plain_name(name):
        raise ArtifactError(f"{MANIFEST}: {name[:200]!r} is not a plain file name")
    if not isinstance(facts, dict):
        raise ArtifactError(f"{MANIFEST}: malformed: no facts of {name}")
    path = directory / name
    try:
        there = path.is_file() and not path.is_symlink()
    except OSError:
        there = False
    if not there:
        raise ArtifactError(f"{name}: listed in {MANIFEST}, but there is no such file", name)
    checked = CheckedFile(path)
    wrong = _wrong_facts(facts, version)
    if wrong:
        raise ArtifactError(f"{MANIFEST}: malformed: {wrong} of {name}")
    if checked.size != facts["bytes"]:
        raise ArtifactError(f"{name}: {checked.size} bytes, {facts['bytes']} expected: truncated or altered", name)
    checked.facts = facts
    return checked


def _wrong_facts(facts: dict[str, Any], version: list[int]) -> str | None:
    size, whole, sums = facts.get("bytes"), facts.get("sha256"), facts.get("crc32c")
    if type(size) is not int or not 0 <= size <= _SIZE_LIMIT:
        return "bytes"
    if not isinstance(whole, str) or not re.fullmatch("[0-9a-f]{64}", whole):
        return "sha256"
    if sums is None and version == [1, 0]:
        return None
    digits = 8 * -(-size // CHUNK)
    if not isinstance(sums, str) or len(sums) != digits or not re.fullmatch("[0-9a-f]*", sums):
        return "crc32c"
    return None


def _check_contents(manifest: dict[str, Any]) -> None:
    """Refuse a manifest that lacks what a machine needs, or lists it in another form."""
    files, chords, module = manifest["files"], manifest.get("chords"), manifest.get("module")
    wrong = None
    if (
        not isinstance(chords, list)
        or not chords
        or chords != [f"chord-{i:06d}.safetensors" for i in range(len(chords))]
    ):
        wrong = "chords is not the list of all chords in order"
    elif sorted(chords) != sorted(n for n in files if n.startswith("chord-")) or CONSTANTS not in files:
        wrong = "the chords or the constants are not those of the table of files"
    elif not isinstance(module, dict) or not all(_described(module.get(kind)) for kind in ("parameters", "buffers")):
        wrong = "module does not describe parameters and buffers"
    elif not all(isinstance(facts.get("trainable"), bool) for facts in module["parameters"].values()):
        wrong = "module does not say which parameters are trainable"
    if wrong:
        raise ArtifactError(f"{MANIFEST}: malformed: {wrong}")


def _described(tensors: object) -> bool:
    return isinstance(tensors, dict) and all(
        isinstance(facts, dict)
        and isinstance(facts.get("dtype"), str)
        and isinstance(facts.get("shape"), list)
        and all(type(d) is int and d >= 0 for d in facts["shape"])
        for facts in tensors.values()
    )


def _digest(expected: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", expected):
        raise ValueError(f"expected_sha256 must be 64 hexadecimal digits, found {expected[:80]!r}")
    return expected.lower()
