"""The windows of a convolution, in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry", "WindowScratch"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvGeometry:
    """Where the windows of a convolution lie; ``padding`` is of zeros, the same on both sides of a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output: tuple[int, ...]

    def convolve(self, inputs: Tensor, factor: Tensor) -> Tensor:
        """Apply ``factor [k, c_in * window]`` to every window of ``inputs [n, c_in, *]``: ``[n, k, *output]``."""
        weight = factor.reshape(factor.shape[0], inputs.shape[1], *self.kernel)
        conv = _CONVOLUTIONS[len(self.kernel)]
        return conv(inputs, weight, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def unfold(self, inputs: Tensor) -> Tensor:
        """Every window written out, ``[n, c_in * window, positions]``."""
        if any(self.padding):
            inputs = F.pad(inputs, [p for size in reversed(self.padding) for p in (size, size)])
        windows = self.windows(inputs.contiguous())
        return windows.reshape(inputs.shape[0], inputs.shape[1] * math.prod(self.kernel), -1)

    def padded(self, like: Tensor, first: int, second: int, *size: int) -> tuple[Tensor, Tensor]:
        """Zeros ``[first, second, *size]`` with the padding around them, and the view of what the padding surrounds."""
        whole = like.new_zeros(first, second, *(s + 2 * p for s, p in zip(size, self.padding, strict=True)))
        inner = whole
        for dim, (length, padding) in enumerate(zip(size, self.padding, strict=True), start=2):
            inner = inner.narrow(dim, padding, length)
        return whole, inner

    def windows(self, padded: Tensor) -> Tensor:
        """A view of contiguous, padded inputs, ``[n, c_in, *window, *positions]``."""
        steps = padded.stride()[2:]
        within = [d * s for d, s in zip(self.dilation, steps, strict=True)]
        across = [d * s for d, s in zip(self.stride, steps, strict=True)]
        return padded.as_strided(
            (*padded.shape[:2], *self.kernel, *self.output), (*padded.stride()[:2], *within, *across)
        )


class WindowScratch:
    """Memory for a layer's windows and a row of ones below them, used again in every step.

    In fresh memory the same copy takes twice the time (measured: docs/benchmarks.md).

    Args:
        largest: More numbers than this are not kept from step to step.
    """

    def __init__(self, largest: int = 1 << 22) -> None:
        self._largest = largest
        self._made_for: tuple[object, ...] = ()

    def unfold(self, inputs: Tensor, geometry: ConvGeometry) -> Tensor | None:
        """Every window written out, then ones, ``[n, c_in * window + 1, positions]``.

        Args:
            inputs: ``[n, c_in, *]``.
            geometry: Where the windows lie.

        Returns:
            Memory that the next call writes over, or None where it would be too large to keep.
        """
        made_for = (inputs.shape, inputs.dtype, inputs.device, geometry)
        if made_for != self._made_for:
            if inputs.shape[0] * _columns(inputs, geometry) * math.prod(geometry.output) > self._largest:
                return None
            self._make(inputs, geometry)
            self._made_for = made_for
        self._inner.copy_(inputs)
        self._inside.copy_(self._windows)
        return self._unfolded

    def _make(self, inputs: Tensor, geometry: ConvGeometry) -> None:
        padded, self._inner = geometry.padded(inputs, *inputs.shape)
        self._windows = geometry.windows(padded)
        self._unfolded = inputs.new_ones(inputs.shape[0], _columns(inputs, geometry), math.prod(geometry.output))
        self._inside = self._unfolded[:, :-1].view(self._windows.shape)


def _columns(inputs: Tensor, geometry: ConvGeometry) -> int:
    return inputs.shape[1] * math.prod(geometry.kernel) + 1
