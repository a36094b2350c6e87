"""Chords as safetensors files: one immutable file per chord, self-describing, checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.publish import publish_tensors

__all__ = ["read_group", "read_tensors", "write_group"]

_HEADER_LIMIT = 16 << 20


def write_group(path: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]) -> Path:
    """Publish named groups of tensors, stored as ``group/name``, with JSON-able facts beside them."""
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    return publish_tensors(path, tensors, {"facts": json.dumps(dict(facts), sort_keys=True)})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its header's size checked; every way in which it may fail to be one is an `ArtifactError`."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _HEADER_LIMIT:
            raise ArtifactError(f"{path.name}: header of {header} bytes, at most {_HEADER_LIMIT} are accepted")
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            yield handle
    except ArtifactError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ArtifactError(f"{path.name}: cannot be read as safetensors: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        ArtifactError: If the file is missing, truncated or not such a file.
    """
    with _opened(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def read_group(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """What `write_group` wrote.

    Args:
        path: The file.

    Returns:
        Group -> name -> tensor, and the facts.

    Raises:
        ArtifactError: If the file is not one of ours.
    """
    tensors, metadata = read_tensors(path)
    try:
        facts = json.loads(metadata["facts"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: no readable facts in the header") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        group, _, name = full.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, facts
