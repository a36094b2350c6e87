"""A convolution with very few channels as a sum of shifted copies.

The library's kernels compute sixteen channels where one or two are wanted (docs/benchmarks.md). Here one product brings
the inputs' channels down, and every place of the window then takes one addition: rows of the padded input lie one after
the other, so that a shift is an offset, and what is added one long vector.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from lightning_pathkernel.capture.windows import ConvGeometry

__all__ = ["ShiftedConvolution"]

_CHANNELS = 2
"""More of them are the library's."""


class ShiftedConvolution:
    """Memory for a layer's shifted copies, used again in every step.

    Args:
        largest: More numbers than this are not kept from step to step.
    """

    def __init__(self, largest: int = 1 << 20) -> None:
        self._largest = largest
        self._made_for: tuple[object, ...] = ()
        self._factor: Tensor | None = None

    def __call__(self, inputs: Tensor, geometry: ConvGeometry, factor: Tensor) -> Tensor | None:
        """``factor`` applied to every window, then ones, ``[n, k + 1, positions]``.

        Args:
            inputs: ``[n, c_in, *]``.
            geometry: Where the windows lie.
            factor: ``[k, c_in * window]``.

        Returns:
            Memory that the next call writes over, or None where the library's convolution is the better one.
        """
        k = factor.shape[0]
        made_for = (inputs.shape, inputs.dtype, inputs.device, geometry, k)
        if made_for != self._made_for:
            if not self._fits(inputs, geometry, k):
                return None
            self._make(inputs, geometry, k)
            self._made_for = made_for
        if factor is not self._factor:  # a chord's
            self._factor, self._by_place = factor, _by_place(factor, inputs.shape[1])
        self._inner.copy_(inputs)
        if k == inputs.shape[1] == 1:
            self._scaled()
        else:
            self._multiplied(k)
        self._inside.copy_(self._cropped)
        return self._result

    def _fits(self, inputs: Tensor, geometry: ConvGeometry, k: int) -> bool:
        places = math.prod(geometry.kernel)
        if k > _CHANNELS or places == 1 or set(geometry.stride) != {1} or inputs.device.type != "cpu":
            return False
        size = [s + 2 * p for s, p in zip(inputs.shape[2:], geometry.padding, strict=True)]
        return inputs.shape[0] * math.prod(size) * (inputs.shape[1] + places * k) <= self._largest

    def _make(self, inputs: Tensor, geometry: ConvGeometry, k: int) -> None:
        n, c_in, *size = inputs.shape
        padded, inner = geometry.padded(inputs, c_in, n, *size)
        self._inner, self._padded = inner.transpose(0, 1), padded.view(c_in, -1)
        steps = [d * s for d, s in zip(geometry.dilation, padded.stride()[2:], strict=True)]
        self._offsets = [
            sum(i * step for i, step in zip(at, steps, strict=True)) for at in product(*map(range, geometry.kernel))
        ]
        if k * c_in > 1:
            self._products = inputs.new_empty(len(self._offsets) * k, self._padded.shape[1])
        sums = inputs.new_zeros(k, *padded.shape[1:])
        self._length = self._padded.shape[1] - self._offsets[-1]
        self._sums = sums.view(k, -1).narrow(1, 0, self._length)
        for dim, length in enumerate(geometry.output, start=2):
            sums = sums.narrow(dim, 0, length)
        self._result = inputs.new_ones(n, k + 1, math.prod(geometry.output))
        self._cropped, self._inside = sums.transpose(0, 1), self._result[:, :k].view(n, k, *geometry.output)

    def _scaled(self) -> None:
        """One channel to one channel."""
        first, *others = self._by_place[:, 0].tolist()
        torch.mul(self._padded.narrow(1, 0, self._length), first, out=self._sums)
        for offset, number in zip(self._offsets[1:], others, strict=True):
            self._sums.add_(self._padded.narrow(1, offset, self._length), alpha=number)

    def _multiplied(self, k: int) -> None:
        each = torch.mm(self._by_place, self._padded, out=self._products).view(len(self._offsets), k, -1)
        first, second, *others = (
            part.narrow(1, offset, self._length) for part, offset in zip(each, self._offsets, strict=True)
        )
        torch.add(first, second, out=self._sums)
        for part in others:
            self._sums.add_(part)


def _by_place(factor: Tensor, c_in: int) -> Tensor:
    """``factor [k, c_in * window]`` as ``[window * k, c_in]``."""
    return factor.view(factor.shape[0], c_in, -1).permute(2, 0, 1).reshape(-1, c_in)
