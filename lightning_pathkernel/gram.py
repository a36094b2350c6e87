"""Gram matrices of whole gradients: the path kernel, and the tangent kernel at a node of the path.

No sketch and no stored example: gradients are formed on both sides, block by block, so that batches of any size fit.
Where a gradient is an outer product and nothing is multiplied into it, ``<G_i, G_j>`` is the product of two small inner
products and it is not formed.

n: example, r: parameter row, c: parameter column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient, matrix_shape
from lightning_pathkernel.chord_path import Chords
from lightning_pathkernel.explanation import OutputFn, functional_of
from lightning_pathkernel.network import Functional, Network, Tensors, batch_size, on_device, take_rows
from lightning_pathkernel.path import QuadratureRule

__all__ = ["Place", "Side", "gram_at", "path_kernel", "place_of_node", "sides"]

NUMBERS = 1 << 26
"""At most about this many numbers of gradients are held for one block of rows, 256 MB in float32."""

Roots = dict[str, tuple[Tensor, ...]]
"""Parameter -> its gradients whole, ``([n, r * c],)``, or their factors, ``([n, r], [n, c])``."""


@dataclass(frozen=True)
class Side:
    """One side of a Gram matrix.

    Attributes:
        batch: Queries.
        targets: Output of each query, ``[n]``, once for each term of the sum over outputs.
        output_fn: ``(outputs [n, K], target [n]) -> [n]``; None for the output ``target``.
    """

    batch: object
    targets: Sequence[Tensor]
    output_fn: OutputFn | None = None

    @property
    def n(self) -> int:
        """Number of queries."""
        return batch_size(self.batch)

    def term(self, k: int, rows: slice) -> tuple[object, Functional]:
        """Some of the queries, and the scalar of each that the term ``k`` is about."""
        return take_rows(self.batch, rows), functional_of(self.output_fn, self.targets[k][rows])


def sides(
    x: object,
    x2: object | None,
    target: Tensor | None,
    target2: Tensor | None,
    output_fn: OutputFn | None,
    outputs: int,
) -> tuple[Side, Side | None]:
    """Both sides of a Gram matrix as a user asks for them.

    Args:
        x: Queries.
        x2: Other queries; None for ``x`` itself.
        target: Output of each query, ``[n]``; None for the trace over outputs, or for an ``output_fn`` that needs none.
        target2: Output of each other query, ``[n2]``; None for ``target`` where ``x2`` is None.
        output_fn: Scalar of the outputs; None for the output ``target``.
        outputs: Number of outputs.

    Returns:
        The first side and the second one; None for the first one again.

    Raises:
        ValueError: If only one of two targets is given, or a target is not one integer per query.
    """
    if (target is None) != (target2 is None) and (x2 is not None or target is None):
        raise ValueError("give both target and target2, or neither (the trace over outputs)")

    def side(batch: object, chosen: Tensor | None, name: str) -> Side:
        n = batch_size(batch)
        if chosen is None:
            terms = outputs if output_fn is None else 1
            return Side(batch, [torch.full((n,), k) for k in range(terms)], output_fn)
        if chosen.shape != (n,) or chosen.is_floating_point():
            raise ValueError(f"{name} must be integers of shape ({n},), found {chosen.dtype} {tuple(chosen.shape)}")
        return Side(batch, [chosen], output_fn)

    first = side(x, target, "target")
    if x2 is None and target2 is None:
        return first, None
    return first, side(x if x2 is None else x2, target2, "target2")


@dataclass(frozen=True)
class Place:
    """Where on the path gradients are taken.

    Attributes:
        weights: Weights there.
        buffers: Buffers there.
        learning: Parameters whose gradients count; those that do not move are left out.
        preconditioner: D, by parameter; empty for the identity.
    """

    weights: Tensors
    buffers: Tensors
    learning: frozenset[str]
    preconditioner: Tensors = field(default_factory=dict)


class _Gradients:
    """Collects a backward pass's per-example gradients times the square root of D."""

    def __init__(self, place: Place, dtype: torch.dtype | None) -> None:
        self._place, self._dtype = place, dtype
        self._uses: dict[str, list[PerExampleGradient]] = {}

    def __call__(self, name: str, gradient: PerExampleGradient) -> None:
        if name in self._place.learning:
            self._uses.setdefault(name, []).append(gradient)

    def roots(self) -> Roots:
        """What was collected, in the type asked for."""
        return {
            name: tuple(part if self._dtype is None else part.to(self._dtype) for part in self._root(name, uses))
            for name, uses in self._uses.items()
        }

    def _root(self, name: str, uses: Sequence[PerExampleGradient]) -> tuple[Tensor, ...]:
        diagonal = self._place.preconditioner.get(name)
        factors = uses[0].factors() if len(uses) == 1 and diagonal is None else None
        if factors is not None:
            left, right = factors
            return (left,) if right is None else (left, right)
        whole = torch.stack([gradient.dense() for gradient in uses]).sum(0)
        if diagonal is not None:
            whole = whole * diagonal.to(whole).reshape(matrix_shape(diagonal.shape)).sqrt()
        return (whole.flatten(1),)


