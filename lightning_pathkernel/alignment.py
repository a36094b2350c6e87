r"""How much of the target, or of another kernel, there is in a kernel: pure functions of Gram matrices.

n: example, G: group or output. Everything is computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["centered_kernel_alignment", "hsic", "kernel_target_alignment"]


def _gram(name: str, kernel: Tensor, least: int) -> Tensor:
    """A Gram matrix in float64, after checking that it is one."""
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{name} must be a square matrix [n, n], found {list(kernel.shape)}")
    if len(kernel) < least:
        raise ValueError(f"{name} has {len(kernel)} examples, at least {least} are needed")
    if not bool(kernel.isfinite().all()):
        raise ValueError(f"{name} must be finite, found nan or inf in it")
    return kernel.detach().double()


def _pair(kernel: Tensor, other: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if kernel.shape != other.shape:
        raise ValueError(
            f"the kernels must be of the same examples, found {list(kernel.shape)} and {list(other.shape)}"
        )
    return _gram("kernel", kernel, least), _gram("other", other, least)


def _centered(kernel: Tensor) -> Tensor:
    """``H K H`` with ``H = 1 - 11^T / n``: the kernel of features whose mean is 0."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _target_gram(target: Tensor, n: int) -> Tensor:
    """``Y Y^T``, of one-hot rows where the target is classes."""
    if target.shape[:1] != (n,) or target.dim() not in (1, 2):
        raise ValueError(f"target must have shape [{n}] or [{n}, K], as the kernel has examples; {list(target.shape)}")
    if target.dim() == 1 and not target.is_floating_point():
        return (target.unsqueeze(1) == target).double()
    if not bool(target.isfinite().all()):
        raise ValueError("target must be finite, found nan or inf in it")
    y = target.detach().double().reshape(n, -1)
    return y @ y.T


def _ratio(inner: float, one: float, other: float, kernel: Tensor, second: Tensor) -> float:
    """``inner / sqrt(one * other)``; nan where centring left nothing but rounding of one of the kernels."""
    floors = (1e-24 * float(k.square().sum()) / len(k) ** 2 for k in (kernel, second))
    known = all(value > floor for value, floor in zip((one, other), floors, strict=True))
    return inner / math.sqrt(one * other) if known else math.nan


def hsic(kernel: Tensor, other: Tensor, unbiased: bool = False) -> float:
    r"""Hilbert-Schmidt independence criterion of two kernels of the same examples.

    Biased, with :math:`H = 1 - \tfrac1n 11^\top` (Gretton et al. 2005, eq. 9):

    .. math:: \mathrm{HSIC}_0 = \frac{\operatorname{tr}(K H L H)}{(n-1)^2}

    Unbiased, with :math:`\tilde K, \tilde L` the kernels without their diagonals (Song et al. 2012, eq. 5):

    .. math:: \mathrm{HSIC}_1 = \frac{1}{n(n-3)} \left[\operatorname{tr}(\tilde K \tilde L)
        + \frac{1^\top \tilde K 1\, 1^\top \tilde L 1}{(n-1)(n-2)}
        - \frac{2}{n-2} 1^\top \tilde K \tilde L 1 \right]

    Args:
        kernel: Symmetric Gram matrix, ``[n, n]``.
        other: Another one of the same examples, ``[n, n]``.
        unbiased: The second form, which needs 4 examples and is 0 on average for independent kernels.

    Returns:
        The criterion, in the product of both kernels' units.

    Raises:
        ValueError: If a matrix is not square or not finite, the sizes differ, or there are too few examples.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel.alignment import hsic
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> round(hsic(x[:, None] * x, x[:, None] * x), 4)
        2.7778
    """
    n = len(kernel)
    if not unbiased:
        k, l_ = _pair(kernel, other, 2)
        return float((_centered(k) * l_.T).sum()) / (n - 1) ** 2
    k, l_ = (m - torch.diag(m.diagonal()) for m in _pair(kernel, other, 4))
    sums = float(k.sum()) * float(l_.sum()) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * float(k.sum(0) @ l_.sum(1))
    return (float((k * l_.T).sum()) + sums - cross) / (n * (n - 3))


def kernel_target_alignment(kernel: Tensor, target: Tensor, centered: bool = True) -> float:
    r"""Cosine between a kernel and the kernel of the labels: how much the kernel already knows of the target.

    .. math:: A(K, Y) = \frac{\langle K, Y Y^\top \rangle_F}{\lVert K \rVert_F \lVert Y Y^\top \rVert_F}

    (Cristianini et al. 2001). Centred, the default, both matrices are replaced by :math:`H K H` and
    :math:`H Y Y^\top H` first (Cortes et al. 2012, eq. 4): without it a kernel with a large mean is aligned with any
    target whose kernel has one.

    Args:
        kernel: Symmetric Gram matrix, ``[n, n]``.
        target: Classes ``[n]`` (integers or bool, read as one-hot rows: 1 for a pair of one class, else 0), or numbers
            ``[n]`` or ``[n, K]`` (floating point), such as -1 and 1, or outputs to fit.
        centered: Center both kernels first.

    Returns:
        Between 0 and 1 for positive semi-definite kernels; scale of kernel and target does not matter. nan where one of
        them is 0 (or constant, if centred).

    Raises:
        ValueError: If the kernel is not square or not finite, or the target does not belong to it.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel import kernel_target_alignment
        >>> x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [2.0, 0.0]])
        >>> round(kernel_target_alignment(x @ x.T, torch.tensor([0, 0, 1, 1])), 4)
        0.8955
        >>> round(kernel_target_alignment(x @ x.T, torch.tensor([0, 1, 0, 1])), 4)
        0.0995
    """
    k = _gram("kernel", kernel, 2)
    y = _target_gram(target.to(k.device), len(k))
    a, b = (_centered(k), _centered(y)) if centered else (k, y)
    return _ratio(float((a * b).sum()), float(a.square().sum()), float(b.square().sum()), k, y)


def centered_kernel_alignment(kernel: Tensor, other: Tensor, unbiased: bool = False) -> float:
    r"""CKA: how alike two kernels, of two networks say, see the same examples.

    .. math:: \mathrm{CKA}(K, L) = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}

    (Kornblith et al. 2019, eq. 4; the centred alignment of Cortes et al. 2012). The biased estimate tends to 1 for any
    two kernels of many features on few examples; the unbiased one (Nguyen et al. 2021) does not.

    Args:
        kernel: Symmetric Gram matrix, ``[n, n]``.
        other: Another one of the same examples in the same order, ``[n, n]``.
        unbiased: Use the unbiased `hsic`; it may then be below 0 for unrelated kernels.

    Returns:
        1 for kernels that are equal up to scale and centring, 0 for unrelated ones; nan where a kernel is constant.

    Raises:
        ValueError: As in `hsic`.

    Examples:
        >>> import torch
        >>> from lightning_pathkernel import centered_kernel_alignment
        >>> x = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [2.0, 0.0]])
        >>> round(centered_kernel_alignment(x @ x.T, 3 * x @ x.T + 1), 4)
        1.0
        >>> round(centered_kernel_alignment(x @ x.T, (x @ x.T) ** 2), 4)
        0.9421
    """
    k, l_ = _pair(kernel, other, 4 if unbiased else 2)
    return _ratio(hsic(k, l_, unbiased), hsic(k, k, unbiased), hsic(l_, l_, unbiased), k, l_)
