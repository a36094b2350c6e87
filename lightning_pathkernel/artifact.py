"""Reading an artifact back: a private module with its constants, and the chords of its path."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path

from torch import nn

from lightning_pathkernel.fingerprint import check_module, check_state, load_constants
from lightning_pathkernel.names import merge_names
from lightning_pathkernel.network import detached_copy
from lightning_pathkernel.store import (
    CONSTANTS,
    LocalCopy,
    Manifest,
    TensorFile,
    download,
    is_url,
    read_manifest,
    tensors_of,
)
from lightning_pathkernel.stored_path import StoredPath

__all__ = ["read_machine"]

_SMALL = 64 << 20
"""An artifact of no more bytes is read through when it is loaded, so that all that is wrong with it shows then."""


def read_machine(
    path: str | Path, module: nn.Module, expected_sha256: str | None = None
) -> tuple[nn.Module, StoredPath, Manifest]:
    """Read what a kernel machine is made of.

    Args:
        path: The artifact's directory, or an fsspec URL of one.
        module: A module of the architecture that was trained; left as it is.
        expected_sha256: As in `KernelMachine.load`.

    Returns:
        A copy of the module with the artifact's constants, the chords in the order of training, and the manifest.

    Raises:
        ArtifactError: If the artifact is damaged, of another format or not of this module.
    """
    copy_here = download(str(path)) if is_url(path) else LocalCopy(Path(path))
    try:
        return _read(copy_here, module, expected_sha256)
    except BaseException:
        copy_here.delete()
        raise


def _read(
    copy_here: LocalCopy, module: nn.Module, expected_sha256: str | None
) -> tuple[nn.Module, StoredPath, Manifest]:
    manifest = read_manifest(copy_here.path, expected_sha256)
    if expected_sha256 is not None:
        manifest.verify()
    described = manifest.contents["module"]
    check_module(module, described)
    private = detached_copy(module)
    for name, parameter in private.named_parameters():
        parameter.requires_grad_(described["parameters"][name]["trainable"])
    load_constants(private, tensors_of(TensorFile(manifest.files[CONSTANTS]))[0])
    stored = StoredPath([manifest.files[name] for name in manifest.contents["chords"]], copy_here)
    for file in stored.files:
        check_state(private, _state(file, "start", "start_buffers", "end", "end_buffers"), whole=False)
    starts = [_state(file, "start") for file in stored.files]
    check_state(private, {**_state(stored.files[0], "start_buffers"), **dict(ChainMap(*starts))})
    if sum(file.size for file in manifest.files.values()) <= _SMALL:
        _read_through(stored)
    return private, stored, manifest


def _state(file: TensorFile, *groups: str) -> dict[str, tuple[tuple[int, ...], object]]:
    """Shape and dtype of every tensor of some groups."""
    split = {full: full.partition("/") for full in file.entries}
    found = {name: file.entries[full] for full, (group, _, name) in split.items() if group in groups}
    return {name: (entry.shape, entry.dtype) for name, entry in found.items()}


def _read_through(stored: StoredPath) -> None:
    merge_names(stored.names())
    for chord in stored:
        for _ in chord.examples.influences():
            pass
