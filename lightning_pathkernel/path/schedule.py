"""Where the nodes of a path lie."""

from __future__ import annotations

__all__ = ["node_schedule"]


def node_schedule(total_steps: int, chords: int, power: float = 2.0) -> list[int]:
    """Nodes denser at the start, at ``total_steps * (c / chords) ** power``.

    Args:
        total_steps: Optimiser steps of the whole path.
        chords: Chords wanted; there are never more than steps.
        power: 1 for even spacing; larger for more nodes early on.

    Returns:
        Rising steps, the first 0 and the last ``total_steps``.

    Raises:
        ValueError: If a number is not positive.
    """
    if total_steps < 1 or chords < 1 or power <= 0:
        raise ValueError(f"total_steps, chords and power must be positive, found {total_steps}, {chords} and {power}")
    count = min(chords, total_steps)
    nodes = [0]
    for c in range(1, count):
        wanted = round(total_steps * (c / count) ** power)
        nodes.append(min(max(wanted, nodes[-1] + 1), total_steps - (count - c)))
    return [*nodes, total_steps]
