"""Wrong labels found on real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.label_errors import coordinates, isolation
from lightning_pathkernel.testing import tiny_machine
from tests.helpers import Classifier, fit

CASES = {
    "MLP, AdamW": ("adamw", 3e-3, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))),
    "CNN, SGD": (
        "sgd", 0.1, lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        ),
    ),
}  # fmt: skip


def mislabelled(seed: int, n: int = 800) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, their labels of which every tenth is another, drawn evenly, and which these are."""
    images, truth = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(truth), generator=generator)[:n]
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(truth)[order]
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: n // 10]] = True
    return x, torch.where(wrong, (y + torch.randint(1, 10, (n,), generator=generator)) % 10, y), wrong


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_four_fifths_of_the_wrong_labels_are_in_the_first_fifth(case: str, seed: int, tmp_path: Path) -> None:
    x, y, wrong = mislabelled(seed)
    optimizer, rate, network = CASES[case]
    torch.manual_seed(seed)
    module = Classifier(optimizer, network(), lr=rate)
    path_kernel = PathKernelCallback(str(tmp_path / "run"), sketch_dim=64, nodes=8, probes=32)
    fit(module, [path_kernel], tmp_path, max_epochs=10, loader=DataLoader(TensorDataset(x, y), 32, shuffle=True))
    assert path_kernel.machine_dir is not None
    machine = KernelMachine.load(path_kernel.machine_dir, module)
    for found in (machine.label_errors(y), machine.label_errors(y, x)):
        assert sorted(found.example_ids.tolist()) == list(range(800))
        assert (found.scores.diff() <= 0).all()
        assert torch.equal(found.labels, y[found.example_ids])
        share = float(wrong[found.example_ids[:160]].sum() / wrong.sum())
        assert share >= 0.8, f"{share:.3f} of the wrong labels among the first fifth"


@pytest.fixture(scope="module")
def machine() -> KernelMachine:
    torch.manual_seed(0)
    x, y, _ = mislabelled(0, 60)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
    return tiny_machine(net, x, y, chords=3)


def test_labels_may_be_a_mapping_and_neither_their_numbers_nor_the_order_of_chords_matters(
    machine: KernelMachine,
) -> None:
    y = mislabelled(0, 60)[1]
    found = machine.label_errors(y)
    assert 0 < found.scores[-1] < found.scores[0] < 1
    mapped = machine.label_errors({i: 100 - int(label) for i, label in enumerate(y.tolist())})
    assert torch.equal(mapped.example_ids, found.example_ids)
    backwards = KernelMachine(machine._network.module, machine.chords[::-1]).label_errors(y)
    torch.testing.assert_close(backwards.scores, found.scores)


def test_labels_and_inputs_that_do_not_fit_are_refused(machine: KernelMachine) -> None:
    x, y, _ = mislabelled(0, 60)
    with pytest.raises(ValueError, match=r"labels must have shape \(60,\).*pass a mapping id -> label"):
        machine.label_errors(y[:50])
    with pytest.raises(ValueError, match="x has 50 rows for 60 training examples"):
        machine.label_errors(y, x[:50])
    with pytest.raises(ValueError, match="network of 10 outputs: with x, a label must be the number of an output"):
        machine.label_errors(y + 5, x)


def test_with_inputs_it_is_the_loss_averaged_over_the_path(machine: KernelMachine) -> None:
    x, y, _ = mislabelled(0, 60)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
    expected = torch.zeros(60)
    for chord in machine.chords:
        module.load_state_dict(chord.weights(1.0))
        expected += nn.functional.cross_entropy(module(x), y, reduction="none").detach() / 3
    found = machine.label_errors(y, x)
    torch.testing.assert_close(found.scores, expected[found.example_ids], rtol=1e-4, atol=1e-5)


def test_coordinates_are_gradients_with_every_parameter_counting_the_same(machine: KernelMachine) -> None:
    """An identity sketch keeps all of a gradient: rows split by parameter, each of mean square 1, with or without a
    second stage."""
    chord = machine.chords[1]
    parts = chord.rows.split([sketch.features for sketch in chord.sketches.values()], dim=1)
    scaled = torch.cat([part / part.square().sum(1).mean().sqrt() for part in parts], dim=1)
    torch.testing.assert_close(coordinates(chord), scaled, rtol=1e-4, atol=1e-6)
    k = chord.rows.shape[1]
    stage = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(0))).Q
    staged = coordinates(replace(chord, rows=chord.rows @ stage.T, second_stage=stage))
    torch.testing.assert_close(staged @ staged.T, scaled @ scaled.T, rtol=1e-3, atol=1e-3)


def test_isolation_is_the_mean_cosine_with_the_nearest_fellows() -> None:
    x, y, _ = mislabelled(1, 90)
    rows = x.flatten(1).double()
    found = isolation(rows, y, neighbours=3)
    for i in range(0, 90, 7):
        fellows = [j for j in range(90) if j != i and y[j] == y[i]]
        cosines = sorted((float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for j in fellows), reverse=True)
        assert float(found[i]) == pytest.approx(-sum(cosines[:3]) / 3)
