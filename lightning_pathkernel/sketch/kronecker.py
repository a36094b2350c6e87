"""A Kronecker sketch of one parameter: two thin factors on the training side, two on the query side.

For a per-example gradient ``G [r, c]`` of a training example and one ``J [r, c]`` of a query

    S_train(G) = train_left G train_right^T            [k_left, k_right]
    S_query(J) = query_left (D . J) query_right^T      [k_left, k_right]
    <S_query(J), S_train(G)>  estimates  <J, D . G>

with D the chord's preconditioner (1 for SGD), eq. (8) of docs/theory.md. ``None`` stands for an identity factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Contractible", "KroneckerSketch"]


_NUMBERS = 1 << 21
"""At most this many numbers of gradients are formed at once, 8 MB."""

_OUTER_NUMBERS = 1 << 23
"""At most this many numbers of a preconditioner times a factor are formed."""


class Contractible(Protocol):
    """What a sketch asks of a per-example gradient."""

    @property
    def n(self) -> int:
        """Number of examples."""
        ...

    def take(self, which: slice) -> Contractible:
        """Some of the examples."""
        ...

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """``left @ G_n @ right.T``, ``[n, k_left, k_right]``."""
        ...

    def factors(self) -> tuple[Tensor, Tensor | None] | None:
        """``left [n, r]`` and ``right [n, c]`` of outer products (None: c = 1), or None."""
        ...

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        ...


def _sandwich(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    x = x if right is None else x @ right.T
    return x if left is None else left @ x


def _transposed(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.T


@dataclass(frozen=True)
class KroneckerSketch:
    """Thin factors ``[k, r]`` (left) and ``[k, c]`` (right) of the two sides of one parameter's sketch.

    An exported machine has those of the query side only: the training side has done its work when a chord closes.
    """

    rows: int
    columns: int
    train_left: Tensor | None = None
    train_right: Tensor | None = None
    query_left: Tensor | None = None
    query_right: Tensor | None = None

    def to(self, device: torch.device) -> KroneckerSketch:
        """The sketch with its factors on a device."""
        factors = (self.train_left, self.train_right, self.query_left, self.query_right)
        return KroneckerSketch(self.rows, self.columns, *(None if f is None else f.to(device) for f in factors))

    @property
    def shape(self) -> tuple[int, int]:
        """``(k_left, k_right)``."""
        left = self.rows if self.query_left is None else int(self.query_left.shape[0])
        right = self.columns if self.query_right is None else int(self.query_right.shape[0])
        return left, right

    @cached_property
    def train_transposed(self) -> tuple[Tensor | None, Tensor | None]:
        """The training factors, transposed, ``[r, k_left]`` and ``[c, k_right]``: what every step multiplies with."""
        return _transposed(self.train_left), _transposed(self.train_right)

    @property
    def features(self) -> int:
        """Numbers per example, ``k_left * k_right``."""
        left, right = self.shape
        return left * right

    def train(self, gradient: Contractible) -> Tensor:
        """Features of training examples, ``[n, k_left * k_right]``."""
        return gradient.project(self.train_left, self.train_right).flatten(1)

    def query(self, gradient: Contractible, preconditioner: Tensor | None = None) -> Tensor:
        """Features of queries, ``[n, k_left * k_right]``; ``preconditioner [r, c]`` is D."""
        if preconditioner is None:
            return gradient.project(self.query_left, self.query_right).flatten(1)
        factors = gradient.factors()
        if factors is not None and preconditioner.numel() * self.shape[1] <= _OUTER_NUMBERS:
            return self._query_outer(*factors, preconditioner)
        rows = max(1, _NUMBERS // preconditioner.numel())
        parts = [gradient.take(slice(start, start + rows)) for start in range(0, gradient.n, rows)]
        whole = [_sandwich(self.query_left, part.dense() * preconditioner, self.query_right) for part in parts]
        return torch.cat(whole).flatten(1)

    def _query_outer(self, left: Tensor, right: Tensor | None, preconditioner: Tensor) -> Tensor:
        """The same of outer products: D goes into the columns' factor once, not into every gradient."""
        if right is None:
            inner = (left * preconditioner.T).unsqueeze(2)
        elif self.query_right is None:
            inner = left.unsqueeze(2) * preconditioner * right.unsqueeze(1)
        else:
            within = (preconditioner.unsqueeze(1) * self.query_right).flatten(0, 1)  # [r * k_right, c]
            inner = (right @ within.T).unflatten(1, (self.rows, -1)) * left.unsqueeze(2)
        return (inner if self.query_left is None else self.query_left @ inner).flatten(1)

    def train_matrix(self, matrix: Tensor) -> Tensor:
        """The training-side features of a whole gradient ``[r, c]``: ``[k_left * k_right]``."""
        return _sandwich(self.train_left, matrix, self.train_right).flatten()

    def synthesise(self, features: Tensor) -> Tensor:
        """The adjoint of `query` with D = 1: ``query_left^T Z query_right``, ``[*, r, c]``.

        Because the two sides are biorthogonal this is also the gradient that the features stand for.

        Args:
            features: ``[*, k_left * k_right]``.

        Returns:
            Matrices ``[*, r, c]``.
        """
        z = features.unflatten(-1, self.shape)
        return _sandwich(_transposed(self.query_left), z, _transposed(self.query_right))

    def energy_form(self, preconditioner: Tensor | None = None) -> Tensor:
        """The form ``M [k, k]`` with ``z^T M z = <G, D G>`` for the gradient G that features z stand for.

        Args:
            preconditioner: D, ``[r, c]``; None for the identity.

        Returns:
            ``M``, symmetric.
        """
        left, right = self._pairs(self.query_left, self.rows), self._pairs(self.query_right, self.columns)
        inner = left.sum(1, keepdim=True) * right.sum(1) if preconditioner is None else left @ preconditioner @ right.T
        k_left, k_right = self.shape
        return inner.view(k_left, k_left, k_right, k_right).transpose(1, 2).reshape(self.features, self.features)

    def _pairs(self, factor: Tensor | None, d: int) -> Tensor:
        """Products of every two rows of a query factor, ``[k * k, d]``."""
        if factor is None:
            like = next(iter(self.tensors().values()))
            factor = torch.eye(d, dtype=like.dtype, device=like.device)
        return (factor.unsqueeze(1) * factor).flatten(0, 1)

    def reexpress(self, features: Tensor, target: KroneckerSketch) -> Tensor:
        """Training features ``[n, k]`` of this sketch in the basis of another, through the kept subspace.

        The rows are read back by the oblique projection ``Q^T (P Q^T)^-1 P``: with a factor such as a random one, which
        is not its own inverse, ``Q^T P`` would make them longer every time.

        Args:
            features: Of this sketch, ``[n, k]``.
            target: The other sketch, of the same parameter.

        Returns:
            Features of the other, ``[n, k']``.
        """
        left = _change(target.train_left, self.train_left, self.query_left)
        right = _change(target.train_right, self.train_right, self.query_right)
        return _sandwich(left, features.unflatten(-1, self.shape), right).flatten(1)

    def scaled(self, left: Tensor, right: Tensor | None) -> KroneckerSketch:
        """The same sketch over a rank-one scale ``left [r] x right [c]``, moved to the training side.

        The training factors are multiplied by it and the query factors divided, so inner products stay; a side that is
        kept exactly needs no scale.

        Args:
            left: Scale of the rows, positive.
            right: Scale of the columns, positive; None for none.

        Returns:
            The scaled sketch.
        """

        def times(factor: Tensor | None, by: Tensor | None) -> Tensor | None:
            return factor if factor is None or by is None else factor * by

        if self.columns == 1 and right is not None:
            left, right = left * right, None
        return KroneckerSketch(
            self.rows,
            self.columns,
            times(self.train_left, left),
            times(self.train_right, right),
            times(self.query_left, 1 / left),
            times(self.query_right, None if right is None else 1 / right),
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> KroneckerSketch:
        """The same sketch with other factors in the places that `tensors` names."""
        return KroneckerSketch(
            self.rows,
            self.columns,
            tensors.get("train_left"),
            tensors.get("train_right"),
            tensors.get("query_left"),
            tensors.get("query_right"),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The factors that are not the identity, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _change(new_train: Tensor | None, old_train: Tensor | None, old_query: Tensor | None) -> Tensor | None:
    if old_train is None or old_query is None:
        return new_train
    kept = torch.linalg.pinv(old_train.double() @ old_query.double().T).to(old_query)
    back: Tensor = old_query.T @ kept
    return back if new_train is None else new_train @ back
