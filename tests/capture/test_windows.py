"""Windows in memory that is used again: the same as in fresh memory, whatever came before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pathkernel.capture import LayerCall, conv, layer_rules
from lightning_pathkernel.capture.conv_gradients import ConvGradient, ConvScratch
from lightning_pathkernel.capture.shifts import ShiftedConvolution
from lightning_pathkernel.capture.windows import ConvGeometry, WindowScratch

SHAPES = [(5, 2, 9, 7), (3, 2, 9, 7), (5, 2, 9, 7), (5, 2, 6, 8), (1, 2, 6, 8)]


def geometry(inputs: Tensor, **options: tuple[int, int]) -> ConvGeometry:
    layer = nn.Conv2d(2, 1, (3, 2), **options)  # type: ignore[arg-type]
    output = tuple(layer.double()(inputs).shape[2:])
    return ConvGeometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, output)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{}, {"padding": (1, 2)}, {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 1)}]
)
def test_windows_and_ones(options: dict[str, tuple[int, int]]) -> None:
    scratch, generator = WindowScratch(), torch.Generator().manual_seed(0)
    for shape in SHAPES:
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        where = geometry(inputs, **options)
        found = scratch.unfold(inputs, where)
        assert found is not None
        assert torch.equal(found[:, :-1], where.unfold(inputs))
        assert bool((found[:, -1] == 1).all())


def test_what_is_too_large_is_not_kept() -> None:
    inputs = torch.randn(5, 2, 9, 7, dtype=torch.float64)
    where = geometry(inputs)
    assert WindowScratch(largest=5 * 13 * 42).unfold(inputs, where) is not None
    assert WindowScratch(largest=5 * 13 * 42 - 1).unfold(inputs, where) is None


@pytest.mark.parametrize("largest", [0, 1 << 22])
def test_a_bias_is_the_same_before_and_after_its_weight(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its sums come from the weight's product or not."""
    generator, layer = torch.Generator().manual_seed(1), nn.Conv2d(2, 4, 3, padding=1).double()
    monkeypatch.setitem(conv._SCRATCH, layer, ConvScratch(WindowScratch(largest)))
    inputs, grads = (torch.randn(3, c, 6, 5, generator=generator, dtype=torch.float64) for c in (2, 4))
    for first in (True, False):
        found = layer_rules()[nn.Conv2d](layer, LayerCall((inputs,), {}, 0, grads, True, 3))
        before = found["bias"].dense() if first else None
        weight = found["weight"].dense()
        for bias in (before, found["bias"].dense()):
            if bias is not None:
                torch.testing.assert_close(bias[:, :, 0], grads.sum((2, 3)))
        again = layer_rules()[nn.Conv2d](layer, LayerCall((inputs.flip(0),), {}, 0, grads.flip(0), True, 3))
        torch.testing.assert_close(again["weight"].dense().flip(0), weight)


CONVOLUTIONS = {"1": (nn.Conv1d, F.conv1d), "2": (nn.Conv2d, F.conv2d), "3": (nn.Conv3d, F.conv3d)}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
def test_shifted_copies_are_the_convolution(
    dimensions: str, padding: int, dilation: int, channels: int, k: int
) -> None:
    """In memory that is used again, whatever came before: another batch, another factor, another size."""
    make, apply = CONVOLUTIONS[dimensions]
    generator, shifted = torch.Generator().manual_seed(0), ShiftedConvolution()
    for n, longest in ((4, 8), (4, 8), (2, 8), (4, 7)):
        size = (longest, 6, 5)[: int(dimensions)]
        layer = make(channels, 4, 3, padding=padding, dilation=dilation)
        inputs = torch.randn(n, channels, *size, generator=generator, dtype=torch.float64)
        factor = torch.randn(k, channels * 3 ** int(dimensions), generator=generator, dtype=torch.float64)
        if min(size) + 2 * padding <= 2 * dilation:
            continue
        weight = factor.view(k, channels, *layer.kernel_size)
        expected = apply(inputs, weight, padding=padding, dilation=dilation)
        where = ConvGeometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, tuple(expected.shape[2:]))
        found = shifted(inputs, where, factor)
        assert found is not None
        torch.testing.assert_close(found[:, :-1], expected.flatten(2))
        assert bool((found[:, -1] == 1).all())


def test_what_shifted_copies_are_no_good_for_is_the_librarys() -> None:
    inputs, factor = torch.randn(5, 2, 9, 7), torch.randn(3, 12)
    where = geometry(inputs.double())
    assert ShiftedConvolution()(inputs, where, factor[:2]) is not None
    assert ShiftedConvolution()(inputs, where, factor) is None, "three channels"
    assert ShiftedConvolution()(inputs, geometry(inputs.double(), stride=(2, 1)), factor[:2]) is None
    assert ShiftedConvolution(largest=5 * 9 * 7 * (2 + 6 * 2))(inputs, where, factor[:2]) is not None
    assert ShiftedConvolution(largest=5 * 9 * 7 * (2 + 6 * 2) - 1)(inputs, where, factor[:2]) is None


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_projected_convolution_and_its_bias(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs, grads = (torch.randn(3, c, 6, 5, generator=generator, dtype=torch.float64) for c in (2, 4))
    left, right = (torch.randn(k, d, generator=generator, dtype=torch.float64) for d in (4, 18))
    where = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), (6, 5))
    gradient = ConvGradient(inputs, grads, where, ConvScratch())
    whole = gradient.dense()
    for factor, expected in ((left, left @ whole @ right.T), (None, whole @ right.T)):
        torch.testing.assert_close(gradient.project(factor, right), expected)
    torch.testing.assert_close(gradient.sums(), grads.sum((2, 3)))
