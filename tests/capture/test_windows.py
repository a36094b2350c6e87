"""Windows in memory that is used again: the same as in fresh memory, whatever came before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pathkernel.capture import LayerCall, conv, layer_rules
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
    monkeypatch.setitem(conv._SCRATCH, layer, WindowScratch(largest))
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
