"""The metrics against numpy, over batches, ranks, copies and merges."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import check_forward_full_state_property

from lightning_pathkernel.functional import kernel_machine_agreement, kernel_machine_fidelity
from lightning_pathkernel.metrics import KernelMachineAgreement, KernelMachineFidelity

mpl.use("Agg")

BATCHES = 5  # odd, so that two ranks get three and two of them
SHAPES = [(7, 3), (7, 1), (7,)]


def reference_fidelity(prediction: np.ndarray, target: np.ndarray, baseline: np.ndarray) -> float:
    error = change = 0.0
    for p, t, b in zip(prediction.ravel(), target.ravel(), baseline.ravel(), strict=True):
        error += (float(t) - float(p)) ** 2
        change += (float(t) - float(b)) ** 2
    return 1 - error / change


def reference_agreement(prediction: np.ndarray, target: np.ndarray) -> float:
    rows = list(zip(np.atleast_2d(prediction.T).T, np.atleast_2d(target.T).T, strict=True))
    if rows[0][0].shape == (1,):
        return sum(bool(p[0] > 0) == bool(t[0] > 0) for p, t in rows) / len(rows)
    return sum(int(np.argmax(p)) == int(np.argmax(t)) for p, t in rows) / len(rows)


# class, function, reference, number of tensors that it takes
CASES: list[Any] = [
    pytest.param(KernelMachineFidelity, kernel_machine_fidelity, reference_fidelity, 3, id="fidelity"),
    pytest.param(KernelMachineAgreement, kernel_machine_agreement, reference_agreement, 2, id="agreement"),
]
METRICS: list[Any] = [
    pytest.param(KernelMachineFidelity, 3, id="fidelity"),
    pytest.param(KernelMachineAgreement, 2, id="agreement"),
]


def batches(arguments: int, shape: tuple[int, ...] = (7, 3), count: int = BATCHES) -> list[tuple[Tensor, ...]]:
    """Batches of unequal size: the network's outputs are the prediction's with noise added."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index in range(count):
        size = (shape[0] + index, *shape[1:])
        target = torch.randn(size, generator=generator)
        prediction = target + 0.7 * torch.randn(size, generator=generator)
        baseline = torch.randn(size, generator=generator)
        found.append((prediction, target, baseline)[:arguments])
    return found


