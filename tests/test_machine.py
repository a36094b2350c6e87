"""The kernel machine: against the reference, term by term, and what it is made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel import KernelMachine, PathKernelCallback
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.network import Network
from lightning_pathkernel.recorder import PathRecorder, RecorderSettings
from lightning_pathkernel.reference import (
    ReferenceAdadelta,
    ReferenceAdagrad,
    ReferenceAdam,
    ReferenceAdamax,
    ReferenceNAdam,
    ReferencePathKernel,
    ReferenceRAdam,
    ReferenceRMSprop,
    ReferenceRprop,
    ReferenceSGD,
)
from lightning_pathkernel.sketch import SketchSettings
from tests.helpers import Classifier, digits, fit, recorded_step

STEPS = 14


def patients() -> tuple[Tensor, Tensor]:
    """Scikit-learn's breast cancer data, standardised: 40 patients, 10 measurements."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x[:60, :10], dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0), torch.tensor(y[:60])


def batches() -> list[tuple[list[int], Tensor, Tensor]]:
    x, y = patients()
    out = []
    for step in range(STEPS):
        ids = [(5 * step + j * (1 + step % 3)) % 40 for j in range(6)]
        out.append((ids, x[ids], y[ids]))
    return out


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


CASES: dict[str, tuple[Any, dict, float | None]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.2}, None),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, None),
    "clipping": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.8, "dampening": 0.2}, 0.4),
    "adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.05}, None),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}, None),
    "nadam": (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.05, "momentum_decay": 0.05}, None),
    "radam": (torch.optim.RAdam, {"lr": 0.02, "betas": (0.9, 0.7), "weight_decay": 0.05}, 0.4),
    "adamax": (torch.optim.Adamax, {"lr": 0.02, "weight_decay": 0.05}, None),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.05, "lr_decay": 0.1}, None),
    "adadelta": (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.05}, 0.4),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}, None),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "weight_decay": 0.05}, None),
    "rmsprop, centred": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.8, "eps": 1e-3, "centered": True}, 0.4),
}
COUPLED = {
    torch.optim.Adam: ReferenceAdam,
    torch.optim.NAdam: ReferenceNAdam,
    torch.optim.RAdam: ReferenceRAdam,
    torch.optim.Adamax: ReferenceAdamax,
}
PLAIN = {
    torch.optim.SGD: ReferenceSGD,
    torch.optim.Adadelta: ReferenceAdadelta,
    torch.optim.Adagrad: ReferenceAdagrad,
    torch.optim.RMSprop: ReferenceRMSprop,
    torch.optim.Rprop: ReferenceRprop,
}


def exact(name: str) -> ReferencePathKernel:
    kind, options, clip = CASES[name]
    if kind is torch.optim.AdamW:
        spec: Any = ReferenceAdam(**options)
    else:
        spec = COUPLED[kind](decoupled=False, **options) if kind in COUPLED else PLAIN[kind](**options)
    return ReferencePathKernel(network(), F.cross_entropy, batches(), spec, max_norm=clip, points=6)


