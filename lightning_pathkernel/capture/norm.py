"""Rules for normalisations: their parameters scale and shift a normalised input elementwise."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture.gradients import DenseGradient, PerExampleGradient, VectorGradient
from lightning_pathkernel.capture.rules import LayerCall, register_layer_rule

__all__ = ["batch_norm_rule", "group_norm_rule", "layer_norm_rule", "rms_norm_rule"]


def _trailing(layer: nn.Module, call: LayerCall, normalised: Tensor) -> dict[str, PerExampleGradient]:
    """Parameters shaped like the trailing dimensions: sum over the positions before them; overwrites ``normalised``."""
    shape = cast(Tensor, layer.weight).shape
    grads = call.grad_output.reshape(call.n, -1, *shape)
    scaled = normalised.reshape(grads.shape).mul_(grads)
    return _collect(layer, scaled.sum(1), grads.sum(1), shape[0] if len(shape) else 1)


def _channels(layer: nn.Module, call: LayerCall, normalised: Tensor) -> dict[str, PerExampleGradient]:
    """Parameters with one entry per channel (dimension 1): sum over the positions after it; as `_trailing`."""
    grads = call.grad_output.reshape(*call.grad_output.shape[:2], -1)
    scaled = normalised.reshape(grads.shape).mul_(grads)
    return _collect(layer, scaled.sum(2), grads.sum(2), grads.shape[1])


def _collect(layer: nn.Module, weight: Tensor, bias: Tensor, rows: int) -> dict[str, PerExampleGradient]:
    out: dict[str, PerExampleGradient] = {}
    for name, value in (("weight", weight), ("bias", bias)):
        if getattr(layer, name, None) is not None:
            flat = value.reshape(value.shape[0], rows, -1)
            out[name] = VectorGradient(flat[:, :, 0]) if flat.shape[2] == 1 else DenseGradient(flat)
    return out


@register_layer_rule(nn.LayerNorm)
def layer_norm_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of a layer norm: ``sum_s g_s * x_hat_s`` and ``sum_s g_s``.

    Args:
        layer: The layer.
        call: Inputs and output gradients ``[n, *s, *normalized_shape]``.

    Returns:
        Gradients of ``weight`` and ``bias``, as far as the layer has them.
    """
    norm = cast(nn.LayerNorm, layer)
    return _trailing(layer, call, F.layer_norm(call.input, norm.normalized_shape, eps=norm.eps))


@register_layer_rule(nn.RMSNorm)
def rms_norm_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of a root-mean-square norm: ``sum_s g_s * x_hat_s``.

    Args:
        layer: The layer.
        call: Inputs and output gradients ``[n, *s, *normalized_shape]``.

    Returns:
        Gradient of ``weight``.
    """
    norm = cast(nn.RMSNorm, layer)
    return _trailing(layer, call, F.rms_norm(call.input, norm.normalized_shape, eps=norm.eps))


@register_layer_rule(nn.GroupNorm)
def group_norm_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of a group norm.

    Args:
        layer: The layer.
        call: Inputs and output gradients ``[n, channels, *s]``.

    Returns:
        Gradients of ``weight`` and ``bias``, one entry per channel.
    """
    norm = cast(nn.GroupNorm, layer)
    return _channels(layer, call, F.group_norm(call.input, norm.num_groups, eps=norm.eps))


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Each row's share of a batch norm's gradient, with the batch's own statistics (docs/theory.md, section 7).

    Args:
        layer: The layer; in evaluation mode its running statistics are used.
        call: Inputs and output gradients ``[n, channels, *s]``.

    Returns:
        Gradients of ``weight`` and ``bias``, one entry per channel.
    """
    norm = cast(nn.BatchNorm2d, layer)
    if call.training or norm.running_mean is None:
        normalised = F.batch_norm(call.input, None, None, training=True, eps=norm.eps)
    else:
        normalised = F.batch_norm(call.input, norm.running_mean, norm.running_var, training=False, eps=norm.eps)
    return _channels(layer, call, normalised)