def whole(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def updated(metric: Metric, parts: list[tuple[Tensor, ...]]) -> Metric:
    for part in parts:
        metric.update(*part)
    return metric


def exactly(value: Tensor, expected: float) -> None:
    """Same value up to float64's rounding, as a float64 scalar."""
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("metric", "function", "reference", "arguments"), CASES)
def test_function_and_class_give_the_references_value(
    metric: Any, function: Any, reference: Any, arguments: int, shape: tuple[int, ...]
) -> None:
    parts = batches(arguments, shape)
    expected = reference(*(tensor.numpy() for tensor in whole(parts)))
    exactly(function(*whole(parts)), expected)
    exactly(updated(metric(), parts).compute(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("metric", "function", "reference", "arguments"), CASES)
def test_forward_gives_the_batchs_value_and_compute_the_wholes(
    metric: Any, function: Any, reference: Any, arguments: int, shape: tuple[int, ...]
) -> None:
    parts = batches(arguments, shape)
    instance = metric()
    for part in parts:
        exactly(instance(*part), reference(*(tensor.numpy() for tensor in part)))
    exactly(instance.compute(), float(function(*whole(parts))))


def test_a_vector_is_a_single_column() -> None:
    prediction, target, baseline = whole(batches(3, (7,)))
    columns = [tensor.unsqueeze(1) for tensor in (prediction, target, baseline)]
    exactly(kernel_machine_fidelity(prediction, target, baseline), float(kernel_machine_fidelity(*columns)))
    exactly(kernel_machine_agreement(prediction, target), float(kernel_machine_agreement(*columns[:2])))


def test_perfect_is_one_and_the_bias_alone_is_zero() -> None:
    _, target, baseline = whole(batches(3))
    exactly(kernel_machine_fidelity(target, target, baseline), 1.0)
    exactly(kernel_machine_fidelity(baseline, target, baseline), 0.0)
    zeros, ones = torch.zeros(4, 2), torch.ones(4, 2)
    exactly(kernel_machine_fidelity(-ones, ones, zeros), -3.0)  # twice as far off


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_are_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    """100 and 0.0625 are exact in every dtype; their difference and the sum of its squares are not."""
    target = torch.full((4096, 1), 100.0, dtype=dtype)
    prediction = torch.full((4096, 1), 0.0625, dtype=dtype)
    value = kernel_machine_fidelity(prediction, target, torch.zeros_like(target))
    exactly(value, 1 - 99.9375**2 / 100**2)


def test_small_errors_survive_many_large_ones() -> None:
    """In float32 the sum would stop growing: 2^24 + 1 = 2^24."""
    metric = KernelMachineFidelity()
    metric.update(torch.tensor([0.0]), torch.tensor([4096.0]), torch.tensor([0.0]))
    for _ in range(100):
        metric.update(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    exactly(metric.compute(), 1 - (2**24 + 100) / 2**24)


def test_fidelity_has_a_gradient_and_says_so() -> None:
    prediction, target, baseline = whole(batches(3))
    prediction.requires_grad_()
    kernel_machine_fidelity(prediction, target, baseline).backward()
    change = ((target - baseline).double() ** 2).sum()
    expected = 2 * (target - prediction.detach()).double() / change
    torch.testing.assert_close(prediction.grad, expected.float(), rtol=1e-5, atol=1e-8)
    assert KernelMachineFidelity.is_differentiable
    assert not KernelMachineAgreement.is_differentiable


def test_the_gradient_is_finite_where_nothing_was_learned() -> None:
    prediction = torch.ones(2, 2, requires_grad=True)
    kernel_machine_fidelity(prediction, torch.ones(2, 2), torch.ones(2, 2)).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


# Edge cases


def test_nothing_learned_is_one_for_an_exact_machine_and_minus_infinity_otherwise() -> None:
    ones, zeros = torch.ones(3, 2), torch.zeros(3, 2)
    exactly(kernel_machine_fidelity(ones, ones, ones), 1.0)
    assert kernel_machine_fidelity(zeros, ones, ones).item() == -math.inf


def test_a_nan_is_not_hidden() -> None:
    nan, ones = torch.full((3, 2), torch.nan), torch.ones(3, 2)
    assert kernel_machine_fidelity(nan, ones, torch.zeros(3, 2)).isnan()
    assert kernel_machine_fidelity(nan, ones, ones).isnan()
    for columns in (1, 2):
        exactly(kernel_machine_agreement(nan[:, :columns], -ones[:, :columns]), 0.0)
        exactly(kernel_machine_agreement(nan[:, :columns], nan[:, :columns]), 0.0)


def test_zero_counts_as_negative() -> None:
    exactly(kernel_machine_agreement(torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 1.0])), 0.5)


