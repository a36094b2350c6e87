"""Parameters whose gradient is nothing but rounding, though the examples' parts of it are not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from lightning_pathkernel.capture import PerExampleGradient, VectorGradient

__all__ = ["cancelling", "warn_of_cancelling"]

_log = logging.getLogger(__name__)


def cancelling(batches: Sequence[Mapping[str, Sequence[PerExampleGradient]]], rtol: float = 1e-5) -> list[str]:
    """Vector parameters whose per-example gradients cancel in every batch.

    The bias of a layer that feeds a batch norm is one: its effect is subtracted again. An optimiser that divides by the
    gradient's size then moves it as fast as any other, along the rounding error, and the examples' parts of that
    movement are huge and cancel.

    Args:
        batches: For each batch, parameter -> per-example gradients of each of its uses.
        rtol: Largest sum, relative to the sum of the examples' norms.

    Returns:
        Their names.
    """
    found = []
    for name in dict.fromkeys(name for batch in batches for name in batch):
        uses = [use for batch in batches for use in batch.get(name, ())]
        vectors = [use.values for use in uses if isinstance(use, VectorGradient)]
        if len(vectors) < len(uses):
            continue
        whole = sum(float(values.sum(0).norm()) for values in vectors)
        parts = sum(float(values.norm(dim=1).sum()) for values in vectors)
        if whole < rtol * parts:
            found.append(name)
    return found


def warn_of_cancelling(batches: Sequence[Mapping[str, Sequence[PerExampleGradient]]], optimizer: str) -> None:
    """Name such parameters in the log, with the remedy.

    Args:
        batches: As for `cancelling`.
        optimizer: The optimiser's name.
    """
    names = cancelling(batches)
    if names:
        _log.warning(
            "the gradient of %s is zero but for rounding (a bias before a batch norm?), and %s divides by its size: "
            "contributions through it are huge, cancel, and mean nothing. Construct its layer with bias=False.",
            ", ".join(map(repr, names)),
            optimizer,
        )
