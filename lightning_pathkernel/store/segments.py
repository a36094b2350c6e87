"""Segments: immutable safetensors files of which each knows its run, its place, its checksum and the one before it.

The library that reads them (safetensors) checks nothing of what it reads. A segment therefore carries a CRC32C of
every one of its bytes, the digits of the CRC itself taken as zeros, and the sha256 of the segment before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.publish import publish

__all__ = ["FORMAT_OF_SEGMENTS", "Groups", "Segment", "SegmentHeader", "read_segment", "segment_name", "write_segment"]

Groups = Mapping[str, Mapping[str, Tensor]]
"""Group -> name -> tensor."""
FORMAT_OF_SEGMENTS = "lightning_pathkernel.recording"
_VERSION = "1.0"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_HEADER_LIMIT = 16 << 20
_PIECE = 1 << 20
_OPENING = b'{"__metadata__":{"crc32c":"'
_CRC_AT = 8 + len(_OPENING)
_FIELDS = ("run_id", "rank", "kind", "index", "first_step", "last_step", "configuration", "previous")


@dataclass(frozen=True)
class SegmentHeader:
    """What a segment says of itself.

    Attributes:
        run_id: The recording's.
        rank: The process that wrote it.
        kind: ``begin``, ``chord``, ``end`` or ``open``.
        index: Its number, from 0 on.
        first_step: Optimiser steps made before what it holds.
        last_step: Optimiser steps made after it.
        configuration: sha256 of the recording's configuration.
        previous: sha256 of the segment before it; of ``recording.json`` for the first.
        facts: Further JSON-able facts.
    """

    run_id: str
    rank: int
    kind: str
    index: int
    first_step: int
    last_step: int
    configuration: str
    previous: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A segment that was read and found whole.

    Attributes:
        header: What it says of itself.
        sha256: Of the file.
        groups: Its tensors, by group and name.
    """

    header: SegmentHeader
    sha256: str
    groups: dict[str, dict[str, Tensor]]


def segment_name(kind: str, index: int) -> str:
    """File name: ``open-NNNNNN`` for the state of an open chord, ``segment-NNNNNN`` for a link of the chain."""
    return f"{'open' if kind == 'open' else 'segment'}-{index:06d}.safetensors"


def write_segment(directory: Path, header: SegmentHeader, groups: Groups) -> str:
    """Publish a segment; nothing is overwritten.

    Args:
        directory: Where.
        header: What it says of itself.
        groups: Its tensors, on the CPU.

    Returns:
        The sha256 of the file.

    Raises:
        OSError: If the file system fails; then nothing is left behind.
    """
    tensors = {f"{group}/{name}": t.detach() for group, named in groups.items() for name, t in named.items()}
    # the widest numbers first, as safetensors does it: every tensor is aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    opening = _opening(header, ordered)
    payload = [_bytes(t).data for _, t in ordered if t.numel()]
    crc = google_crc32c.value(opening)
    for part in payload:
        crc = _extended(crc, part)
    opening = opening[:_CRC_AT] + f"{crc:08x}".encode() + opening[_CRC_AT + 8 :]
    digest = hashlib.sha256()

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            parts: list[bytes | memoryview] = [opening, *payload]
            for part in parts:
                file.write(part)
                digest.update(part)

    publish(directory / segment_name(header.kind, header.index), write)
    return digest.hexdigest()


def _opening(header: SegmentHeader, tensors: list[tuple[str, Tensor]]) -> bytes:
    """Length and header of the file, with zeros in the place of the CRC."""
    said = {**{k: str(v) for k, v in asdict(header).items() if k in _FIELDS}}
    said |= {"format": FORMAT_OF_SEGMENTS, "version": _VERSION, "facts": json.dumps(dict(header.facts), sort_keys=True)}
    entries: dict[str, Any] = {"__metadata__": {"crc32c": "0" * 8, **dict(sorted(said.items()))}}
    at = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    flat = tensor.to("cpu").contiguous().reshape(-1)
    found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return found


def _extended(crc: int, part: memoryview) -> int:
    # google_crc32c takes nothing but bytes: in pieces, so that no second copy of a large tensor is made
    for start in range(0, len(part), _PIECE):
        crc = google_crc32c.extend(crc, bytes(part[start : start + _PIECE]))
    return crc


def read_segment(path: Path) -> Segment:
    """Read a segment and check every byte of it.

    Args:
        path: The file.

    Returns:
        The segment, its tensors on the CPU.

    Raises:
        ArtifactError: Naming the file, if it is missing, truncated, altered or no segment.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{_called(path)} cannot be read: {error}") from error
    metadata = _metadata(path, data)
    tensors = _tensors(path, data)
    try:
        facts = json.loads(metadata["facts"])
        numbers = {name: int(metadata[name]) for name in ("rank", "index", "first_step", "last_step")}
        words = {name: str(metadata[name]) for name in ("run_id", "kind", "configuration", "previous")}
        header = SegmentHeader(**words, **numbers, facts=facts)  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{_called(path)}: its header lacks what a segment says of itself: {error!r}") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors:
        group, _, name = full.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return Segment(header, hashlib.sha256(data).hexdigest(), groups)


def _called(path: Path) -> str:
    """A segment's rank and name: there is one of the same name in every rank."""
    return f"{path.parent.name}/{path.name}"


def _metadata(path: Path, data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < _CRC_AT + 8 or length > min(_HEADER_LIMIT, len(data) - 8) or data[8:_CRC_AT] != _OPENING:
        raise ArtifactError(f"{_called(path)}: {len(data)} bytes that are no segment: truncated or altered")
    said = data[_CRC_AT : _CRC_AT + 8]
    crc = google_crc32c.value(data[:_CRC_AT] + b"0" * 8 + data[_CRC_AT + 8 : 8 + length])
    crc = _extended(crc, memoryview(data)[8 + length :])
    if said != f"{crc:08x}".encode():
        expected = said.decode("ascii", "replace")
        raise ArtifactError(f"{_called(path)}: its CRC32C is {crc:08x}, {expected} expected: truncated or altered")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        known = metadata["format"] == FORMAT_OF_SEGMENTS and metadata["version"].split(".")[0] == _VERSION.split(".")[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{_called(path)}: its header cannot be read: {error!r}") from error
    if not known:
        raise ArtifactError(
            f"{_called(path)}: format {metadata['format']!r} {metadata.get('version')!r}, this version reads "
            f"{FORMAT_OF_SEGMENTS!r} {_VERSION.split('.')[0]}.x"
        )
    return dict(metadata)


def _tensors(path: Path, data: bytes) -> Iterator[tuple[str, Tensor]]:
    try:
        return iter(load(data).items())
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, KeyError) as error:
        raise ArtifactError(f"{_called(path)}: its tensors cannot be read: {error}") from error
