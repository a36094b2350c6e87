"""Per-example gradients in the form in which a layer yields them.

Every parameter is read as a matrix ``[r, c]``: ``r`` is its first dimension, ``c`` the product of the others
(1 for a vector). A `PerExampleGradient` stands for ``n`` such matrices, one per example of the batch, without
forming them. It can be contracted with two thin factors, formed whole, or summed over the examples.

Index letters: n example, s shared position, r parameter row, c parameter column, k kept rows of a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "BiasGradient",
    "DenseGradient",
    "FactoredGradient",
    "IndexedGradient",
    "OuterGradient",
    "PerExampleGradient",
    "VectorGradient",
    "matrix_shape",
]


_CHEAPER = 0.7
"""Another order of products must take so much less: the usual one has the better shapes (docs/benchmarks.md)."""


_POSITIONS = 16
"""Fewer of them make products by example too small."""


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """The ``(r, c)`` under which a parameter of this shape is sketched; a scalar is ``(1, 1)``."""
    rows = int(shape[0]) if len(shape) else 1
    return rows, int(shape.numel()) // max(rows, 1)


class PerExampleGradient(Protocol):
    """``n`` per-example gradients ``G_n [r, c]`` of one parameter, scaled as the backward pass left them."""

    @property
    def n(self) -> int:
        """Number of examples."""
        ...

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """``left @ G_n @ right.T``, shape ``[n, k_left, k_right]``; ``None`` stands for the identity."""
        ...

    def factors(self) -> tuple[Tensor, Tensor | None] | None:
        """``left [n, r]`` and ``right [n, c]`` where every ``G_n`` is their outer product (None: c = 1), else None."""
        ...

    def dense(self) -> Tensor:
        """The gradients themselves, ``[n, r, c]``."""
        ...

    def total(self) -> Tensor:
        """Their sum over the examples, ``[r, c]``."""
        ...

    def take(self, which: slice) -> PerExampleGradient:
        """Some of the examples."""
        ...


def _thin(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x @ factor.T``, as products with few rows: few columns cost BLAS up to twice as much (docs/benchmarks.md)."""
    if factor is None:
        return x
    if x.dim() == 3 and x.shape[1] >= _POSITIONS:  # by example: with few rows a single product is one thread's
        return torch.bmm(factor.expand(x.shape[0], *factor.shape), x.transpose(1, 2)).transpose(1, 2)
    return (factor @ x.flatten(0, -2).T).T.view(*x.shape[:-1], factor.shape[0])


