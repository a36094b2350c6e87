r"""How faithfully a kernel machine reproduces its network: two pure functions.

Each is an ``_update``, which turns a batch into sums, and a ``_compute``, which turns sums into the value.
The classes of `lightning_pathkernel.metrics` add the sums up over batches and ranks, so that function and
class cannot disagree.

n: example, K: output. A tensor ``[n]`` is read as ``[n, 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kernel_machine_agreement", "kernel_machine_fidelity"]


def _rows(**tensors: Tensor) -> list[Tensor]:
    """The tensors as ``[n, K]``, in the order given, after checking that they belong together."""
    found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"Shapes differ: found {found}; expected the same [n, K], or the same [n], for all of them.")
    shape = shapes.pop()
    if len(shape) not in (1, 2):
        raise ValueError(
            f"Wrong number of dimensions: found {found}; expected [n, K] or [n]. Flatten further dimensions into K."
        )
    if shape[1:] == (0,):
        raise ValueError(f"No outputs: found {found}; expected [n, K] with K of at least 1.")
    return [tensor if tensor.dim() == 2 else tensor.unsqueeze(1) for tensor in tensors.values()]


def _accumulable(tensor: Tensor) -> Tensor:
    """The tensor in float64, before anything is subtracted; float32 on MPS, which knows no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _kernel_machine_fidelity_update(
    prediction: Tensor, target: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of one batch.

    Args:
        prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
        target: Outputs of the network, same shape.
        baseline: Outputs of the machine's bias alone, same shape.

    Returns:
        Squared error, squared learned change (both float64), and number of rows (int64); all scalars.

    Raises:
        ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.
    """
    rows = _rows(prediction=prediction, target=target, baseline=baseline)
    machine, network, bias = (_accumulable(tensor) for tensor in rows)
    n = torch.tensor(network.shape[0], device=network.device)
    return (network - machine).square().sum(), (network - bias).square().sum(), n


def _kernel_machine_fidelity_compute(squared_error: Tensor, squared_change: Tensor, n: Tensor) -> Tensor:
    """The fidelity from the sums over all batches.

    Args:
        squared_error: Sum of ``|target - prediction|^2``.
        squared_change: Sum of ``|target - baseline|^2``.
        n: Number of rows seen.

    Returns:
        The fidelity, a scalar: nan where no row was seen; where nothing was learned, 1 for an exact machine,
        else -inf.
    """
    # Only 0 / 0 has to be told what it means: error / 0 is inf already. The denominator is replaced, not the
    # result, so that no nan reaches the gradient.
    exact = (squared_error == 0) & (squared_change == 0)
    fidelity = 1 - squared_error / squared_change.masked_fill(exact, 1.0)
    return fidelity.masked_fill(n == 0, torch.nan)


def kernel_machine_fidelity(prediction: Tensor, target: Tensor, baseline: Tensor) -> Tensor:
    r"""R squared of the learned change: the share of it that the kernel machine accounts for.

    .. math::
        \text{fidelity} = 1 - \frac{\sum_{i=1}^n \lVert y_i - \hat y_i \rVert^2}
                                   {\sum_{i=1}^n \lVert y_i - b_i \rVert^2}

    where :math:`\hat y_i` is the machine's prediction, :math:`y_i` the network's output and :math:`b_i` the
    bias alone, which is what the machine says before any training example has spoken. 1 is perfect, 0 is no
    better than the bias, and there is no lower bound. Unlike the usual R squared, the yardstick is the bias
    of each row and not the mean of the targets. Sums are taken in float64 over rows and outputs alike, so
    outputs on a larger scale weigh more.

    Args:
        prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
        target: Outputs of the network, same shape.
        baseline: Outputs of the machine's bias alone, same shape.

    Returns:
        The fidelity, a scalar in float64 (float32 on MPS). Where nothing was learned (``target == baseline``
        everywhere) it is 1 if the machine is exact and -inf if not; without rows it is nan.

    Raises:
        ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.functional import kernel_machine_fidelity
        >>> prediction = torch.tensor([[2.0, 0.0], [1.0, 4.0]])
        >>> target = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> baseline = torch.zeros(2, 2)
        >>> kernel_machine_fidelity(prediction, target, baseline)  # 1 - 2 / 15
        tensor(0.8667, dtype=torch.float64)
    """
    return _kernel_machine_fidelity_compute(*_kernel_machine_fidelity_update(prediction, target, baseline))


def _kernel_machine_agreement_update(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The counts of one batch.

    Args:
        prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
        target: Outputs of the network, same shape.

    Returns:
        Number of rows that agree and number of rows, both int64 scalars.

    Raises:
        ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.
    """
    machine, network = _rows(prediction=prediction, target=target)
    if network.shape[1] == 1:
        agree = ((machine > 0) == (network > 0)).squeeze(1)
    else:
        agree = machine.argmax(dim=1) == network.argmax(dim=1)
    # A nan is no decision: argmax would settle on it, and `nan > 0` would pass for a negative output.
    decided = ~(machine.isnan() | network.isnan()).any(dim=1)
    return (agree & decided).sum(), torch.tensor(network.shape[0], device=network.device)


def _kernel_machine_agreement_compute(agreeing: Tensor, n: Tensor) -> Tensor:
    """The agreement from the counts over all batches.

    Args:
        agreeing: Number of rows that agree.
        n: Number of rows seen.

    Returns:
        The agreement, a scalar: nan where no row was seen.
    """
    return _accumulable(agreeing) / _accumulable(n)  # 0 / 0 is nan, as it should be


def kernel_machine_agreement(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Share of rows on which the kernel machine decides as its network does.

    .. math::
        \text{agreement} = \frac{1}{n} \sum_{i=1}^n \mathbb{1}[d(\hat y_i) = d(y_i)], \qquad
        d(y) = \begin{cases} \arg\max_k y_k & K > 1 \\ \mathbb{1}[y > 0] & K = 1 \end{cases}

    where :math:`\hat y_i` is the machine's prediction and :math:`y_i` the network's output. With a single
    output the decision is its sign, as for a logit; zero counts as negative. A row with a nan on either side
    never agrees.

    Args:
        prediction: Outputs of the kernel machine, ``[n, K]`` or ``[n]``.
        target: Outputs of the network, same shape.

    Returns:
        The agreement, a scalar between 0 and 1 in float64 (float32 on MPS); without rows it is nan.

    Raises:
        ValueError: If the shapes differ, are neither ``[n, K]`` nor ``[n]``, or have no outputs.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.functional import kernel_machine_agreement
        >>> prediction = torch.tensor([[2.0, 0.0], [1.0, 4.0], [0.5, 0.4], [0.0, 1.0]])
        >>> target = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.4, 0.5], [0.0, 2.0]])
        >>> kernel_machine_agreement(prediction, target)
        tensor(0.7500, dtype=torch.float64)
        >>> kernel_machine_agreement(torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.1]))
        tensor(0.5000, dtype=torch.float64)
    """
    return _kernel_machine_agreement_compute(*_kernel_machine_agreement_update(prediction, target))
