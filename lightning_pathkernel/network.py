"""The network as a function of its weights: outputs, directional derivatives and per-example gradients anywhere.

Everything runs in evaluation mode, leaves no ``p.grad`` behind, draws no random number and restores the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_pathkernel.capture import CapturePlan, GradientCapture, PerExampleGradient, RowGroup

__all__ = [
    "ForwardFn",
    "Functional",
    "Network",
    "Tensors",
    "batch_size",
    "default_forward",
    "detached_copy",
    "float_buffers",
    "in_parts",
    "on_device",
    "take_rows",
]

Tensors = Mapping[str, Tensor]
"""Parameter or buffer name -> tensor."""
ForwardFn = Callable[[Any, Any], Tensor]
"""``(module, batch) -> outputs [n, K]``."""
Functional = Callable[[Tensor], Tensor]
"""Outputs ``[n, K]`` -> one number per row ``[n]``."""


def default_forward(module: nn.Module, batch: object) -> Tensor:
    """The module called on the batch, or on its first element when the batch is a tuple or a list."""
    outputs: Tensor = module(batch[0] if isinstance(batch, tuple | list) else batch)
    return outputs


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers by name: the part of the state that moves without the optimiser."""
    return {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def _tensor_leaves(batch: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]


def batch_size(batch: object) -> int:
    """Number of rows of a batch.

    Args:
        batch: Tensors, nested in any way.

    Returns:
        The first dimension of its first tensor that has one.

    Raises:
        ValueError: If there is no tensor with a first dimension in it.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    for leaf in [first] if type(first) is Tensor and first.dim() else _tensor_leaves(batch):
        if leaf.dim():
            return int(leaf.shape[0])
    raise ValueError(f"cannot tell the batch size of a {type(batch).__name__}: it contains no tensor with rows")


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """Some rows of every tensor of a batch that has one row per example.

    Args:
        batch: Tensors, nested in any way.
        rows: Which, as a slice or as indices.

    Returns:
        The batch with these rows; everything else in it as it was.
    """
    n = batch_size(batch)

    def take(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == n
        return value[rows] if fits else value

    return pytree.tree_map(take, batch)


def in_parts(batch: Any, rows: int) -> list[Any]:
    """A batch cut into parts of at most so many rows."""
    return [take_rows(batch, slice(start, start + rows)) for start in range(0, batch_size(batch), rows)]


def detached_copy(module: nn.Module) -> nn.Module:
    """A deep copy without a trainer behind it."""
    trainer = module.__dict__.pop("_trainer", None)
    try:
        return copy.deepcopy(module)
    finally:
        if trainer is not None:
            module.__dict__["_trainer"] = trainer


def on_device(value: Any, device: torch.device) -> Any:
    """Every tensor of a batch, a mapping or any other nesting on a device; what is there already is not copied."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


class _Forward(nn.Module):
    """Lets `torch.func.functional_call` reach a module through a user's forward function."""

    def __init__(self, module: nn.Module, forward_fn: ForwardFn) -> None:
        super().__init__()
        self.module = module
        self.forward_fn = forward_fn

    def forward(self, batch: object) -> Tensor:
        return self.forward_fn(self.module, batch)


class Network:
    """A module, what its outputs are, and the parameters that its path moves.

    Args:
        module: The module; shared with its owner, never left changed.
        plan: Its trainable parameters and the layers that use them.
        forward_fn: ``(module, batch) -> outputs [n, K]`` (``[n]`` is taken as ``[n, 1]``).
    """

    def __init__(self, module: nn.Module, plan: CapturePlan, forward_fn: ForwardFn | None = None) -> None:
        self.module = module
        self.plan = plan
        self.forward_fn = forward_fn or default_forward
        self._forward = _Forward(module, self.forward_fn)
        self.parameters = {name: p for name, p in plan.parameters.items() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(iter(self.plan.parameters.values())).device

    def activate(self, names: Sequence[str]) -> None:
        """Take in parameters of the plan that begin to learn only now."""
        for name in names:
            self.parameters[name] = self.plan.parameters[name]

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trainable weights as they are now."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        """A copy of the floating-point buffers as they are now."""
        return {name: b.detach().clone() for name, b in float_buffers(self.module).items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode with differentiable kernels; modes and switches are restored."""
        modes = {m: m.training for m in self.module.modules()}
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device in {"cpu", *(p.device.type for p in self.plan.parameters.values())}:
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            try:
                self.module.eval()
                torch.backends.mha.set_fastpath_enabled(False)
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)
                for module, training in modes.items():
                    module.training = training

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Exactly the trainable parameters require gradients, whatever is toggled at the moment."""
        states = {name: p.requires_grad for name, p in self.plan.parameters.items()}
        try:
            for name, parameter in self.plan.parameters.items():
                if parameter.requires_grad != (name in self.parameters):
                    parameter.requires_grad_(name in self.parameters)
            yield
        finally:
            for name, parameter in self.plan.parameters.items():
                if parameter.requires_grad != states[name]:
                    parameter.requires_grad_(states[name])

    @contextmanager
    def at(self, weights: Tensors | None, buffers: Tensors | None) -> Iterator[None]:
        """Put other weights and buffers in the module's place for a while; None leaves them."""
        live = {**self.parameters, **float_buffers(self.module)}
        swapped = {name: live[name].data for name in (*(weights or ()), *(buffers or ()))}
        try:
            for name, value in {**(weights or {}), **(buffers or {})}.items():
                live[name].data = value.to(live[name])
            yield
        finally:
            for name, value in swapped.items():
                live[name].data = value

    def outputs(
        self,
        batch: object,
        weights: Tensors | None = None,
        buffers: Tensors | None = None,
        functional: Functional | None = None,
    ) -> Tensor:
        """Outputs ``[n, K]`` at the given weights; ``[n, 1]`` under a functional."""
        with self.evaluating(), self.at(weights, buffers), torch.no_grad():
            return _apply(functional, self.forward_fn(self.module, batch))

    def jvps(
        self,
        batch: object,
        weights: Tensors,
        buffers: Tensors,
        directions: Sequence[Tensors],
        functional: Functional | None = None,
    ) -> list[Tensor]:
        """Directional derivatives ``J(x) d`` for each direction, ``[n, K]`` each; ``[n, 1]`` under a functional.

        Forward-mode differentiation where every operation has it, otherwise two reverse passes.

        Args:
            batch: Inputs.
            weights: Where to differentiate.
            buffers: Buffers to use.
            directions: Parameter -> direction, absent parameters standing for 0.
            functional: Scalar of the outputs to differentiate; None for the outputs.

        Returns:
            One tensor per direction.
        """
        at = {name: w.to(self.parameters[name]) for name, w in weights.items()}
        live = float_buffers(self.module)
        fixed = {f"module.{name}": b.to(live[name]) for name, b in buffers.items()}

        def run(values: dict[str, Tensor]) -> Tensor:
            named = {f"module.{name}": v for name, v in values.items()}
            out: Tensor = torch.func.functional_call(self._forward, {**named, **fixed}, (batch,))
            return _apply(functional, out)

        results = []
        with self.evaluating():
            for direction in directions:
                tangent = {n: direction[n].to(w) if n in direction else torch.zeros_like(w) for n, w in at.items()}
                results.append(_jvp(run, at, tangent))
        return results

    def per_example_gradients(
        self,
        batch: object,
        functional: Functional,
        sink: Callable[[str, PerExampleGradient], None],
        weights: Tensors | None = None,
        buffers: Tensors | None = None,
    ) -> None:
        """Send the per-example gradients of a scalar per row to ``sink``.

        Args:
            batch: The queries.
            functional: ``outputs [n, K] -> [n]``.
            sink: Called with ``(parameter, gradient)`` for each use of a parameter.
            weights: Where to differentiate; None for the module's own.
            buffers: Buffers to use; None for the module's own.
        """
        capture = GradientCapture(self.module, self.plan).attach()
        parameters = list(self.parameters.values())
        try:
            with self.evaluating(), self.learning(), self.at(weights, buffers), torch.enable_grad():
                capture.begin([RowGroup(batch_size(batch))])
                scalar = functional(as_matrix(self.forward_fn(self.module, batch))).sum()
                capture.listen(lambda _, name, gradient: sink(name, gradient))
                torch.autograd.grad(scalar, parameters, allow_unused=True)
                capture.check()
        finally:
            capture.detach()


def as_matrix(outputs: object) -> Tensor:
    """Outputs as ``[n, K]``.

    Args:
        outputs: What a forward function returned.

    Returns:
        The outputs, ``[n]`` turned into ``[n, 1]``.

    Raises:
        ValueError: If they are anything but a tensor ``[n]`` or ``[n, K]``.
    """
    if isinstance(outputs, Tensor) and outputs.dim() in (1, 2):
        return outputs.unsqueeze(1) if outputs.dim() == 1 else outputs
    found = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"the network's outputs must be a tensor [n, K] or [n], found {found}: pass forward_fn=, a function "
        "(module, batch) -> outputs [n, K]"
    )


def _apply(functional: Functional | None, outputs: object) -> Tensor:
    matrix = as_matrix(outputs)
    return matrix if functional is None else as_matrix(functional(matrix))


def _jvp(run: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], tangent: dict[str, Tensor]) -> Tensor:
    try:
        with torch.no_grad():
            derivative: Tensor = torch.func.jvp(run, (at,), (tangent,))[1]
    except (RuntimeError, NotImplementedError) as error:
        if "forward" not in str(error).lower():
            raise
        derivative = _double_backward_jvp(run, at, tangent)
    return derivative.detach()


def _double_backward_jvp(
    run: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], tangent: dict[str, Tensor]
) -> Tensor:
    """``J t`` as the derivative of ``u -> u^T J t``: for operations without forward-mode differentiation."""
    with torch.enable_grad():
        leaves = {name: w.detach().requires_grad_() for name, w in at.items()}
        outputs = run(leaves)
        dual = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, list(leaves.values()), dual, create_graph=True, allow_unused=True)
        terms = [(g * t).sum() for g, t in zip(pulled, (tangent[n] for n in leaves), strict=True) if g is not None]
        (derivative,) = torch.autograd.grad(torch.stack(terms).sum(), dual)
    return derivative
