"""Whether what was captured is what the optimiser received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import CaptureError, PerExampleGradient

__all__ = ["check_sum"]


def check_sum(
    held: Sequence[Mapping[str, Sequence[PerExampleGradient]]],
    parameters: Mapping[str, Tensor],
    coefficient: float,
    step: int,
) -> None:
    """The captured rows must add up to the gradient that the optimiser received.

    Args:
        held: For each batch of the step, parameter -> per-example gradients of each of its uses.
        parameters: The trainable parameters, with what the optimiser received as their ``grad``.
        coefficient: What clipping multiplied the gradients with.
        step: The optimiser step, for the message.

    Raises:
        CaptureError: Naming every parameter of which more than 0.1 % is unaccounted for.
    """
    wrong = []
    largest = max(float(p.grad.norm()) for p in parameters.values() if p.grad is not None)
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        uses = [use.total() for batch in held for use in batch.get(name, ())]
        captured = torch.stack(uses).sum(0) if uses else torch.zeros_like(parameter).flatten()
        gap = float((captured.reshape(parameter.shape) * coefficient - parameter.grad).norm())
        if gap > 1e-3 * float(parameter.grad.norm()) and gap > 1e-5 * largest:
            wrong.append(f"{name!r} ({gap / max(float(parameter.grad.norm()), 1e-30):.1%} unaccounted for)")
    if wrong:
        raise CaptureError(
            f"the per-example gradients do not add up to the gradient for {', '.join(wrong)} at step {step}. "
            "A weight used outside its module's forward, dropout inside a layer without a rule, or gradients added "
            "by hand do that. Call the owning module instead, or register a layer rule."
        )
