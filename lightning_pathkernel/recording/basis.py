"""Fitting a chord's sketches to a sample of training gradients and of probes' gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import OuterGradient, PerExampleGradient, VectorGradient, matrix_shape
from lightning_pathkernel.chord import Chord, QueryBuffer
from lightning_pathkernel.network import Network, Tensors, batch_size, in_parts, take_rows
from lightning_pathkernel.path import QuadratureRule
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.samples import Samples, preconditioned_samples, scaled_samples
from lightning_pathkernel.sketch import (
    KroneckerSketch,
    SideMoments,
    SketchSettings,
    fit_sketch,
    fit_sketches,
    rank_one_log,
)

__all__ = ["Blocks", "ProbePasses", "fit_basis", "query_features", "random_cotangent"]

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


class ProbePasses:
    """Per-example gradients of probes, by parameter, pass by pass.

    A pass keeps inputs and output gradients of all layers until it is let go of.

    Args:
        network: The network.
        probes: The probes.
        functional: What is differentiated, ``outputs [n, K] -> [n]``.
        rows: Most probes that are asked: the first ones.
        at_once: Most probes in one pass.
    """

    def __init__(
        self, network: Network, probes: object, functional: Callable[[Tensor], Tensor], rows: int, at_once: int
    ) -> None:
        self._network = network
        self._functional = functional
        self._parts = in_parts(take_rows(probes, slice(rows)), at_once)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Blocks]:
        return map(self._gradients, self._parts)

    def _gradients(self, part: object) -> Blocks:
        blocks: dict[str, list[PerExampleGradient]] = {}
        self._network.per_example_gradients(
            part, self._functional, lambda name, gradient: blocks.setdefault(name, []).append(gradient)
        )
        return blocks


def query_features(
    network: Network, probes: object, chord: Chord, rule: QuadratureRule, generator: torch.Generator, at_once: int
) -> Tensor:
    """First-stage query features of the probes along a chord, ``[M, F]``: each point asks its share of the probes."""
    found = []
    stride = max(1, min(len(rule.points), batch_size(probes) // _ASKED))
    for first, t in enumerate(rule.points):
        asked = take_rows(probes, slice(first % stride, _MOST_ASKED, stride))
        for part in in_parts(asked, at_once):
            buffer = QueryBuffer(chord.sketches, chord.preconditioner, batch_size(part))
            network.per_example_gradients(
                part, random_cotangent(generator), buffer, weights=chord.weights(t), buffers=chord.end_buffers
            )
            found.append(buffer.features())
    return torch.cat(found)


def fit_basis(
    train: Blocks,
    probes: ProbePasses | None,
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
        probes: Gradients of the probes by random cotangents, pass by pass; None where there are none.
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
    scales = {name: _scale(preconditioner.get(name)) for name in shapes if name in train}
    queried = _queried(probes, scales, preconditioner, shapes, generator)
    sides: dict[str, tuple[SideMoments, SideMoments]] = {}
    riding: dict[str, str] = {}
    for name, scale in scales.items():
        trained = _trained(train[name], direction[name], scale, settings, generator, ranks)
        left, right = (SideMoments(*both) for both in zip(trained, queried.get(name, (None, None)), strict=True))
        sides[name] = left, right
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


def _trained(
    uses: Sequence[PerExampleGradient], direction: Tensor, scale: Scale | None, settings: SketchSettings,
    generator: torch.Generator, ranks: Ranks,
) -> Samples:  # fmt: skip
    """Samples of both sides of one parameter's training gradients, scaled, from all processes."""
    moving = direction.reshape(matrix_shape(direction.shape))
    shape = (int(moving.shape[0]), int(moving.shape[1]))
    rows, columns = (ranks.rows(x) * ranks.world**-0.5 for x in scaled_samples(uses, shape, scale, generator))
    moving = moving if scale is None else moving * _outer(scale)
    # the sum over examples lies in this direction, and the second moment of single examples hardly shows it
    moving = moving * (settings.direction**0.5 * rows.norm() / moving.norm().clamp_min(1e-30))
    return torch.cat([rows, moving.T]), torch.cat([columns, moving])


def _queried(
    passes: ProbePasses | None, scales: Mapping[str, Scale | None], preconditioner: Tensors,
    shapes: Mapping[str, torch.Size], generator: torch.Generator,
) -> dict[str, Samples]:  # fmt: skip
    """Samples of both sides of the probes' gradients, scaled; nothing of a pass but these outlives it."""
    found: dict[str, list[tuple[int, Samples]]] = {}
    if passes is None:
        return {}
    for blocks in passes:
        for name, scale in scales.items():
            uses = blocks.get(name)
            if uses is None:
                continue
            shape = matrix_shape(shapes[name])
            if scale is None:
                samples = scaled_samples(uses, shape, None, generator)
            else:
                diagonal = preconditioner[name].reshape(shape) / _outer(scale)
                samples = preconditioned_samples(uses, diagonal, generator, passes=len(passes))
            found.setdefault(name, []).append((uses[0].n, samples))
        del blocks, uses
    return {name: _joined(parts) for name, parts in found.items()}


def _joined(parts: Sequence[tuple[int, Samples]]) -> Samples:
    """Samples of several passes, of ``n`` examples each, as those of all."""
    count = sum(n for n, _ in parts)
    rows, columns = (torch.cat([(n / count) ** 0.5 * both[side] for n, both in parts]) for side in (0, 1))
    return rows, columns


def _outer(scale: Scale) -> Tensor:
    return scale[0].unsqueeze(1) * scale[1]


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