@pytest.mark.parametrize(("metric", "function", "reference", "arguments"), CASES)
def test_without_rows_the_value_is_nan(metric: Any, function: Any, reference: Any, arguments: int) -> None:
    for shape in ((0, 3), (0, 1), (0,)):
        empty = [torch.zeros(shape)] * arguments
        assert function(*empty).isnan()
        instance = metric()
        instance.update(*empty)
        assert instance.compute().isnan()


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_before_the_first_update_the_value_is_nan_with_a_warning(metric: Any, arguments: int) -> None:
    with pytest.warns(UserWarning, match="called before"):
        assert metric().compute().isnan()


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_an_empty_batch_changes_nothing(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    instance = updated(metric(), [*parts, (torch.zeros(0, 3),) * arguments])
    exactly(instance.compute(), float(updated(metric(), parts).compute()))


@pytest.mark.parametrize(("metric", "function", "reference", "arguments"), CASES)
@pytest.mark.parametrize(
    ("first", "others", "message"),
    [
        pytest.param((4, 3), (4, 2), r"prediction \[4, 3\], target \[4, 2\].*same \[n, K\]", id="outputs"),
        pytest.param((4, 3), (5, 3), r"prediction \[4, 3\], target \[5, 3\].*the same", id="rows"),
        pytest.param((4,), (4, 1), r"prediction \[4\], target \[4, 1\].*expected", id="vector-column"),
        pytest.param((), (), r"prediction \[\], target \[\].*expected \[n, K\] or \[n\]", id="scalar"),
        pytest.param((4, 3, 2), (4, 3, 2), r"prediction \[4, 3, 2\].*expected \[n, K\] or \[n\]", id="three"),
        pytest.param((4, 0), (4, 0), r"prediction \[4, 0\].*K of at least 1", id="no-outputs"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_by_name(
    metric: Any, function: Any, reference: Any, arguments: int, first: Any, others: Any, message: str
) -> None:
    tensors = [torch.zeros(first), *[torch.zeros(others)] * (arguments - 1)]
    with pytest.raises(ValueError, match=message):
        function(*tensors)
    instance = metric()
    with pytest.raises(ValueError, match=message):
        instance.update(*tensors)
    assert all(getattr(instance, name) == 0 for name in instance._defaults), "a refused batch left something behind"


def test_the_baselines_shape_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"target \[4, 3\], baseline \[3\]"):
        kernel_machine_fidelity(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3))


# Metric machinery


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_a_pickled_or_cloned_metric_goes_on_where_it_was(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    expected = float(updated(metric(), parts).compute())
    begun = updated(metric(), parts[:2])
    for copy in (pickle.loads(pickle.dumps(begun)), begun.clone()):
        exactly(updated(copy, parts[2:]).compute(), expected)
    exactly(updated(begun, parts[2:]).compute(), expected)


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_two_metrics_have_two_hashes(metric: Any, arguments: int) -> None:
    one, other = metric(), metric()
    assert hash(one) == hash(one)
    assert hash(one) != hash(other)


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_the_state_dict_is_empty_unless_asked_for(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    instance = updated(metric(), parts)
    assert instance.state_dict() == {}
    instance.persistent(True)
    state = instance.state_dict()
    restored = metric()
    restored.persistent(True)
    restored.load_state_dict(state)
    for name in restored._defaults:
        assert torch.equal(getattr(restored, name), getattr(instance, name)), name


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_reset_forgets_everything(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    instance = updated(metric(), parts)
    instance.reset()
    exactly(updated(instance, parts[3:]).compute(), float(updated(metric(), parts[3:]).compute()))


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_merged_states_are_the_whole(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    expected = float(updated(metric(), parts).compute())
    one, other = updated(metric(), parts[:2]), updated(metric(), parts[2:])
    one.merge_state(other)
    exactly(one.compute(), expected)
    from_dict = updated(metric(), parts[:2])
    from_dict.merge_state(other.metric_state)
    exactly(from_dict.compute(), expected)


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_half_and_float_leave_the_sums_alone(metric: Any, arguments: int) -> None:
    parts = batches(arguments)
    instance = updated(metric().half().float(), parts)
    exactly(instance.compute(), float(updated(metric(), parts).compute()))


def test_states_can_be_made_float32_for_devices_without_float64() -> None:
    parts = batches(3)
    metric = updated(KernelMachineFidelity().set_dtype(torch.float32), parts)
    torch.testing.assert_close(float(metric.compute()), float(updated(KernelMachineFidelity(), parts).compute()))


def test_compute_groups_never_merge_the_two() -> None:
    """After an empty first batch every state is zero: only their names tell the two metrics apart."""
    collection = MetricCollection(
        {"fidelity": KernelMachineFidelity(), "agreement": KernelMachineAgreement()}, compute_groups=True
    )
    zeros = torch.zeros(0, 3)
    parts = batches(3)
    for part in [(zeros, zeros, zeros), *parts]:
        collection.update(prediction=part[0], target=part[1], baseline=part[2])
    assert sorted(collection.compute_groups.values()) == [["agreement"], ["fidelity"]]
    value = collection.compute()
    prediction, target, baseline = whole(parts)
    exactly(value["fidelity"], float(kernel_machine_fidelity(prediction, target, baseline)))
    exactly(value["agreement"], float(kernel_machine_agreement(prediction, target)))


def test_no_state_has_the_same_name_in_both() -> None:
    assert not set(KernelMachineFidelity()._defaults) & set(KernelMachineAgreement()._defaults)


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_the_full_state_is_not_needed(metric: Any, arguments: int, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("prediction", "target", "baseline")[:arguments]
    check_forward_full_state_property(
        metric,
        input_args=dict(zip(names, batches(arguments)[0], strict=True)),
        num_update_to_compare=[5],
        reps=2,
    )
    if printed := capsys.readouterr().out:
        assert "Full state for" in printed  # it prints its timings only where both ways agree
    assert metric.full_state_update is False


@pytest.mark.parametrize(("metric", "arguments"), METRICS)
def test_plots_a_value_and_a_history(metric: Any, arguments: int) -> None:
    from matplotlib import pyplot as plt

    parts = batches(arguments)
    instance = metric()
    history = [instance(*part) for part in parts]
    for values in (None, history[0], history):
        figure, axis = instance.plot(values)
        assert isinstance(figure, Figure)
        assert isinstance(axis, Axes)
        plt.close(figure)
    figure, axis = plt.subplots()
    _, drawn = instance.plot(history, axis)
    assert drawn is axis
    assert len(axis.get_lines()[0].get_ydata()) == len(history)
    plt.close(figure)


def test_higher_is_better_and_the_plots_end_at_one() -> None:
    for metric in (KernelMachineFidelity, KernelMachineAgreement):
        assert metric.higher_is_better
        assert metric.plot_upper_bound == 1.0
    assert KernelMachineFidelity.plot_lower_bound is None
    assert KernelMachineAgreement.plot_lower_bound == 0.0


# Two ranks


def _on_rank(rank: int, world: int, directory: str) -> None:
    """Everything that two ranks are asked, in one process each: starting it is what takes the time.

    An assertion that fails here fails the test: `spawn` raises it again in the parent.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    try:
        for metric, function, arguments in (
            (KernelMachineFidelity, kernel_machine_fidelity, 3),
            (KernelMachineAgreement, kernel_machine_agreement, 2),
        ):
            parts = batches(arguments)
            expected = float(function(*whole(parts)))
            mine = parts[rank::world]  # three batches on rank 0, two on rank 1, all of different sizes

            exactly(updated(metric(), mine).compute(), expected)

            # synchronised at the end only: forward gives this rank's batch
            instance = metric()
            for part in mine:
                exactly(instance(*part), float(function(*part)))
            exactly(instance.compute(), expected)
            exactly(instance.compute(), expected)  # the states were put back: a second call counts nothing twice
            instance.reset()

            # synchronised on every step, so ranks step together: forward gives both ranks' batches
            instance = metric(dist_sync_on_step=True)
            for step in range(BATCHES // world):
                together = parts[world * step : world * (step + 1)]
                exactly(instance(*together[rank]), float(function(*whole(together))))
            exactly(instance.compute(), float(function(*whole(parts[: BATCHES // world * world]))))

            # a rank with an empty batch, and a rank that never saw one
            empty = [(torch.zeros(0, 3),) * arguments]
            exactly(updated(metric(), parts if rank == 0 else empty).compute(), expected)
            exactly(updated(metric(), parts if rank == 0 else []).compute(), expected)
            assert updated(metric(), empty).compute().isnan()
        (Path(directory) / f"done-{rank}").touch()
    finally:
        dist.destroy_process_group()


def test_two_ranks_give_the_value_of_one(tmp_path: Path) -> None:
    spawn(_on_rank, args=(2, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
