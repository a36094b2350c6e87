"""The path kernel as a scikit-learn estimator."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from lightning_pathkernel import KernelMachine
from lightning_pathkernel.sklearn import PathKernel
from lightning_pathkernel.testing import tiny_machine


class AnyWidth(nn.Module):
    """scikit-learn's checks ask with rows of 1 to 20 numbers: cut to 4, or filled up with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(nn.functional.pad(x, (0, max(0, 4 - x.shape[1])))[:, :4])
        return out


def any_width() -> KernelMachine:
    torch.manual_seed(0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return tiny_machine(AnyWidth(), x, chords=1)


DO_NOT_APPLY = {
    "check_estimators_overwrite_params": "it compares pickles of a deep copy of the machine with its own, and those of "
    "a torch module differ before anything was done; test_fitting_leaves_the_machine_as_it_was takes its place",
}


@parametrize_with_checks(
    [PathKernel(any_width()), PathKernel(any_width(), kernel="tangent", node=0, scaled=True)],
    expected_failed_checks=lambda _: DO_NOT_APPLY,
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_fitting_leaves_the_machine_as_it_was() -> None:
    kernel = PathKernel(any_width(), scaled=True)
    before = joblib.hash(kernel.machine)
    kernel.fit(np.eye(4)).transform(np.ones((2, 4)))
    assert joblib.hash(kernel.machine) == before
    assert joblib.hash(copy.deepcopy(kernel.machine)) != before, "the check left out above applies now"


@pytest.fixture(scope="module")
def flowers() -> tuple[KernelMachine, np.ndarray, np.ndarray]:
    x, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = ((x - x.mean(0)) / x.std(0))[order].astype(np.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return tiny_machine(net, torch.tensor(x[:100]), torch.tensor(y[order][:100]), chords=20), x, y[order]


def test_in_a_pipeline_it_is_the_gram_matrix_of_the_machine(
    flowers: tuple[KernelMachine, np.ndarray, np.ndarray],
) -> None:
    machine, x, y = flowers
    train, test = torch.tensor(x[:100]), torch.tensor(x[100:])
    by_hand = SVC(kernel="precomputed").fit(machine.kernel(train, dtype=torch.float64), y[:100])
    expected = by_hand.decision_function(machine.kernel(test, train, dtype=torch.float64))
    pipeline = make_pipeline(PathKernel(machine), SVC(kernel="precomputed")).fit(x[:100], y[:100])
    np.testing.assert_allclose(pipeline.decision_function(x[100:]), expected, atol=1e-6)
    assert pipeline.score(x[100:], y[100:]) >= 0.9
    function = SVC(kernel=PathKernel(machine)).fit(x[:100], y[:100])
    np.testing.assert_allclose(function.decision_function(x[100:]), expected, atol=1e-6)


def test_scaled_the_fitted_diagonal_is_1_on_average(flowers: tuple[KernelMachine, np.ndarray, np.ndarray]) -> None:
    machine, x, _ = flowers
    plain, scaled = (PathKernel(machine, scaled=s).fit_transform(x[:30]) for s in (False, True))
    assert np.mean(np.diagonal(scaled)) == pytest.approx(1)
    np.testing.assert_allclose(scaled * np.mean(np.diagonal(plain)), plain, rtol=1e-9)


def test_one_output_and_any_node_can_be_chosen(flowers: tuple[KernelMachine, np.ndarray, np.ndarray]) -> None:
    machine, x, _ = flowers
    found = PathKernel(machine, kernel="tangent", node=7, target=2).fit(x[:10]).transform(x[10:15])
    two = [torch.full((n,), 2) for n in (5, 10)]
    expected = machine.tangent_kernel(torch.tensor(x[10:15]), torch.tensor(x[:10]), 7, *two, dtype=torch.float64)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10)


def test_searched_and_cross_validated(flowers: tuple[KernelMachine, np.ndarray, np.ndarray]) -> None:
    machine, x, y = flowers
    pipeline = make_pipeline(PathKernel(machine, scaled=True), SVC(kernel="precomputed"))
    search = GridSearchCV(pipeline, {"pathkernel__kernel": ["path", "tangent"], "svc__C": [0.1, 10]}, cv=3).fit(x, y)
    assert search.best_score_ >= 0.9
    gram = machine.kernel(torch.tensor(x), dtype=torch.float64).numpy()
    scores = cross_val_score(SVC(kernel="precomputed"), gram, y, cv=3)  # both sides are cut, as for a pairwise input
    assert scores.mean() >= 0.9


def test_kernel_ridge_on_images() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = (images[:300] / 16).astype(np.float32), labels[:300]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    machine = tiny_machine(net, torch.tensor(x[:200]).reshape(-1, 1, 8, 8), torch.tensor(y[:200]), chords=10)
    kernel = PathKernel(machine, input_shape=(1, 8, 8), scaled=True)
    model = make_pipeline(kernel, KernelRidge(alpha=1e-2, kernel="precomputed")).fit(x[:200], np.eye(10)[y[:200]])
    assert (model.predict(x[200:]).argmax(1) == y[200:]).mean() >= 0.85


def test_a_clone_shares_the_machine_and_nothing_fitted() -> None:
    fitted = PathKernel(any_width(), scaled=True).fit(np.ones((3, 4)))
    other = clone(fitted)
    assert other.machine is fitted.machine
    assert other.scaled
    assert not hasattr(other, "X_fit_")


def test_without_a_machine_or_with_another_kernel_it_says_so() -> None:
    with pytest.raises(ValueError, match="PathKernel needs machine=, a KernelMachine, found NoneType"):
        PathKernel().fit(np.ones((3, 4)))
    with pytest.raises(ValueError, match="kernel must be 'path' or 'tangent', found 'rbf'"):
        PathKernel(any_width(), kernel="rbf").fit(np.ones((3, 4)))


def test_without_scikit_learn_the_extra_is_named() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import lightning_pathkernel.sklearn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert 'needs scikit-learn, which is not installed: pip install "lightning-pathkernel[sklearn]"' in run.stderr
