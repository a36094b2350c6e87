"""Contributions by group: by class, by any label of the training examples, by epoch.

Q: query, N: training example, G: group, C: chord, E: epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord

__all__ = ["Labels", "contributions_by_epoch", "group_contributions", "grouped_chord", "labels_in_order"]

Labels = Tensor | Sequence[int] | Mapping[int, int]
"""One label per training example: in the order of ``example_ids``, or by id."""


def labels_in_order(labels: Labels, example_ids: Tensor) -> Tensor:
    """The label of each example, ``[N]``.

    Args:
        labels: Integers in the order of ``example_ids``, or a mapping from ids to integers, which may know more ids.
        example_ids: Ids, ``[N]``.

    Returns:
        LongTensor on the CPU.

    Raises:
        ValueError: If their number is another, they are no integers, or an id has none.
    """
    n = len(example_ids)
    if isinstance(labels, Mapping):
        missing = [i for i in example_ids.tolist() if i not in labels]
        if missing:
            raise ValueError(f"no label for {len(missing)} of {n} training examples, such as ids {missing[:5]}")
        labels = [int(labels[i]) for i in example_ids.tolist()]
    found = torch.as_tensor(labels).detach().cpu()
    if found.is_floating_point() or found.is_complex():
        raise ValueError(f"labels must be integers, found {found.dtype}")
    if found.shape != (n,):
        raise ValueError(
            f"labels must have shape ({n},), one for each of example_ids in their order, found {tuple(found.shape)}; "
            "pass a mapping id -> label if examples are missing or in another order"
        )
    return found.long()


def group_contributions(contributions: Tensor, labels: Tensor, groups: int | None = None) -> Tensor:
    """Contributions summed over the training examples of each group.

    Args:
        contributions: ``[..., N]``, as `KernelMachine.contributions` gives them.
        labels: Group of each training example, ``[N]``, integers from 0. (For names or other numbers:
            ``torch.unique(values, return_inverse=True)`` or ``numpy.unique`` with the same argument.)
        groups: Number of groups; None for the largest label + 1.

    Returns:
        ``[..., G]``, in the units of the contributions; over G they add up to what the contributions add up to over N.

    Raises:
        ValueError: If the labels do not belong to the contributions, or one is negative or too large.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel import group_contributions
        >>> contributions = torch.tensor([[1.0, -2.0, 0.5, 4.0]])
        >>> group_contributions(contributions, torch.tensor([0, 1, 0, 2]))
        tensor([[ 1.5000, -2.0000,  4.0000]])
    """
    n = contributions.shape[-1] if contributions.dim() else 0
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({n},), found {labels.dtype} {tuple(labels.shape)}")
    least, most = (int(labels.min()), int(labels.max())) if n else (0, -1)
    count = most + 1 if groups is None else groups
    if least < 0 or most >= count:
        raise ValueError(f"labels must be between 0 and {count - 1}, found {least} to {most}")
    out = contributions.new_zeros(*contributions.shape[:-1], count)
    return out.index_add_(-1, labels.long().to(contributions.device), contributions)


def contributions_by_epoch(by_chord: Tensor, node_steps: Tensor, steps_per_epoch: int) -> Tensor:
    """Contributions of every chord shared out over epochs, by the steps that they have in common.

    Inside a chord the path is straight and knows no time, so that a chord across an epoch's end is split in proportion.

    Args:
        by_chord: ``[Q, C, ...]``, as `KernelMachine.contributions_by_chord` gives them.
        node_steps: Optimiser steps of the nodes, ``[C + 1]``: `KernelMachine.node_steps`.
        steps_per_epoch: Optimiser steps in an epoch.

    Returns:
        ``[Q, E, ...]``; over E they add up to what they add up to over C.

    Raises:
        ValueError: If there is not one node more than chords, or ``steps_per_epoch`` is not positive.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.grouping import contributions_by_epoch
        >>> contributions_by_epoch(torch.tensor([[4.0, 9.0]]), torch.tensor([0, 4, 13]), steps_per_epoch=5)
        tensor([[5., 5., 3.]])
    """
    chords = by_chord.shape[1]
    if node_steps.shape != (chords + 1,):
        raise ValueError(f"node_steps must have shape ({chords + 1},), found {tuple(node_steps.shape)}")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be positive, found {steps_per_epoch}")
    nodes = node_steps.double()
    epochs = -(-int(node_steps[-1]) // steps_per_epoch)
    starts = torch.arange(epochs).double() * steps_per_epoch
    first = torch.maximum(nodes[:-1, None], starts)
    common = (torch.minimum(nodes[1:, None], starts + steps_per_epoch) - first).clamp_min(0)
    shares = (common / (nodes[1:, None] - nodes[:-1, None])).to(by_chord)
    return torch.einsum("qc...,ce->qe...", by_chord, shares)


def grouped_chord(chord: Chord, ids: Tensor, labels: Tensor) -> Chord:
    """The chord with one row per group in place of one per example.

    Args:
        chord: The chord.
        ids: All ids that are labelled, sorted, ``[N]``.
        labels: Their labels, ``[N]``.

    Returns:
        A chord whose ``example_ids`` are labels; its rows add up to what they added up to.
    """
    mine = labels[torch.searchsorted(ids, chord.example_ids)]
    groups, inverse = torch.unique(mine, return_inverse=True)
    rows = chord.rows.new_zeros(len(groups), chord.rows.shape[1]).index_add_(0, inverse, chord.rows)
    inner = chord.self_inner.new_zeros(len(groups)).index_add_(0, inverse, chord.self_inner)
    return replace(chord, example_ids=groups, rows=rows, self_inner=inner, names={})
