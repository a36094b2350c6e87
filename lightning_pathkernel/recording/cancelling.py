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
        vectors = [use.values for use in uses if isinstance(use, VectorGradient)]
        if len(vectors) < len(uses):
            continue
        whole = sum(float(values.sum(0).norm()) for values in vectors)
        parts = sum(float(values.norm(dim=1).sum()) for values in vectors)
        if whole < rtol * parts:
            found.append(name)
    return found
