"""A kernel machine in a fraction of a second, for tests and doctests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings

__all__ = ["tiny_machine"]


def tiny_machine(
    module: nn.Module | None = None, x: Tensor | None = None, y: Tensor | None = None, chords: int = 3
) -> KernelMachine:
    """A kernel machine in a fraction of a second, for tests and doctests: a few steps of SGD without a Trainer.

    Every step takes all examples and is a chord; gradients are kept whole.

    Args:
        module: The network, ``[n, D] -> [n, K]``; it is trained. None for a seeded ``nn.Linear(2, 3)``.
        x: Training inputs, ``[N, D]``, with the ids 0 to N - 1; None for 6 seeded random ones with D = 2.
        y: Their classes, ``[N]``; None for 0, 1, 0, 1, ...
        chords: Optimiser steps, with learning rate 0.1.

    Returns:
        The machine.

    Examples:
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> tiny_machine().example_ids
        tensor([0, 1, 2, 3, 4, 5])
    """
    module = _linear() if module is None else module
    inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) if x is None else x
    targets = torch.arange(len(inputs)) % 2 if y is None else y
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found: list[Chord] = []
    settings = RecorderSettings(range(chords + 1), 1 << 20, SketchSettings("identity"))
    recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, settings, None, found.append)
    recorder.capture.attach()
    try:
        for _ in range(chords):
            recorder.begin_batch(torch.arange(len(inputs)))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(inputs), targets)
            recorder.before_backward()
            loss.backward()
            recorder.after_backward()
            recorder.before_step()
            optimizer.step()
            recorder.after_step()
            recorder.end_batch()
    finally:
        recorder.capture.detach()
    return KernelMachine(module, found)


def _linear() -> nn.Linear:
    """Weights of its own, whatever the state of the global generator, which stays as it is."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, 2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 2, generator=torch.Generator().manual_seed(1)))
        layer.bias.zero_()
    return layer
