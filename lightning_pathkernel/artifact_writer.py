"""Writing an artifact: staged beside its place or in a temporary directory, and published whole or not at all."""

from __future__ import annotations

import errno
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_pathkernel.chord_io import chord_name
from lightning_pathkernel.chord_path import ChordPath
from lightning_pathkernel.fingerprint import constants, describe_module
from lightning_pathkernel.packed_io import Node, write_packed, write_reduced
from lightning_pathkernel.store import (
    CHUNK,
    CONSTANTS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    CheckedFile,
    Manifest,
    TensorFile,
    file_table,
    fsync_directory,
    is_url,
    make_directory,
    publish,
    publish_json,
    publish_tensors,
    read_manifest,
    taken_back,
    upload,
)
from lightning_pathkernel.stored_path import ReducedPath, StoredPath

__all__ = ["METRICS", "README", "publish_artifact", "remove_staged", "save_machine", "seal", "write_text"]

METRICS = "metrics.json"
README = "README.md"
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
"""What a rename of a directory says of a place where there is something."""


def publish_artifact(out: str | Path, fill: Callable[[Path], None]) -> str | Path:
    """Let ``fill`` write an artifact to a private directory, and publish it: a rename, or an upload, manifest last.

    Args:
        out: Where it is to be: a directory that does not exist or is empty, or an fsspec URL.
        fill: Given a directory that is empty, writes the whole artifact.

    Returns:
        ``out``, a directory as a path.

    Raises:
        FileExistsError: If there is something at ``out``; nothing is overwritten.
        OSError: If it cannot be written; then nothing is left behind.
    """
    if is_url(out):
        url = str(out)
        if not url.startswith(("file://", "local://")):
            with tempfile.TemporaryDirectory(prefix="pathkernel-") as temporary:
                fill(Path(temporary))
                return upload(Path(temporary), url)
        out = url.partition("://")[2]
    place = Path(out)
    _check_free(place)
    make_directory(place.parent)
    staged = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        staged.mkdir()
        fill(staged)
        fsync_directory(staged)
        _check_free(place)
        try:
            staged.rename(place)  # replaces an empty directory, and nothing else
        except OSError as error:
            if error.errno in _TAKEN:
                raise FileExistsError(_taken(place)) from error
            raise
        with taken_back(lambda: place.rename(staged)):
            fsync_directory(place.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return place


def remove_staged(directory: Path) -> None:
    """Remove what a killed export of a fit's machine left behind; only for whoever alone exports there."""
    for path in directory.glob(".machine*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _check_free(place: Path) -> None:
    if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise FileExistsError(_taken(place))


def _taken(place: Path) -> str:
    return f"{place} exists and is not empty: choose another place for the machine"


def seal(staged: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, when all other files are there, and see that what is written can be opened.

    Args:
        staged: The artifact's directory.
        facts: What the manifest says beside its format, its files and the libraries.

    Raises:
        ArtifactError: If it is beyond the format's limits: too many parameters, for example.
    """
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "required_features": [],
        "chunk_bytes": CHUNK,
        "files": file_table(staged),
        "libraries": {"lightning_pathkernel": version("lightning-pathkernel"), "torch": torch.__version__},
        **facts,
    }
    publish_json(staged / MANIFEST, manifest)
    for name, file in read_manifest(staged).files.items():
        if name.endswith(".safetensors"):
            TensorFile(file)
            file.close()


def write_text(path: Path, text: str) -> None:
    """Publish a text file, UTF-8."""
    publish(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_machine(out: str | Path, path: ChordPath, module: nn.Module, manifest: Manifest | None) -> str | Path:
    """Write a machine as an artifact.

    Args:
        out: As in `publish_artifact`.
        path: Its path.
        module: Its module.
        manifest: Of the artifact that it was loaded from; None for one that never was one.

    Returns:
        As `publish_artifact`.
    """

    def fill(staged: Path) -> None:
        facts: dict[str, Any] = {"optimizer": {}, "settings": {}, "ids": None, "module": describe_module(module)}
        if manifest is not None:
            facts |= {key: manifest.contents[key] for key in facts if key in manifest.contents}
        left_out = 0
        if manifest is not None and isinstance(path, StoredPath | ReducedPath):
            left_out = _write_stored(staged, path, manifest)
        else:
            _write_held(staged, path)
            publish_tensors(staged / CONSTANTS, constants(module), {"format": "pt"})
        if manifest is not None and isinstance(before := manifest.contents.get("left_out"), int):
            left_out += before
        write_text(staged / README, _card(len(path), left_out))
        if left_out:
            facts["left_out"] = left_out
        seal(staged, {**facts, "chords": [chord_name(i) for i in range(len(path))]})

    return publish_artifact(out, fill)


def _write_held(staged: Path, path: ChordPath) -> None:
    node: Node | None = None
    for index, chord in enumerate(path):
        node = write_packed(staged, chord.held(), node, index == len(path) - 1)


def _write_stored(staged: Path, path: StoredPath | ReducedPath, manifest: Manifest) -> int:
    """Files of an artifact as they are, but for the chords that lose examples; the number of examples lost."""
    copied = [CONSTANTS]
    gone: set[int] = set()
    if isinstance(path, ReducedPath):
        for index, (chord, kept) in enumerate(zip(path, path.examples, strict=True)):
            ids = [found[torch.isin(found, path.gone)] for found, _ in path.whole.examples[index].influences()]
            lost = torch.cat([*ids, torch.zeros(0, dtype=torch.long)])
            write_reduced(staged, path.whole.files[index], chord, kept, path.gone)
            gone.update(lost.tolist())
    else:
        copied += [*manifest.contents["chords"], *([METRICS] if METRICS in manifest.files else [])]
    for name in copied:
        _copy(manifest.files[name], staged / name)
    return len(gone)


def _copy(source: CheckedFile, target: Path) -> None:
    """A file whose every chunk is checked on the way."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            for start in range(0, source.size, CHUNK):
                out.write(source.read(start, min(start + CHUNK, source.size)))

    publish(target, write)


def _card(chords: int, left_out: int) -> str:
    lines = ["# Kernel machine", "", f"Path kernel of a network, in {chords} chords; saved from a loaded machine."]
    if left_out:
        lines += [
            "",
            f"{left_out} training examples were taken out: their rows and names are not in it. What the network "
            "learned from them is still in its weights, and in the ledger's `unattributed`.",
        ]
    return "\n".join([*lines, "", "Load it with `lightning_pathkernel.KernelMachine.load(directory, module)`.", ""])
