"""Which scalar of the outputs is explained, and what an explanation holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pathkernel.network import Functional

__all__ = ["Explanation", "OutputFn", "functional_of", "joined", "pick_target"]

OutputFn = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [n, K], target [n]) -> [n]``: the scalar that is explained."""


def pick_target(outputs: Tensor, target: Tensor) -> Tensor:
    """The output ``target`` of each row, ``[n]``: the default output function."""
    return outputs.gather(1, target.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class Explanation:
    """Why a prediction is what it is.

    Attributes:
        prediction: The explained scalar as the kernel machine predicts it, ``[Q]``.
        example_ids: Training examples most for it, strongest first, then most against it, strongest first, ``[Q, 2k]``.
        contributions: What each of them adds to the scalar, in its units, ``[Q, 2k]``.
        ledger: Term of docs/theory.md section 5 -> ``[Q]``; the terms add up to the network's own scalar.
        target: Which output of each query is explained, ``[Q]``; what an output function made of it, if one was given.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> machine, x = tiny_machine(), torch.eye(2)[:1]
        >>> why = machine.explain(x, top_k=1)
        >>> why.target, why.prediction, why.example_ids, why.contributions
        (tensor([0]), tensor([0.6858]), tensor([[0, 3]]), tensor([[ 0.0451, -0.0276]]))
        >>> bool(torch.isclose(why.network, machine.network_outputs(x).max()))
        True
        >>> list(why.ledger)
        ['initial', 'examples', 'decay', 'buffers', 'quadrature', 'sketch', 'unattributed']
    """

    prediction: Tensor
    example_ids: Tensor
    contributions: Tensor
    ledger: dict[str, Tensor]
    target: Tensor

    @property
    def network(self) -> Tensor:
        """The explained scalar of the network itself, ``[Q]``: the sum of the ledger's terms."""
        return torch.stack(list(self.ledger.values())).double().sum(0).to(self.prediction)


def joined(pieces: Sequence[Explanation]) -> Explanation:
    """The explanations of several chunks of queries as one."""
    ledger = {name: torch.cat([p.ledger[name] for p in pieces]) for name in pieces[0].ledger}
    return Explanation(
        torch.cat([p.prediction for p in pieces]),
        torch.cat([p.example_ids for p in pieces]),
        torch.cat([p.contributions for p in pieces]),
        ledger,
        torch.cat([p.target for p in pieces]),
    )


def functional_of(output_fn: OutputFn | None, target: Tensor) -> Functional:
    """The scalar that an output function picks of each row for its target, as a function of the outputs alone."""
    chosen = output_fn or pick_target
    return lambda outputs: chosen(outputs, target.to(outputs.device))