def machine(name: str) -> KernelMachine:
    """Recorded without a sketch and with one chord per step, in float64."""
    kind, options, clip = CASES[name]
    module = network()
    optimizer = kind(module.parameters(), **options)
    chords: list = []
    settings = RecorderSettings(range(STEPS + 1), 10_000, SketchSettings("identity"))
    recorder = PathRecorder(Network(module, plan_capture(module)), optimizer, settings, None, chords.append)
    recorder.capture.attach()
    for ids, x, y in batches():
        recorded_step(recorder, optimizer, torch.tensor(ids), lambda x=x, y=y: F.cross_entropy(module(x), y), clip)
    recorder.capture.detach()
    return KernelMachine(module, chords, quadrature_points=6)


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_those_of_the_reference(name: str) -> None:
    path, found = exact(name), machine(name)
    unseen = patients()[0][40:43]
    target = torch.tensor([1, 0, 1])
    assert found.example_ids.tolist() == path.ids
    for query in range(3):
        pick = lambda output, k=int(target[query]): output[k]  # noqa: E731
        row = unseen[query : query + 1]
        expected = path.contributions(row, pick)
        torch.testing.assert_close(found.contributions(row, target[query : query + 1]), expected, rtol=1e-4, atol=1e-7)
        k = int(target[query])
        torch.testing.assert_close(found.predict(row)[:, k], path.predict(row, pick), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.bias(row)[:, k], path.bias(row, pick), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.predict(row)[:, k], path.output(row, pick), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_kernel_and_coefficients_are_those_of_the_reference(name: str) -> None:
    path, found = exact(name), machine(name)
    x = patients()[0]
    unseen, ids = x[40:43], [0, 5, 7]
    target = torch.tensor([1, 1, 1])
    pick = lambda output: output[1]  # noqa: E731
    expected = path.kernel(unseen, x[ids], pick, pick)
    torch.testing.assert_close(found.kernel(unseen, x[ids], target, target), expected, rtol=1e-4, atol=1e-7)
    share = path.contributions(unseen, pick)[:, [path.ids.index(i) for i in ids]]
    coefficients = found.coefficients(unseen, x[ids], torch.tensor(ids), target)
    torch.testing.assert_close(coefficients, share / expected, rtol=1e-3, atol=1e-6)


def test_coefficients_name_examples_that_were_never_visited() -> None:
    found = machine("sgd")
    x = patients()[0]
    with pytest.raises(KeyError, match=r"examples \[999\] were never visited in training"):
        found.coefficients(x[:1], x[:1], torch.tensor([999]), torch.tensor([0]))


# an artifact of a sketched recording on real images


def cnn() -> nn.Module:
    """Batch norm after a convolution without a bias."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Machine directory and trained module: batch norm, AdamW with decay, six chords of many steps."""
    root = tmp_path_factory.mktemp("machine")
    torch.manual_seed(3)
    module = Classifier("adamw", cnn(), weight_decay=0.1)
    path_kernel = PathKernelCallback(str(root / "run"), sketch_dim=64, nodes=6, probes=64)
    fit(module, [path_kernel], root)
    assert path_kernel.machine_dir is not None
    return path_kernel.machine_dir, module


@pytest.fixture(scope="module")
def sketched(exported: tuple[Path, nn.Module]) -> KernelMachine:
    return KernelMachine.load(exported[0], Classifier(net=cnn()))


@pytest.fixture(scope="module")
def unseen() -> Tensor:
    return digits()[1].tensors[0][:24]


def altered(machine: KernelMachine, **changes: Any) -> KernelMachine:
    chords = [replace(c, **{k: change(getattr(c, k)) for k, change in changes.items()}) for c in machine.chords]
    return KernelMachine(copy.deepcopy(machine._network.module), chords)


def test_leaving_examples_out_changes_predictions_by_their_contributions(
    sketched: KernelMachine, unseen: Tensor
) -> None:
    before = sketched.predict(unseen)
    gone = sketched.example_ids[[3, 50, 200]]
    after = sketched.without(gone)
    for k in range(10):
        shares = sketched.contributions(unseen, torch.full((24,), k))[:, [3, 50, 200]].sum(1)
        torch.testing.assert_close(before[:, k] - after.predict(unseen)[:, k], shares, rtol=1e-3, atol=1e-5)
    assert not torch.isin(after.example_ids, gone).any()
    assert len(after.example_ids) == len(sketched.example_ids) - 3
    torch.testing.assert_close(after.bias(unseen), sketched.bias(unseen))


def test_what_was_left_out_is_unattributed_and_never_shared_out_again(sketched: KernelMachine, unseen: Tensor) -> None:
    target = torch.zeros(24, dtype=torch.long)
    gone = sketched.example_ids[:100]
    shares = sketched.contributions(unseen, target)[:, :100].sum(1)
    one, other = (m.explain(unseen, target, top_k=1) for m in (sketched, sketched.without(gone)))
    moved = {name: other.ledger[name] - one.ledger[name] for name in one.ledger}
    torch.testing.assert_close(moved["examples"], -shares, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moved["unattributed"], shares, rtol=1e-3, atol=1e-5)
    for name in ("initial", "decay", "buffers", "quadrature", "sketch"):
        torch.testing.assert_close(moved[name], torch.zeros(24), rtol=0, atol=1e-4)


def test_leaving_everything_out_or_zeroing_it_leaves_the_bias(sketched: KernelMachine, unseen: Tensor) -> None:
    bias = sketched.bias(unseen)
    assert (sketched.predict(unseen) - bias).abs().max() > 0.3
    assert torch.equal(altered(sketched, rows=torch.zeros_like).predict(unseen), bias)
    empty = sketched.without(sketched.example_ids)
    assert empty.example_ids.shape == (0,)
    torch.testing.assert_close(empty.predict(unseen), bias)


def test_prediction_is_linear_in_the_stored_rows(sketched: KernelMachine, unseen: Tensor) -> None:
    bias, whole = sketched.bias(unseen), sketched.predict(unseen)
    half = altered(sketched, rows=lambda rows: rows / 2).predict(unseen)
    torch.testing.assert_close(half - bias, (whole - bias) / 2, rtol=1e-4, atol=1e-5)


def test_the_error_of_a_prediction_is_its_error_budget(
    sketched: KernelMachine, exported: tuple[Path, nn.Module], unseen: Tensor
) -> None:
    with torch.no_grad():
        outputs = exported[1].eval()(unseen)
    torch.testing.assert_close(sketched.network_outputs(unseen), outputs)
    prediction = sketched.predict(unseen)
    parts = torch.zeros_like(outputs)
    for k in range(10):
        ledger = sketched.explain(unseen, torch.full((24,), k), top_k=1).ledger
        parts[:, k] = ledger["quadrature"] + ledger["sketch"] + ledger["unattributed"]
        total = torch.stack(list(ledger.values())).sum(0)
        assert ((total - outputs[:, k]).abs() <= 1e-4 * outputs.abs().amax(1)).all()
        stored = ledger["initial"] + ledger["examples"] + ledger["decay"] + ledger["buffers"]
        torch.testing.assert_close(stored, prediction[:, k], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs - prediction, parts, rtol=1e-3, atol=1e-4)
    found = sketched.fidelity([unseen])
    change = (outputs - sketched.bias(unseen)).norm()
    assert found["fidelity"] == pytest.approx(1 - float(parts.norm() / change) ** 2, abs=1e-5)


def test_completed_contributions_add_up_to_all_that_was_learned_from_examples(
    sketched: KernelMachine, unseen: Tensor
) -> None:
    n = len(sketched.example_ids)
    plain = sketched.explain(unseen, top_k=n, complete=False)
    whole = sketched.explain(unseen, top_k=n)
    torch.testing.assert_close(plain.contributions[:, :n].sum(1), plain.ledger["examples"], rtol=1e-3, atol=1e-4)
    learned = whole.ledger["examples"] + whole.ledger["sketch"]
    torch.testing.assert_close(whole.contributions[:, :n].sum(1), learned, rtol=1e-3, atol=1e-4)
    assert (whole.contributions[:, :n].diff(dim=1) <= 0).all()
    assert (whole.contributions[:, n:].diff(dim=1) >= 0).all()


def test_explanations_name_the_extreme_contributions(sketched: KernelMachine, unseen: Tensor) -> None:
    why = sketched.explain(unseen, top_k=4, complete=False)
    everything = sketched.contributions(unseen)
    assert why.example_ids.shape == why.contributions.shape == (24, 8)
    torch.testing.assert_close(why.contributions[:, 0], everything.max(1).values)
    torch.testing.assert_close(why.contributions[:, 4], everything.min(1).values)
    columns = torch.searchsorted(sketched.example_ids, why.example_ids)
    torch.testing.assert_close(everything.gather(1, columns), why.contributions)


def test_an_output_function_is_explained_by_its_own_gradient(sketched: KernelMachine, unseen: Tensor) -> None:
    """Contributions to a margin are differences of contributions to its logits."""
    one, other = torch.full((24,), 3), torch.full((24,), 8)
    margin = sketched.contributions(unseen, one, output_fn=lambda out, t: out.gather(1, t[:, None])[:, 0] - out[:, 8])
    apart = sketched.contributions(unseen, one) - sketched.contributions(unseen, other)
    torch.testing.assert_close(margin, apart, rtol=1e-3, atol=1e-5)


def test_the_kernel_is_symmetric_and_positive_semi_definite(sketched: KernelMachine, unseen: Tensor) -> None:
    for target in (None, torch.arange(24) % 10):
        gram = sketched.kernel(unseen, target=target).double()
        assert gram.shape == (24, 24)
        torch.testing.assert_close(gram, gram.T, rtol=1e-5, atol=0)
        values = torch.linalg.eigvalsh((gram + gram.T) / 2)
        assert values[0] > -1e-5 * values[-1]
        torch.testing.assert_close(sketched.kernel(unseen, unseen, target, target).double(), gram, rtol=1e-5, atol=0)


def test_the_kernel_without_targets_is_the_trace_over_outputs(sketched: KernelMachine, unseen: Tensor) -> None:
    parts = [sketched.kernel(unseen, target=torch.full((24,), k)) for k in range(10)]
    torch.testing.assert_close(sketched.kernel(unseen), torch.stack(parts).sum(0))
    with pytest.raises(ValueError, match="give both target and target2, or neither"):
        sketched.kernel(unseen, unseen, target=torch.zeros(24, dtype=torch.long))


def test_answers_do_not_depend_on_chunks(sketched: KernelMachine, unseen: Tensor) -> None:
    small = KernelMachine(sketched._network.module, sketched.chords, chunk_size=5)
    torch.testing.assert_close(small.predict(unseen), sketched.predict(unseen), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.contributions(unseen), sketched.contributions(unseen), rtol=1e-4, atol=1e-6)


def test_a_tolerance_bounds_the_quadrature_error(exported: tuple[Path, nn.Module], unseen: Tensor) -> None:
    """The embedded estimate holds the error below the tolerance, chord by chord; a loose one costs fewer points."""
    errors = {}
    for rtol in (0.3, 0.01):
        found = KernelMachine.load(exported[0], Classifier(net=cnn()), rtol=rtol)
        errors[rtol] = found.fidelity([unseen])["error_quadrature"]
        assert errors[rtol] <= rtol
    coarse = KernelMachine.load(exported[0], Classifier(net=cnn()), quadrature_points=1)
    assert errors[0.01] < 0.3 * coarse.fidelity([unseen])["error_quadrature"]
    with pytest.raises(ValueError, match="quadrature_points and rtol must be positive, found 4 and -1"):
        KernelMachine.load(exported[0], Classifier(net=cnn()), rtol=-1)


def test_asking_for_targets_of_the_wrong_shape(sketched: KernelMachine, unseen: Tensor) -> None:
    with pytest.raises(ValueError, match=r"target must have shape \(24,\), found \(3,\)"):
        sketched.contributions(unseen, torch.zeros(3, dtype=torch.long))


def test_a_query_leaves_the_module_and_the_generator_alone(exported: tuple[Path, nn.Module], unseen: Tensor) -> None:
    module = Classifier(net=cnn()).train()
    weights = copy.deepcopy(module.state_dict())
    found = KernelMachine.load(exported[0], module)
    state = torch.get_rng_state()
    found.explain(unseen)
    found.fidelity([unseen])
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
