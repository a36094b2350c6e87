"""Rule for `torch.nn.Embedding`."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lightning_pathkernel.capture.gradients import IndexedGradient, PerExampleGradient, zero_where
from lightning_pathkernel.capture.rules import LayerCall, register_layer_rule

__all__ = ["embedding_rule"]


@register_layer_rule(nn.Embedding)
def embedding_rule(layer: nn.Module, call: LayerCall) -> dict[str, PerExampleGradient]:
    """Per-example gradients of an embedding, ``G_n = sum_s e_{index_s} g_s^T``, eq. (5) of docs/theory.md.

    Args:
        layer: The layer; ``padding_idx`` and ``scale_grad_by_freq`` are honoured.
        call: Indices ``[n, *s]`` and output gradients ``[n, *s, d]``.

    Returns:
        Gradient of ``weight [rows, d]``.
    """
    embedding = cast(nn.Embedding, layer)
    indices = call.input.reshape(call.n, -1).long()
    grads = call.grad_output.reshape(call.n, -1, call.grad_output.shape[-1])
    if embedding.padding_idx is not None:
        grads = zero_where(indices == embedding.padding_idx, grads)
    if embedding.scale_grad_by_freq:
        counts = torch.bincount(indices.flatten(), minlength=embedding.num_embeddings)
        grads = grads / counts[indices].unsqueeze(-1).to(grads.dtype)
    return {"weight": IndexedGradient(indices, grads, embedding.num_embeddings)}
