"""One chord as it is recorded, stored and asked: displacement, sketches and the examples' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient, matrix_shape
from lightning_pathkernel.example_rows import HeldRows
from lightning_pathkernel.ledger import ChordSpan, weights_along
from lightning_pathkernel.network import Tensors, on_device
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["Chord", "QueryBuffer", "direction_of", "parts_on"]


@dataclass(frozen=True)
class Chord:
    """A straight piece of the path, eq. (1) to (7) of docs/theory.md.

    Attributes:
        index: Its place on the path.
        first_step: Optimiser step of its first node.
        last_step: Optimiser step of its last node.
        learning_time: Sum of the learning rates of its steps (of the first parameter group).
        example_ids: Training examples visited, sorted, ``[V]``.
        rows: Sketch of each example's share of the displacement, ``S_train(A_i)``, ``[V, k]``.
        self_inner: ``sum over visits of weight * <g, D g>``, by example, ``[V]``.
        sketches: Parameter -> first stage of the sketch.
        second_stage: Query side of the second stage, ``[k, F]``, or None where there is none.
        start: Weights at the first node.
        delta: Displacement.
        start_buffers: Floating-point buffers at the first node.
        end_buffers: The same at the last node.
        preconditioner: The clipped secant D; empty for the identity.
        decay: Displacement by weight decay; empty where there is none.
        residual: Displacement left unattributed; empty where there is none.
        total: Sum of the rows over all processes, ``[k]``, where others hold some of them; None where they are all
            here.
        names: The user's string ids, by the integers that stand for them in ``example_ids``; empty where ids are the
            user's integers or dataset indices.
        end: Weights at the last node, where ``start + delta`` does not give them to the last bit.
    """

    index: int
    first_step: int
    last_step: int
    learning_time: float
    example_ids: Tensor
    rows: Tensor
    self_inner: Tensor
    sketches: Mapping[str, KroneckerSketch]
    second_stage: Tensor | None
    start: Tensors
    delta: Tensors
    start_buffers: Tensors
    end_buffers: Tensors
    preconditioner: Tensors = field(default_factory=dict)
    decay: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    total: Tensor | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    end: Tensors = field(default_factory=dict)

    def weights(self, t: float) -> dict[str, Tensor]:
        """Weights at ``t`` in [0, 1] along the chord."""
        return weights_along(self.start, self.delta, self.end, t)

    def examples_direction(self) -> dict[str, Tensor]:
        """What the stored rows add up to, back in weight space: ``D . S_query^T (sum_i row_i)``.

        ``J`` times this is the sum of all contributions of the chord, eq. (8).

        Returns:
            Parameter -> direction, with the parameter's shape.
        """
        total = self.examples.total if self.total is None else self.total
        return direction_of(total, self.sketches, self.second_stage, self.preconditioner, self.start)

    def without(self, example_ids: Tensor) -> Chord:
        """The chord without some examples' rows; their displacement becomes part of the residual."""
        gone = torch.isin(self.example_ids, example_ids)
        if not bool(gone.any()):
            return self
        removed = replace(self, rows=self.rows[gone]).examples_direction()
        residual = {name: value + self.residual.get(name, 0) for name, value in removed.items()}
        return replace(
            self,
            example_ids=self.example_ids[~gone],
            rows=self.rows[~gone],
            self_inner=self.self_inner[~gone],
            residual={**self.residual, **residual},
        )

    def to(self, device: torch.device) -> Chord:
        """The chord with all but its examples on a device."""
        return replace(self, **parts_on(self, device))

    @property
    def examples(self) -> HeldRows:
        """The examples, as what is asked of a stored chord's."""
        return HeldRows(self.example_ids, self.rows, self.self_inner)

    def held(self) -> Chord:
        """Itself: everything is in memory."""
        return self

    def span(self) -> ChordSpan:
        """The chord's directions in weight space."""
        return ChordSpan(
            self.start,
            self.delta,
            self.start_buffers,
            self.end_buffers,
            self.examples_direction(),
            self.decay,
            self.residual,
            self.end,
        )


def parts_on(chord: Any, device: torch.device) -> dict[str, Any]:
    """What of a chord, in memory or in a file, goes to a device with the network; its examples stay where they are."""
    names = ("start", "delta", "start_buffers", "end_buffers", "preconditioner", "decay", "residual", "end")
    return {
        "sketches": {name: sketch.to(device) for name, sketch in chord.sketches.items()},
        **{name: on_device(getattr(chord, name), device) for name in (*names, "second_stage")},
    }


def direction_of(
    total: Tensor,
    sketches: Mapping[str, KroneckerSketch],
    second_stage: Tensor | None,
    preconditioner: Tensors,
    like: Tensors,
) -> dict[str, Tensor]:
    """A sum of rows ``[k]`` as a direction in weight space: ``D . S_query^T total``."""
    total = total.to(next(iter(like.values())).device)
    features = total if second_stage is None else total @ second_stage
    return synthesise(sketches, features, preconditioner, like)


def synthesise(
    sketches: Mapping[str, KroneckerSketch], features: Tensor, preconditioner: Tensors, like: Tensors
) -> dict[str, Tensor]:
    """First-stage features ``[F]`` as a direction in weight space."""
    out, start = {}, 0
    for name, sketch in sketches.items():
        matrix = sketch.synthesise(features[start : start + sketch.features]).reshape(like[name].shape)
        out[name] = matrix * preconditioner[name] if name in preconditioner else matrix
        start += sketch.features
    return out


class QueryBuffer:
    """Collects a backward pass's per-example gradients as query features of one chord.

    Args:
        sketches: The chord's sketches.
        preconditioner: Its D; empty for the identity.
        n: Number of queries.
    """

    def __init__(self, sketches: Mapping[str, KroneckerSketch], preconditioner: Tensors, n: int) -> None:
        self._sketches = sketches
        self._preconditioner = preconditioner
        self._n = n
        self._parts: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: PerExampleGradient) -> None:
        """Take in one use of one parameter."""
        sketch = self._sketches.get(name)
        if sketch is None:  # it did not move
            return
        diagonal = self._preconditioner.get(name)
        if diagonal is not None:
            diagonal = diagonal.reshape(matrix_shape(diagonal.shape))
        part = sketch.query(gradient, diagonal)
        self._parts[name] = self._parts[name] + part if name in self._parts else part

    def features(self) -> Tensor:
        """First-stage features, ``[n, F]``."""
        like = next(iter(self._parts.values()), torch.zeros(()))
        columns: Sequence[Tensor] = [
            self._parts[name] if name in self._parts else like.new_zeros(self._n, sketch.features)
            for name, sketch in self._sketches.items()
        ]
        return torch.cat([like.new_zeros(self._n, 0), *columns], dim=1)
