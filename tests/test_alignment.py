"""Alignments of kernels, against loops over pairs of examples."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor

from lightning_pathkernel import centered_kernel_alignment, kernel_target_alignment
from lightning_pathkernel.alignment import hsic


def flowers(n: int = 12) -> tuple[Tensor, Tensor]:
    x, y = load_iris(return_X_y=True)
    step = len(x) // n
    return torch.tensor(x[::step][:n]), torch.tensor(y[::step][:n])


def kernels() -> tuple[Tensor, Tensor]:
    x, _ = flowers()
    return x @ x.T, torch.exp(-(torch.cdist(x, x) ** 2))


def centred(k: Tensor) -> list[list[float]]:
    n = len(k)
    total = sum(float(k[i, j]) for i in range(n) for j in range(n)) / n**2
    rows = [sum(float(k[i, j]) for j in range(n)) / n for i in range(n)]
    columns = [sum(float(k[i, j]) for i in range(n)) / n for j in range(n)]
    return [[float(k[i, j]) - rows[i] - columns[j] + total for j in range(n)] for i in range(n)]


def dot(a: list[list[float]], b: list[list[float]]) -> float:
    return sum(x * y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_target_alignment_is_the_cosine_over_pairs() -> None:
    gram, _ = kernels()
    _, y = flowers()
    ideal = torch.tensor([[1.0 if a == b else 0.0 for b in y.tolist()] for a in y.tolist()], dtype=torch.float64)
    for centre, change in ((False, Tensor.tolist), (True, centred)):
        k, t = change(gram), change(ideal)
        expected = dot(k, t) / math.sqrt(dot(k, k) * dot(t, t))
        assert kernel_target_alignment(gram, y, centered=centre) == pytest.approx(expected, rel=1e-9)
    assert 0.3 < kernel_target_alignment(gram, y) < 1


def test_two_classes_are_cristianinis_signs() -> None:
    """Centred, signs and one-hot rows of two classes are the same target; the kernel of the target is aligned by 1."""
    gram, _ = kernels()
    y = (flowers()[1] > 0).long()
    signs = 2.0 * y - 1
    assert kernel_target_alignment(gram, signs) == pytest.approx(kernel_target_alignment(gram, y))
    assert kernel_target_alignment(gram, signs[:, None]) == pytest.approx(kernel_target_alignment(gram, signs))
    assert kernel_target_alignment(7 * torch.outer(signs, signs), signs, centered=False) == pytest.approx(1)


def test_biased_cka_is_the_cosine_of_centred_kernels() -> None:
    one, other = kernels()
    k, t = centred(one), centred(other)
    assert centered_kernel_alignment(one, other) == pytest.approx(dot(k, t) / math.sqrt(dot(k, k) * dot(t, t)))
    assert hsic(one, other) == pytest.approx(dot(k, t) / (len(one) - 1) ** 2)


def test_unbiased_hsic_is_the_mean_over_quadruples() -> None:
    """Song et al. 2012, eq. 3: the U-statistic itself, over all tuples of four different examples."""
    x, _ = flowers(7)
    one, other = x @ x.T, torch.exp(-(torch.cdist(x, x) ** 2))
    total, count, every = 0.0, 0, range(7)
    for i in every:
        for j in every:
            for q in every:
                for r in every:
                    if len({i, j, q, r}) == 4:
                        total += float(one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
                        count += 1
    assert hsic(one, other, unbiased=True) == pytest.approx(total / count, rel=1e-9)


def test_unrelated_kernels_are_0_only_for_the_unbiased_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(60):
        a, b = (torch.randn(20, 200, generator=generator, dtype=torch.float64) for _ in range(2))
        for unbiased in found:
            found[unbiased].append(centered_kernel_alignment(a @ a.T, b @ b.T, unbiased))
    assert torch.tensor(found[False]).mean() > 0.8
    assert torch.tensor(found[True]).mean().abs() < 0.05


def test_scale_shift_and_rotation_do_not_matter() -> None:
    x, y = flowers()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    other = 3 * ((x @ turn + 5) @ (x @ turn + 5).T)
    for unbiased in (False, True):
        assert centered_kernel_alignment(x @ x.T, other, unbiased) == pytest.approx(1)
    assert kernel_target_alignment(x @ x.T, y) == pytest.approx(kernel_target_alignment(other, y))
    assert isinstance(kernel_target_alignment(x.float() @ x.float().T, y), float)


def test_a_constant_kernel_is_aligned_with_nothing() -> None:
    gram, constant = kernels()[0], torch.full((12, 12), 1 / 3)
    for unbiased in (False, True):
        assert math.isnan(centered_kernel_alignment(gram, constant.double(), unbiased))
    assert math.isnan(kernel_target_alignment(constant, flowers()[1]))


@pytest.mark.parametrize(
    ("kernel", "target", "message"),
    [
        (torch.ones(3, 4), torch.arange(3), r"kernel must be a square matrix \[n, n\], found \[3, 4\]"),
        (torch.full((3, 3), torch.nan), torch.arange(3), "kernel must be finite"),
        (torch.eye(3), torch.arange(4), r"target must have shape \[3\] or \[3, K\]"),
        (torch.eye(3), torch.tensor([0.0, torch.inf, 1.0]), "target must be finite"),
        (torch.eye(1), torch.arange(1), "kernel has 1 examples, at least 2 are needed"),
    ],
)
def test_what_is_no_kernel_of_the_target_is_refused(kernel: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_target_alignment(kernel, target)


def test_kernels_of_other_examples_or_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of the same examples, found \[3, 3\] and \[4, 4\]"):
        centered_kernel_alignment(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match="kernel has 3 examples, at least 4 are needed"):
        centered_kernel_alignment(torch.eye(3), torch.eye(3), unbiased=True)
