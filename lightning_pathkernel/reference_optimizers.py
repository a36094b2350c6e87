"""The optimisers of the reference, written out from torch's documentation.

They know nothing of the fast code's rules. D of a step is found from all gradients since the first, every time anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "ReferenceAdadelta",
    "ReferenceAdagrad",
    "ReferenceAdam",
    "ReferenceAdamax",
    "ReferenceNAdam",
    "ReferenceOptimizer",
    "ReferenceRAdam",
    "ReferenceRMSprop",
    "ReferenceResponse",
    "ReferenceRprop",
    "ReferenceSGD",
]


@dataclass(frozen=True)
class ReferenceOptimizer:
    """What the reference asks of an optimiser: ``w <- w - rate * (D . m) - rate * decoupled_decay * w``."""

    lr: float
    maximize: bool = field(default=False, kw_only=True)

    def rate(self, lr: float, step: int) -> float:
        """Rate of a step, counted from 0, under a learning rate."""
        return lr

    def linear_map(self, step: int) -> tuple[float, float, float, float]:
        """``keep, inject, from_buffer, from_gradient``: ``b = keep b + inject h``, ``m = from_buffer b + ... h``."""
        return 0.0, 0.0, 0.0, 1.0

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """D of the latest step, from all gradients so far, with coupled decay in them."""
        return torch.ones_like(gradients[-1])

    @property
    def preconditions_first(self) -> bool:
        """Whether ``D h`` stands for h in the linear map, and m is not multiplied any more."""
        return False

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return 0.0

    @property
    def decoupled_decay(self) -> float:
        """Decay applied beside the update."""
        return 0.0


@dataclass(frozen=True)
class ReferenceSGD(ReferenceOptimizer):
    """`torch.optim.SGD`, update equations of its documentation."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def linear_map(self, step: int) -> tuple[float, float, float, float]:
        """The buffer's first step takes the gradient whole."""
        inject = 1.0 if step == 0 else 1.0 - self.dampening
        if self.momentum == 0:
            return 0.0, 0.0, 0.0, 1.0
        if self.nesterov:
            return self.momentum, inject, self.momentum, 1.0
        return self.momentum, inject, 1.0, 0.0

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class ReferenceAdam(ReferenceOptimizer):
    """`torch.optim.Adam` (``decoupled=False``) and `torch.optim.AdamW`, update equations of their documentation."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = False

    def linear_map(self, step: int) -> tuple[float, float, float, float]:
        """With the bias correction of the step."""
        beta = self.betas[0]
        return beta, 1.0 - beta, 1.0 / (1.0 - beta ** (step + 1)), 0.0

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """D of the latest step, from all gradients so far."""
        beta = self.betas[1]
        second, largest = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
        for gradient in gradients:
            second = beta * second + (1.0 - beta) * gradient**2
            largest = torch.maximum(largest, second)
        corrected = (largest if self.amsgrad else second) / (1.0 - beta ** len(gradients))
        return 1.0 / (corrected.sqrt() + self.eps)

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def decoupled_decay(self) -> float:
        """Decay applied beside the update."""
        return self.weight_decay if self.decoupled else 0.0


def _decaying_mean(values: Sequence[Tensor], keep: float) -> Tensor:
    mean = torch.zeros_like(values[0])
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
    return mean


@dataclass(frozen=True)
class ReferenceNAdam(ReferenceAdam):
    """`torch.optim.NAdam`, update equations of its documentation."""

    momentum_decay: float = 4e-3

    def _momentum(self, step: int) -> float:
        return self.betas[0] * (1.0 - 0.5 * math.pow(0.96, step * self.momentum_decay))

    def linear_map(self, step: int) -> tuple[float, float, float, float]:
        """Momentum of this step for the gradient, of the next for the buffer."""
        now, product = self._momentum(step + 1), math.prod(self._momentum(t + 1) for t in range(step + 1))
        following = self._momentum(step + 2)
        beta = self.betas[0]
        return beta, 1.0 - beta, following / (1.0 - product * following), (1.0 - now) / (1.0 - product)


@dataclass(frozen=True)
class ReferenceRAdam(ReferenceAdam):
    """`torch.optim.RAdam`, update equations of its documentation."""

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """1 while the length of the approximated average is at most 5, then rectified."""
        beta, t = self.betas[1], len(gradients)
        longest = 2.0 / (1.0 - beta) - 1.0
        length = longest - 2.0 * t * beta**t / (1.0 - beta**t)
        if length <= 5.0:
            return torch.ones_like(gradients[0])
        second = _decaying_mean([g**2 for g in gradients], beta)
        adaptive = math.sqrt(1.0 - beta**t) / (second.sqrt() + self.eps)
        over = (length - 4.0) * (length - 2.0) * longest
        return math.sqrt(over / ((longest - 4.0) * (longest - 2.0) * length)) * adaptive


@dataclass(frozen=True)
class ReferenceAdamax(ReferenceAdam):
    """`torch.optim.Adamax`, update equations of its documentation."""

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """1 over the decaying maximum of the gradients' sizes."""
        largest = torch.zeros_like(gradients[0])
        for gradient in gradients:
            largest = torch.maximum(self.betas[1] * largest, gradient.abs() + self.eps)
        return 1.0 / largest


