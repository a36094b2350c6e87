"""Whatever the loss and its reduction, a row's share is what went back through its own outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.machine import KernelMachine
from lightning_pathkernel.network import Network
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import recorded_step

N, K, STEPS, RATE = 6, 4, 5, 0.2
Loss = Callable[[Tensor, Tensor], Tensor]


def contrastive(outputs: Tensor, classes: Tensor) -> Tensor:
    """InfoNCE between both halves of the batch: every row's loss has all rows in it."""
    one, other = F.normalize(outputs, dim=1).chunk(2)
    return F.cross_entropy(one @ other.T / 0.5, torch.arange(len(one)))


def connectionist(outputs: Tensor, classes: Tensor) -> Tensor:
    """CTC over two frames of two symbols each."""
    frames = outputs.reshape(len(outputs), 2, 2).transpose(0, 1).log_softmax(2)
    lengths = torch.full((len(outputs),), 2)
    return F.ctc_loss(frames, torch.ones(len(outputs), 1, dtype=torch.long), lengths, lengths // 2, reduction="sum")


def smooth(outputs: Tensor, classes: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=outputs.dtype)
    return F.cross_entropy(outputs, classes, weight=weight, label_smoothing=0.1)


def weighted(outputs: Tensor, classes: Tensor) -> Tensor:
    """Sample weights, one of them 0."""
    return (F.cross_entropy(outputs, classes, reduction="none") * torch.arange(len(classes))).sum() / 7


LOSSES: dict[str, Loss] = {
    "label smoothing, class weights": smooth,
    "binary": lambda o, c: F.binary_cross_entropy_with_logits(o, F.one_hot(c, K).to(o)),
    "squared": lambda o, c: F.mse_loss(o, F.one_hot(c, K).to(o)),
    "squared, summed": lambda o, c: 0.1 * F.mse_loss(o, F.one_hot(c, K).to(o), reduction="sum"),
    "huber": lambda o, c: F.huber_loss(o, 3.0 * F.one_hot(c, K).to(o), delta=0.5),
    "ctc": connectionist,
    "contrastive": contrastive,
    "sample weights": weighted,
    "several": lambda o, c: smooth(o, c) + 0.3 * contrastive(o, c) + 1e-2 * o.square().sum(),
    "ignored rows": lambda o, c: F.cross_entropy(o, torch.where(c == 1, -100, c)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, K)).double()


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for step in range(STEPS):
        x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
        out.append(((torch.arange(N) + 3 * step) % 12, x, torch.randint(0, K, (N,), generator=generator)))
    return out


def literally(loss: Loss, query: Tensor, pick: int) -> tuple[dict[int, float], nn.Module]:
    """Contributions by one vector-Jacobian product per row and step, and 64 midpoints along the step."""
    module, found = network(), dict.fromkeys(range(12), 0.0)
    parameters = list(module.parameters())
    for ids, x, classes in batches():
        outputs = module(x)
        (back,) = torch.autograd.grad(loss(outputs, classes), outputs, retain_graph=True)
        rows = [torch.autograd.grad(outputs[i] @ back[i], parameters, retain_graph=True) for i in range(N)]
        start = [p.detach().clone() for p in parameters]
        moves = [-RATE * torch.stack([row[j] for row in rows]).sum(0) for j in range(len(parameters))]
        for t in (torch.arange(64) + 0.5) / 64:
            for p, w, move in zip(parameters, start, moves, strict=True):
                p.data = w + t * move
            tangent = torch.autograd.grad(module(query)[0, pick], parameters)
            for i, row in zip(ids.tolist(), rows, strict=True):
                found[i] -= RATE / 64 * float(sum((a * b).sum() for a, b in zip(tangent, row, strict=True)))
        for p, w, move in zip(parameters, start, moves, strict=True):
            p.data = w + move
    return found, module


@pytest.mark.parametrize("name", LOSSES)
def test_contributions_under_any_loss(name: str) -> None:
    loss, module, query = LOSSES[name], network(), torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    chords: list = []
    settings = RecorderSettings(range(STEPS + 1), 10_000, SketchSettings("identity"))
    recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, settings, None, chords.append)
    recorder.capture.attach()
    for ids, x, classes in batches():
        recorded_step(recorder, optimizer, ids, lambda x=x, c=classes: loss(module(x), c))
    recorder.capture.detach()
    machine = KernelMachine(module, chords, quadrature_points=6)
    expected, trained = literally(loss, query, 2)
    found = machine.contributions(query, torch.tensor([2]))[0]
    assert machine.example_ids.tolist() == list(expected)
    torch.testing.assert_close(found, torch.tensor(list(expected.values())).to(found), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(machine.predict(query), trained(query).detach(), rtol=1e-6, atol=1e-8)
    assert float(found.abs().max()) > 1e-3
