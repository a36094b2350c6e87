"""The rows that a batch may bring before a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import RowGroup
from lightning_pathkernel.capture.positions import ids_by_position

__all__ = ["row_groups"]


def row_groups(ids: Tensor | Sequence[tuple[Tensor, object]], positions: int) -> tuple[list[Tensor], list[RowGroup]]:
    """Groups of rows that go through the network together: a loader's, or those of all loaders joined.

    Args:
        ids: A batch's examples, ``[n]``; or, where several loaders feed it, each one's examples and part of the batch.
        positions: Positions of every example that are rows of their own; 0 for whole examples.

    Returns:
        For each group, the ids of its rows, and what capture is told of it.
    """
    if isinstance(ids, Tensor):
        found, groups = [ids], [RowGroup(len(ids))]
    else:
        found = [part for part, _ in ids]
        groups = [RowGroup(len(part), batch) for part, batch in ids]
        if len(groups) > 1:
            found.append(torch.cat(found))
            groups.append(RowGroup(len(found[-1])))
    return [ids_by_position(part, positions) for part in found] if positions else found, groups
