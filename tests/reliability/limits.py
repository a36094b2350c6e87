"""How long a campaign may take: one that runs out of time reports what it has reached, and another seed goes on."""

from __future__ import annotations

import time

__all__ = ["part_of", "set_minutes", "set_part", "time_left"]

_deadline: list[float] = []
_part = [0, 1]


def set_minutes(minutes: float | None) -> None:
    """Set the time from now on; None for any."""
    _deadline[:] = [] if minutes is None else [time.monotonic() + 60 * minutes]


def time_left() -> bool:
    """Whether a campaign may go on."""
    return not _deadline or time.monotonic() < _deadline[0]


def set_part(text: str) -> None:
    """Set which part of all that there is to try is tried: ``2/3`` is the second of three.

    Args:
        text: The part.

    Raises:
        ValueError: If it is none.
    """
    part, _, parts = text.partition("/")
    if not 1 <= int(part) <= int(parts):
        raise ValueError(f"{text!r} is no part: from 1/1 on")
    _part[:] = [int(part) - 1, int(parts)]


def part_of() -> tuple[int, int]:
    """Number of the part, from 0 on, and of how many."""
    return _part[0], _part[1]