@dataclass(frozen=True)
class ReferenceAdagrad(ReferenceOptimizer):
    """`torch.optim.Adagrad`, update equations of its documentation."""

    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def rate(self, lr: float, step: int) -> float:
        """Falling with ``lr_decay``."""
        return lr / (1.0 + step * self.lr_decay)

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """1 over the root of the sum of squares."""
        total = self.initial_accumulator_value + torch.stack([g**2 for g in gradients]).sum(0)
        return 1.0 / (total.sqrt() + self.eps)

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class ReferenceRMSprop(ReferenceOptimizer):
    """`torch.optim.RMSprop`, update equations of its documentation."""

    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def linear_map(self, step: int) -> tuple[float, float, float, float]:
        """A buffer with momentum only."""
        return (self.momentum, 1.0, 1.0, 0.0) if self.momentum > 0 else (0.0, 0.0, 0.0, 1.0)

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """1 over the root of the decaying mean of squares, or of the variance."""
        second, mean = _decaying_mean([g**2 for g in gradients], self.alpha), _decaying_mean(gradients, self.alpha)
        return 1.0 / ((second - mean**2 if self.centered else second).sqrt() + self.eps)

    @property
    def preconditions_first(self) -> bool:
        """The buffer takes in ``h / (sqrt(v) + eps)``."""
        return self.momentum > 0

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class ReferenceAdadelta(ReferenceOptimizer):
    """`torch.optim.Adadelta`, update equations of its documentation."""

    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """The root mean square of the updates before this step over that of the gradients up to it."""
        second, updates, diagonal = (torch.zeros_like(gradients[0]) for _ in range(3))
        for gradient in gradients:
            second = self.rho * second + (1.0 - self.rho) * gradient**2
            diagonal = (updates + self.eps).sqrt() / (second + self.eps).sqrt()
            updates = self.rho * updates + (1.0 - self.rho) * (diagonal * gradient) ** 2
        return diagonal

    @property
    def coupled_decay(self) -> float:
        """Decay added to the gradient."""
        return self.weight_decay


@dataclass(frozen=True)
class ReferenceRprop(ReferenceOptimizer):
    """`torch.optim.Rprop`, update equations of its documentation; ``lr`` is the first step size and nothing else."""

    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)

    def rate(self, lr: float, step: int) -> float:
        """1: the step sizes are in D."""
        return 1.0

    def preconditioner(self, gradients: Sequence[Tensor]) -> Tensor:
        """The step size over the gradient's size; 0 where its sign has changed, or where it is 0."""
        size, previous = torch.full_like(gradients[0], self.lr), torch.zeros_like(gradients[0])
        for gradient in gradients:
            product = previous * gradient
            grown = torch.clamp(size * self.etas[1], max=self.step_sizes[1])
            shrunk = torch.clamp(size * self.etas[0], min=self.step_sizes[0])
            size = torch.where(product > 0, grown, torch.where(product < 0, shrunk, size))
            previous = torch.where(product < 0, 0.0, gradient)
        return torch.where(previous == 0, 0.0, size / previous.abs())


class ReferenceResponse:
    """An optimiser's steps, example by example: every example has a momentum buffer of its own, and so has the decay.

    Args:
        optimizer: The optimiser.
    """

    def __init__(self, optimizer: ReferenceOptimizer) -> None:
        self.optimizer = optimizer
        self._gradients: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}
        self._pulled: Tensor | None = None

    def step(
        self, rows: Mapping[int, Tensor], received: Tensor, weights: Tensor, lr: float
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """The parts of one step, eq. (4) of docs/theory.md.

        Args:
            rows: Each example's part of the gradient, as it is descended.
            received: The whole gradient, without decay: D is made of it.
            weights: The weights that the step starts from.
            lr: Learning rate of the step.

        Returns:
            Displacement by each example seen so far, displacement by decay, and D.
        """
        step, optimizer = len(self._gradients), self.optimizer
        self._gradients.append(received + optimizer.coupled_decay * weights)
        keep, inject, from_buffer, from_gradient = optimizer.linear_map(step)
        rate, diagonal = optimizer.rate(lr, step), optimizer.preconditioner(self._gradients)
        zero, one = torch.zeros_like(diagonal), torch.ones_like(diagonal)
        before, after = (diagonal, one) if optimizer.preconditions_first else (one, diagonal)
        shares = {}
        for example in {*self._buffers, *rows}:
            gradient = before * rows.get(example, zero)
            self._buffers[example] = keep * self._buffers.get(example, zero) + inject * gradient
            shares[example] = -rate * after * (from_buffer * self._buffers[example] + from_gradient * gradient)
        pulled = before * optimizer.coupled_decay * weights
        self._pulled = keep * (zero if self._pulled is None else self._pulled) + inject * pulled
        decay = -rate * after * (from_buffer * self._pulled + from_gradient * pulled)
        return shares, decay - rate * optimizer.decoupled_decay * weights, diagonal
