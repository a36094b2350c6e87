"""A safetensors file, read by ourselves: nothing is allocated that its header does not account for byte by byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.store.checked_file import CheckedFile
from lightning_pathkernel.store.errors import ArtifactError
from lightning_pathkernel.store.strict_json import TEXT_LIMIT, parse_json

__all__ = ["TensorEntry", "TensorFile"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DIMENSIONS = 16
_EMPTY_LIMIT = 1 << 24
"""A dimension of a tensor without elements: it takes no bytes, but whoever loops over it takes time."""
_NAME_LIMIT = 1024


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is in its file, and what it is.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        start: Its first byte, from the beginning of the file.
        stop: The byte behind its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The header of a safetensors file, checked, and its tensors, read when they are asked for.

    Args:
        file: The file.

    Attributes:
        entries: Name -> where it is.
        metadata: The strings beside the tensors.

    Raises:
        ArtifactError: If it is no such file.
    """

    def __init__(self, file: CheckedFile) -> None:
        self.file = file
        try:
            self.entries, self.metadata = _header(file)
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            raise ArtifactError(f"{file.name}: cannot be read as safetensors: {error}", file.name) from error

    @property
    def name(self) -> str:
        """The file's name."""
        return self.file.name

    def groups(self) -> dict[str, list[str]]:
        """Group -> names within it, of tensors stored as ``group/name``."""
        out: dict[str, list[str]] = {}
        for full in self.entries:
            group, _, name = full.partition("/")
            out.setdefault(group, []).append(name)
        return out

    def get(self, name: str) -> Tensor:
        """A tensor, copied from the file.

        Args:
            name: Its name.

        Returns:
            The tensor.

        Raises:
            ArtifactError: If a chunk that holds some of it is damaged, or a truth value is neither 0 nor 1.
        """
        entry = self.entries[name]
        return self._tensor(entry, entry.start, entry.stop, entry.shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``[first, last)`` of a tensor, copied from the file.

        Args:
            name: Its name; it has at least one dimension.
            first: First row.
            last: The one behind the last.

        Returns:
            The rows.
        """
        entry = self.entries[name]
        stride = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        shape = (last - first, *entry.shape[1:])
        return self._tensor(entry, entry.start + first * stride, entry.start + last * stride, shape)

    def _tensor(self, entry: TensorEntry, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        data = self.file.read(start, stop)
        if not data:
            return torch.zeros(shape, dtype=entry.dtype)
        if entry.dtype is torch.bool and max(data) > 1:
            raise ArtifactError(f"{self.name}: a truth value that is neither 0 nor 1")
        return torch.frombuffer(data, dtype=entry.dtype).reshape(shape)


def _header(file: CheckedFile) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if file.size < 8:
        raise ValueError(f"{file.size} bytes, too short for a header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > TEXT_LIMIT:
        raise ArtifactError(f"{file.name}: header of {length} bytes, at most {TEXT_LIMIT} are accepted")
    data_start = 8 + length
    if data_start > file.size:
        raise ValueError(f"a header of {length} bytes in a file of {file.size}: truncated or altered")
    header = parse_json(bytes(file.read(8, data_start)))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are no strings by name")
    entries = {name: _entry(name, facts, data_start) for name, facts in header.items()}
    at = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ValueError(f"{name[:80]!r} begins at byte {entry.start}, not at {at}: tensors overlap or leave a gap")
        at = entry.stop
    if at != file.size:
        raise ValueError(f"tensors end at byte {at} of {file.size}: truncated or altered")
    return entries, metadata


def _entry(name: str, facts: Any, data_start: int) -> TensorEntry:
    if len(name) > _NAME_LIMIT:
        raise ValueError(f"a name of {len(name)} characters, at most {_NAME_LIMIT} are accepted")
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} has not a dtype, a shape and data_offsets")
    code, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{name[:80]!r} is of dtype {str(code)[:20]!r}, expected one of {', '.join(_DTYPES)}")
    if not _counts(shape) or len(shape) > _DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has a shape or offsets that are no lists of counts")
    dtype, numbers = _DTYPES[code], math.prod(shape)
    if not numbers and max(shape) > _EMPTY_LIMIT:
        raise ValueError(f"{name[:80]!r} has no elements and a dimension of {max(shape)}")
    start, stop = offsets
    if stop - start != numbers * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} of shape {shape} takes {numbers * dtype.itemsize} bytes, not {stop - start}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
