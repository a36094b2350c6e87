"""Query maps rounded to eight bits, and the training maps corrected for it.

A sketch keeps ``<j, Q^T P g>``, and with ``P Q^T = 1`` it is exact on what Q spans. Rounding Q alone loses that.
With ``Q'`` the rounded map and ``P' = (P Q^T) (P Q'^T)^-1 P`` the identity holds again: all that has happened is that
the subspace has turned a little, an error of second order. Numbers are whole multiples of a power of two that a column
shares, so that rounding a rounded map changes nothing, and whoever stores it finds the same eight bits again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_pathkernel.sketch.kronecker import KroneckerSketch

__all__ = ["from_grid", "pivots_of", "rounded_sketches", "rounded_stage", "to_grid"]

_TOP = 127
_LEAST, _GREATEST = -126, 121
"""Exponents at which float32 holds ``1 * 2^e`` as a normal number, and ``127 * 2^e`` without overflow."""


def to_grid(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest multiples of the smallest power of two per column that eight bits reach.

    Args:
        matrix: Finite numbers, ``[r, c]``.

    Returns:
        Multiples ``[r, c]``, int8, from -127 to 127, and the columns' exponents ``[c]``, int8.
    """
    largest = matrix.abs().amax(0).double() if len(matrix) else matrix.new_zeros(matrix.shape[1]).double()
    exponents = torch.ceil(torch.log2(largest.clamp_min(1e-300) / _TOP)).clamp(_LEAST, _GREATEST)
    multiples = (matrix.double() / torch.exp2(exponents)).round().clamp(-_TOP, _TOP)
    return multiples.to(torch.int8), exponents.to(torch.int8)


def from_grid(multiples: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `to_grid` rounded to, ``[r, c]``."""
    return (multiples.double() * torch.exp2(exponents.double())).to(dtype)


def _rounded(matrix: Tensor) -> Tensor:
    return from_grid(*to_grid(matrix), dtype=matrix.dtype)


def _turn(train: Tensor, query: Tensor, rounded: Tensor) -> Tensor | None:
    """``T [k, k]`` for which T times the training map goes with the rounded query map, or None where there is none."""
    p = train.double()
    wanted, found = p @ query.double().T, p @ rounded.double().T
    turn: Tensor
    turn, singular = torch.linalg.solve_ex(found, wanted, left=False)
    return None if bool(singular) or not bool(turn.isfinite().all()) else turn


def rounded_sketches(sketches: Mapping[str, KroneckerSketch]) -> dict[str, KroneckerSketch]:
    """Sketches with rounded query factors and the training factors that go with them.

    Args:
        sketches: Parameter -> sketch; factors that several of them share stay shared.

    Returns:
        Parameter -> sketch. A pair of factors that rounding would make singular stays as it is.
    """
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    turns: dict[int, tuple[Tensor, Tensor]] = {}  # training factor -> the corrected one, and what corrected it

    def rounded(train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        if id(train) in turns:  # a bias with its weight's training factor: its own query factor stays unrounded
            corrected, turned = turns[id(train)]
            return corrected, torch.linalg.solve(turned.T, query.double()).to(query)
        near = _rounded(query)
        turn = _turn(train, query, near)
        if turn is None:
            return train, query
        corrected = (turn @ train.double()).to(train)
        turns[id(train)] = corrected, turn
        return corrected, near

    def pair(train: Tensor | None, query: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if train is None or query is None or not bool(query.isfinite().all()):
            return train, query
        key = id(train), id(query)
        if key not in known:
            known[key] = rounded(train, query)
        return known[key]

    out = {}
    for name, sketch in sketches.items():
        left, query_left = pair(sketch.train_left, sketch.query_left)
        right, query_right = pair(sketch.train_right, sketch.query_right)
        out[name] = replace(sketch, train_left=left, train_right=right, query_left=query_left, query_right=query_right)
    return out


def rounded_stage(train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of a second stage in a form that takes few bytes: ``Q = [1 R]`` but for the order of its columns.

    Any invertible ``M`` gives maps ``M^-T P`` and ``M Q`` with the same inner products. The one that makes k columns of
    Q those of the identity leaves ``k (F - k)`` numbers. Columns are the pivots of an elimination, so that R has hardly
    any large entries.

    Args:
        train: P, ``[k, F]``.
        query: Q, ``[k, F]``.

    Returns:
        P and Q, R rounded; the maps as they are where that would make them singular.
    """
    pivots = _independent_columns(query)
    if pivots is None:
        return train, query
    block = query.double()[:, pivots]
    near = _rounded(torch.linalg.solve(block, query.double())).to(query)
    near[:, pivots] = torch.eye(len(pivots), dtype=near.dtype, device=near.device)
    p = block.T @ train.double()
    found = p @ near.double().T
    turned, singular = torch.linalg.solve_ex(found, p)
    corrected = turned.to(train)
    return (train, query) if bool(singular) or not bool(corrected.isfinite().all()) else (corrected, near)


def _independent_columns(matrix: Tensor) -> Tensor | None:
    """Columns that span all: the pivots of an elimination of ``Q^T``, ``[k]``; None if there are too few."""
    eliminated, swaps, _ = torch.linalg.lu_factor_ex(matrix.double().T)
    steps = eliminated.diagonal().abs()
    if not bool(steps.min() > 1e-10 * steps.max()):
        return None
    order = list(range(matrix.shape[1]))
    for at, other in enumerate((swaps - 1).tolist()):
        order[at], order[other] = order[other], order[at]
    return torch.tensor(order[: len(matrix)], device=matrix.device)


def pivots_of(query: Tensor) -> Tensor | None:
    """For a Q of the form `rounded_stage` gives, the column of each row's 1, ``[k]``; None for any other matrix."""
    alone = (query != 0).sum(0) == 1
    columns = (alone & (query == 1).any(0)).nonzero().flatten()
    rows = query[:, columns].argmax(0)
    pivots = torch.full((len(query),), -1, dtype=torch.long, device=query.device)
    pivots[rows.flip(0)] = columns.flip(0)  # of several columns of one row the first one
    return None if bool((pivots < 0).any()) else pivots
