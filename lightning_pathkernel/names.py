"""String ids of examples, kept beside the integers that stand for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.store import ArtifactError

__all__ = ["decode_names", "encode_names", "merge_names", "names_of"]


def encode_names(names: Mapping[int, str]) -> Tensor:
    """Names as the UTF-8 text of a strict JSON object ``{"id": "name"}``, ids ascending, ``[bytes]`` of uint8."""
    text = json.dumps({str(key): names[key] for key in sorted(names)}, ensure_ascii=False, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)


def decode_names(stored: Tensor) -> dict[int, str]:
    """What `encode_names` made.

    Args:
        stored: The text, ``[bytes]`` of uint8.

    Returns:
        Id -> name.

    Raises:
        ValueError: If it is anything else: no such tensor, no UTF-8, no JSON object, a key that is no 64-bit integer in
            plain decimal or stands there twice, a value that is no string.
    """
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        raise ValueError(f"names of shape {tuple(stored.shape)} and {stored.dtype}, expected one dimension of uint8")
    try:
        found = json.loads(stored.numpy().tobytes().decode("utf-8"), object_pairs_hook=_Pairs)
    except RecursionError as error:
        raise ValueError("names are nested too deeply") from error
    if not isinstance(found, _Pairs):
        raise ValueError(f"names are a JSON {type(found).__name__}, expected an object")
    names: dict[int, str] = {}
    for key, name in found:
        number = int(key)
        if str(number) != key or not -(2**63) <= number < 2**63:
            raise ValueError(f"names have the key {key[:40]!r}, expected a 64-bit integer")
        if not isinstance(name, str):
            raise ValueError(f"the name of {number} is a {type(name).__name__}, expected a string")
        if number in names:
            raise ValueError(f"{number} has two names")
        names[number] = name
    return names


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written, repeated keys and all."""


def merge_names(tables: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """One table of names out of several chords'.

    Args:
        tables: Id -> name, of each chord.

    Returns:
        All of them.

    Raises:
        ArtifactError: If two chords call one id by different names.
    """
    merged: dict[int, str] = {}
    for table in tables:
        for key, name in table.items():
            if merged.setdefault(key, name) != name:
                raise ArtifactError(f"example {key} is called {merged[key]!r} by one chord and {name!r} by another")
    return merged


def names_of(names: Mapping[int, str], ids: Tensor) -> list[Any]:
    """Names of ids, nested as the ids are; the number itself, as text, where there is no name."""
    if ids.dim() > 1:
        return [names_of(names, row) for row in ids]
    return [names.get(key, str(key)) for key in ids.tolist()]
