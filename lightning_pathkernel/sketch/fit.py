"""Choosing the factors of every parameter's sketch, and the second stage that brings all of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.sketch.balance import balanced_factors
from lightning_pathkernel.sketch.deflation import deflated_factor, random_factor
from lightning_pathkernel.sketch.kronecker import KroneckerSketch

__all__ = ["SKETCHES", "SideMoments", "SketchSettings", "fit_second_stage", "fit_sketch", "register_sketch"]

Pair = tuple[Tensor | None, Tensor | None]
"""Training and query factor of one side, ``[k, d]`` each."""


@dataclass(frozen=True)
class SketchSettings:
    """How sketches are fitted.

    Attributes:
        kind: Key of `SKETCHES`.
        direction: Energy given to the direction of the displacement, relative to that of all examples.
        width: Rows of a thin factor: each parameter keeps at most ``width x width`` numbers per example.
        ridge: Regularisation of the balanced fit of the first stage.
        second_ridge: Regularisation of the balanced fit of the second stage.
    """

    kind: str = "balanced"
    width: int = 16
    ridge: float = 0.03
    second_ridge: float = 0.1
    direction: float = 1.0


@dataclass(frozen=True)
class SideMoments:
    """Samples of one side of one parameter: of training gradients ``[N, d]`` and, if known, of queries ``[M, d]``."""

    train: Tensor
    query: Tensor | None = None


Fitter = Callable[[SideMoments, int, SketchSettings, torch.Generator], Pair]
SKETCHES: dict[str, Fitter] = {}


def register_sketch(kind: str) -> Callable[[Fitter], Fitter]:
    """Register a way of choosing the factors of one side.

    Args:
        kind: Its name.

    Returns:
        The decorator.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(fitter: Fitter) -> Fitter:
        if kind in SKETCHES:
            raise ValueError(f"sketch {kind!r} is registered already")
        SKETCHES[kind] = fitter
        return fitter

    return decorate


@register_sketch("identity")
def _identity(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> Pair:
    return None, None


@register_sketch("random")
def _random(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> Pair:
    factor = random_factor(moments.train.shape[1], k, generator, moments.train)
    return factor, factor


@register_sketch("deflated")
def _deflated(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> Pair:
    factor = deflated_factor(moments.train, k, generator)
    return factor, factor


@register_sketch("balanced")
def _balanced(moments: SideMoments, k: int, settings: SketchSettings, generator: torch.Generator) -> Pair:
    if moments.query is None:
        return _deflated(moments, k, settings, generator)
    return balanced_factors(moments.train, moments.query, k, settings.ridge, generator)


def fit_sketch(
    left: SideMoments, right: SideMoments, settings: SketchSettings, generator: torch.Generator
) -> KroneckerSketch:
    """Choose the factors of one parameter.

    Args:
        left: Samples of its rows.
        right: Samples of its columns.
        settings: Kind and sizes; a side whose dimension is at most ``width`` is kept exactly.
        generator: Private source of randomness, on the CPU.

    Returns:
        The sketch.
    """
    fitter = SKETCHES[settings.kind]
    pairs: list[Pair] = []
    for side in (left, right):
        small = side.train.shape[1] <= settings.width
        pairs.append((None, None) if small else fitter(side, settings.width, settings, generator))
    rows, columns = left.train.shape[1], right.train.shape[1]
    return KroneckerSketch(rows, columns, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])


def fit_second_stage(
    train: Tensor,
    query: Tensor | None,
    total: Tensor,
    k: int,
    settings: SketchSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor] | None:
    """Maps ``[k, F]`` of the training and the query side that bring the features of all parameters down to ``k``.

    The direction of the rows' sum is given as much weight as all rows together, so that the second stage loses
    nothing of the displacement that the rows add up to.

    Args:
        train: First-stage features of training rows, ``[N, F]``.
        query: First-stage features of probes, ``[M, F]``, or None.
        total: Sum of the training rows, ``[F]``.
        k: Features to keep.
        settings: ``second_ridge`` is read.
        generator: Private source of randomness, on the CPU.

    Returns:
        ``(P, Q)``, or None when ``F`` is at most ``k`` and nothing needs to be dropped.
    """
    if train.shape[1] <= k:
        return None
    direction = total / total.norm().clamp_min(1e-30)
    rows = torch.cat([train, direction.unsqueeze(0) * train.norm()])
    return balanced_factors(rows, rows if query is None else query, k, settings.second_ridge, generator)
