"""A path as a machine asks it: chord after chord, whether they are in memory or in the files of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.example_rows import ExampleRows
from lightning_pathkernel.ledger import ChordSpan
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["ChordPath", "Chords", "HeldPath", "PathChord", "PlacedChords"]


class PathChord(Protocol):
    """What is asked of a chord; `Chord` explains it."""

    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def first_step(self) -> int: ...  # noqa: D102
    @property
    def last_step(self) -> int: ...  # noqa: D102
    @property
    def learning_time(self) -> float: ...  # noqa: D102
    @property
    def sketches(self) -> Mapping[str, KroneckerSketch]: ...  # noqa: D102
    @property
    def second_stage(self) -> Tensor | None: ...  # noqa: D102
    @property
    def start(self) -> Tensors: ...  # noqa: D102
    @property
    def delta(self) -> Tensors: ...  # noqa: D102
    @property
    def start_buffers(self) -> Tensors: ...  # noqa: D102
    @property
    def end_buffers(self) -> Tensors: ...  # noqa: D102
    @property
    def preconditioner(self) -> Tensors: ...  # noqa: D102
    @property
    def decay(self) -> Tensors: ...  # noqa: D102
    @property
    def residual(self) -> Tensors: ...  # noqa: D102
    @property
    def names(self) -> Mapping[int, str]: ...  # noqa: D102
    @property
    def examples(self) -> ExampleRows: ...  # noqa: D102

    def weights(self, t: float) -> dict[str, Tensor]: ...  # noqa: D102
    def examples_direction(self) -> dict[str, Tensor]: ...  # noqa: D102
    def span(self) -> ChordSpan: ...  # noqa: D102
    def held(self) -> Chord: ...  # noqa: D102
    def to(self, device: torch.device) -> PathChord: ...  # noqa: D102


class Chords(Protocol):
    """Chords in the order of training; going along them may read each of them anew."""

    def __len__(self) -> int:
        """Number of chords."""
        ...

    def __iter__(self) -> Iterator[PathChord]:
        """The chords, one after another."""
        ...


class ChordPath(Chords, Protocol):
    """All that a machine asks of its path."""

    @property
    def examples(self) -> Sequence[ExampleRows]:
        """The examples of each chord."""
        ...

    def names(self) -> Iterator[Mapping[int, str]]:
        """The names that each chord brings."""
        ...

    def without(self, gone: Tensor) -> ChordPath:
        """The path without some examples."""
        ...


class HeldPath:
    """Chords in memory.

    Args:
        chords: The chords.
    """

    def __init__(self, chords: Sequence[Chord]) -> None:
        self.chords = list(chords)
        self.examples: Sequence[ExampleRows] = [chord.examples for chord in self.chords]

    def __len__(self) -> int:
        return len(self.chords)

    def __iter__(self) -> Iterator[PathChord]:
        return iter(self.chords)

    def names(self) -> Iterator[Mapping[int, str]]:
        """The names that each chord brings."""
        return (chord.names for chord in self.chords)

    def without(self, gone: Tensor) -> HeldPath:
        """The path without some examples."""
        return HeldPath([chord.without(gone) for chord in self.chords])


class PlacedChords:
    """Chords that come to the device of the network, one after another, while somebody waits.

    Args:
        path: Where they are.
        device: Where they are asked, all but their examples.
        passed: Called whenever a chord has been dealt with.
    """

    def __init__(self, path: Chords, device: torch.device, passed: Callable[[], object] = lambda: None) -> None:
        self._path, self._device, self._passed = path, device, passed

    def __len__(self) -> int:
        return len(self._path)

    def __iter__(self) -> Iterator[PathChord]:
        for chord in self._path:
            yield chord.to(self._device)
            self._passed()
