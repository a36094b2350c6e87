"""The open chord's rows: first-stage sketches of per-example gradients, visit by visit.

Where a layer has one position per example a gradient is an outer product, and so is its sketch. The two thin factors
are kept until the chord closes: less work in every step, and fewer bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient
from lightning_pathkernel.recording.arena import Arena, Slot
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = [
    "CarriedRows",
    "RecordedStep",
    "Rows",
    "Sketches",
    "StepRows",
    "features_of",
    "split",
    "summed",
    "visited",
]

Sketches = Mapping[str, KroneckerSketch]


class Rows(Protocol):
    """Visits of some examples, with the features of their gradients."""

    @property
    def ids(self) -> Tensor:
        """Training examples, ``[n]``."""
        ...

    @property
    def layout(self) -> object:
        """What the rows of several steps must have in common to be taken together."""
        ...

    def features(self, sketches: Sketches) -> Tensor:
        """All features, ``[n, F]``; 0 for parameters that were not reached."""
        ...


class RecordedStep(NamedTuple):
    """One optimiser step: its visits, and what their gradients were multiplied with before they were received."""

    parts: Sequence[Rows]
    coefficient: float = 1.0


class StepRows:
    """Visits whose gradients came in one backward pass.

    Every matrix taken in is written to a slot of the arena. Gradients of parameters whose sketch is not known yet are
    held back whole until `settle`.

    Args:
        ids: Training examples, ``[n]``; or where the arena keeps them.
        arena: Where what is taken in is kept.
        room: Numbers that are expected, asked of the arena at once.

    Attributes:
        held: Parameter -> gradients held back.
    """

    __slots__ = ("_arena", "_at", "_block", "_end", "_ids", "_last", "_room", "_slots", "_uses", "held")

    def __init__(self, ids: Tensor | Slot, arena: Arena, room: int = 0) -> None:
        self._ids: Tensor | Slot = ids
        self._arena = arena
        self._room = room
        self._block: Tensor | None = None
        self._at = self._end = 0
        self._slots: list[Slot] = []
        self._uses: list[tuple[str, tuple[int, ...]]] = []
        self._last: tuple[Tensor, Tensor | None, int] | None = None
        self.held: dict[str, list[PerExampleGradient]] = {}

    @property
    def ids(self) -> Tensor:
        """Training examples, ``[n]``."""
        return self._ids.view()[:, 0] if isinstance(self._ids, Slot) else self._ids

    @property
    def empty(self) -> bool:
        """Whether nothing was taken in or held back."""
        return not (self._uses or self.held)

    def names(self) -> set[str]:
        """Parameters whose gradients were taken in or are held back."""
        return {name for name, _ in self._uses} | self.held.keys()

    def add(self, name: str, sketch: KroneckerSketch, gradient: PerExampleGradient) -> None:
        """Take in one use of one parameter: its features, or the two factors of them."""
        factors = gradient.factors()
        if factors is None:
            features = gradient.project(sketch.train_left, sketch.train_right)
            slot = self._slot(features.shape[0], features.shape[1] * features.shape[2], features)
            slot.view(features.shape).copy_(features)
            self._uses.append((name, (len(self._slots) - 1,)))
            return
        left, right = factors
        by_left, by_right = sketch.train_transposed
        # a weight and its bias have the same left factor, and under a common basis the same product
        if self._last is None or self._last[0] is not left or self._last[1] is not sketch.train_left:
            self._last = (left, sketch.train_left, self._product(left, by_left))
        at = self._last[2]
        self._uses.append((name, (at,) if right is None else (at, self._product(right, by_right))))

    def _product(self, rows: Tensor, transposed: Tensor | None) -> int:
        n, width = rows.shape
        if transposed is None:
            self._slot(n, width, rows).copy_(rows)
        else:
            torch.mm(rows, transposed, out=self._slot(n, transposed.shape[1], rows))
        return len(self._slots) - 1

    def _slot(self, n: int, width: int, like: Tensor) -> Tensor:
        """The matrix of a new slot."""
        start, size, block = self._at, n * width, self._block
        if block is None or start + size > self._end or block.dtype is not like.dtype:
            whole = self._arena.new(1, max(self._room, size), like)
            block, start, self._end = whole.block, whole.start, whole.start + whole.k
            self._block, self._room = block, 0
        self._at = start + size
        slot = Slot(block, start, n, width)
        self._slots.append(slot)
        return slot.view()

    def close(self) -> None:
        """Nothing more is taken in for now: hold on to no tensor, only to what the arena keeps."""
        if self._slots and not isinstance(self._ids, Slot):
            self._ids = self._arena.keep(self._ids)
        self._last = None
        self._block = None

    def settle(self, sketches: Sketches, names: Sequence[str]) -> None:
        """Take in what was held back of these parameters."""
        for name in names:
            for use in self.held.pop(name, ()):
                self.add(name, sketches[name], use)
        self.close()

    def move(self, arena: Arena) -> None:
        """Keep everything in another arena from now on."""
        if arena is self._arena:
            return
        self._slots = [_moved(slot, arena) for slot in self._slots]
        if isinstance(self._ids, Slot):
            self._ids = _moved(self._ids, arena)
        self._arena = arena

    def first_total(self) -> float:
        """The sum of what the backward pass brought first, finite only if every number of it is; 0 if there is none."""
        return float(self._slots[0].view().sum()) if self._slots else 0.0

    def numbers(self) -> int:
        """Numbers kept."""
        return sum(slot.n * slot.k for slot in self._slots)

    @property
    def layout(self) -> object:
        """What two backward passes must have in common for `features_of` to take them together."""
        return self._uses, [(slot.n, slot.k, slot.block.dtype) for slot in self._slots], isinstance(self._ids, Slot)

    def features(self, sketches: Sketches) -> Tensor:
        """All features of closed rows, ``[n, F]``."""
        return features_of([self], sketches)


def features_of(parts: Sequence[StepRows], sketches: Sketches) -> Tensor:
    """All features of closed rows of one layout, one after the other, ``[s * n, F]``."""
    first = parts[0]
    matrices = [torch.cat([part._slots[at].view() for part in parts]) for at in range(len(first._slots))]
    found: dict[str, Tensor] = {}
    for name, use in first._uses:
        part = _outer([matrices[at] for at in use])
        found[name] = found[name] + part if name in found else part
    return _joined(found, sketches, len(parts) * len(first.ids), matrices[0] if matrices else None)


class CarriedRows:
    """Visits of an earlier chord that a momentum buffer still holds.

    Args:
        ids: Training examples, ``[n]``.
        parts: Parameter -> features ``[n, k]`` in the basis that is the parameter's at the moment.
    """

    def __init__(self, ids: Tensor, parts: dict[str, Tensor]) -> None:
        self._ids = ids
        self.parts = parts

    @property
    def ids(self) -> Tensor:
        """Training examples, ``[n]``."""
        return self._ids

    @property
    def layout(self) -> object:
        """What the rows of two steps must have in common to be taken together.

        Returns:
            Something to compare.
        """
        return len(self._ids), list(self.parts)

    def features(self, sketches: Sketches) -> Tensor:
        """All features, ``[n, F]``."""
        return _joined(self.parts, sketches, len(self._ids), next(iter(self.parts.values()), None))


def _moved(slot: Slot, arena: Arena) -> Slot:
    view = slot.view()
    moved = arena.new(slot.n, slot.k, view)
    moved.view().copy_(view)
    return moved


def _joined(found: Mapping[str, Tensor], sketches: Sketches, n: int, like: Tensor | None) -> Tensor:
    like = torch.zeros(()) if like is None else like
    columns = [found[name] if name in found else like.new_zeros(n, s.features) for name, s in sketches.items()]
    return torch.cat([like.new_zeros(n, 0), *columns], dim=1)


def _outer(factors: list[Tensor]) -> Tensor:
    if len(factors) == 1:
        return factors[0]
    left, right = factors
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def split(features: Tensor, sketches: Sketches) -> dict[str, Tensor]:
    """Features ``[*, F]`` by parameter."""
    sizes = [sketch.features for sketch in sketches.values()]
    return dict(zip(sketches, features.split(sizes, dim=-1), strict=True))


def visited(steps: Sequence[RecordedStep]) -> Tensor:
    """Ids of the examples that were visited, sorted, ``[V]``."""
    found = [part.ids for step in steps for part in step.parts]
    return torch.unique(torch.cat(found)) if found else torch.zeros(0, dtype=torch.long)


def summed(ids: Tensor, rows: Iterator[tuple[Tensor, Tensor]], width: tuple[int, ...], like: Tensor) -> Tensor:
    """Rows added up by example; memory grows with the examples, not with the visits.

    Args:
        ids: Sorted ids, ``[V]``.
        rows: Ids ``[n]`` and rows ``[n, *width]``.
        width: Shape of a row.
        like: Gives dtype and device.

    Returns:
        The sums, ``[V, *width]``.
    """
    out = like.new_zeros(len(ids), *width)
    for found, values in rows:
        out.index_add_(0, torch.searchsorted(ids, found).to(out.device), values.to(out))
    return out
