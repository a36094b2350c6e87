"""Rule for convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture.conv_gradients import ConvGradient, ConvScratch, grouped_conv_gradient
from lightning_pathkernel.capture.gradients import BiasGradient, DenseGradient, PerExampleGradient, VectorGradient
from lightning_pathkernel.capture.rules import LayerCall, register_layer_rule
from lightning_pathkernel.capture.windows import ConvGeometry

__all__ = ["conv_rule"]

_SCRATCH: WeakKeyDictionary[nn.Module, ConvScratch] = WeakKeyDictionary()


def _padded(layer: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The inputs, padded if the layer pads them by more than zeros on both sides alike, and the padding left to do."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return inputs, layer.padding
    amounts = list(layer._reversed_padding_repeated_twice)
    if any(amounts):
        inputs = F.pad(inputs, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    return inputs, (0,) * len(layer.kernel_size)


@register_layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of a convolution, ``G_n = sum_s g_s window_s^T``, eq. (5) of docs/theory.md.

    Args:
        layer: The layer, with any stride, padding, padding mode, dilation and number of groups.
        call: Inputs ``[n, c_in, *]`` and output gradients ``[n, c_out, *]``.

    Returns:
        Gradients of ``weight [c_out, c_in / groups * window]`` and of ``bias [c_out]``.
    """
    conv = cast(nn.Conv2d, layer)
    inputs, padding = _padded(conv, call.input)
    grads = call.grad_output
    geometry = ConvGeometry(conv.kernel_size, conv.stride, padding, conv.dilation, tuple(grads.shape[2:]))
    if conv.groups != 1:
        out: dict[str, PerExampleGradient] = {}
        out["weight"] = DenseGradient(grouped_conv_gradient(inputs, grads, geometry, conv.groups))
        if conv.bias is not None:
            out["bias"] = VectorGradient(grads.flatten(2).sum(2))
        return out
    if layer not in _SCRATCH:
        _SCRATCH[layer] = ConvScratch()
    shared = ConvGradient(inputs, grads, geometry, _SCRATCH[layer])
    return {"weight": shared, "bias": BiasGradient(shared)}
