"""The probes' account: its three errors are what the machine misses, and it is the machine's own prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel import pass_size
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.ledger import ERROR_TERMS
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import NodeBudget, gauss_legendre
from lightning_pathkernel.probes import LEDGER_PROBES, ProbeTracker
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import recorded_step

PROBES = 100


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.GELU(), nn.Linear(24, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(320, 3)
    )


Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CASES: dict[str, tuple[Callable[[], nn.Module], Maker, float | None]] = {
    "sgd": (mlp, lambda p: torch.optim.SGD(p, lr=0.3), None),
    "momentum, decay": (mlp, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.02), None),
    "adamw": (mlp, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), None),
    "adam, coupled decay, clipping": (mlp, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01), 0.1),
    "rmsprop, momentum": (dropout, lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9), None),
    "dropout, nadam": (dropout, lambda p: torch.optim.NAdam(p, lr=0.01), None),
    "batch norm, sgd": (batch_norm, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), None),
    "batch norm, adamw": (batch_norm, lambda p: torch.optim.AdamW(p, lr=0.01), None),
    "no rule": (mlp, lambda p: torch.optim.ASGD(p, lr=0.1), None),
}


def followed(name: str, nodes: list[int] | NodeBudget, steps: int) -> tuple[ProbeTracker, KernelMachine, Tensor]:
    """A fit whose coarse sketch and few chords make every error large; its probes at the end."""
    make, maker, clip = CASES[name]
    torch.manual_seed(0)
    x, probes = torch.randn(64, 1, 6, 6), torch.randn(PROBES, 1, 6, 6)
    y = (x.flatten(1) @ torch.randn(36, 3)).argmax(1)
    model = make()
    optimizer = maker(list(model.parameters()))
    network, chords = Network(model, plan_capture(model)), []
    tracker = ProbeTracker(network, probes, gauss_legendre(4), 0)

    def closed(chord: Chord) -> None:
        chords.append(chord)
        tracker.advance(chord)

    settings = RecorderSettings(nodes, 24, SketchSettings(width=6), allow_unattributed=name == "no rule")
    recorder = PathRecorder(network, optimizer, settings, probes, closed)
    recorder.capture.attach()
    for step in range(steps):
        ids = torch.arange(16) + 16 * (step % 4)
        recorded_step(recorder, optimizer, ids, lambda ids=ids: F.cross_entropy(model(x[ids]), y[ids]), clip)
    recorder.finish()
    recorder.capture.detach()
    machine = KernelMachine(copy.deepcopy(model), chords)
    return tracker, machine, probes


@pytest.mark.parametrize("name", CASES)
def test_the_three_errors_add_up_to_what_the_machine_misses(name: str) -> None:
    tracker, machine, probes = followed(name, [0, 5, 20], 20)
    missed = machine.network_outputs(probes) - machine.predict(probes)
    first = missed[:LEDGER_PROBES]
    found = torch.stack([tracker.account.terms[term] for term in ERROR_TERMS]).sum(0)
    change = machine.network_outputs(probes) - machine.bias(probes)
    assert first.norm() > 1e-3 * change.norm(), "the errors are too small for the test to say anything"
    gap = (found - first).norm() / first.norm()
    assert gap < 0.01, f"{name}: the parts miss the error by {100 * gap:.2f} %"


@pytest.mark.parametrize("name", CASES)
def test_the_logged_metrics_are_the_machines(name: str) -> None:
    """Prediction of all probes to rounding; fidelity to what decay's part of the bias costs at the chords' middle."""
    tracker, machine, probes = followed(name, [0, 5, 20], 20)
    torch.testing.assert_close(tracker.account.prediction(), machine.predict(probes), rtol=1e-3, atol=1e-4)
    logged, whole = tracker.metrics(None), machine.fidelity([probes])
    first = machine.fidelity([probes[:LEDGER_PROBES]])
    assert abs(logged["fidelity"] - whole["fidelity"]) < 0.01 * (1 - whole["fidelity"]) + 1e-5
    assert logged["agreement"] == pytest.approx(whole["agreement"], abs=0.011)
    for term in ERROR_TERMS:
        assert logged[f"error_{term}"] == pytest.approx(first[f"error_{term}"], rel=0.01, abs=1e-5), term


def test_nodes_by_a_tolerance_keep_the_account_right() -> None:
    tracker, machine, probes = followed("momentum, decay", NodeBudget(0.05, 8, 20), 20)
    assert 1 < len(machine.chords) <= 8
    torch.testing.assert_close(tracker.account.prediction(), machine.predict(probes), rtol=1e-3, atol=1e-4)


def test_how_many_probes_pass_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, machine, probes = followed("adamw", [0, 5, 20], 20)
    monkeypatch.setattr(pass_size, "_NUMBERS", 1)
    model = mlp()
    model.load_state_dict(dict(machine.chords[0].start))
    other = ProbeTracker(Network(model, plan_capture(model)), probes, gauss_legendre(4), 0)
    for chord in machine.chords:
        model.load_state_dict(chord.weights(1.0))
        other.advance(chord)
    assert tracker._at_once == 64
    assert other._at_once == 8
    torch.testing.assert_close(other.account.prediction(), tracker.account.prediction())
    assert other.metrics(None) == pytest.approx(tracker.metrics(None), rel=1e-3, abs=1e-5)


def test_the_tangent_kernel_stands_still_with_the_network() -> None:
    torch.manual_seed(0)
    model = mlp()
    network, probes = Network(model, plan_capture(model)), torch.randn(40, 1, 6, 6)
    tracker = ProbeTracker(network, probes, gauss_legendre(4), 0)
    assert torch.equal(tracker.kernel_matrix(), tracker.kernel_matrix())
    before = tracker.kernel_matrix()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    moved = 1 - F.cosine_similarity(before.flatten(), tracker.kernel_matrix().flatten(), dim=0)
    assert moved > 1e-3


def test_a_pass_over_the_probes_costs_the_same_for_a_thousand_outputs() -> None:
    """Counted in calls of the network: forward mode gives all outputs at once."""
    calls = {}
    for outputs in (3, 1000):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.GELU(), nn.Linear(24, outputs))
        network, count = Network(model, plan_capture(model)), [0]
        model.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        probes = torch.randn(40, 1, 6, 6)
        tracker = ProbeTracker(network, probes, gauss_legendre(4), 0)
        weights = network.weights()
        direction = {name: torch.randn_like(w) for name, w in weights.items()}
        found = network.jvps(probes, weights, {}, [direction])[0]
        step = {name: w + 1e-2 * direction[name] for name, w in weights.items()}
        back = {name: w - 1e-2 * direction[name] for name, w in weights.items()}
        expected = (network.outputs(probes, step) - network.outputs(probes, back)) / 2e-2
        assert found.shape == (40, outputs)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)
        tracker.metrics(None)
        calls[outputs] = count[0]
    assert calls[3] == calls[1000], f"calls by number of outputs: {calls}"
