"""A chord of an artifact in memory, all but its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord, direction_of, parts_on
from lightning_pathkernel.example_rows import ExampleRows, KeptRows
from lightning_pathkernel.ledger import ChordSpan, weights_along
from lightning_pathkernel.network import Tensors
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["StoredChord"]


def _no_names() -> Mapping[int, str]:
    return {}


@dataclass(frozen=True)
class StoredChord:
    """A chord of an artifact; but for `examples` and `names` its attributes are those of `Chord`.

    Attributes:
        examples: Its training examples, in the chord's file.
        read_names: Reads the string ids that it brings.
    """

    index: int
    first_step: int
    last_step: int
    learning_time: float
    examples: ExampleRows
    sketches: Mapping[str, KroneckerSketch]
    second_stage: Tensor | None
    start: Tensors
    delta: Tensors
    start_buffers: Tensors
    end_buffers: Tensors
    preconditioner: Tensors
    decay: Tensors
    residual: Tensors
    end: Tensors
    read_names: Callable[[], Mapping[int, str]] = field(default=_no_names)

    @property
    def names(self) -> Mapping[int, str]:
        """The string ids that it brings."""
        return self.read_names()

    def weights(self, t: float) -> dict[str, Tensor]:
        """Weights at ``t`` in [0, 1] along the chord."""
        return weights_along(self.start, self.delta, self.end, t)

    def _direction(self, total: Tensor) -> dict[str, Tensor]:
        return direction_of(total, self.sketches, self.second_stage, self.preconditioner, self.start)

    def examples_direction(self) -> dict[str, Tensor]:
        """What the stored rows add up to, back in weight space."""
        return self._direction(self.examples.total)

    def span(self) -> ChordSpan:
        """The chord's directions in weight space."""
        return ChordSpan(
            self.start, self.delta, self.start_buffers, self.end_buffers, self.examples_direction(), self.decay,
            self.residual, self.end,
        )  # fmt: skip

    def reduced(self, kept: KeptRows) -> StoredChord:
        """The chord with some of its examples; the displacement of the others becomes part of the residual."""
        if not bool(kept.lost.any()) and len(kept) == len(kept.whole):
            return self
        lost = self._direction(kept.lost)
        residual = {**self.residual, **{name: value + self.residual.get(name, 0) for name, value in lost.items()}}
        return replace(self, examples=kept, residual=residual)

    def to(self, device: torch.device) -> StoredChord:
        """The chord with all but its examples on a device."""
        return replace(self, **parts_on(self, device))

    def held(self) -> Chord:
        """The chord with its examples in memory."""
        held = self.examples.held()
        return Chord(
            self.index, self.first_step, self.last_step, self.learning_time, held.example_ids, held.rows,
            held.self_inner, self.sketches, self.second_stage, self.start, self.delta, self.start_buffers,
            self.end_buffers, self.preconditioner, self.decay, self.residual, names=self.names, end=self.end,
        )  # fmt: skip
