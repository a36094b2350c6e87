"""Visits that a momentum buffer still holds when their chord closes, taken into the next chord's basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording.rows import CarriedRows, RecordedStep, Sketches, split

__all__ = ["carried", "reexpress"]


def carried(steps: Sequence[RecordedStep], sketches: Sketches) -> list[RecordedStep]:
    """Steps of a chord that closes, in memory of their own and still in its basis."""
    out = []
    for step in steps:
        if not step.parts:
            out.append(step)
            continue
        ids = torch.cat([part.ids for part in step.parts])
        features = torch.cat([part.features(sketches) for part in step.parts]) * step.coefficient
        out.append(RecordedStep([CarriedRows(ids.clone(), split(features, sketches))]))
    return out


def reexpress(
    steps: Sequence[RecordedStep],
    shares: Mapping[str, npt.NDArray[np.float64]],
    momentum: Mapping[str, Tensor],
    old: Sketches,
    new: Sketches,
    ranks: Ranks,
) -> None:
    """Bring some parameters' carried features into the open chord's basis.

    Each row is re-expressed through the subspace its old basis kept. What that loses of their sum, which is known
    exactly from the optimiser's buffer, is shared out in proportion to the rows' shares of it: of all corrections
    that restore the sum the smallest one.

    Args:
        steps: Carried steps, changed in place.
        shares: Parameter -> every carried step's share of its buffer, ``[steps]``.
        momentum: Parameter -> what the buffers hold of these steps, as matrices ``[r, c]``.
        old: The parameters' old sketches.
        new: Their new ones.
        ranks: The processes that hold the steps' rows.
    """
    parts = [part for step in steps for part in step.parts if isinstance(part, CarriedRows)]
    counts = [sum(len(part.ids) for part in step.parts) for step in steps]
    for name, sketch in old.items():
        before = torch.cat([part.parts[name] for part in parts])
        rows = sketch.reexpress(before, new[name])
        if name in momentum:
            each = torch.from_numpy(np.repeat(shares[name], counts)).to(rows)
            rows = _complete(rows, each, new[name].train_matrix(momentum[name]), ranks)
        for part, found in zip(parts, rows.split([len(part.ids) for part in parts]), strict=True):
            part.parts[name] = found


def _complete(rows: Tensor, shares: Tensor, wanted: Tensor, ranks: Ranks) -> Tensor:
    """Correct ``rows [n, k]`` by least squares so that ``sum_i shares_i rows_i`` is ``wanted [k]``."""
    # not in proportion to <row, sum>, as a control variate would: few features' sum may all but cancel, and what is
    # missing is not made of what is there; rows came out a thousand times too large (docs/sketches.md)
    missing = wanted - ranks.total(shares @ rows)
    return rows + torch.outer(shares / ranks.total(shares @ shares).clamp_min(1e-30), missing)
