"""Fitting a chord's sketches to a sample of training gradients and of probes' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import OuterGradient, PerExampleGradient, VectorGradient, matrix_shape
from lightning_pathkernel.chord import Chord, QueryBuffer
from lightning_pathkernel.network import Network, Tensors, take_rows
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.sketch import KroneckerSketch, SideMoments, SketchSettings, fit_sketch, rank_one_log

__all__ = ["Blocks", "dense_sample", "fit_basis", "probe_gradients", "query_features", "random_cotangent"]

Blocks = Mapping[str, Sequence[PerExampleGradient]]
"""Parameter -> per-example gradients of each of its uses; the uses add up."""

Sketches = Mapping[str, KroneckerSketch]

_DENSE_NUMBERS = 1 << 22
"""At most this many numbers of per-example gradients are formed at once."""


def dense_sample(uses: Sequence[PerExampleGradient], shape: tuple[int, int], rows: int | None = None) -> Tensor:
    """Gradients of as many leading examples as fit, formed whole and added over the uses, ``[m, r, c]``."""
    fit = max(8, _DENSE_NUMBERS // (shape[0] * shape[1]))
    count = min(uses[0].n, fit if rows is None else min(fit, rows))
    total = uses[0].take(slice(count)).dense()
    for use in uses[1:]:
        total = total + use.take(slice(count)).dense()
    return total


def random_cotangent(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A functional that mixes the outputs with random signs, one draw per row: its gradients have J's moments."""

    def functional(outputs: Tensor) -> Tensor:
        signs = torch.randint(0, 2, outputs.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (outputs * signs.to(outputs)).sum(1)

    return functional


def probe_gradients(
    network: Network,
    probes: object,
    functional: Callable[[Tensor], Tensor],
    rows: int = 128,
    **where: Tensors,
) -> dict[str, list[PerExampleGradient]]:
    """Per-example gradients of the first ``rows`` probes, by parameter, kept for use after the pass."""
    blocks: dict[str, list[PerExampleGradient]] = {}
    batch = take_rows(probes, slice(rows))
    network.per_example_gradients(batch, functional, lambda n, g: blocks.setdefault(n, []).append(g), **where)
    return blocks


def query_features(
    network: Network, probes: object, chord: Chord, rule: QuadratureRule, generator: torch.Generator
) -> Tensor:
    """First-stage query features of the probes along a chord, ``[M, F]``."""
    parts = []
    for t in rule.points:
        blocks = probe_gradients(
            network, probes, random_cotangent(generator), rows=256, weights=chord.weights(t), buffers=chord.end_buffers
        )
        buffer = QueryBuffer(chord.sketches, chord.preconditioner, next(iter(blocks.values()))[0].n)
        for name, uses in blocks.items():
            for use in uses:
                buffer(name, use)
        parts.append(buffer.features())
    return torch.cat(parts)


def _sides(gradients: Tensor) -> tuple[Tensor, Tensor]:
    return gradients.transpose(1, 2).reshape(-1, gradients.shape[1]), gradients.reshape(-1, gradients.shape[2])


def _all_moments(
    uses: Sequence[PerExampleGradient], shape: tuple[int, int], scale: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Samples of all processes, in which each has its share of those that one process would take."""
    rows, columns = _moments(uses, shape, scale, ranks.world)
    return ranks.rows(rows), ranks.rows(columns)


def _moments(
    uses: Sequence[PerExampleGradient], shape: tuple[int, int], scale: Tensor | None, world: int = 1
) -> tuple[Tensor, Tensor]:
    if scale is None and len(uses) == 1:
        fit = max(8, _DENSE_NUMBERS // (shape[0] * shape[1]))
        return uses[0].take(slice(max(fit // world, 1))).moments()
    dense = dense_sample(uses, shape, rows=64 // world)
    return _sides(dense if scale is None else dense * scale)


def fit_basis(
    train: Blocks,
    probes: Mapping[str, list[PerExampleGradient]],
    preconditioner: Tensors,
    direction: Tensors,
    shapes: Mapping[str, torch.Size],
    settings: SketchSettings,
    generator: torch.Generator,
    ranks: Ranks,
) -> dict[str, KroneckerSketch]:
    """Choose a sketch for every parameter, over a rank-one square root of the preconditioner where there is one.

    A parameter that the chord's first batch did not reach gets a random sketch.

    Args:
        train: Gradients of the chord's first batch.
        probes: Gradients of the probes, by random cotangents; empty where there are none.
        preconditioner: D of the chord's first step, with the parameters' shapes, 0 where a weight has never moved;
            empty for the identity.
        direction: Where the optimiser is moving: its momentum, or the gradient, with the parameters' shapes.
        shapes: Every trainable parameter's shape.
        settings: Kind and sizes.
        generator: Private source of randomness, on the CPU.
        ranks: The processes whose samples are put together.

    Returns:
        Parameter -> sketch, the same on all processes.
    """
    sketches: dict[str, KroneckerSketch] = {}
    like = next(iter(train.values()))[0].total()
    device, dtype = like.device, like.dtype
    for name, size in shapes.items():
        shape = matrix_shape(size)
        if name not in train:
            sides = tuple(torch.zeros(1, d, device=device, dtype=dtype) for d in shape)
            random = SketchSettings("random", settings.width)
            sketches[name] = _fit_sides((sides[0], sides[1]), None, random, generator)
            continue
        diagonal = preconditioner[name].reshape(shape) if name in preconditioner else None
        weight = _weight_of(train[name], train, sketches) if diagonal is None else None
        if weight is not None:
            sketches[name] = KroneckerSketch(shape[0], 1, weight.train_left, None, weight.query_left, None)
            continue
        moving = direction[name].reshape(shape)
        sketches[name] = _fit_one(train[name], probes.get(name), diagonal, moving, settings, generator, ranks)
    if ranks.world > 1:
        sketches = {name: sketch.with_tensors(ranks.first(sketch.tensors())) for name, sketch in sketches.items()}
    return sketches


def _weight_of(uses: Sequence[PerExampleGradient], train: Blocks, known: Sketches) -> KroneckerSketch | None:
    """The sketch of the weight whose left factors a bias shares, so that one product serves both."""
    if len(uses) > 1 or not isinstance(uses[0], VectorGradient):
        return None
    for name, sketch in known.items():
        other = train.get(name, ())
        if len(other) == 1 and isinstance(other[0], OuterGradient) and other[0].left is uses[0].values:
            return sketch
    return None


def _fit_one(
    train: Sequence[PerExampleGradient], probes: list[PerExampleGradient] | None, diagonal: Tensor | None,
    moving: Tensor, settings: SketchSettings, generator: torch.Generator, ranks: Ranks,
) -> KroneckerSketch:  # fmt: skip
    shape = (int(moving.shape[0]), int(moving.shape[1]))
    if diagonal is None:
        trained = _with_direction(_all_moments(train, shape, None, ranks), moving, settings.direction)
        queried = None if probes is None else _moments(probes, shape, None)
        return _fit_sides(trained, queried, settings, generator)
    left, right = rank_one_log(diagonal.sqrt(), (diagonal > 0).to(diagonal))
    scale = left.unsqueeze(1) * right
    trained = _with_direction(_all_moments(train, shape, scale, ranks), moving * scale, settings.direction)
    queried = None if probes is None else _moments(probes, shape, diagonal / scale)
    return _fit_sides(trained, queried, settings, generator).scaled(left, right)


def _with_direction(moments: tuple[Tensor, Tensor], moving: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Add the direction of the displacement to the samples, with ``weight`` times the energy of all of them."""
    # the sum over examples lies in this direction, and the second moment of single examples hardly shows it
    rows, columns = moments
    moving = moving * (weight**0.5 * rows.norm() / moving.norm().clamp_min(1e-30))
    return torch.cat([rows, moving.T]), torch.cat([columns, moving])


def _fit_sides(
    train: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor] | None,
    settings: SketchSettings,
    generator: torch.Generator,
) -> KroneckerSketch:
    rows, columns = query or (None, None)
    return fit_sketch(SideMoments(train[0], rows), SideMoments(train[1], columns), settings, generator)
