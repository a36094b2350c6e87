"""What a recorder is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_pathkernel.path import NodeBudget, QuadratureRule, gauss_legendre
from lightning_pathkernel.recording.received import Changes
from lightning_pathkernel.sketch import SketchSettings

__all__ = ["RecorderSettings"]


@dataclass(frozen=True)
class RecorderSettings:
    """What is recorded.

    Attributes:
        nodes: Optimiser steps at which chords end, rising, the first one 0, beyond the last of which the last interval
            repeats; or a tolerance of the drift within a chord, and a budget.
        sketch_dim: Numbers stored per example and chord.
        sketch: How sketches are fitted.
        seed: Seed of the private random generator.
        changes: What may happen to gradients between the backward pass and the step.
        manual: Whether gradients may be changed before `before_step`, and graphs retained: manual optimisation.
        sum_rtol: Share of a gradient that rounding may keep the captured rows from adding up to.
        positions: Positions of every example that are rows of their own, with the ids ``id * positions + position``; 0
            for whole examples.
        allow_unattributed: Leave what cannot be attributed to the residual, instead of raising.
        rule: Quadrature along a chord, where the recorder needs one.
    """

    nodes: Sequence[int] | NodeBudget
    sketch_dim: int = 256
    sketch: SketchSettings = field(default_factory=SketchSettings)
    seed: int = 0
    changes: Changes = "factor"
    manual: bool = False
    sum_rtol: float = 1e-3
    positions: int = 0
    allow_unattributed: bool = False
    rule: QuadratureRule = field(default_factory=lambda: gauss_legendre(2))
