"""Per-example gradients of a convolution, in the form in which it yields them.

Index letters as in `lightning_pathkernel.capture.gradients`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_pathkernel.capture.shifts import ShiftedConvolution
from lightning_pathkernel.capture.windows import ConvGeometry, WindowScratch

__all__ = ["ConvGradient", "ConvScratch", "grouped_conv_gradient"]


class ConvScratch:
    """Memory of one layer, used again in every step.

    Args:
        windows: For windows that are written out.
    """

    def __init__(self, windows: WindowScratch | None = None) -> None:
        self.windows = windows or WindowScratch()
        self.shifted = ShiftedConvolution()


@dataclass(slots=True)
class ConvGradient:
    """Gradient of an ungrouped convolution's weight: ``inputs [n, c_in, *]``, ``grad_outputs [n, c_out, *]``.

    The column factor acts as a convolution with ``k`` output channels: where there is one, no window is unfolded.
    """

    inputs: Tensor
    grad_outputs: Tensor
    geometry: ConvGeometry
    scratch: ConvScratch
    _sums: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.inputs.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """A thin convolution of the inputs, contracted with the output gradients, ``[n, k_left, k_right]``."""
        out = self._columns(right)
        return (out if left is None else out @ left.T).transpose(1, 2)

    def _columns(self, right: Tensor | None) -> Tensor:
        """``right @ G_n^T``, ``[n, k_right, c_out]``: columns first, since the product over positions is large."""
        grads = self.grad_outputs.flatten(2)
        if right is None:
            ones_below = self.scratch.windows.unfold(self.inputs, self.geometry)
            if ones_below is None:
                return self.geometry.unfold(self.inputs) @ grads.transpose(1, 2)
            both = ones_below @ grads.transpose(1, 2)
        else:
            ones_below = self.scratch.shifted(self.inputs, self.geometry, right)
            if ones_below is None:
                return self.geometry.convolve(self.inputs, right).flatten(2) @ grads.transpose(1, 2)
            both = (grads @ ones_below.transpose(1, 2)).transpose(1, 2)  # with few rows the faster way round
        self._sums = both[:, -1]
        return both[:, :-1]

    def sums(self) -> Tensor:
        """Output gradients summed over positions, ``[n, c_out]``; already there if the weight's product had ones."""
        if self._sums is None:
            self._sums = self.grad_outputs.flatten(2).sum(2)
        return self._sums

    def factors(self) -> None:
        """Not of rank one."""

    def dense(self) -> Tensor:
        """``[n, r, c]``."""
        return self.project(None, None)

    def total(self) -> Tensor:
        """``[r, c]``."""
        return self.dense().sum(0)

    def take(self, which: slice) -> ConvGradient:
        """Some of the examples."""
        return ConvGradient(self.inputs[which], self.grad_outputs[which], self.geometry, ConvScratch())


def grouped_conv_gradient(inputs: Tensor, grad_outputs: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """Per-example weight gradients of a grouped convolution, ``[n, c_out, c_in / groups * window]``."""
    n, c_out = grad_outputs.shape[:2]
    windows = geometry.unfold(inputs)
    windows = windows.reshape(n, groups, windows.shape[1] // groups, -1)
    grads = grad_outputs.flatten(2).reshape(n, groups, c_out // groups, -1)
    return (grads @ windows.transpose(2, 3)).reshape(n, c_out, -1)
