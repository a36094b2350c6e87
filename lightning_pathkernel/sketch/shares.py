"""How many directions each side of each parameter keeps: features go where the energy is.

For one parameter the inner products of its gradients have a mean square near ``sum_ij l_i r_j``, with ``l`` and ``r``
the energies of the directions of its two sides, so that a sketch of ``a x b`` features keeps about
``(l_1 + .. + l_a) (r_1 + .. + r_b)`` of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SideEnergies", "share_out"]


@dataclass(frozen=True)
class SideEnergies:
    """What the directions of one parameter count; `fit_sketches` takes fourth roots of energies.

    Attributes:
        left: Of each direction of its rows, falling.
        right: Of each direction of its columns, falling; products of the two compare between parameters.
        riders: Parameters that keep one more feature for each direction of the rows: a bias.
    """

    left: Sequence[float]
    right: Sequence[float]
    riders: int = 0


class _Widths:
    """The directions that one parameter keeps so far."""

    def __init__(self, energies: SideEnergies) -> None:
        self._energies = energies
        self.at = [1, 1]
        self._sums = [energies.left[0], energies.right[0]]

    @property
    def cost(self) -> int:
        return self.at[0] * (self.at[1] + self._energies.riders)

    def price(self, side: int) -> int:
        """Features that one more direction of a side brings."""
        return self.at[0] if side else self.at[1] + self._energies.riders

    def offers(self) -> list[tuple[float, int]]:
        """Energy gained per feature by one more direction of each side that has one left, and the side."""
        found = []
        for side, values in enumerate((self._energies.left, self._energies.right)):
            if self.at[side] < len(values):
                gain = values[self.at[side]] * self._sums[1 - side]
                found.append((gain / self.price(side), side))
        return found

    def widen(self, side: int) -> None:
        values = (self._energies.left, self._energies.right)[side]
        self._sums[side] += values[self.at[side]]
        self.at[side] += 1


def share_out(parameters: Sequence[SideEnergies], features: int) -> list[tuple[int, int]]:
    """Widths of all parameters' sides, the direction with most energy per feature first.

    Args:
        parameters: Their energies; every parameter keeps one direction of each side at least.
        features: Features in all that are given out.

    Returns:
        For each parameter ``(directions of the rows, directions of the columns)``.
    """
    widths = [_Widths(energies) for energies in parameters]
    cost = sum(each.cost for each in widths)
    heap = [(-gain, index, side, tuple(each.at)) for index, each in enumerate(widths) for gain, side in each.offers()]
    heapq.heapify(heap)
    while heap:
        _, index, side, at = heapq.heappop(heap)
        each = widths[index]
        # stale where the other side has grown since; one that does not fit may leave room for another
        if at != tuple(each.at) or cost + each.price(side) > features:
            continue
        cost += each.price(side)
        each.widen(side)
        for gain, other in each.offers():
            heapq.heappush(heap, (-gain, index, other, tuple(each.at)))
    return [(each.at[0], each.at[1]) for each in widths]
