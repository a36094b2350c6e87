"""Pure functions: how faithfully a kernel machine reproduces its network."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kernel_machine_agreement", "kernel_machine_fidelity"]


def kernel_machine_fidelity(prediction: Tensor, target: Tensor, baseline: Tensor) -> Tensor:
    """R squared of the learned change: ``1 - sum |target - prediction|^2 / sum |target - baseline|^2``."""
    error = ((target - prediction).double() ** 2).sum()
    change = ((target - baseline).double() ** 2).sum()
    return 1 - error / change


def kernel_machine_agreement(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of rows whose argmax (or sign, for a single output) agrees."""
    if prediction.dim() == 1 or prediction.shape[1] == 1:
        return ((prediction > 0) == (target > 0)).double().mean()
    return (prediction.argmax(1) == target.argmax(1)).double().mean()
