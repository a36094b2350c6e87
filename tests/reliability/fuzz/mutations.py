"""Changes of inputs that keep some of their form: bytes, JSON values, and headers of safetensors."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

__all__ = ["mutated"]

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, -(2**63), 1.5, 1e308, "", "x", "F32", "../x", "a\0b",
    "\ud800", [], {}, [0], [0, 0], [1, 2, 3], [2**62, 2**62], [10**9, 0], [[]], {"x": 1}, "F33", "I8", "BOOL", [4, 0],
    [0, 8],
)  # fmt: skip
_LIMIT = 1 << 16


def mutated(data: bytes, rng: random.Random) -> bytes:
    """An input like this one.

    Args:
        data: The input.
        rng: Decides.

    Returns:
        The other one, of 64 KiB at most.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice((_bytes, _json, _header, _header, _header_text))(data, rng)
    return data[:_LIMIT]


def _bytes(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    kind, at = rng.randrange(6), rng.randrange(len(found) + 1)
    if kind == 0 and at < len(found):
        found[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        found[at:at] = rng.randbytes(rng.randint(1, 8))
    elif kind == 2:
        del found[at : at + rng.randint(1, 16)]
    elif kind == 3:
        del found[at:]
    elif kind == 4:
        found[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, struct.pack("<q", rng.choice((1, -1, 1 << 62)))))
    else:
        start = rng.randrange(len(found) + 1)
        found[at:at] = found[start : start + rng.randint(1, 64)]
    return bytes(found)


def _json(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON text is another one, missing, or there twice."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    return _text(_changed(tree, rng))


def _text(tree: Any) -> bytes:
    try:
        return json.dumps(tree, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"{}"


def _changed(tree: Any, rng: random.Random) -> Any:
    holders = [node for node in _nodes(tree) if node]
    if not holders:
        return rng.choice(_VALUES)
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((1, -1, 4, -4, 256))
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(("x", "start/x", "rows/rows", "../x", "__metadata__", str(key) + "x"))] = holder[key]
    elif kind == 3:
        holder[key] = rng.choice(holders) if rng.random() < 0.2 else rng.choice(_VALUES)
    else:
        holder[key] = rng.choice(_VALUES)
    return tree


def _nodes(tree: Any, depth: int = 8) -> list[Any]:
    inner = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    found = [tree] if isinstance(tree, dict | list) else []
    if depth:
        for node in inner[:64]:
            found += _nodes(node, depth - 1)
    return found


def _split(data: bytes) -> tuple[Any, bytes] | None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        return None
    try:
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, RecursionError):
        return None


def _header(data: bytes, rng: random.Random) -> bytes:
    """A value of a safetensors header is another one; its length fits."""
    parts = _split(data)
    if parts is None:
        return _json(data, rng)
    header, rest = parts
    facts = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if isinstance(facts, dict) and isinstance(facts.get("facts"), str) and rng.random() < 0.4:
        facts["facts"] = _json(facts["facts"].encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    else:
        header = _changed(header, rng)
    text = _text(header)
    return struct.pack("<Q", len(text)) + text + rest


def _header_text(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a safetensors header are others; its length fits. Or bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        return _bytes(data, rng)
    text, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        text = _bytes(text, rng)
    else:
        rest = _bytes(rest, rng)
    return struct.pack("<Q", len(text)) + text + rest
