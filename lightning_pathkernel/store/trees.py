"""Trees of plain values and tensors, to and from one group of tensors.

A tensor that stands in several places is stored once and is one tensor again afterwards; its strides come back too, and
where it lay relative to 64 bytes, for products of the same numbers in another layout may differ in their last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack_tree", "unpack_tree"]

_TREE = "tree"
_ALIGNED = 64


def pack_tree(tree: Any) -> dict[str, Tensor]:
    """A tree as named tensors.

    Args:
        tree: Dictionaries with string keys, lists, tuples, strings, numbers, booleans, None and tensors.

    Returns:
        Name -> tensor: the tensors by number, and ``tree``, UTF-8 JSON of all the rest. Nothing is copied that need
        not be.

    Raises:
        TypeError: If something else is in it.
    """
    found: dict[int, int] = {}
    tensors: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in found:
                found[id(value)] = len(tensors)
                tensors.append(value)
            return {"t": found[id(value)]}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise TypeError("a tree's keys are strings")
            return {"d": [[key, plain(each)] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"f": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a tree has no {type(value).__name__}")

    body = plain(tree)
    text = json.dumps({"tree": body, "layouts": [_layout(t) for t in tensors]}, separators=(",", ":"))
    named = {str(i): t.detach() for i, t in enumerate(tensors)}
    return {**named, _TREE: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def _layout(tensor: Tensor) -> list[Any]:
    """Strides and place of a tensor, empty where it is contiguous and aligned; and whether it is on a device."""
    per = max(1, _ALIGNED // max(tensor.element_size(), 1))
    offset = tensor.storage_offset() % per
    strides = [] if tensor.is_contiguous() and not offset else list(tensor.stride())
    return [strides, offset, tensor.device.type != "cpu"]


def unpack_tree(tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """What `pack_tree` was given; tuples have become lists.

    Args:
        tensors: What it made of it.
        device: Where tensors go that were on a device.

    Returns:
        The tree.

    Raises:
        ValueError: If it is malformed.
    """
    try:
        stored = json.loads(bytes(tensors[_TREE].numpy().tobytes()).decode())
        made = [_laid_out(tensors[str(i)], layout, device) for i, layout in enumerate(stored["layouts"])]
        return _grown(stored["tree"], made)
    except (KeyError, TypeError, IndexError, RecursionError, RuntimeError) as error:
        raise ValueError(f"malformed tree: {error!r}") from error


def _grown(value: Any, made: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [_grown(each, made) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "t":
        return made[inner]
    return float(inner) if kind == "f" else {key: _grown(each, made) for key, each in inner}


def _laid_out(stored: Tensor, layout: list[Any], device: torch.device | str) -> Tensor:
    strides, offset, on_device = layout
    where = device if on_device else "cpu"
    if not strides or not stored.numel():
        return stored.to(where, copy=True)
    extent = 1 + sum((n - 1) * step for n, step in zip(stored.shape, strides, strict=True))
    if 0 in strides or extent > 64 * stored.numel() or offset >= _ALIGNED:
        return stored.to(where, copy=True)
    room = torch.empty(offset + extent, dtype=stored.dtype, device=where)
    return room.as_strided(stored.shape, strides, offset).copy_(stored)
