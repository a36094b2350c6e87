"""Kernels of any size, and contributions by group, chord and epoch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_pathkernel import KernelMachine, gram, group_contributions
from lightning_pathkernel.grouping import contributions_by_epoch
from lightning_pathkernel.testing import tiny_machine


class Shared(nn.Module):
    """A convolution, a layer that is used twice, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x.reshape(-1, 1, 8, 8)))).mean(2)[:, :2].flatten(1)
        out: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.inner(h)))))
        return out


def images() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:40] / 16), torch.tensor(y[:40])


@pytest.fixture(scope="module")
def machine() -> KernelMachine:
    torch.manual_seed(0)
    x, y = images()
    return tiny_machine(Shared().double(), x[:30], y[:30], chords=4)


def jacobian(machine: KernelMachine, x: Tensor, node: int) -> Tensor:
    """By autograd, output by output and row by row: ``[n, K, P]``."""
    chord = machine.chords[min(node, len(machine.chords) - 1)]
    weights = chord.start if node < len(machine.chords) else chord.weights(1.0)
    buffers = chord.start_buffers if node < len(machine.chords) else chord.end_buffers
    module = Shared().double().eval()
    module.load_state_dict({**module.state_dict(), **weights, **buffers})
    rows = []
    for row in x:
        out = module(row[None])[0]
        found = [torch.autograd.grad(o, list(module.parameters()), retain_graph=True) for o in out]
        rows.append(torch.stack([torch.cat([g.flatten() for g in one]) for one in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("node", [0, 2, 4])
def test_the_tangent_kernel_is_that_of_autograd(machine: KernelMachine, node: int) -> None:
    x = images()[0][30:36]
    j = jacobian(machine, x, node)
    torch.testing.assert_close(machine.tangent_kernel(x, node=node), torch.einsum("ikp,jkp->ij", j, j))
    torch.testing.assert_close(
        machine.tangent_kernel(x[:4], x[4:], node, torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])),
        torch.stack([j[i, i + 1] for i in range(4)]) @ torch.stack([j[4, 5], j[5, 6]]).T,
    )
    assert torch.equal(machine.tangent_kernel(x, node=node), machine.tangent_kernel(x, node=node - 5))


def test_there_are_as_many_nodes_as_chords_and_one(machine: KernelMachine) -> None:
    assert machine.node_steps.tolist() == [0, 1, 2, 3, 4]
    for node in (5, -6):
        with pytest.raises(IndexError, match=f"no node {node}: the path has nodes 0 to 4, or -5 to -1"):
            machine.tangent_kernel(images()[0][:2], node=node)


def test_under_sgd_the_path_kernel_is_the_integral_of_tangent_kernels(machine: KernelMachine) -> None:
    """Without batch norm's buffers, which jump at a chord's end: between the kernels at both ends, near their mean."""
    torch.manual_seed(0)
    x, y = images()
    plain = tiny_machine(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double(), x, y, chords=6)
    ends = [plain.tangent_kernel(x[:5], node=node) for node in range(7)]
    trapezia = sum(0.1 * (a + b) / 2 for a, b in pairwise(ends))
    torch.testing.assert_close(plain.kernel(x[:5]), trapezia, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(plain.kernel(x[:5]), 0.6 * ends[0], rtol=1e-2)


def test_blocks_and_chunks_do_not_matter(machine: KernelMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()[0]
    target = torch.arange(len(x)) % 10
    whole = machine.kernel(x), machine.kernel(x[:23], x, target[:23], target), machine.tangent_kernel(x, node=1)
    monkeypatch.setattr(gram, "NUMBERS", 7 * 900)
    small = KernelMachine(machine._network.module, machine.chords, chunk_size=3)
    parts = small.kernel(x), small.kernel(x[:23], x, target[:23], target), small.tangent_kernel(x, node=1)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gram_matrices_are_symmetric_and_positive_semi_definite_to_rounding() -> None:
    torch.manual_seed(0)
    x, y = (part.float() if part.is_floating_point() else part for part in images())
    single = tiny_machine(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)), x, y)
    target = torch.arange(40) % 10
    for ask in (single.kernel, single.tangent_kernel):
        for kwargs in ({}, {"target": target}, {"output_fn": lambda out, _: out.logsumexp(1)}):
            found = ask(x, dtype=torch.float64, **kwargs)
            assert found.dtype is torch.float64
            assert torch.equal(found, found.T)
            values = torch.linalg.eigvalsh(found)
            assert values[0] > -1e-12 * values[-1]
            torch.testing.assert_close(ask(x, **kwargs).double(), found, rtol=1e-4, atol=1e-5 * float(values[-1]))
    twice = single.kernel(torch.cat([x, x])).double()
    assert torch.linalg.eigvalsh(twice)[0] > -1e-5 * twice.diagonal().sum()


def test_two_targets_of_the_same_queries_are_two_sides(machine: KernelMachine) -> None:
    x = images()[0][:6]
    one, other = torch.zeros(6, dtype=torch.long), torch.full((6,), 3)
    crossed = machine.kernel(x, target=one, target2=other)
    torch.testing.assert_close(crossed, machine.kernel(x, x, one, other))
    assert not torch.allclose(crossed, machine.kernel(x, target=one))


def test_a_target_that_does_not_fit_is_refused(machine: KernelMachine) -> None:
    x = images()[0][:6]
    with pytest.raises(ValueError, match=r"target must be integers of shape \(6,\), found torch.int64 \(5,\)"):
        machine.kernel(x, target=torch.arange(5))
    with pytest.raises(ValueError, match=r"target2 must be integers of shape \(6,\), found torch.float32"):
        machine.kernel(x, x, torch.zeros(6).long(), torch.zeros(6))
    with pytest.raises(ValueError, match="give both target and target2, or neither"):
        machine.tangent_kernel(x, x, target=torch.zeros(6).long())


# groups


def test_a_grouped_machine_answers_with_sums_over_its_groups(machine: KernelMachine) -> None:
    (x, y), n = images(), 30
    queries, target = x[30:], torch.arange(10)
    labels = y[:n]
    by_class = machine.grouped(labels)
    every = machine.contributions(queries, target)
    assert by_class.example_ids.tolist() == sorted(set(labels.tolist()))
    torch.testing.assert_close(by_class.contributions(queries, target), group_contributions(every, labels))
    named = machine.grouped({i: int(label) for i, label in enumerate(labels.tolist())})
    torch.testing.assert_close(named.contributions(queries, target), group_contributions(every, labels))
    torch.testing.assert_close(by_class.predict(queries), machine.predict(queries))
    torch.testing.assert_close(by_class.explain(queries, target).ledger, machine.explain(queries, target).ledger)
    torch.testing.assert_close(
        by_class.self_influence(), group_contributions(machine.self_influence(), labels), rtol=1e-5, atol=1e-7
    )


def test_chords_and_epochs_add_up_to_the_contributions(machine: KernelMachine) -> None:
    queries, target = images()[0][30:], torch.arange(10)
    every = machine.contributions(queries, target)
    by_chord = machine.contributions_by_chord(queries, target)
    assert by_chord.shape == (10, 4, 30)
    torch.testing.assert_close(by_chord.sum(1), every)
    some = machine.contributions_by_chord(queries, target, ids=[7, 3])
    assert torch.equal(some, by_chord[:, :, [7, 3]])
    by_epoch = contributions_by_epoch(by_chord, machine.node_steps, steps_per_epoch=3)
    assert by_epoch.shape == (10, 2, 30)
    torch.testing.assert_close(by_epoch[:, 0], by_chord[:, :3].sum(1))
    torch.testing.assert_close(by_epoch.sum(1), every)
    with pytest.raises(KeyError, match=r"examples \[99\] were never visited in training"):
        machine.contributions_by_chord(queries, ids=[99])


def test_a_chord_without_an_example_has_none_of_its_contribution(machine: KernelMachine) -> None:
    first = machine.chords[0]
    cut = replace(first, example_ids=first.example_ids[5:], rows=first.rows[5:], self_inner=first.self_inner[5:])
    without = KernelMachine(machine._network.module, [cut, *machine.chords[1:]])
    by_chord = without.contributions_by_chord(images()[0][30:32])
    assert torch.equal(by_chord[:, 0, :5], torch.zeros(2, 5, dtype=torch.float64))
    assert (by_chord[:, 1:, :5] != 0).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(29).long(), r"labels must have shape \(30,\).*found \(29,\)"),
        (torch.zeros(30), "labels must be integers, found torch.float32"),
        ({0: 1}, r"no label for 29 of 30 training examples, such as ids \[1, 2, 3, 4, 5\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(machine: KernelMachine, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine.grouped(labels)  # type: ignore[arg-type]


def test_groups_are_numbered_from_0() -> None:
    shares = torch.ones(2, 3)
    assert group_contributions(shares, torch.tensor([0, 0, 2]), groups=5).tolist() == [[2, 0, 1, 0, 0]] * 2
    for labels, groups in ((torch.tensor([0, -1, 1]), None), (torch.tensor([0, 1, 2]), 2)):
        with pytest.raises(ValueError, match="labels must be between 0 and 1"):
            group_contributions(shares, labels, groups)
    with pytest.raises(ValueError, match=r"integers of shape \(3,\)"):
        group_contributions(shares, torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"node_steps must have shape \(4,\), found \(3,\)"):
        contributions_by_epoch(shares, torch.arange(3), 2)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive, found 0"):
        contributions_by_epoch(shares, torch.arange(4), 0)
