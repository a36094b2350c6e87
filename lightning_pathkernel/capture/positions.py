"""Every position of every example as a row of its own: tokens of a sequence in place of sequences.

A layer that treats positions alike (``[n, s, ...]`` in, ``[n, s, ...]`` out) has a gradient for each of them, and its
rule gives it as soon as the first two dimensions are one: row ``i * s + j`` is position ``j`` of example ``i``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_pathkernel.capture.plan import CaptureError, OwnedLayer
from lightning_pathkernel.capture.rules import LayerCall

__all__ = ["by_position", "check_positions", "has_positions", "ids_by_position", "unsplit"]

_ROWWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
"""Layers that look at one position at a time, however many dimensions stand before it."""


def check_positions(layers: Iterable[OwnedLayer]) -> None:
    """Refuse every layer whose gradient cannot be split among positions.

    Args:
        layers: The layers of a plan.

    Raises:
        CaptureError: Naming all of them.
    """
    wrong = [
        f"{layer.path or '(the model)'!r} ({type(layer.module).__name__})"
        for layer in layers
        if layer.rule is None or type(layer.module) not in _ROWWISE or _normalises_positions(layer.module)
    ]
    if wrong:
        names = ", ".join(sorted(t.__name__ for t in _ROWWISE))
        raise CaptureError(
            f"No gradients by position for {', '.join(wrong)}: only {names} treat every position by itself. Freeze the "
            "others, or record whole examples."
        )


def unsplit(names: list[str]) -> str:
    """What to say of parameters that were used without the positions in their inputs."""
    return (
        f"No gradients by position for {', '.join(map(repr, sorted(names)))}: the layer was not called with one row "
        "per example and position (a table of positions, shared by all examples?). Freeze it, call it with the batch "
        "in front, or record whole examples."
    )


def _normalises_positions(module: nn.Module) -> bool:
    """Whether a norm runs over several dimensions, the first of which may be the positions."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1


def has_positions(call: LayerCall, positions: int) -> bool:
    """Whether a call came with examples and positions in its first two dimensions, ``[n, positions, ...]``.

    Args:
        call: A call of a layer with a rule.
        positions: Positions of every example.

    Returns:
        Whether both its input and its output did.
    """
    leading = (call.n, positions)
    return tuple(call.input.shape[:2]) == leading == tuple(call.grad_output.shape[:2])


def ids_by_position(ids: Tensor, positions: int) -> Tensor:
    """Ids of the positions of examples ``ids [n]``, ``id * positions + position``, ``[n * positions]``."""
    return (ids.unsqueeze(1) * positions + torch.arange(positions)).flatten()


def by_position(call: LayerCall, positions: int) -> LayerCall:
    """The same call with every position as a row, ``[n * positions, ...]``.

    Args:
        call: A call of a layer that `check_positions` lets pass, with input and output gradient
            ``[n, positions, ...]``.
        positions: Positions of every example.

    Returns:
        The call that the layer's rule takes: its per-example gradients are then per-position ones.

    Raises:
        CaptureError: If the call has no such dimension.
    """
    if not has_positions(call, positions):
        raise CaptureError(
            f"a layer was called with an input {list(call.input.shape)} and gave an output "
            f"{list(call.grad_output.shape)}: gradients by position need [{call.n}, {positions}, ...] in both. Call it "
            "before positions are pooled, or record whole examples."
        )

    def flat(value: object) -> object:
        fits = isinstance(value, Tensor) and tuple(value.shape[:2]) == (call.n, positions)
        return value.flatten(0, 1) if fits and isinstance(value, Tensor) else value

    return replace(
        call,
        args=tuple(flat(value) for value in call.args),
        kwargs={name: flat(value) for name, value in call.kwargs.items()},
        grad_output=call.grad_output.flatten(0, 1),
        n=call.n * positions,
    )
