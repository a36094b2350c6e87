"""Which labels are suspicious, from what the artifact stores of every training example.

A wrong label shows in its example's gradients in two ways: they are large, because the network never agrees, and they
point where those of no other example with this label point. Both are read chord by chord, as ranks among the examples
that the chord visited: under Adam the first steps alone would otherwise decide. docs/label-errors.md has the figures.

N: training example, V: example visited in a chord, k: number stored per example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord

__all__ = ["NEIGHBOURS", "LabelErrors", "coordinates", "isolation", "ranked", "suspicion"]

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

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> found = tiny_machine().label_errors(torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> len(found.example_ids), len(found.labels), bool((found.scores.diff() <= 0).all())
        (6, 6, True)
    """

    example_ids: Tensor
    scores: Tensor
    labels: Tensor


def ranked(scores: Tensor, example_ids: Tensor, labels: Tensor) -> LabelErrors:
    """Scores as a ranking; equal ones keep the order of their ids."""
    order = scores.argsort(descending=True, stable=True)
    return LabelErrors(example_ids[order], scores[order], labels[order])


def suspicion(chords: Iterable[Chord], example_ids: Tensor, labels: Tensor) -> Tensor:
    """How suspicious each label is, ``[N]``, between 0 and 1, from stored rows alone.

    For every chord, an example has two ranks among those visited: of the length of its gradients' sum, and of its
    `isolation`, both in `coordinates`. The score is the mean of both over chords, weighted by their optimiser steps;
    1/2 stands for a chord without a visit.

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
        rows = coordinates(chord)
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

    Examples:
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


def coordinates(chord: Chord) -> Tensor:
    """Rows in coordinates whose inner products are those of gradients, every parameter counting the same, ``[V, *]``.

    Stored rows are features of the sketch's training side; its query side brings them back to gradients, as far as the
    sketch keeps them. Each parameter is scaled so that its mean square over the chord's examples is 1: otherwise the
    largest matrix decides, often that next to the input (Fashion-MNIST, MLP, AdamW: 0.72 of the wrong labels among
    the first fifth, 0.86 scaled).

    Args:
        chord: A chord.

    Returns:
        The rows, in float32.
    """
    stage, rows = chord.second_stage, chord.rows.double()
    if stage is None:
        parts = [_scaled(_times_root(rows[:, columns], form)) for columns, form in _forms(chord)]
        return torch.cat([rows[:, :0], *parts], dim=1).float()
    moment = rows.T @ rows / max(len(rows), 1)
    metric = torch.zeros(len(stage), len(stage), dtype=torch.float64)
    for columns, form in _forms(chord):
        part = stage[:, columns].double()
        part = part @ part.T if form is None else part @ form @ part.T
        metric += part / (part * moment).sum().clamp_min(1e-300)
    return _times_root(rows, metric).float()


def _scaled(part: Tensor) -> Tensor:
    return part / part.square().sum(1).mean().sqrt().clamp_min(1e-150)


def _forms(chord: Chord) -> Iterator[tuple[slice, Tensor | None]]:
    """For every parameter its columns of the first stage, and ``<G, G>`` as a form of them; None for their square."""
    start = 0
    for sketch in chord.sketches.values():
        yield slice(start, start + sketch.features), sketch.energy_form().double() if sketch.tensors() else None
        start += sketch.features


def _times_root(rows: Tensor, form: Tensor | None) -> Tensor:
    """``rows R`` with ``R R^T`` the form."""
    if form is None:
        return rows
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return rows @ root
