"""How faithfully a kernel machine reproduces its network, over batches and ranks: two torchmetrics.

The arithmetic is in `lightning_pathkernel.functional`; here it is only added up. States are scalars, summed
over ranks, and named after their metric: a `MetricCollection` puts metrics whose states have the same names
and first values into one compute group, where only one of them is updated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_pathkernel.functional import (
    _kernel_machine_agreement_compute,
    _kernel_machine_agreement_update,
    _kernel_machine_fidelity_compute,
    _kernel_machine_fidelity_update,
)

__all__ = ["KernelMachineAgreement", "KernelMachineFidelity"]


class KernelMachineFidelity(Metric):
    r"""R squared of the learned change: the share of it that the kernel machine accounts for.

    .. math::
        \text{fidelity} = 1 - \frac{\sum_i \lVert y_i - \hat y_i \rVert^2}{\sum_i \lVert y_i - b_i \rVert^2}

    where :math:`\hat y_i` is the machine's prediction, :math:`y_i` the network's output and :math:`b_i` the
    bias alone. 1 is perfect, 0 is no better than the bias, and there is no lower bound. Where nothing was
    learned it is 1 if the machine is exact and -inf if not; before any row was seen it is nan.

    As input to ``forward`` and ``update``: ``prediction``, ``target`` and ``baseline``, each ``[n, K]`` or
    ``[n]``. As output of ``forward`` and ``compute``: a scalar in float64. The sums are float64; before
    moving the metric to a device without it (MPS), call ``set_dtype(torch.float32)``.

    Args:
        kwargs: Passed on to `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.metrics import KernelMachineFidelity
        >>> fidelity = KernelMachineFidelity()
        >>> fidelity.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2))
        >>> fidelity.update(torch.tensor([[1.0, 4.0]]), torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        >>> fidelity.compute()  # 1 - 2 / 15
        tensor(0.8667, dtype=torch.float64)
    """

    is_differentiable: bool = True
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_upper_bound: float = 1.0

    fidelity_squared_error: Tensor
    fidelity_squared_change: Tensor
    fidelity_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("fidelity_squared_error", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fidelity_squared_change", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fidelity_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, baseline: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
            target: Outputs of the network, same shape.
            baseline: Outputs of the machine's bias alone, same shape.

        Raises:
            ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.
        """
        squared_error, squared_change, rows = _kernel_machine_fidelity_update(prediction, target, baseline)
        self.fidelity_squared_error = self.fidelity_squared_error + squared_error
        self.fidelity_squared_change = self.fidelity_squared_change + squared_change
        self.fidelity_rows = self.fidelity_rows + rows

    def compute(self) -> Tensor:
        """The fidelity over everything seen.

        Returns:
            A scalar; nan if no row was seen.
        """
        return _kernel_machine_fidelity_compute(
            self.fidelity_squared_error, self.fidelity_squared_change, self.fidelity_rows
        )

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or several in the order given; needs matplotlib.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them; default: compute now.
            ax: A matplotlib axis to draw on; default: a new figure.

        Returns:
            Figure and axis.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel import KernelMachineFidelity
            >>> from matplotlib.figure import Figure
            >>> metric = KernelMachineFidelity()
            >>> metric.update(torch.ones(4, 2), torch.ones(4, 2), torch.zeros(4, 2))
            >>> figure, axis = metric.plot(ax=Figure().subplots())
        """
        return self._plot(val, ax)


class KernelMachineAgreement(Metric):
    r"""Share of rows on which the kernel machine decides as its network does.

    .. math::
        \text{agreement} = \frac{1}{n} \sum_{i=1}^n \mathbb{1}[d(\hat y_i) = d(y_i)], \qquad
        d(y) = \begin{cases} \arg\max_k y_k & K > 1 \\ \mathbb{1}[y > 0] & K = 1 \end{cases}

    where :math:`\hat y_i` is the machine's prediction and :math:`y_i` the network's output. Zero counts as
    negative; a row with a nan on either side never agrees; before any row was seen the agreement is nan.

    As input to ``forward`` and ``update``: ``prediction`` and ``target``, each ``[n, K]`` or ``[n]``. As
    output of ``forward`` and ``compute``: a scalar in float64.

    Args:
        kwargs: Passed on to `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.metrics import KernelMachineAgreement
        >>> agreement = KernelMachineAgreement()
        >>> agreement.update(torch.tensor([[2.0, 0.0], [1.0, 4.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> agreement.update(torch.tensor([[0.5, 0.4], [0.0, 1.0]]), torch.tensor([[0.4, 0.5], [0.0, 2.0]]))
        >>> agreement.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    agreement_agreeing: Tensor
    agreement_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreement_agreeing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("agreement_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
            target: Outputs of the network, same shape.

        Raises:
            ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.
        """
        agreeing, rows = _kernel_machine_agreement_update(prediction, target)
        self.agreement_agreeing = self.agreement_agreeing + agreeing
        self.agreement_rows = self.agreement_rows + rows

    def compute(self) -> Tensor:
        """The agreement over everything seen.

        Returns:
            A scalar between 0 and 1; nan if no row was seen.
        """
        return _kernel_machine_agreement_compute(self.agreement_agreeing, self.agreement_rows)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or several in the order given; needs matplotlib.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them; default: compute now.
            ax: A matplotlib axis to draw on; default: a new figure.

        Returns:
            Figure and axis.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel import KernelMachineAgreement
            >>> from matplotlib.figure import Figure
            >>> metric = KernelMachineAgreement()
            >>> metric.update(torch.eye(2), torch.eye(2))
            >>> figure, axis = metric.plot(ax=Figure().subplots())
        """
        return self._plot(val, ax)
