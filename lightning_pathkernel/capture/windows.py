"""The windows of a convolution, in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry"]

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
        inputs = inputs.contiguous()
        steps = inputs.stride()[2:]
        within = [d * s for d, s in zip(self.dilation, steps, strict=True)]
        across = [d * s for d, s in zip(self.stride, steps, strict=True)]
        windows = inputs.as_strided(
            (*inputs.shape[:2], *self.kernel, *self.output), (*inputs.stride()[:2], *within, *across)
        )
        return windows.reshape(inputs.shape[0], inputs.shape[1] * math.prod(self.kernel), -1)
