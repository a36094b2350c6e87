"""Rule for `torch.nn.Linear`."""

from __future__ import annotations

from torch import nn

from lightning_pathkernel.capture.gradients import (
    BiasGradient,
    FactoredGradient,
    OuterGradient,
    PerExampleGradient,
    VectorGradient,
)
from lightning_pathkernel.capture.rules import LayerCall, register_layer_rule

__all__ = ["linear_rule"]


@register_layer_rule(nn.Linear)
def linear_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of a linear layer, ``G_n = sum_s g_s a_s^T``, eq. (5) of docs/theory.md.

    n: example, s: every position shared between the first and the last dimension.

    Args:
        layer: The layer.
        call: Inputs ``[n, *s, i]`` and output gradients ``[n, *s, o]``.

    Returns:
        Gradients of ``weight [o, i]`` and of ``bias [o]``.
    """
    grads, inputs = call.grad_output, call.input
    if grads.dim() == 2:
        return {"weight": OuterGradient(grads, inputs), "bias": VectorGradient(grads)}
    grads = grads.reshape(call.n, -1, grads.shape[-1])
    inputs = inputs.reshape(call.n, -1, inputs.shape[-1])
    weight = FactoredGradient(grads, inputs)
    return {"weight": weight, "bias": BiasGradient(weight)}
