"""Parameters whose gradient is nothing but rounding, though the examples' parts of it are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_pathkernel.capture import PerExampleGradient, VectorGradient

__all__ = ["cancelling"]


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
    for name in batches[0]:
        uses = [use for batch in batches for use in batch.get(name, ())]
        if not all(isinstance(use, VectorGradient) for use in uses) or batches[0][name][0].n < 2:
            continue
        whole = sum(float(use.total().norm()) for use in uses)
        parts = sum(float(use.dense().flatten(1).norm(dim=1).sum()) for use in uses)
        if whole < rtol * parts:
            found.append(name)
    return found
