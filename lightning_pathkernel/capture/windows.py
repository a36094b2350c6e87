"""The windows of a convolution, in any number of dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvGeometry"]

_CONVOLVED = 16
"""Windows of at most this many numbers are written out by a convolution, which is faster than slicing."""
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
        size = inputs.shape[1] * math.prod(self.kernel)
        if size <= _CONVOLVED:
            return self.convolve(inputs, torch.eye(size, dtype=inputs.dtype, device=inputs.device)).flatten(2)
        if any(self.padding):
            inputs = F.pad(inputs, [p for size in reversed(self.padding) for p in (size, size)])
        columns = []
        for offset in itertools.product(*(range(size) for size in self.kernel)):
            where = [slice(None), slice(None)]
            for o, d, s, size in zip(offset, self.dilation, self.stride, self.output, strict=True):
                where.append(slice(o * d, o * d + s * (size - 1) + 1, s))
            columns.append(inputs[tuple(where)].flatten(2))
        return torch.stack(columns, dim=2).flatten(1, 2)
