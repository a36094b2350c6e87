"""Whatever the network, the batches, the accumulation and the clipping: the ledger closes, training is untouched."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.support.fitting import quiet_trainer

ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
INPUTS, CLASSES = 3, 3


@dataclass(frozen=True)
class Fit:
    """One fit, as hypothesis draws it."""

    widths: tuple[int, ...]
    activation: str
    examples: int
    batch: int
    accumulate: int
    clip: float | None
    optimizer: str
    nodes: int
    sketch: str
    seed: int

    @property
    def windows(self) -> list[list[list[int]]]:
        """Ids of every micro-batch of every optimiser step of two epochs, the last of an epoch short."""
        out = []
        for epoch in range(2):
            order = torch.randperm(self.examples, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            batches = [order[i : i + self.batch] for i in range(0, self.examples, self.batch)]
            out += [batches[i : i + self.accumulate] for i in range(0, len(batches), self.accumulate)]
        return out

    def network(self) -> nn.Module:
        """The network before training, in float64."""
        torch.manual_seed(self.seed)
        sizes, layers = [INPUTS, *self.widths], list[nn.Module]()
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES)).double()

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and classes."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.examples, INPUTS, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (self.examples,), generator=generator)


FITS = st.builds(
    Fit,
    widths=st.lists(st.integers(1, 6), max_size=2).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    examples=st.integers(2, 11),
    batch=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    clip=st.one_of(st.none(), st.floats(0.05, 1.0)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    nodes=st.integers(1, 12),
    sketch=st.sampled_from(["identity", "deflated"]),
    seed=st.integers(0, 99),
)


def train(fit: Fit, record: bool) -> tuple[nn.Module, list[Chord]]:
    """A training loop by hand."""
    module, (x, y), chords = fit.network(), fit.data(), list[Chord]()
    optimizer, recorder = OPTIMIZERS[fit.optimizer](module.parameters()), None
    if record:
        options = RecorderSettings(node_schedule(len(fit.windows), fit.nodes), 64, SketchSettings(fit.sketch))
        recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, options, None, chords.append)
        recorder.capture.attach()
    for window in fit.windows:
        optimizer.zero_grad()
        for ids in window:
            backward(recorder, lambda at=ids: F.cross_entropy(module(x[at]), y[at]) / fit.accumulate, ids)
        if recorder:
            recorder.before_step()
        if fit.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), fit.clip)
        optimizer.step()
        if recorder:
            recorder.after_step()
    if recorder:
        recorder.close_chord()
        recorder.capture.detach()
    return module, chords


def backward(recorder: PathRecorder | None, loss: Callable[[], Tensor], ids: list[int]) -> None:
    if recorder is None:
        loss().backward()
        return
    recorder.begin_batch(torch.tensor(ids))
    value = loss()
    recorder.before_backward()
    value.backward()
    recorder.after_backward()
    recorder.end_batch()


def assert_adds_up(fit: Fit, machine: KernelMachine, module: nn.Module) -> None:
    """The ledger adds up to the outputs, and contributions to its examples."""
    x, target = torch.randn(4, INPUTS, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        outputs = module(x)
    ledger = machine.explain(x, target, top_k=1).ledger
    expected = outputs.gather(1, target[:, None])[:, 0]
    assert float((sum(ledger.values()) - expected).abs().max()) <= 1e-8 * max(1.0, float(outputs.abs().max()))
    found = machine.contributions(x, target)
    assert found.shape == (4, fit.examples)
    gap = (found.sum(1) - ledger["examples"]).abs().max()
    assert float(gap) <= 1e-8 * max(1.0, float(found.abs().sum(1).max())), float(gap)


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(FITS)
def test_any_fit_of_a_raw_loop(fit: Fit) -> None:
    plain, _ = train(fit, record=False)
    module, chords = train(fit, record=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert chords[-1].last_step == len(fit.windows)
    assert len(chords) == min(fit.nodes, len(fit.windows))
    assert_adds_up(fit, KernelMachine(copy.deepcopy(module), chords, quadrature_points=4), module)


class Module(pl.LightningModule):
    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.net, self.choice = fit.network(), fit.optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.choice](self.parameters())


def lightning_fit(fit: Fit, root: Path, callbacks: list[pl.Callback]) -> Module:
    module = Module(fit)
    pl.seed_everything(fit.seed, verbose=False)
    trainer = quiet_trainer(
        root, callbacks, precision="64-true", max_epochs=2, gradient_clip_val=fit.clip,
        accumulate_grad_batches=fit.accumulate,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*fit.data()), fit.batch, shuffle=True))
    return module


@settings(derandomize=True, deadline=None, max_examples=6, database=None)
@given(FITS)
def test_any_fit_of_a_trainer(fit: Fit) -> None:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nodes=.* is more than")
        plain = lightning_fit(fit, Path(name), [])
        callback = PathKernelCallback(
            str(Path(name) / "run"), sketch_dim=64, nodes=fit.nodes, probes=0, sketch=fit.sketch
        )
        module = lightning_fit(fit, Path(name), [callback])
        machine = KernelMachine.load(callback.machine_dir, Module(fit))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert_adds_up(fit, machine, module.eval())
