"""Queries unlike the probes, to which sketches were fitted: the ledger's sketch term says where the machine fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel import KernelMachine
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.network import Network
from lightning_pathkernel.path import node_schedule
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import digits, recorded_step

LIKE, OTHER, NOISE = "like the probes", "other classes", "noise"


def unseen() -> dict[str, Tensor]:
    """Forty images of each kind that nobody has seen: the probes are digits from 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[420:]
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    low = torch.tensor(labels)[order] < 5
    noise = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return {LIKE: x[low][:40], OTHER: x[~low][:40], NOISE: noise}


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}


def recorded(optimizer: str, probes: Tensor) -> KernelMachine:
    """Forty steps on all digits, kept by few features."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optim = OPTIMIZERS[optimizer](model.parameters())
    x, y = digits()[0].tensors
    chords: list[Chord] = []
    settings = RecorderSettings(node_schedule(40, 8), 32, SketchSettings(features=120, most=0))
    recorder = PathRecorder(Network(model, plan_capture(model)), optim, settings, probes, chords.append)
    recorder.capture.attach()
    for ids in torch.arange(320).repeat(4).split(32):
        recorded_step(recorder, optim, ids, lambda ids=ids: F.cross_entropy(model(x[ids]), y[ids]))
    recorder.capture.detach()
    return KernelMachine(model, chords, quadrature_points=16)


@pytest.fixture(scope="module", params=list(OPTIMIZERS))
def accounts(request: Any) -> dict[str, dict[str, Tensor]]:
    """Kind of query -> error of the prediction, terms of the ledger and learned change, for the predicted class."""
    x, y = digits()[1].tensors
    machine = recorded(request.param, x[y < 5])
    found = {}
    for kind, queries in unseen().items():
        outputs = machine.network_outputs(queries)
        target = outputs.argmax(1)
        ledger = machine.explain(queries, target=target).ledger
        value, predicted = (each.gather(1, target[:, None])[:, 0] for each in (outputs, machine.predict(queries)))
        found[kind] = {**ledger, "error": value - predicted, "change": value - ledger["initial"]}
    return found


@pytest.mark.parametrize("kind", [LIKE, OTHER, NOISE])
def test_the_sketch_term_is_the_error_up_to_the_other_terms(accounts: dict[str, dict[str, Tensor]], kind: str) -> None:
    found = accounts[kind]
    torch.testing.assert_close(
        found["error"] - found["quadrature"] - found["unattributed"], found["sketch"], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", [OTHER, NOISE])
def test_queries_unlike_the_probes_have_a_larger_sketch_term(accounts: dict[str, dict[str, Tensor]], kind: str) -> None:
    like, unlike = (
        float(accounts[each]["sketch"].abs().mean() / accounts[each]["change"].abs().mean()) for each in (LIKE, kind)
    )
    assert unlike > 1.8 * like, f"sketch term {unlike:.3f} of the change, {like:.3f} for queries like the probes"


def test_the_sketch_term_ranks_queries_by_the_machines_error(accounts: dict[str, dict[str, Tensor]]) -> None:
    error = torch.cat([found["error"].abs() for found in accounts.values()])
    sketch = torch.cat([found["sketch"].abs() for found in accounts.values()])
    found = correlation(ranks(error), ranks(sketch))
    assert found > 0.9, f"rank correlation {found:.3f}"
