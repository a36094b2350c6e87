"""Whether what was captured is what the optimiser received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.capture import PerExampleGradient
from lightning_pathkernel.recording.ranks import Ranks

__all__ = ["NonFiniteError", "not_finite", "past", "sum_gaps", "unseen"]


class NonFiniteError(ArithmeticError):
    """Gradients or weights stopped being finite."""


def sum_gaps(
    held: Sequence[Mapping[str, Sequence[PerExampleGradient]]],
    parameters: Mapping[str, Tensor],
    divisor: float,
    rtol: float,
    ranks: Ranks,
) -> str | None:
    """Where the captured rows do not add up to the gradients.

    Args:
        held: For each backward pass, parameter -> per-example gradients of each of its uses.
        parameters: The parameters concerned, with the whole gradient as their ``grad``.
        divisor: What the captured gradients are to be divided by.
        rtol: Share of a parameter's gradient that may be unaccounted for.
        ranks: The processes whose gradients were averaged.

    Returns:
        Every parameter of which more is unaccounted for, and the likely causes; None if there is none.
    """
    wrong = []
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    largest = max(norms.values(), default=0.0)
    for name, norm in norms.items():
        gradient = gradients[name]
        uses = [use.total() for batch in held for use in batch.get(name, ())]
        captured = torch.stack(uses).sum(0) if uses else torch.zeros_like(gradient).flatten()
        captured = ranks.total(captured.reshape(gradient.shape) / divisor)
        gap = float((captured - gradient).norm())
        if gap > rtol * norm and gap > 1e-2 * rtol * largest:
            wrong.append(f"{name!r} ({gap / max(norm, 1e-30):.1%} unaccounted for)")
    if not wrong:
        return None
    return (
        f"the per-example gradients do not add up to the gradient for {', '.join(wrong)}. "
        "A weight used outside its module's forward, dropout inside a layer without a rule, or gradients added "
        "by hand do that. Call the owning module instead, or register a layer rule."
    )


def unseen(step: int) -> str:
    """What to say of a step for which nothing was captured."""
    return (
        f"no layer's gradient was seen in a backward pass for optimiser step {step}: the hooks did not fire. Call "
        "self.manual_backward(loss) under manual optimisation, compile a module only after the fit has begun, and set "
        "no gradients by hand."
    )


def not_finite(step: int, recorded: int) -> str:
    """What to say of gradients that are not finite at a step; chords up to step ``recorded`` were handed on."""
    return (
        f"gradients are not finite at optimiser step {step}: the path ends there. Everything up to step {recorded} was "
        "recorded. Lower the learning rate, clip, or check the data."
    )


def past(step: int) -> str:
    """What to say of a step that Lightning did not see."""
    return (
        f"optimiser step {step} was made past Lightning, by a raw optimiser's step with a closure: call "
        "self.optimizers().step(), or the closure first and then step()."
    )
