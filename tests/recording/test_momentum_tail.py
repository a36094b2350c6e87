"""Momentum's tail across a node: exact in an exact basis; what a coarse basis loses is in the ledger, per query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel import query
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import HeldPath
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.query import Question, RowRules, everywhere
from lightning_pathkernel.ranking import all_contributions
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.recording import open_chord
from lightning_pathkernel.reference import ReferenceAdam, ReferencePathKernel, ReferenceSGD
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import recorded_step

N, STEPS, BATCH = 24, 16, 6
OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda: ReferenceSGD(0.05, momentum=0.9)),
    "short memory": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.3), lambda: ReferenceSGD(0.1, momentum=0.3)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.003), lambda: ReferenceAdam(0.003)),
}


def squared(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def network_and_data() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 2)).double()
    x = torch.randn(N, 9, dtype=torch.float64)
    return model, x, torch.sin(x[:, :2] * 2), torch.randn(5, 9, dtype=torch.float64)


def batch(step: int) -> Tensor:
    return (torch.arange(BATCH) + BATCH * step) % N


def recorded(name: str, nodes: Sequence[int], sketch: SketchSettings) -> tuple[Network, list[Chord]]:
    model, x, y, probes = network_and_data()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    network, chords = Network(model, plan_capture(model)), []
    recorder = PathRecorder(network, optimizer, RecorderSettings(nodes, 4096, sketch), probes, chords.append)
    recorder.capture.attach()
    for step in range(STEPS):
        ids = batch(step)
        recorded_step(recorder, optimizer, ids, lambda ids=ids: squared(model(x[ids]), y[ids]) / BATCH)
    recorder.finish()
    recorder.capture.detach()
    return network, chords


def first_output(queries: Tensor) -> Question:
    return Question(queries, torch.zeros(len(queries), dtype=torch.long))


def rules_of(chords: list[Chord]) -> list[RowRules]:
    return [everywhere(gauss_legendre(8))] * len(chords)


def contributions(network: Network, chords: list[Chord], queries: Tensor) -> Tensor:
    shares = query.shares(network, first_output(queries), HeldPath(chords), rules_of(chords))
    return all_contributions(shares, torch.arange(N))


def expected(name: str) -> tuple[Tensor, Tensor]:
    """Contributions by the reference, which follows every visit whole and for ever, and the queries."""
    model, x, y, queries = network_and_data()
    batches = [(batch(step).tolist(), x[batch(step)], y[batch(step)]) for step in range(STEPS)]
    path = ReferencePathKernel(model, squared, batches, OPTIMIZERS[name][1]())
    return path.contributions(queries, lambda output: output[0]), queries


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "limit"), [("momentum", 1e-6), ("short memory", 1e-3), ("adam", 1e-6)])
def test_the_tail_is_exact_in_an_exact_basis(name: str, limit: float) -> None:
    """A node after every step: all momentum crosses nodes. A short memory lets go of a step at 1/1000 of its share."""
    wanted, queries = expected(name)
    network, chords = recorded(name, range(STEPS + 1), SketchSettings("identity"))
    assert relative(contributions(network, chords, queries), wanted) < limit


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_lost_of_the_sum_is_in_the_ledger_for_every_query(name: str) -> None:
    """Of the sum over examples, query by query, the machine misses what the sketch and unattributed terms say."""
    wanted, queries = expected(name)
    network, chords = recorded(name, range(STEPS + 1), SketchSettings("balanced", width=4))
    terms, _ = query.ledger(network, first_output(queries), chords, rules_of(chords))
    lost = wanted.sum(1) - contributions(network, chords, queries).sum(1)
    shown = (terms["sketch"] + terms["unattributed"])[:, 0]
    assert lost.norm() > 1e-4 * wanted.sum(1).norm(), "nothing is lost: the basis is not coarse"
    assert relative(shown, lost) < 0.01


def test_carrying_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Re-expressed through coarse bases the tail's split among examples is an approximation; dropped, it is wrong."""
    wanted, queries = expected("momentum")
    nodes, sketch = range(0, STEPS + 1, 4), SketchSettings("balanced", width=6)
    kept = relative(contributions(*recorded("momentum", nodes, sketch), queries), wanted)
    monkeypatch.setattr(open_chord, "carried", lambda steps, sketches: [open_chord.RecordedStep([]) for _ in steps])
    dropped = relative(contributions(*recorded("momentum", nodes, sketch), queries), wanted)
    assert kept < 0.5 * dropped, f"carried {kept:.3f}, dropped {dropped:.3f}"
