"""The recorder on a small network: contributions, ledger and sums."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_pathkernel import query
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord_path import HeldPath
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.query import Question, everywhere
from lightning_pathkernel.ranking import all_contributions
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import recorded_step


def _record(optimizer_name: str) -> tuple[Network, list, torch.Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }
    optimizer = makers[optimizer_name](model.parameters())
    chords: list = []
    network = Network(model, plan_capture(model))
    recorder = PathRecorder(network, optimizer, RecorderSettings([0, 1, 4, 9, 16], 128), x[:32], chords.append)
    recorder.capture.attach()
    for step in range(16):
        ids = torch.arange(16) + 16 * (step % 4)
        recorded_step(recorder, optimizer, ids, lambda ids=ids: F.cross_entropy(model(x[ids]), y[ids]))
    recorder.capture.detach()
    return network, chords, torch.randn(10, 6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_ledger_adds_up_and_the_sketch_is_faithful(name: str) -> None:
    network, chords, x = _record(name)
    rule = gauss_legendre(4)
    terms, _ = query.ledger(network, Question(x), chords, [everywhere(rule)] * len(chords))
    outputs = network.outputs(x)
    torch.testing.assert_close(sum(terms.values()), outputs, rtol=1e-4, atol=1e-5)
    change = (outputs - terms["initial"]).norm()
    for part in ("quadrature", "sketch", "unattributed"):
        assert terms[part].norm() < 0.05 * change, f"{part}: {terms[part].norm() / change:.3f} of the learned change"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_contributions_add_up_to_the_sum_over_examples(name: str) -> None:
    network, chords, x = _record(name)
    rule = everywhere(gauss_legendre(3))
    total = sum(query.sums(network, x, chord, rule)[0] for chord in chords)
    question = Question(x, torch.ones(len(x), dtype=torch.long))
    shares = query.shares(network, question, HeldPath(chords), [rule] * len(chords))
    parts = all_contributions(shares, torch.arange(64))
    torch.testing.assert_close(parts.sum(1), total[:, 1], rtol=1e-3, atol=1e-4)


def test_self_influence_of_an_unsketched_recording_is_exact() -> None:
    """One step of SGD: minus rate times rows times the squared norm of an example's share of the gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    network = Network(model, plan_capture(model))
    rows = []
    for i in range(12):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / 12
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = -0.1 * 12 * torch.stack(rows).square().sum(1)
    chords: list = []
    recorder = PathRecorder(network, optimizer, RecorderSettings([0, 1], 512), None, chords.append)
    recorder.capture.attach()
    recorded_step(recorder, optimizer, torch.arange(12), lambda: F.cross_entropy(model(x), y))
    recorder.capture.detach()
    torch.testing.assert_close(chords[0].self_inner, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("bias", "optimizer"), [(True, "AdamW"), (False, "AdamW"), (True, "SGD")])
def test_a_bias_that_adam_moves_along_rounding_is_named(
    bias: bool, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.BatchNorm1d(8), nn.Linear(8, 3))
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    recorder = PathRecorder(Network(model, plan_capture(model)), chosen, RecorderSettings([0, 1]), None, lambda _: None)
    recorder.capture.attach()
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    recorded_step(recorder, chosen, torch.arange(16), lambda: F.cross_entropy(model(x), y))
    recorder.capture.detach()
    if bias and optimizer == "AdamW":
        assert "the gradient of '0.bias' is zero but for rounding" in caplog.text
        assert "bias=False" in caplog.text
    else:
        assert not caplog.text


def test_momentum_that_is_switched_on_later_begins_its_buffer_undampened() -> None:
    """As torch does: the first buffer is the whole gradient, whenever that is."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, dampening=0.5)
    chords: list = []
    settings = RecorderSettings([0, 6], 512, SketchSettings("identity"))
    recorder = PathRecorder(Network(model, plan_capture(model)), optimizer, settings, None, chords.append)
    recorder.capture.attach()
    for step in range(6):
        optimizer.param_groups[0]["momentum"] = 0.9 if step >= 3 else 0.0
        recorded_step(recorder, optimizer, torch.arange(8), lambda: F.cross_entropy(model(x), y))
    recorder.capture.detach()
    for name, direction in chords[0].examples_direction().items():
        torch.testing.assert_close(direction, chords[0].delta[name], rtol=1e-10, atol=1e-12)


def test_no_tensor_outlives_the_step_it_was_made_in() -> None:
    """A tensor kept for the chord, however small, splits memory that the next backward pass needs whole."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 20, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 30),
        nn.Linear(30, 3),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    recorder = PathRecorder(
        Network(model, plan_capture(model)), optimizer, RecorderSettings([0, 100], 64), None, lambda chord: None
    )
    recorder.capture.attach()

    def alive_after(steps: int) -> int:
        for _ in range(steps):
            recorded_step(recorder, optimizer, torch.arange(16), lambda: F.cross_entropy(model(x), y))
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    assert alive_after(3) == alive_after(10)
