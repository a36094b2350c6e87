"""JSON that somebody else wrote: its size, depth and number of values are known before a parser builds anything."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["DEPTH_LIMIT", "MARK_LIMIT", "TEXT_LIMIT", "parse_json"]

TEXT_LIMIT = 16 << 20
"""Bytes of a JSON text."""
MARK_LIMIT = 1 << 19
"""Brackets, braces, commas, colons, quotes and backslashes in it, those within strings too."""
DEPTH_LIMIT = 32
"""Arrays and objects within one another."""

_MARKS = b'[]{},:"\\'
_OTHERS = bytes(b for b in range(256) if b not in _MARKS)
_NO_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def parse_json(data: bytes) -> Any:
    """Parse strict JSON (RFC 8259), UTF-8.

    Args:
        data: The text.

    Returns:
        What it says.

    Raises:
        ValueError: If it is none, too large or nested too deeply, names a key twice in an object, or has a number that
            is not finite.
    """
    if len(data) > TEXT_LIMIT:
        raise ValueError(f"{len(data)} bytes of JSON, at most {TEXT_LIMIT} are accepted")
    marks = data.translate(None, _OTHERS)
    if len(marks) > MARK_LIMIT:
        raise ValueError(f"JSON with {len(marks)} marks, at most {MARK_LIMIT} are accepted")
    if marks.count(b"[") + marks.count(b"{") > DEPTH_LIMIT:
        _check_depth(data)
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_table, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _check_depth(data: bytes) -> None:
    depth = 0
    for mark in _STRING.sub(b"", data).translate(None, _NO_BRACKETS):
        depth += 1 if mark in b"[{" else -1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"JSON nested more than {DEPTH_LIMIT} deep")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond double precision")
    return value
