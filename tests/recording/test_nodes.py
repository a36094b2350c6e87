"""The drift that ends a chord, against the sums that define it, and in a recorder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import NodeBudget
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.nodes import preconditioner_change, relative_displacement
from tests.helpers import recorded_step

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def recorded(name: str, budget: NodeBudget, steps: int) -> tuple[list[Chord], list[dict[str, Tensor]]]:
    """Chords, and the weights after every step."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    optimizer = OPTIMIZERS[name](model.parameters())
    network, chords = Network(model, plan_capture(model)), []
    recorder = PathRecorder(network, optimizer, RecorderSettings(budget, 64), x[:32], chords.append)
    recorder.capture.attach()
    weights = [network.weights()]
    for step in range(steps):
        ids = torch.arange(16) + 16 * (step % 4)
        recorded_step(recorder, optimizer, ids, lambda ids=ids: F.cross_entropy(model(x[ids]), y[ids]))
        weights.append(network.weights())
    recorder.finish()
    recorder.capture.detach()
    return chords, weights


def test_relative_displacement_by_hand() -> None:
    start = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[1.0], [0.0]]), "bias": torch.zeros(2)}
    now = {"a": torch.tensor([[3.0, 4.5]]), "b": torch.tensor([[9.0], [0.0]]), "bias": torch.ones(2)}
    # 0.5 / 5 and 8 / 1, of which 1 counts; vectors do not, where there are matrices
    assert relative_displacement(now, start) == pytest.approx(math.sqrt((0.01 + 1) / 2))
    vector = {"v": torch.tensor([0.0, 2.0])}
    assert relative_displacement({"v": torch.tensor([0.0, 2.5])}, vector) == pytest.approx(0.25)


def test_preconditioner_change_by_hand() -> None:
    start = {"a": torch.zeros(3)}
    weights = {"a": torch.tensor([1.0, 2.0, 5.0])}
    before, now = {"a": torch.tensor([1.0, 4.0, 0.0])}, {"a": torch.tensor([math.e, 4.0, 7.0])}
    # a weight that had no D before the node tells nothing
    assert preconditioner_change(now, before, weights, start) == pytest.approx(math.sqrt(1 / 5))
    assert preconditioner_change({}, before, weights, start) == 0.0


@pytest.mark.parametrize("name", ["sgd", "momentum, decay"])
def test_chords_end_at_the_tolerance(name: str) -> None:
    budget = NodeBudget(0.1, 16)
    chords, weights = recorded(name, budget, 60)
    assert len(chords) > 3
    for closed, chord in enumerate(chords[:-1]):
        drift = relative_displacement(weights[chord.last_step], weights[chord.first_step])
        short = relative_displacement(weights[chord.last_step - 1], weights[chord.first_step])
        assert drift >= budget.threshold(closed) > 0.8 * short


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("total", [None, 40])
def test_chords_cover_the_path_within_the_budget(name: str, total: int | None) -> None:
    chords, weights = recorded(name, NodeBudget(0.02, 6, total), 40)
    assert 1 < len(chords) <= 6
    assert [c.first_step for c in chords[1:]] == [c.last_step for c in chords[:-1]]
    assert (chords[0].first_step, chords[-1].last_step) == (0, 40)
    for chord in chords:
        for key, value in chord.weights(1.0).items():
            torch.testing.assert_close(value, weights[chord.last_step][key])


def test_a_preconditioner_that_has_just_begun_ends_chords_early() -> None:
    """Adam's D changes by large factors in its first steps, long before the weights have gone far."""
    adam, _ = recorded("adamw", NodeBudget(0.05, 12, 60), 60)
    assert [c.last_step for c in adam[:2]] == [1, 2]
    sgd, _ = recorded("sgd", NodeBudget(0.05, 12, 60), 60)
    assert sgd[0].last_step > 2


def test_two_recordings_have_the_same_nodes() -> None:
    one, two = (recorded("adamw", NodeBudget(0.05, 12, 40), 40)[0] for _ in range(2))
    assert [c.last_step for c in one] == [c.last_step for c in two]
    for a, b in itertools.zip_longest(one, two):
        assert torch.equal(a.rows, b.rows)