@dataclass(frozen=True)
class DenseGradient:
    """Gradients formed whole: ``gradients [n, r, c]``."""

    gradients: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.gradients.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """``left @ G_n @ right.T``, ``[n, k_left, k_right]``."""
        out = self.gradients if right is None else self.gradients @ right.T
        return out if left is None else left @ out

    def factors(self) -> None:
        """Not of rank one."""

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        return self.gradients

    def total(self) -> Tensor:
        """``[r, c]``."""
        return self.gradients.sum(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Row samples ``[n * c, r]`` and column samples ``[n * r, c]``."""
        rows = self.gradients.transpose(1, 2).reshape(-1, self.gradients.shape[1])
        return rows, self.gradients.reshape(-1, self.gradients.shape[2])

    def take(self, which: slice) -> DenseGradient:
        """Some of the examples."""
        return DenseGradient(self.gradients[which])


@dataclass(slots=True)
class VectorGradient:
    """A vector parameter's gradients ``values [n, r]``, as matrices with one column."""

    values: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.values.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """One thin product, ``[n, k_left, k_right]``."""
        out = _thin(self.values, left).unsqueeze(2)
        return out if right is None else out @ right.T

    def factors(self) -> tuple[Tensor, None]:
        """The values; the other factor is 1."""
        return self.values, None

    def dense(self) -> Tensor:
        """``[n, r, 1]``."""
        return self.values.unsqueeze(2)

    def total(self) -> Tensor:
        """``[r, 1]``."""
        return self.values.sum(0).unsqueeze(1)

    def take(self, which: slice) -> VectorGradient:
        """Some of the examples."""
        return VectorGradient(self.values[which])


@dataclass(slots=True)
class OuterGradient:
    """``G_n = left_n right_n^T`` with ``left [n, r]`` and ``right [n, c]``: one position per example."""

    left: Tensor
    right: Tensor

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.left.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Two thin products, ``[n, k_left, k_right]``."""
        return _thin(self.left, left).unsqueeze(2) * _thin(self.right, right).unsqueeze(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors."""
        return self.left, self.right

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        return self.project(None, None)

    def total(self) -> Tensor:
        """``[r, c]``, without forming the gradients."""
        return self.left.T @ self.right

    def take(self, which: slice) -> OuterGradient:
        """Some of the examples."""
        return OuterGradient(self.left[which], self.right[which])


@dataclass(slots=True)
class FactoredGradient:
    """``G_n = sum_s left_s right_s^T`` with ``left [n, s, r]`` and ``right [n, s, c]``."""

    left: Tensor
    right: Tensor
    _sums: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.left.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Thin products and a sum over positions, in the order that takes least, ``[n, k_left, k_right]``."""
        if left is not None and right is not None:
            (a, r), (b, c) = left.shape, right.shape
            both = a * r + b * c + a * b  # multiplications for each position
            if b * (r + c) < _CHEAPER * both:
                return self._columns_first(left, right)
            if a * (r + c) < _CHEAPER * both:
                return _thin(self.left, left).transpose(1, 2) @ self.right @ right.T
        return _thin(self.left, left).transpose(1, 2) @ _thin(self.right, right)

    def _columns_first(self, left: Tensor, right: Tensor) -> Tensor:
        """With a one beside the columns' numbers, so that the sums over positions come of the same product."""
        n, positions, _ = self.right.shape
        thin = self.right.new_ones(n, right.shape[0] + 1, positions)
        thin[:, :-1] = _thin(self.right, right).transpose(1, 2)
        whole = thin @ self.left
        self._sums = whole[:, -1]
        return (whole[:, :-1] @ left.T).transpose(1, 2)

    def sums(self) -> Tensor:
        """``left`` summed over positions, ``[n, r]``."""
        if self._sums is None:
            self._sums = self.left.sum(1)
        return self._sums

    def factors(self) -> None:
        """Not of rank one."""

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        return self.project(None, None)

    def total(self) -> Tensor:
        """``[r, c]``, without forming the gradients."""
        return self.left.flatten(0, 1).T @ self.right.flatten(0, 1)

    def take(self, which: slice) -> FactoredGradient:
        """Some of the examples."""
        return FactoredGradient(self.left[which], self.right[which])


class Summing(Protocol):
    """The gradient of a weight whose output gradients, summed over positions, are its bias's gradient."""

    def sums(self) -> Tensor:
        """``[n, r]``."""
        ...


class BiasGradient(VectorGradient):
    """The gradient of a bias: read after its weight's, it costs nothing where the weight's product has it."""

    __slots__ = ("_weight",)

    def __init__(self, weight: Summing) -> None:
        self._weight = weight

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """``[n, r]``."""
        return self._weight.sums()


@dataclass(frozen=True)
class IndexedGradient:
    """An embedding's gradient: ``G_n = sum_s e_{index_s} right_s^T``, ``indices [n, s]``, ``right [n, s, c]``."""

    indices: Tensor
    right: Tensor
    rows: int

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.indices.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """A row look-up in place of the left product, ``[n, k_left, k_right]``."""
        columns = _thin(self.right, right)
        if left is None:
            out = columns.new_zeros(self.n, self.rows, columns.shape[2])
            return out.scatter_add_(1, self.indices.unsqueeze(2).expand_as(columns), columns)
        return left.T[self.indices].transpose(1, 2) @ columns

    def factors(self) -> None:
        """Not of rank one."""

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        return self.project(None, None)

    def total(self) -> Tensor:
        """``[r, c]``."""
        out = self.right.new_zeros(self.rows, self.right.shape[2])
        return out.index_add_(0, self.indices.flatten(), self.right.flatten(0, 1))

    def take(self, which: slice) -> IndexedGradient:
        """Some of the examples."""
        return IndexedGradient(self.indices[which], self.right[which], self.rows)


def zero_where(mask: Tensor, values: Tensor) -> Tensor:
    """``values [n, s, c]`` with the positions of ``mask [n, s]`` set to zero."""
    return values.masked_fill(mask.unsqueeze(-1), 0.0)
