"""Any module that owns parameters, by the vector-Jacobian product of its own forward pass, example by example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture.gradients import DenseGradient, PerExampleGradient, matrix_shape
from lightning_pathkernel.capture.rules import LayerCall

__all__ = ["batch_dimension", "fallback_gradients"]


def batch_dimension(layer: nn.Module) -> int:
    """The dimension that holds the examples: 0, or 1 for a layer with ``batch_first=False``."""
    return 0 if getattr(layer, "batch_first", True) else 1


def fallback_gradients(layer: nn.Module, call: LayerCall, names: Sequence[str]) -> dict[str, PerExampleGradient]:
    """Per-example gradients of the named parameters by `torch.func.vmap` of the layer's own VJP.

    Where the layer has no batching rule, a loop over the examples takes its place: slower, the same numbers.

    Args:
        layer: Any module.
        call: One call of it; every tensor argument that carries the batch holds it in `batch_dimension`.
        names: Parameters, by their name within the layer.

    Returns:
        Parameter name -> dense per-example gradients.
    """
    bound = inspect.signature(layer.forward).bind(*call.args, **call.kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    dims = [_argument_dim(layer, call.n, name, leaf) for name, v in bound.items() for leaf in pytree.tree_leaves(v)]
    parameters = {name: layer.get_parameter(name).detach() for name in names}
    frozen = {k: v.detach() for k, v in layer.named_parameters() if k not in parameters}

    def one(grad: Tensor, *values: Any) -> dict[str, Tensor]:
        full = [v if d is None else v.unsqueeze(d) for v, d in zip(values, dims, strict=True)]
        args, kwargs = _call_form(layer, pytree.tree_unflatten(full, spec))

        def run(params: dict[str, Tensor]) -> Tensor:
            buffers = {k: v.clone() for k, v in layer.named_buffers()}
            out = torch.func.functional_call(layer, {**frozen, **params, **buffers}, args, kwargs)
            tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
            return tensors[call.output_index]

        output, vjp, *_ = torch.func.vjp(run, parameters)
        gradients: dict[str, Tensor] = vjp(grad.reshape(output.shape))[0]
        return gradients

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        rows = _over_examples(one, call, leaves, dims, _output_dim(layer, call))
    return {name: DenseGradient(rows[name].reshape(call.n, *matrix_shape(parameters[name].shape))) for name in names}


def _call_form(layer: nn.Module, arguments: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Named arguments back as ``(args, kwargs)``, whatever kinds of parameters ``forward`` has."""
    bound = inspect.signature(layer.forward).bind_partial()
    bound.arguments.update(arguments)
    return bound.args, bound.kwargs


def _argument_dim(layer: nn.Module, n: int, name: str, value: object) -> int | None:
    """The dimension of an argument that holds the examples, or None where it is shared by all of them."""
    if not isinstance(value, Tensor):
        return None
    dim = batch_dimension(layer)
    if isinstance(layer, nn.MultiheadAttention):
        dim = {"attn_mask": -1, "key_padding_mask": 0}.get(name, dim)
    elif isinstance(layer, nn.RNNBase):
        dim = 1 if name == "hx" else dim
    return dim if 0 <= dim < value.dim() and value.shape[dim] == n else None


def _output_dim(layer: nn.Module, call: LayerCall) -> int:
    """The dimension of the output, whose gradient arrived, that holds the examples."""
    if call.output_index and isinstance(layer, nn.RNNBase):
        return 1
    if call.output_index and isinstance(layer, nn.MultiheadAttention):
        return 0
    return batch_dimension(layer)


def _over_examples(
    one: Callable[..., Mapping[str, Tensor]],
    call: LayerCall,
    leaves: list[object],
    dims: list[int | None],
    grad_dim: int,
) -> Mapping[str, Tensor]:
    try:
        return torch.func.vmap(one, in_dims=(grad_dim, *dims), randomness="same")(call.grad_output, *leaves)
    except (RuntimeError, NotImplementedError):
        rows = []
        for i in range(call.n):
            values = [v if d is None else v.select(d, i) for v, d in zip(leaves, dims, strict=True)]  # type: ignore[attr-defined]
            rows.append(one(call.grad_output.select(grad_dim, i), *values))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
