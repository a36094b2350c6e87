"""Chords as safetensors files: one immutable file per chord, self-describing, checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_pathkernel.store.checked_file import CheckedFile
from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.publish import publish_tensors
from lightning_pathkernel.store.strict_json import parse_json
from lightning_pathkernel.store.tensor_file import TensorFile

__all__ = ["facts_of", "read_group", "read_tensors", "tensors_of", "write_group"]


def write_group(path: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]) -> Path:
    """Publish named groups of tensors, stored as ``group/name``, with JSON-able facts beside them."""
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    return publish_tensors(path, tensors, {"facts": json.dumps(dict(facts), sort_keys=True)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        Name -> tensor, and the metadata.

    Raises:
        ArtifactError: If the file is missing, truncated or not such a file.
    """
    return tensors_of(TensorFile(CheckedFile(path)))


def tensors_of(stored: TensorFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file that is open; its map is given up."""
    try:
        return {name: stored.get(name) for name in stored.entries}, stored.metadata
    finally:
        stored.file.close()


def read_group(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """What `write_group` wrote.

    Args:
        path: The file.

    Returns:
        Group -> name -> tensor, and the facts.

    Raises:
        ArtifactError: If the file is not one of ours.
    """
    stored = TensorFile(CheckedFile(path))
    facts = facts_of(stored)
    groups: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors_of(stored)[0].items():
        group, _, name = full.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, facts


def facts_of(stored: TensorFile) -> dict[str, Any]:
    """The facts beside the tensors of a file that `write_group` wrote.

    Args:
        stored: The file.

    Returns:
        The facts.

    Raises:
        ArtifactError: If there are none, or they are no JSON object.
    """
    try:
        facts = parse_json(stored.metadata["facts"].encode("utf-8"))
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{stored.name}: no readable facts in the header: {error!r}") from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{stored.name}: the facts in the header are no JSON object")
    return facts
