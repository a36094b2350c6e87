"""A training run of `benchmarks.brute_force` together with the machine that was recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.brute_force import Listener, Training, train
from benchmarks.cases import Case, Data
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings

__all__ = ["Recording", "Run", "data_of", "record", "recorded_step"]


def recorded_step(
    recorder: PathRecorder, optimizer: torch.optim.Optimizer, ids: Tensor, loss: Callable[[], Tensor]
) -> None:
    """One training step of a loop by hand, recorded.

    Args:
        recorder: Attached.
        optimizer: The raw optimiser.
        ids: Examples of the batch, ``[n]``.
        loss: The batch's loss; called once.
    """
    recorder.begin_batch(ids)
    optimizer.zero_grad()
    value = loss()
    recorder.before_backward()
    value.backward()
    recorder.after_backward()
    recorder.before_step()
    optimizer.step()
    recorder.after_step()
    recorder.end_batch()


class Recording(Listener):
    """A recorder that is told of a training run."""

    def __init__(self, recorder: PathRecorder) -> None:
        self.recorder = recorder
        recorder.capture.attach()

    def begin_batch(self, rows: Tensor) -> None:
        """A batch of these examples comes."""
        self.recorder.begin_batch(rows)

    def before_backward(self) -> None:
        """Its gradients come."""
        self.recorder.before_backward()

    def after_backward(self) -> None:
        """They are all in."""
        self.recorder.after_backward()

    def before_step(self) -> None:
        """The optimiser's gradients are complete."""
        self.recorder.before_step()

    def after_step(self) -> None:
        """It has moved the weights."""
        self.recorder.after_step()

    def end_batch(self) -> None:
        """The batch is over."""
        self.recorder.end_batch()


@dataclass(frozen=True)
class Run:
    """A training run with every step's weights, and its kernel machine."""

    training: Training
    machine: KernelMachine


def data_of(train_images: tuple[Tensor, Tensor], unseen: Tensor, probes: int) -> Data:
    """Data of which the other images are first the probes, then the queries."""
    return Data(*train_images, unseen[:probes], unseen[probes:], unseen[probes:])


def record(case: Case, seed: int, sketch_dim: int, data: Data) -> Run:
    """Train and record.

    Args:
        case: Network and optimiser.
        seed: Of the first weights and the order of the examples.
        sketch_dim: Of the machine.
        data: Its data.

    Returns:
        The run.
    """
    chords: list[Chord] = []
    told: list[Recording] = []

    def listeners(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Recording]:
        settings = RecorderSettings(node_schedule(steps, case.nodes), sketch_dim, seed=seed)
        network = Network(module, plan_capture(module))
        told.append(Recording(PathRecorder(network, optimizer, settings, data.probes, chords.append)))
        return told

    training = train(case, seed, data, listeners)
    told[0].recorder.finish()
    told[0].recorder.capture.detach()
    return Run(training, KernelMachine(training.module, chords))