def _inner(one: Roots, two: Roots) -> Tensor:
    """Inner products of the gradients of two blocks, ``[n, n2]``."""
    parts = []
    for name, a in one.items():
        if name not in two:
            continue
        b = two[name]
        if len(a) != len(b):
            a, b = _whole(a), _whole(b)
        product = a[0] @ b[0].T
        parts.append(product if len(a) == 1 else product * (a[1] @ b[1].T))
    if not parts:
        raise ValueError("no parameter of the network has a gradient there")
    return torch.stack(parts).sum(0)


def _whole(root: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (root[0] if len(root) == 1 else (root[0].unsqueeze(2) * root[1].unsqueeze(1)).flatten(1),)


@dataclass(frozen=True)
class _Asked:
    """What is the same for every block."""

    network: Network
    place: Place
    chunk: int
    dtype: torch.dtype | None

    def blocks(self, n: int) -> Iterator[slice]:
        """Rows whose gradients are held at once."""
        weights = sum(self.network.parameters[name].numel() for name in self.place.learning)
        rows = max(1, NUMBERS // max(weights, 1))
        return (slice(start, min(start + rows, n)) for start in range(0, n, rows))

    def roots(self, side: Side, k: int, rows: slice) -> Roots:
        """The gradients of a block, one chunk after another."""
        pieces: list[Roots] = []
        for start in range(rows.start, rows.stop, self.chunk):
            batch, functional = side.term(k, slice(start, min(start + self.chunk, rows.stop)))
            here, sink = on_device(batch, self.network.device), _Gradients(self.place, self.dtype)
            self.network.per_example_gradients(here, functional, sink, self.place.weights, self.place.buffers)
            pieces.append(sink.roots())
        return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _joined(pieces: Sequence[Mapping[str, tuple[Tensor, ...]]]) -> Roots:
    out: Roots = {}
    for name in pieces[0]:
        parts = [piece[name] for piece in pieces]
        if len({len(part) for part in parts}) > 1:
            parts = [_whole(part) for part in parts]
        out[name] = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    return out


def gram_at(
    network: Network, first: Side, second: Side | None, place: Place, chunk: int = 256, dtype: torch.dtype | None = None
) -> Tensor:
    """``sum over terms of <J_k(x), D J_k(x2)>`` at one place of the path, ``[n, n2]``.

    Args:
        network: The network.
        first: Queries.
        second: The other side; None for the first one again, for which only half of the blocks are computed.
        place: Weights, buffers and preconditioner.
        chunk: Queries in one backward pass.
        dtype: Type in which inner products are taken; None for that of the gradients.

    Returns:
        The matrix, in units of squared output per squared weight (times that of D).

    Raises:
        ValueError: If there are no queries on one side.
    """
    asked, other = _Asked(network, place, chunk, dtype), first if second is None else second
    out: Tensor | None = None
    for k in range(len(first.targets)):
        for rows in asked.blocks(first.n):
            one = asked.roots(first, k, rows)
            for columns in asked.blocks(other.n):
                if second is None and columns.start < rows.start:
                    continue
                same = second is None and columns == rows
                part = _inner(one, one if same else asked.roots(other, k, columns))
                out = part.new_zeros(first.n, other.n) if out is None else out
                out[rows, columns] += part
                if second is None and not same:
                    out[columns, rows] += part.T
    if out is None:
        raise ValueError("a Gram matrix needs at least one query on each side")
    return out if second is not None else (out + out.T) / 2


def path_kernel(
    network: Network,
    first: Side,
    second: Side | None,
    path: Chords,
    rules: Sequence[QuadratureRule],
    chunk: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The path kernel ``sum_c learning_time_c * integral of J D J'^T`` between two batches, ``[n, n2]``.

    Args:
        network: The network.
        first: Queries.
        second: The other side; None for the first one again: symmetric and positive semi-definite.
        path: The path.
        rules: Quadrature along each chord.
        chunk: Queries in one backward pass.
        dtype: Type in which inner products are taken and added; None for that of the gradients.

    Returns:
        The kernel matrix.

    Raises:
        ValueError: If there are no chords or no queries.
    """
    out: Tensor | None = None
    for chord, rule in zip(path, rules, strict=True):
        for t, w in zip(rule.points, rule.weights, strict=True):
            place = Place(chord.weights(t), chord.end_buffers, frozenset(chord.delta), chord.preconditioner)
            part = w * chord.learning_time * gram_at(network, first, second, place, chunk, dtype)
            out = part if out is None else out + part
    if out is None:
        raise ValueError("a machine without chords")
    return out


def place_of_node(path: Chords, node: int) -> Place:
    """A node of the path, for the tangent kernel there.

    Args:
        path: The path, of C chords.
        node: From 0, where training began, to C, where it ended; or from the end, with -1 for the last one.

    Returns:
        The place, without a preconditioner, with the parameters that move in the chord that begins there.

    Raises:
        IndexError: If there is no such node.
    """
    count = len(path)
    if not -count - 1 <= node <= count:
        raise IndexError(f"no node {node}: the path has nodes 0 to {count}, or -{count + 1} to -1 from its end")
    at = node % (count + 1)
    chord = next(islice(path, min(at, count - 1), None))
    if at == count:
        return Place(chord.weights(1.0), chord.end_buffers, frozenset(chord.delta))
    return Place(chord.start, chord.start_buffers, frozenset(chord.delta))
