"""Which labels are suspicious, from what the artifact stores of every training example.

A wrong label shows in its example's gradients in two ways: they are large, because the network never agrees, and they
point where those of no other example with this label point. Both are read chord by chord, as ranks among the examples
that the chord visited: under Adam the first steps alone would otherwise decide. docs/label-errors.md has the figures.

N: training example, V: example visited in a chord, k: number stored per example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.capture import matrix_shape
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.sketch import KroneckerSketch

__all__ = ["NEIGHBOURS", "LabelErrors", "isolation", "own_metric", "ranked", "suspicion"]

NEIGHBOURS = 10
"""Examples of the same label that a gradient is compared with."""
_ROWS = 1024


@dataclass(frozen=True)
class LabelErrors:
    """Training examples, the most suspicious label first.

    Attributes:
        example_ids: All ids, ranked, ``[N]``.
        scores: Their scores, falling, ``[N]``; what they mean is said where they were asked for.
        labels: Their labels as given, ``[N]``.
    """

    example_ids: Tensor
    scores: Tensor
    labels: Tensor


def ranked(scores: Tensor, example_ids: Tensor, labels: Tensor) -> LabelErrors:
    """Scores as a ranking; equal ones keep the order of their ids."""
    order = scores.argsort(descending=True, stable=True)
    return LabelErrors(example_ids[order], scores[order], labels[order])


def suspicion(chords: Sequence[Chord], example_ids: Tensor, labels: Tensor) -> Tensor:
    """How suspicious each label is, ``[N]``, between 0 and 1, from stored rows alone.

    For every chord, an example has two ranks among those visited: of the length of its share of the displacement, and
    of its `isolation`. The score is the mean of both over chords, weighted by their optimiser steps; 1/2 stands for a
    chord without a visit.

    Args:
        chords: The path.
        example_ids: All ids, sorted, ``[N]``.
        labels: Their labels, ``[N]``.

    Returns:
        The scores.
    """
    total, steps = torch.zeros(len(example_ids), dtype=torch.float64), 0
    for chord in chords:
        at = torch.searchsorted(example_ids, chord.example_ids)
        rows = own_metric(chord)
        ranks = (_ranks(rows.square().sum(1)) + _ranks(isolation(rows, labels[at]))) / 2
        length = chord.last_step - chord.first_step
        total[at] += length * (ranks - 0.5)
        steps += length
    return (0.5 + total / max(steps, 1)).float()


def _ranks(values: Tensor) -> Tensor:
    """Ranks of ``[V]`` numbers between 0 and 1, equal ones sharing theirs; 1/2 for nan."""
    known = ~values.isnan()
    found = values[known]
    _, inverse, counts = torch.unique(found, return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - counts / 2
    out = torch.full(values.shape, 0.5, dtype=torch.float64)
    out[known] = middle[inverse].double() / max(len(found), 1)
    return out


def isolation(rows: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """How unlike its likest fellows an example is: minus its mean cosine with them, ``[V]``.

    Args:
        rows: Gradients, in any coordinates in which inner products count, ``[V, k]``.
        labels: Their labels, ``[V]``.
        neighbours: Examples of the same label with the largest cosines that are averaged over; all of them where there
            are fewer.

    Returns:
        Between -1 and 1; nan for the only example of a label.

    Example:
        >>> import torch
        >>> from lightning_pathkernel.label_errors import isolation
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> isolation(rows, torch.tensor([0, 0, 0, 1]), neighbours=1)
        tensor([-1., -1., -0., nan])
    """
    unit = torch.nn.functional.normalize(rows, dim=1, eps=1e-30)
    out = torch.full((len(rows),), torch.nan, dtype=rows.dtype)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = min(neighbours, len(members) - 1)
        if count < 1:
            continue
        fellows = unit[members]
        for start in range(0, len(members), _ROWS):
            block = members[start : start + _ROWS]
            cosines = unit[block] @ fellows.T
            cosines[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
            out[block] = -cosines.topk(count, dim=1).values.mean(1)
    return out


def own_metric(chord: Chord) -> Tensor:
    """Rows in coordinates whose inner products are ``<A_i, D^-1 A_j> = <G_i, D G_j>``, ``[V, *]``.

    Stored rows are features of the sketch's training side; its query side brings them back to gradients, as far as the
    sketch keeps them.

    Args:
        chord: A chord.

    Returns:
        The rows, in float32.
    """
    stage = chord.second_stage
    if stage is None:
        parts = [_times_root(chord.rows[:, columns].double(), form) for columns, form in _forms(chord)]
        return torch.cat([chord.rows.new_zeros(len(chord.rows), 0).double(), *parts], dim=1).float()
    metric = torch.zeros(len(stage), len(stage), dtype=torch.float64)
    for columns, form in _forms(chord):
        part = stage[:, columns].double()
        metric += (part * form) @ part.T if form.dim() == 1 else part @ form @ part.T
    return _times_root(chord.rows.double(), metric).float()


def _forms(chord: Chord) -> Iterator[tuple[slice, Tensor]]:
    """For every parameter its columns of the first stage, and ``<G, D G>`` as a form of them or as its diagonal."""
    start = 0
    for name, sketch in chord.sketches.items():
        yield slice(start, start + sketch.features), _form(sketch, chord.preconditioner.get(name)).double()
        start += sketch.features


def _form(sketch: KroneckerSketch, preconditioner: Tensor | None) -> Tensor:
    diagonal = None if preconditioner is None else preconditioner.reshape(matrix_shape(preconditioner.shape))
    if sketch.tensors():
        return sketch.energy_form(diagonal)
    return torch.ones(sketch.features) if diagonal is None else diagonal.flatten()


def _times_root(rows: Tensor, form: Tensor) -> Tensor:
    """``rows R`` with ``R R^T`` the form, or the diagonal form."""
    if form.dim() == 1:
        return rows * form.sqrt()
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    return rows @ (vectors * values.clamp_min(0).sqrt())
