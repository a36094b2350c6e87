"""Fitting a chord's sketches to a sample of training gradients and of probes' gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import OuterGradient, PerExampleGradient, VectorGradient, matrix_shape
from lightning_pathkernel.chord import Chord, QueryBuffer
from lightning_pathkernel.network import Network, Tensors, batch_size, take_rows
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.samples import preconditioned_samples, scaled_samples
from lightning_pathkernel.sketch import (
    KroneckerSketch,
    SideMoments,
    SketchSettings,
    fit_sketch,
    fit_sketches,
    rank_one_log,
)

__all__ = ["Blocks", "fit_basis", "probe_gradients", "query_features", "random_cotangent"]

Blocks = Mapping[str, Sequence[PerExampleGradient]]
"""Parameter -> per-example gradients of each of its uses; the uses add up."""

_ASKED, _MOST_ASKED = 64, 256
"""Probes whose gradients the second stage asks for: at each point of a chord at least, and at most."""
_FACTORS = ("train_left", "train_right", "query_left", "query_right")

Scale = tuple[Tensor, Tensor]
"""``left [r]`` and ``right [c]`` of a rank-one matrix."""


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
    """First-stage query features of the probes along a chord, ``[M, F]``: each point asks its share of the probes."""
    parts = []
    stride = max(1, min(len(rule.points), batch_size(probes) // _ASKED))
    for first, t in enumerate(rule.points):
        asked = take_rows(probes, slice(first % stride, _MOST_ASKED, stride))
        blocks = probe_gradients(
            network, asked, random_cotangent(generator), rows=_MOST_ASKED, weights=chord.weights(t),
            buffers=chord.end_buffers,
        )  # fmt: skip
        buffer = QueryBuffer(chord.sketches, chord.preconditioner, next(iter(blocks.values()))[0].n)
        for name, uses in blocks.items():
            for use in uses:
                buffer(name, use)
        parts.append(buffer.features())
    return torch.cat(parts)


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

    A parameter that the chord's first batch did not reach gets a random sketch. A bias takes over its weight's
    left factor, so that one product serves both.

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
        Parameter -> sketch, the same on all processes, in the order of ``shapes``.
    """
    scales: dict[str, Scale | None] = {}
    sides: dict[str, tuple[SideMoments, SideMoments]] = {}
    riding: dict[str, str] = {}
    for name in shapes:
        if name not in train:
            continue
        scales[name] = _scale(preconditioner.get(name))
        sides[name] = _samples(name, train, probes, preconditioner, direction, scales[name], settings, generator, ranks)
        weight = _weight_of(name, train, sides)
        if weight is not None:
            riding[name] = weight
    owners = {name: both for name, both in sides.items() if name not in riding}
    riders = Counter(riding.values())
    found = fit_sketches(owners, riders, settings, generator)
    for name, scale in scales.items():
        if scale is not None and name in found:
            found[name] = found[name].scaled(*scale)
    for name, weight in riding.items():
        found[name] = _riding(found[weight], sides[name][0].train, scales[name], scales[weight], settings)
    like = next(iter(train.values()))[0].total()
    for name in shapes.keys() - train.keys():
        found[name] = _random(matrix_shape(shapes[name]), settings, generator, like)
    return _same({name: found[name] for name in shapes}, ranks, like)


def _scale(diagonal: Tensor | None) -> Scale | None:
    """The rank-one square root of a preconditioner, None for the identity."""
    if diagonal is None:
        return None
    matrix = diagonal.reshape(matrix_shape(diagonal.shape))
    return rank_one_log(matrix.sqrt(), (matrix > 0).to(matrix))


def _samples(
    name: str, train: Blocks, probes: Blocks, preconditioner: Tensors, direction: Tensors, scale: Scale | None,
    settings: SketchSettings, generator: torch.Generator, ranks: Ranks,
) -> tuple[SideMoments, SideMoments]:  # fmt: skip
    """Samples of both sides of one parameter, scaled; those of training gradients from all processes."""
    moving = direction[name].reshape(matrix_shape(direction[name].shape))
    shape = (int(moving.shape[0]), int(moving.shape[1]))
    rows, columns = (ranks.rows(x) * ranks.world**-0.5 for x in scaled_samples(train[name], shape, scale, generator))
    outer = None if scale is None else scale[0].unsqueeze(1) * scale[1]
    moving = moving if outer is None else moving * outer
    # the sum over examples lies in this direction, and the second moment of single examples hardly shows it
    moving = moving * (settings.direction**0.5 * rows.norm() / moving.norm().clamp_min(1e-30))
    trained = torch.cat([rows, moving.T]), torch.cat([columns, moving])
    if name not in probes:
        return SideMoments(trained[0]), SideMoments(trained[1])
    if outer is None:
        queried = scaled_samples(probes[name], shape, None, generator)
    else:
        queried = preconditioned_samples(probes[name], preconditioner[name].reshape(shape) / outer, generator)
    return SideMoments(trained[0], queried[0]), SideMoments(trained[1], queried[1])


def _weight_of(name: str, train: Blocks, known: Iterable[str]) -> str | None:
    """The weight whose left factors a bias shares."""
    uses = train[name]
    if len(uses) > 1 or not isinstance(uses[0], VectorGradient):
        return None
    for weight in known:
        other = train[weight]
        if len(other) == 1 and isinstance(other[0], OuterGradient) and other[0].left is uses[0].values:
            return weight
    return None


def _riding(
    weight: KroneckerSketch, samples: Tensor, scale: Scale | None, above: Scale | None, settings: SketchSettings
) -> KroneckerSketch:
    """The sketch of a bias with its weight's training factor P, and ``(P C P^T)^-1 P C`` on the query side."""
    # with C the second moment of the bias's gradients: their best reconstruction from P g, whatever is asked
    factor = weight.train_left
    if factor is None:
        return KroneckerSketch(weight.rows, 1)
    x = samples if scale is None else samples / (scale[0] * scale[1])
    u = torch.ones_like(factor[0]) if above is None else above[0]
    x, p = (x * u).double(), (factor / u).double()
    moment = x.T @ x
    moment += settings.ridge * moment.diagonal().mean().clamp_min(1e-30) * torch.eye(len(moment)).to(moment)
    query = torch.linalg.solve(p @ moment @ p.T, p @ moment).to(factor) / u
    return KroneckerSketch(weight.rows, 1, factor, None, query, None)


def _random(
    shape: tuple[int, int], settings: SketchSettings, generator: torch.Generator, like: Tensor
) -> KroneckerSketch:
    left, right = (SideMoments(like.new_zeros(1, d)) for d in shape)
    return fit_sketch(left, right, SketchSettings("random", settings.width), generator)


def _same(sketches: dict[str, KroneckerSketch], ranks: Ranks, like: Tensor) -> dict[str, KroneckerSketch]:
    """The first process' sketches: on the others rounding may have given widths and factors that differ."""
    if ranks.world == 1:
        return sketches
    out = {}
    for name, sketch in sketches.items():
        found = sketch.tensors()
        # a side that is kept exactly has no factor, and may have one elsewhere
        there = ranks.first({"there": torch.tensor([float(part in found) for part in _FACTORS])})["there"]
        factors = {
            part: found.get(part, like.new_empty(0, sketch.rows if part.endswith("left") else sketch.columns))
            for part, known in zip(_FACTORS, there.tolist(), strict=True)
            if known
        }
        out[name] = sketch.with_tensors(ranks.first_matrices(factors))
    return out
