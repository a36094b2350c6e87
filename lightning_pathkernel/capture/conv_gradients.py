"""Per-example gradients of a convolution, in the form in which it yields them.

Index letters as in `lightning_pathkernel.capture.gradients`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_pathkernel.capture.gradients import VectorGradient
from lightning_pathkernel.capture.windows import ConvGeometry, WindowScratch

__all__ = ["ConvBiasGradient", "ConvGradient", "grouped_conv_gradient"]


@dataclass(slots=True)
class ConvGradient:
    """Gradient of an ungrouped convolution's weight: ``inputs [n, c_in, *]``, ``grad_outputs [n, c_out, *]``.

    The column factor acts as a convolution with ``k`` output channels: where there is one, no window is unfolded.
    """

    inputs: Tensor
    grad_outputs: Tensor
    geometry: ConvGeometry
    scratch: WindowScratch
    _sums: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.inputs.shape[0])

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """A thin convolution of the inputs, contracted with the output gradients, ``[n, k_left, k_right]``."""
        # columns first: the product over positions is the large one, and this order of it the fast one
        grads = self.grad_outputs.flatten(2).transpose(1, 2)
        if right is not None:
            out = self.geometry.convolve(self.inputs, right).flatten(2) @ grads
        else:
            unfolded = self.scratch.unfold(self.inputs, self.geometry)
            if unfolded is None:
                out = self.geometry.unfold(self.inputs) @ grads
            else:
                both = unfolded @ grads
                out, self._sums = both[:, :-1], both[:, -1]
        return (out if left is None else out @ left.T).transpose(1, 2)

    def sums(self) -> Tensor:
        """Output gradients summed over positions, ``[n, c_out]``; already there if the windows were written out."""
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
        return ConvGradient(self.inputs[which], self.grad_outputs[which], self.geometry, WindowScratch())


class ConvBiasGradient(VectorGradient):
    """A convolution's bias: read after its weight, it costs nothing where the weight's windows were written out."""

    __slots__ = ("_weight",)

    def __init__(self, weight: ConvGradient) -> None:
        self._weight = weight

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """``[n, c_out]``."""
        return self._weight.sums()


def grouped_conv_gradient(inputs: Tensor, grad_outputs: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """Per-example weight gradients of a grouped convolution, ``[n, c_out, c_in / groups * window]``."""
    n, c_out = grad_outputs.shape[:2]
    windows = geometry.unfold(inputs)
    windows = windows.reshape(n, groups, windows.shape[1] // groups, -1)
    grads = grad_outputs.flatten(2).reshape(n, groups, c_out // groups, -1)
    return (grads @ windows.transpose(2, 3)).reshape(n, c_out, -1)
