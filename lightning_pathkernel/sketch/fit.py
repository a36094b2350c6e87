"""Choosing the factors of every parameter's sketch, and the second stage that brings all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_pathkernel.sketch.balance import balanced_factors
from lightning_pathkernel.sketch.deflation import deflated_factor, random_factor
from lightning_pathkernel.sketch.kronecker import KroneckerSketch
from lightning_pathkernel.sketch.shares import SideEnergies, share_out

__all__ = [
    "SKETCHES",
    "SideMoments",
    "SketchSettings",
    "fit_second_stage",
    "fit_sketch",
    "fit_sketches",
    "register_sketch",
]

Pair = tuple[Tensor | None, Tensor | None]
"""Training and query factor of one side, ``[k, d]`` each."""


@dataclass(frozen=True)
class SketchSettings:
    """How sketches are fitted.

    Attributes:
        kind: Key of `SKETCHES`.
        direction: Energy given to the direction of the displacement, relative to that of all examples.
        width: Rows of a thin factor: each parameter keeps at most ``width x width`` numbers per example.
        features: Features of the first stage that are shared out over the parameters at least, by energy; None gives
            every parameter ``width x width``. Only balanced sketches of networks with probes can be shared out.
        most: Features of the first stage at most, for each weight matrix of the network: what a node costs grows with
            their square and more.
        tolerance: Share of a chord's displacement, as probes see it, that the first stage may lose: the next chord gets
            more features where it has lost more, and fewer where less.
        ridge: Regularisation of the balanced fit of the first stage.
        second_ridge: Regularisation of the balanced fit of the second stage.
    """

    kind: str = "balanced"
    width: int = 16
    features: int | None = 256
    most: int = 128
    tolerance: float = 0.03
    ridge: float = 0.03
    second_ridge: float = 0.1
    direction: float = 5.0

    @property
    def shared_features(self) -> int | None:
        """Features that are shared out over parameters, where queries are known; None for fixed widths."""
        return self.features if self.kind == "balanced" else None


@dataclass(frozen=True)
class SideMoments:
    """Samples of one side of one parameter: of training gradients ``[N, d]`` and, if known, of queries ``[M, d]``.

    Features are shared out by the squares of these numbers: they must have one scale for all parameters.
    """

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


Sides = tuple[SideMoments, SideMoments]
"""Of the rows and the columns of one parameter."""


def fit_sketches(
    sides: Mapping[str, Sides], riders: Mapping[str, int], settings: SketchSettings, generator: torch.Generator
) -> dict[str, KroneckerSketch]:
    """Choose the factors of several parameters, features shared out by energy where the settings say so.

    Args:
        sides: Parameter -> samples of its rows and of its columns.
        riders: Parameter -> further parameters that share its left factor.
        settings: Kind and sizes.
        generator: Private source of randomness, on the CPU.

    Returns:
        Parameter -> sketch.
    """
    known = all(side.query is not None for both in sides.values() for side in both)
    if settings.shared_features is None or not known:
        return {name: fit_sketch(left, right, settings, generator) for name, (left, right) in sides.items()}
    widest = 2 * settings.width
    fits = {
        name: (_spectrum(left, widest, settings, generator), _spectrum(right, widest, settings, generator))
        for name, (left, right) in sides.items()
    }
    energies = [
        SideEnergies(left.energies, right.energies, riders.get(name, 0)) for name, (left, right) in fits.items()
    ]
    shares = share_out(energies, settings.shared_features)
    return {
        name: _cut(fits[name], widths, tuple(side.train.shape[1] for side in sides[name]))
        for name, widths in zip(sides, shares, strict=True)
    }


_POWER = 0.25
"""Features are shared out by fourth roots of energies: a few layers have nearly all, but do not rank examples alone."""


class _Spectrum(NamedTuple):
    """Factors of one side, leading directions first, and what each counts; no factors for a side of one dimension."""

    train: Tensor | None
    query: Tensor | None
    energies: list[float]


def _spectrum(side: SideMoments, widest: int, settings: SketchSettings, generator: torch.Generator) -> _Spectrum:
    train, query = side.train, cast(Tensor, side.query)
    scale = float(train.norm() * query.norm()) + 1e-30
    if train.shape[1] == 1:
        return _Spectrum(None, None, [scale**_POWER])
    p, q = balanced_factors(train, query, min(widest, train.shape[1]), settings.ridge, generator)
    # the product of two sides' energies has the scale of the inner products' mean square once more than it should
    energies = (train @ p.T).square().sum(0) * (query @ q.T).square().sum(0) / scale
    return _Spectrum(p, q, (energies.double().cummin(0).values ** _POWER).tolist())


def _cut(fits: Sequence[_Spectrum], widths: tuple[int, int], shape: tuple[int, ...]) -> KroneckerSketch:
    exact = [k == d for k, d in zip(widths, shape, strict=True)]
    train, query = (
        [None if whole or f is None else f[:k] for whole, f, k in zip(exact, factors, widths, strict=True)]
        for factors in ([fit.train for fit in fits], [fit.query for fit in fits])
    )
    return KroneckerSketch(shape[0], shape[1], train[0], train[1], query[0], query[1])


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
