"""The registry of optimiser rules: an update as a linear map of the gradients it has seen.

For one parameter and one step an optimiser is described, eq. (4) of docs/theory.md, by

    h  = sign * g + coupled_decay * w
    b  <- keep * b + inject * h
    m  = from_buffer * b + from_gradient * h
    w  <- w - rate * D . m - decay_rate * w

with scalars read after the step and a diagonal preconditioner D, which is the identity unless the rule is diagonal.
With ``before_buffer`` D multiplies h as it enters the buffer, as in RMSprop with momentum:

    b  <- keep * b + inject * D . h
    m  = from_buffer * b + from_gradient * D . h
    w  <- w - rate * m - decay_rate * w

so that every gradient keeps the D of its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "ForeseeableRule",
    "OptimizerRule",
    "ParameterUpdate",
    "UnsupportedOptimizerError",
    "optimizer_rule",
    "optimizer_rules",
    "register_optimizer_rule",
]


class UnsupportedOptimizerError(ValueError):
    """The optimiser, or an option of it, has no rule."""


class ParameterUpdate(NamedTuple):
    """The scalars of one parameter's update, as in this module's header."""

    rate: float
    keep: float = 0.0
    inject: float = 1.0
    from_buffer: float = 0.0
    from_gradient: float = 1.0
    sign: float = 1.0
    coupled_decay: float = 0.0
    decay_rate: float = 0.0
    before_buffer: bool = False


class OptimizerRule(Protocol):
    """What is known of an optimiser."""

    diagonal: bool
    """Whether it has a preconditioner D."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `UnsupportedOptimizerError` for options that the rule does not cover."""
        ...

    def update(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> ParameterUpdate:
        """The scalars of a parameter's latest step; ``first`` on the parameter's first step."""
        ...

    def buffer(self, state: Mapping[str, Any]) -> Tensor | None:
        """The momentum buffer ``b`` after the step, if there is one; with D inside if ``before_buffer``."""
        ...

    def moved(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
        """Which weights have moved so far, as a mask; elsewhere D is 0 or means nothing. For diagonal optimisers."""
        ...

    def denominators(
        self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """``1 / D`` of the latest step of several parameters; for diagonal optimisers only.

        Args:
            group: Their group.
            states: Their states after the step. They have one `ParameterUpdate`, but not always one number of steps.
            directions: What D multiplied in this step, for rules whose D depends on it: h with ``before_buffer``, and m
                otherwise. Where ``from_gradient`` is 0, m is a multiple of the buffer and the buffer itself is passed.
                Not to be changed.

        Returns:
            New tensors, which the caller may overwrite; infinite where D is 0, and never 0 where the direction is.
        """
        ...


@runtime_checkable
class ForeseeableRule(OptimizerRule, Protocol):
    """What some rules know of the step to come. It spares the recorder work in every step, and changes no result.

    For diagonal optimisers that multiply D with their momentum buffer.
    """

    def decay_rate(self, group: Mapping[str, Any]) -> float:
        """`ParameterUpdate.decay_rate` of the step to come; 0 where there is none, or where decay is coupled."""
        ...

    def rise(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        """Factor by which D grows at most in the parameter's next step; infinite where that is not known."""
        ...


_RULES: dict[type[torch.optim.Optimizer], OptimizerRule] = {}


def register_optimizer_rule(
    *optimizer_types: type[torch.optim.Optimizer],
) -> Callable[[type[OptimizerRule]], type[OptimizerRule]]:
    """Register a rule class for optimisers of exactly these types.

    Args:
        *optimizer_types: The types.

    Returns:
        The decorator.

    Raises:
        ValueError: If a type has a rule already.
    """

    def decorate(rule: type[OptimizerRule]) -> type[OptimizerRule]:
        taken = [t.__name__ for t in optimizer_types if t in _RULES]
        if taken:
            raise ValueError(f"optimiser rules exist already for {', '.join(taken)}")
        for optimizer_type in optimizer_types:
            _RULES[optimizer_type] = rule()
        return rule

    return decorate


def optimizer_rules() -> dict[type[torch.optim.Optimizer], OptimizerRule]:
    """A copy of the registry, by optimiser type."""
    return dict(_RULES)


@overload
def optimizer_rule(optimizer: torch.optim.Optimizer) -> OptimizerRule: ...


@overload
def optimizer_rule(optimizer: torch.optim.Optimizer, allow_missing: bool) -> OptimizerRule | None: ...


def optimizer_rule(optimizer: torch.optim.Optimizer, allow_missing: bool = False) -> OptimizerRule | None:
    """The rule of an optimiser.

    Args:
        optimizer: The raw torch optimiser.
        allow_missing: Return None where there is no rule, or none for its options.

    Returns:
        Its rule.

    Raises:
        UnsupportedOptimizerError: If there is none, with the list of those there are.
    """
    rule = _RULES.get(type(optimizer))
    if rule is None and allow_missing:
        return None
    if rule is None:
        known = ", ".join(sorted(t.__name__ for t in _RULES))
        raise UnsupportedOptimizerError(
            f"No optimiser rule for {type(optimizer).__name__}. Supported: {known}. Use one of these, or register "
            "a rule with @register_optimizer_rule, or pass unattributed='allow'."
        )
    try:
        rule.check(optimizer)
    except UnsupportedOptimizerError:
        if not allow_missing:
            raise
        return None
    return rule
