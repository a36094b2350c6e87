"""Rule for `torch.nn.MultiheadAttention`: linear layers around an attention that is run again for its gradients.

The attention between the projections, dropout included, is run once more on the whole batch with the random numbers
of the call, its projections replaced by identities. That yields what the rule of a linear layer needs: the output
projection's inputs, and the gradients with respect to the outputs of the input projections.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture.gradients import (
    BiasGradient,
    DenseGradient,
    FactoredGradient,
    PerExampleGradient,
    VectorGradient,
)
from lightning_pathkernel.capture.replay import replayed
from lightning_pathkernel.capture.rules import LayerCall, register_layer_rule

__all__ = ["attention_rule"]

_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


@register_layer_rule(nn.MultiheadAttention)
def attention_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of multi-head attention, ``G_n = sum_s g_s a_s^T`` for each projection, eq. (5).

    n: example, s: position, e: embedding dimension.

    Args:
        layer: The layer.
        call: Query, key and value, ``[s, n, e]`` or ``[n, s, e]``, with any masks, and the gradient of the output or
            of the attention weights.

    Returns:
        Gradients of the input projections (``in_proj_weight [3 e, e]``, or one for each) and of the output projection.
    """
    attention = cast(nn.MultiheadAttention, layer)
    bound = inspect.signature(layer.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    options = {name: bound.arguments[name] for name in _OPTIONS}
    time_first = [_swap(bound.arguments[name], attention) for name in ("query", "key", "value")]
    projected = [F.linear(x, *p) for x, p in zip(time_first, _projections(attention), strict=True)]
    extra = attention.bias_k is not None
    if extra:
        projected, options = _with_biases(attention, projected, options)
    mixed, pulled = _attend(attention, call, projected, options)
    inputs, grads = ([x.transpose(0, 1) for x in side] for side in (time_first, pulled))
    out: dict[str, PerExampleGradient] = {}
    if extra:
        out = {"bias_k": DenseGradient(grads[1][:, -1:]), "bias_v": DenseGradient(grads[2][:, -1:])}
        grads = [grads[0], grads[1][:, :-1], grads[2][:, :-1]]
    out.update(_input_gradients(attention, inputs, grads))
    if call.output_index == 0:
        grad = _swap(call.grad_output, attention).transpose(0, 1)
        weight = FactoredGradient(grad, mixed.transpose(0, 1))
        out.update({"out_proj.weight": weight, "out_proj.bias": BiasGradient(weight)})
    return out


def _with_biases(
    attention: nn.MultiheadAttention, projected: list[Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """The biases of ``add_bias_kv`` as one more position of key and value, hidden by no mask."""
    query, *others = projected
    biases = (attention.bias_k, attention.bias_v)
    longer = [torch.cat([x, cast(Tensor, b).expand(1, *x.shape[1:])]) for x, b in zip(others, biases, strict=True)]
    masks = {name: options[name] for name in ("key_padding_mask", "attn_mask") if options[name] is not None}
    return [query, *longer], {**options, **{name: F.pad(mask, (0, 1)) for name, mask in masks.items()}}


def _swap(x: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """Between the layer's own layout and time first."""
    return x.transpose(0, 1) if attention.batch_first else x


def _projections(attention: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the projections of query, key and value."""
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return list(zip(weights, biases, strict=True))


def _attend(
    attention: nn.MultiheadAttention, call: LayerCall, projected: list[Tensor], options: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The attention itself, from projected query, key and value ``[s, n, e]``.

    Args:
        attention: The layer.
        call: Its call.
        projected: Query, key and value after their projections.
        options: Masks and switches of the call.

    Returns:
        Its output before the output projection, and the gradients with respect to ``projected``.
    """
    one = torch.eye(attention.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    random = call.state.random if call.state is not None else None
    with replayed(random, call.grad_output.device), torch.enable_grad():
        query, key, value = leaves = [x.detach().requires_grad_() for x in projected]
        outputs = F.multi_head_attention_forward(
            query, key, value, attention.embed_dim, attention.num_heads, one.repeat(3, 1), None, None, None,
            attention.add_zero_attn, attention.dropout, one, None, training=call.training, **options,
        )  # fmt: skip
        if call.output_index:
            grad = call.grad_output
        else:
            grad = _swap(call.grad_output, attention) @ attention.out_proj.weight.detach()
        pulled = torch.autograd.grad(
            cast(Tensor, outputs[call.output_index]), leaves, grad, allow_unused=True, materialize_grads=True
        )
    return outputs[0].detach(), pulled


def _input_gradients(
    attention: nn.MultiheadAttention, inputs: list[Tensor], grads: list[Tensor]
) -> dict[str, PerExampleGradient]:
    """Gradients of the input projections, from what went in and the gradient of what came out, ``[n, s, e]`` each."""
    out: dict[str, PerExampleGradient] = {}
    if not attention._qkv_same_embed_dim:
        for name, x, g in zip("qkv", inputs, grads, strict=True):
            out[f"{name}_proj_weight"] = FactoredGradient(g, x)
    elif all(_same(inputs[0], x) for x in inputs[1:]):
        out["in_proj_weight"] = FactoredGradient(torch.cat(grads, 2), inputs[0])
    else:
        blocks = [g.transpose(1, 2) @ x for g, x in zip(grads, inputs, strict=True)]
        out["in_proj_weight"] = DenseGradient(torch.cat(blocks, 1))
    if attention.in_proj_bias is not None:
        out["in_proj_bias"] = VectorGradient(torch.cat([g.sum(1) for g in grads], 1))
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, as query, key and value are in self-attention."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
