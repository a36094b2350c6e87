"""The registry of layer rules: which layer's per-example gradients are known, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from lightning_pathkernel.capture.gradients import PerExampleGradient
from lightning_pathkernel.capture.replay import CallState

__all__ = ["LayerCall", "LayerRule", "layer_rules", "register_layer_rule"]


@dataclass(slots=True)
class LayerCall:
    """One call of a layer in the forward pass, as seen when its output's gradient arrived.

    Attributes:
        args: Positional arguments of the call, detached.
        kwargs: Keyword arguments of the call, detached.
        output_index: Which tensor of the flattened output ``grad_output`` belongs to.
        grad_output: Gradient of the loss with respect to that tensor, scaled as the backward pass left it.
        training: Whether the layer was in training mode during the call.
        n: Number of examples in the batch.
        state: What the call ran on, for a layer without a rule, which runs a second time.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    output_index: int
    grad_output: Tensor
    training: bool
    n: int
    state: CallState | None = None

    @property
    def input(self) -> Tensor:
        """The first tensor among the arguments."""
        first = self.args[0] if self.args else None
        if type(first) is Tensor:
            return first
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise TypeError("the layer was called without a tensor")


LayerRule = Callable[[nn.Module, LayerCall], Mapping[str, PerExampleGradient]]
"""``rule(layer, call)`` -> parameter name within the layer -> its per-example gradients, eq. (5).

Names that the layer does not train (no bias, or a frozen one) are passed over."""

RuleT = TypeVar("RuleT", bound=LayerRule)
_RULES: dict[type[nn.Module], LayerRule] = {}


def register_layer_rule(*layer_types: type[nn.Module], replace: bool = False) -> Callable[[RuleT], RuleT]:
    """Register a rule for layers of exactly these types; a subclass takes the fallback.

    Args:
        *layer_types: The types whose rule this is.
        replace: Allow a rule that is already there to be replaced.

    Returns:
        The decorator.

    Raises:
        ValueError: If a type has a rule already and ``replace`` is false.
    """

    def decorate(rule: RuleT) -> RuleT:
        taken = [t.__name__ for t in layer_types if t in _RULES]
        if taken and not replace:
            raise ValueError(f"layer rules exist already for {', '.join(taken)}: pass replace=True to replace them")
        for layer_type in layer_types:
            _RULES[layer_type] = rule
        return rule

    return decorate


def layer_rules() -> dict[type[nn.Module], LayerRule]:
    """A copy of the registry, by layer type."""
    return dict(_RULES)
