"""Forward hook plus tensor hook: per-example gradients out of the user's own backward pass.

A forward hook notes each call of an owned layer; a hook on the call's output receives the gradient and hands the
layer's rule both. Unlike full backward hooks this leaves the graph as it was, and in-place activations work. A
parameter whose own module is not called with the batch (positions shared by all examples, a bare `nn.Parameter`)
is taken care of by the nearest enclosing module that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_pathkernel.capture.fallback import batch_dimension, fallback_gradients, least_dimension
from lightning_pathkernel.capture.gradients import PerExampleGradient
from lightning_pathkernel.capture.groups import CallGroups, RowGroup
from lightning_pathkernel.capture.hook import OwnHook
from lightning_pathkernel.capture.plan import CaptureError, CapturePlan, OwnedLayer
from lightning_pathkernel.capture.positions import by_position, unsplit
from lightning_pathkernel.capture.precision import full_precision, in_parameter_dtype
from lightning_pathkernel.capture.replay import CallState, call_state, random_state
from lightning_pathkernel.capture.rules import LayerCall

__all__ = ["GradientCapture", "GradientSink"]

_Arguments = tuple[tuple[object, ...], dict[str, object]]
GradientSink = Callable[[int, str, PerExampleGradient], None]
"""``sink(group, parameter, gradient)``: called once for each use of a parameter in the backward pass."""


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


class GradientCapture:
    """Hooks on every owned layer of a model.

    Forward passes are noted between `begin` and `end`; gradients are sent between `listen` and `mute`, so that those
    that a training step takes for itself (a gradient penalty) are left alone.

    Args:
        model: The network.
        plan: Who answers for which parameter.

    Attributes:
        seconds: Time spent in the hooks since the last reset, wall clock.
        positions: Positions of every example that are rows of their own; 0 for whole examples.
        lenient: Leave alone what cannot be split among the examples, instead of raising.
        retain: Keep a layer's input after its gradient has arrived, for backward passes that retain their graph.
    """

    def __init__(self, model: nn.Module, plan: CapturePlan) -> None:
        self._model = model
        self._owners = {id(layer.module): layer for layer in plan.layers}
        self._parameters = plan.parameters
        self._parents = _parents(model)
        self._random: dict[int, Tensor | None] = {}
        self._answered: set[str] = set()
        self._recomputed: set[str] = set()
        self._pending: dict[int, dict[str, str]] = {}
        self._handles: list[RemovableHandle] = []
        self._noting = False
        self._sink: GradientSink | None = None
        self._groups = CallGroups()
        self._batch = 0
        self.retain = False
        self.lenient = False
        self.positions = 0
        self.seconds = 0.0

    def attach(self) -> GradientCapture:
        """Install the hooks.

        Returns:
            This object.
        """
        for module in self._model.modules():
            owner = self._owners.get(id(module))
            if owner is not None and owner.rule is not None:
                self._handles.append(module.register_forward_hook(OwnHook(self._layer_hook(owner)), with_kwargs=True))
            if (owner is not None and owner.rule is None) or next(module.children(), None) is not None:
                self._handles.append(module.register_forward_pre_hook(OwnHook(self._before_forward)))
                self._handles.append(module.register_forward_hook(OwnHook(self._after_forward), with_kwargs=True))
        return self

    def _before_forward(self, module: nn.Module, args: object) -> None:
        """Of a module that may have to run a second time: with the random numbers it draws now."""
        if self._noting and module.training and torch.is_grad_enabled():
            self._random[id(module)] = random_state(next(iter(self._parameters.values())).device)

    def _trains(self, owner: OwnedLayer) -> bool:
        """Whether any parameter of the layer requires a gradient at the moment."""
        return any(self._parameters[name].requires_grad for name in owner.parameters.values())

    def _layer_hook(self, owner: OwnedLayer) -> Callable[..., None]:
        """A hook for a layer with a rule, short because it runs in every step."""
        dim, least = batch_dimension(owner.module), least_dimension(owner.module)
        parameters = [self._parameters[name] for name in owner.parameters.values()]
        groups, random, key = self._groups, self._random, id(owner.module)

        def after_forward(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> None:
            if not self._noting:
                return
            for parameter in parameters:
                if parameter.requires_grad:
                    break
            else:
                return
            start = time.perf_counter()
            first = args[0] if len(args) == 1 and not kwargs else None
            if type(first) is Tensor and type(output) is Tensor:
                shape, shape_out = first.shape, output.shape
                fits = len(shape) > least < len(shape_out) and shape[dim] == groups.n == shape_out[dim]
                if fits and key not in random:
                    if output.requires_grad:
                        output.register_hook(_Call(self, owner, (first.detach(),), kwargs, 0, None))
                    self.seconds += time.perf_counter() - start
                    return
            else:
                fits = self._batched(module, args, kwargs, output)
            if fits:
                self._watch(owner, args, kwargs, output)
            elif torch.is_grad_enabled():
                self._watch_pending(module, owner.parameters, args, kwargs, output)
            self.seconds += time.perf_counter() - start

        return after_forward

    def detach(self) -> None:
        """Remove the hooks."""
        self.end()
        self._groups = CallGroups()
        while self._handles:
            self._handles.pop().remove()

    def begin(self, groups: Sequence[RowGroup]) -> None:
        """Note the coming forward passes of a batch.

        Args:
            groups: The rows that a layer may be called with; one group unless several loaders feed the batch.
        """
        self._noting = True
        self._batch += 1
        self._clear()
        self._groups.begin(groups)
        if len(groups) > 1 and not self._groups.followed:
            self._handles.extend(self._groups.follow(self._model))

    def listen(self, sink: GradientSink) -> None:
        """Send the per-example gradients of the coming backward pass to ``sink``."""
        self._sink = sink

    def mute(self) -> None:
        """The backward pass is over."""
        self._sink = None

    def end(self) -> None:
        """The batch is over: note nothing more."""
        self._noting, self._sink = False, None
        self._clear()

    def _clear(self) -> None:
        for noted in (self._pending, self._random, self._answered, self._recomputed):
            noted.clear()

    def check(self) -> None:
        """Raise what a hook found wrong; hooks cannot raise through the user's code without harm.

        Raises:
            CaptureError: If a parameter's gradient could not be split among the examples.
        """
        if not self._pending:
            return
        # checkpointing runs layers again in the backward pass; that their first run found who answers is enough
        found = self._recomputed & self._answered
        names = sorted({name for owned in self._pending.values() for name in owned.values()} - found)
        if names:
            raise CaptureError(_unbatched(names, self._groups.n))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note and send nothing for a while: for forward passes that are not the training step's."""
        noting, sink = self._noting, self._sink
        self._noting, self._sink = False, None
        try:
            yield
        finally:
            self._noting, self._sink = noting, sink

    def _after_forward(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Of a module without a rule, or one whose children left parameters to it."""
        if not self._noting or not torch.is_grad_enabled():
            return
        owner = self._owners.get(id(module))
        pending = self._pending.pop(id(module), {})
        if owner is not None and owner.rule is None and self._trains(owner):
            pending = {**pending, **owner.parameters}
        if not pending:
            return
        start = time.perf_counter()
        self._watch_pending(module, pending, args, kwargs, output)
        self.seconds += time.perf_counter() - start

    def _watch_pending(
        self,
        module: nn.Module,
        pending: Mapping[str, str],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """Take the module's own VJP for parameters that no rule answers for, or pass them on to its parent."""
        if self._batched(module, args, kwargs, output):
            self._answered.update(pending.values())
            self._watch(OwnedLayer("", module, None, pending), args, kwargs, output)
            return
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            self._recomputed.update(pending.values())
        parent = self._parents.get(id(module))
        if parent is None and self.lenient:
            return
        if parent is None:
            raise CaptureError(_unbatched(sorted(pending.values()), self._groups.n))
        prefix, above = parent
        lifted = self._pending.setdefault(id(above), {})
        lifted.update({f"{prefix}.{name}": canonical for name, canonical in pending.items()})

    def _batched(self, module: nn.Module, args: tuple[object, ...], kwargs: object, output: object) -> bool:
        dim, least = batch_dimension(module), least_dimension(module)
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

        def fits(values: list[Tensor]) -> bool:
            return bool(values) and values[0].dim() > least and values[0].shape[dim] == self._groups.n

        return fits(inputs) and fits(outputs)

    def _watch(
        self,
        owner: OwnedLayer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        args, kwargs = pytree.tree_map(_detached, (args, kwargs))
        state = None
        before = self._random.pop(id(owner.module), None)
        if tensors and (owner.rule is None or before is not None):
            state = call_state(owner.module, before, tensors[0].device)
        for index, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(_Call(self, owner, args, kwargs, index, state))

    def _send(self, owner: OwnedLayer, group: int, call: LayerCall) -> None:
        sink, parameters = self._sink, self._parameters
        if sink is None:
            return
        if self.positions:
            if owner.rule is None:
                raise CaptureError(unsplit(list(owner.parameters.values())))
            call = by_position(call, self.positions)
        found: Mapping[str, PerExampleGradient]
        if owner.rule is not None:
            found = owner.rule(owner.module, in_parameter_dtype(owner.module, call))
        else:
            with self.paused():
                names = [name for name, whole in owner.parameters.items() if parameters[whole].requires_grad]
                found = fallback_gradients(owner.module, call, names)
        for name, canonical in owner.parameters.items():
            if name in found and parameters[canonical].requires_grad:
                sink(group, canonical, found[name])


class _Call:
    """A hook on one output of one call of a layer, with what is known of the call.

    ``arguments`` is emptied when the gradient arrives: an input kept any longer is memory that the backward pass cannot
    use again.
    """

    __slots__ = ("arguments", "batch", "capture", "group", "index", "n", "owner", "state", "training")

    def __init__(
        self, capture: GradientCapture, owner: OwnedLayer, args: tuple[object, ...], kwargs: dict[str, object],
        index: int, state: CallState | None,
    ) -> None:  # fmt: skip
        self.capture = capture
        self.owner = owner
        self.arguments: _Arguments | None = (args, kwargs)
        self.index = index
        self.state = state
        self.training = owner.module.training
        self.n, self.group, self.batch = capture._groups.n, capture._groups.current, capture._batch

    def __call__(self, grad: Tensor) -> None:
        capture = self.capture
        if capture._sink is None:
            return
        start = time.perf_counter()
        arguments, group = self.arguments, self.group
        if arguments is None or self.batch != capture._batch:
            raise CaptureError(_stale(self.owner.path, earlier_batch=self.batch != capture._batch))
        if not capture.retain:
            self.arguments = None
        received = grad.detach() if grad.requires_grad else grad
        call = LayerCall(*arguments, self.index, received, self.training, self.n, self.state)
        if group is None:
            capture._groups.refuse(self.owner.path)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(grad.device.type):
            with torch.no_grad(), full_precision(grad):  # backward(create_graph=True), or a step under autocast
                capture._send(self.owner, group, call)
        else:
            capture._send(self.owner, group, call)
        capture.seconds += time.perf_counter() - start


def _parents(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    return {id(child): (name, parent) for parent in model.modules() for name, child in parent.named_children()}


def _unbatched(names: list[str], n: int) -> str:
    return (
        f"The gradient of {', '.join(map(repr, names))} cannot be split among the {n} examples of the batch: no module "
        "that uses it was called with the batch in its first dimension. Call the layer on one row per example, or "
        "own the parameter in a module whose forward takes the batch."
    )


def _stale(path: str, earlier_batch: bool) -> str:
    if earlier_batch:
        return (
            f"{path or 'the model'!r} received a gradient of an earlier batch's forward pass: detach what is carried "
            "over from batch to batch."
        )
    return (
        f"{path or 'the model'!r} received a second gradient in one batch: backward ran twice through the same graph "
        "(retain_graph=True). Add the losses up and go back once, or use manual optimisation."
    )
