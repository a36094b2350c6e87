"""Any module that owns parameters, by the vector-Jacobian product of its own forward pass, example by example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture.errors import CaptureError
from lightning_pathkernel.capture.gradients import DenseGradient, PerExampleGradient, matrix_shape
from lightning_pathkernel.capture.precision import in_parameter_dtype
from lightning_pathkernel.capture.replay import mixes_rows, repeatable, replayed
from lightning_pathkernel.capture.rules import LayerCall

__all__ = ["batch_dimension", "fallback_gradients", "least_dimension"]

Rows = Mapping[str, Tensor]


def batch_dimension(layer: nn.Module) -> int:
    """The dimension that holds the examples: 0, or 1 for a layer with ``batch_first=False``."""
    return 0 if getattr(layer, "batch_first", True) else 1


def least_dimension(layer: nn.Module) -> int:
    """A batched input has more dimensions than this; attention and recurrent layers also take unbatched ones of two."""
    return 2 if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) else batch_dimension(layer)


def fallback_gradients(layer: nn.Module, call: LayerCall, names: Sequence[str]) -> dict[str, PerExampleGradient]:
    """Per-example gradients of the named parameters by `torch.func.vmap` of the layer's own VJP.

    Where the layer has no batching rule, a loop over the examples takes its place: slower, the same numbers. Where one
    row alone cannot be run again as it was (dropout inside, batch statistics), the whole batch is, with the random
    numbers of the call, and one backward pass for each row of its output: slower still, and exact too.

    Args:
        layer: Any module.
        call: One call of it; every tensor argument that carries the batch holds it in `batch_dimension`.
        names: Parameters, by their name within the layer.

    Returns:
        Parameter name -> dense per-example gradients, in the parameters' precision.
    """
    call = in_parameter_dtype(layer, call)
    parameters = {name: layer.get_parameter(name).detach() for name in names}
    random = call.state.random if call.state is not None else None
    with repeatable(layer), replayed(random, call.grad_output.device), torch.enable_grad():
        rows = None if random is not None or mixes_rows(layer) else _over_examples(layer, call, parameters)
        if rows is None:
            rows = _row_by_row(layer, call, parameters)
    return {name: DenseGradient(rows[name].reshape(call.n, *matrix_shape(parameters[name].shape))) for name in names}


def _rerun(layer: nn.Module, call: LayerCall, params: Rows, args: tuple[object, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output whose gradient arrived, as a function of some parameters; the layer's buffers stay as they are."""
    # each use for itself: of tied parameters, one may be another layer's to answer for
    tensors = {**_fixed(layer, set(params)), **params, **({} if call.state is None else call.state.buffers)}
    out = torch.func.functional_call(layer, tensors, args, kwargs, tie_weights=False)
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)][call.output_index]


def _fixed(layer: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """All other parameters, and copies of the buffers, each module's under one of its names."""
    parts = [name.rpartition(".") for name in names]
    taken = {(id(layer.get_submodule(prefix)), leaf) for prefix, _, leaf in parts}
    fixed = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, p in module._parameters.items():
            if p is not None and (id(module), leaf) not in taken:
                fixed[prefix + leaf] = p.detach()
        fixed.update({prefix + leaf: b.clone() for leaf, b in module._buffers.items() if b is not None})
    return fixed


def _row_by_row(layer: nn.Module, call: LayerCall, parameters: Rows) -> Rows:
    """One forward pass of the whole batch, and one backward pass for every row of its output.

    Args:
        layer: The layer.
        call: Its call.
        parameters: Name within the layer -> value.

    Returns:
        Name -> ``[n, *shape]``.

    Raises:
        CaptureError: If torch cannot do that, as with reentrant checkpointing inside the layer.
    """
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    output = _rerun(layer, call, leaves, call.args, dict(call.kwargs))
    dim = _output_dim(layer, call)
    rows = []
    try:
        for i in range(call.n):
            grad = torch.zeros_like(output)
            grad.select(dim, i).copy_(call.grad_output.select(dim, i))
            found = torch.autograd.grad(output, list(leaves.values()), grad, retain_graph=True, materialize_grads=True)
            rows.append(found)
    except RuntimeError as error:
        names = ", ".join(map(repr, parameters))
        raise CaptureError(
            f"a {type(layer).__name__} that answers for {names} cannot be run again: {error} "
            "Own these parameters in a module that does little else, or register a layer rule."
        ) from error
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(leaves)}


def _over_examples(layer: nn.Module, call: LayerCall, parameters: Rows) -> Rows | None:
    """Every example by itself, all at once by vmap or else one after the other; None if no transform works."""
    bound = inspect.signature(layer.forward).bind(*call.args, **call.kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    dims = [_argument_dim(layer, call.n, name, leaf) for name, v in bound.items() for leaf in pytree.tree_leaves(v)]
    grad_dim = _output_dim(layer, call)

    def one(grad: Tensor, *values: Any) -> Rows:
        full = [v if d is None else v.unsqueeze(d) for v, d in zip(values, dims, strict=True)]
        args, kwargs = _call_form(layer, pytree.tree_unflatten(full, spec))
        output, vjp, *_ = torch.func.vjp(lambda params: _rerun(layer, call, params, args, kwargs), parameters)
        gradients: dict[str, Tensor] = vjp(grad.reshape(output.shape).to(output.dtype))[0]
        return gradients

    try:
        mapped: Callable[..., Rows] = torch.func.vmap(one, in_dims=(grad_dim, *dims), randomness="same")
        return mapped(call.grad_output, *leaves)
    except (RuntimeError, NotImplementedError):
        rows = []
    try:
        for i in range(call.n):
            values = [v if d is None else v.select(d, i) for v, d in zip(leaves, dims, strict=True)]
            rows.append(one(call.grad_output.select(grad_dim, i), *values))
    except (RuntimeError, NotImplementedError):  # checkpointing inside the layer
        return None
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


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
