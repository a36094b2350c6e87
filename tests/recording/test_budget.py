"""The features of a chord's first stage follow from what the chord before it lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording.budget import FeatureBudget, sketch_error
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import digits, recorded_step

SETTINGS = SketchSettings(features=64, most=500, tolerance=0.05)


def network() -> nn.Module:
    """Batch norm: the rows of a batch mostly cancel."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def recorded(sketch: SketchSettings, sketch_dim: int = 64) -> tuple[Network, list[Chord]]:
    """The chords of 60 steps on digits."""
    module = network()
    net = Network(module, plan_capture(module))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    settings = RecorderSettings(node_schedule(60, 12), sketch_dim, sketch)
    (x, y), probes = digits()[0].tensors, digits()[1].tensors[0]
    chords: list[Chord] = []
    recorder = PathRecorder(net, optimizer, settings, probes, chords.append)
    recorder.capture.attach()
    for ids in torch.arange(320).repeat(6).split(32):
        recorded_step(recorder, optimizer, ids, lambda ids=ids: F.cross_entropy(module(x[ids]), y[ids]))
    recorder.capture.detach()
    return net, chords


def features(chords: list[Chord]) -> list[int]:
    return [sum(sketch.features for sketch in chord.sketches.values()) for chord in chords]


def lost(net: Network, chords: list[Chord]) -> float:
    """Root mean square of what is lost on images that were no probes, of chords with one before them to learn from."""
    x: Tensor = digits()[1].tensors[0][64:]
    return math.sqrt(sum(sketch_error(net, x, chord, 64) ** 2 for chord in chords[1:]) / (len(chords) - 1))


def test_a_chord_that_keeps_everything_has_no_error() -> None:
    net, chords = recorded(SketchSettings("identity"), sketch_dim=10_000)
    found = [sketch_error(net, digits()[1].tensors[0], chord, 64) for chord in chords]
    assert max(found) < 1e-3, found


@pytest.mark.parametrize("error", [0.5, 0.1, math.nan, math.inf])
def test_a_chord_that_lost_much_is_followed_by_more_features(error: float) -> None:
    budget = FeatureBudget(SETTINGS, 32, 2)
    before = budget.features
    budget.learn(error)
    assert budget.features > before


def test_a_chord_that_lost_little_is_followed_by_fewer() -> None:
    budget = FeatureBudget(SETTINGS, 32, 2)
    before = budget.features
    budget.learn(0.01)
    assert budget.features < before


@pytest.mark.parametrize(("error", "bound"), [(1.0, 1000), (0.0, 64)])
def test_features_stay_within_their_bounds(error: float, bound: int) -> None:
    budget = FeatureBudget(SETTINGS, 32, 2)
    for _ in range(20):
        budget.learn(error)
    assert budget.features == bound


def test_never_fewer_features_than_numbers_kept() -> None:
    budget = FeatureBudget(SETTINGS, 200, 2)
    for _ in range(20):
        budget.learn(0.0)
    assert budget.features == 200


def test_a_network_whose_rows_cancel_gets_more_features_and_loses_less() -> None:
    net, chords = recorded(SketchSettings(features=64, most=0))
    fixed, few = lost(net, chords), features(chords)
    net, chords = recorded(SketchSettings(features=64))
    learned, many = lost(net, chords), features(chords)
    assert sum(many) > 2 * sum(few)
    assert learned < fixed / 2, f"{learned:.3f} with {many}, {fixed:.3f} with {few}"
