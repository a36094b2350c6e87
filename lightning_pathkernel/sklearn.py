"""The path kernel in scikit-learn: a transformer for pipelines, and a kernel function for `SVC`.

Needs scikit-learn: ``pip install "lightning-pathkernel[sklearn]"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_pathkernel.machine import KernelMachine

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "lightning_pathkernel.sklearn needs scikit-learn, which is not installed: "
        'pip install "lightning-pathkernel[sklearn]"'
    ) from error

__all__ = ["PathKernel"]

Array = npt.NDArray[Any]


class PathKernel(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Gram matrices of a kernel machine's path kernel, or of the tangent kernel at one of its nodes.

    ``fit`` keeps its rows, ``transform`` gives the kernel of its rows with those. In a pipeline before an estimator
    with ``kernel="precomputed"`` that makes a kernel method of any trained network; the object itself is a kernel
    function, ``SVC(kernel=PathKernel(machine))``. The kernel is positive semi-definite and summed in float64.

    scikit-learn hands on arrays with a row per example; ``input_shape`` gives rows the shape that the network takes,
    and they get the type of its weights. A clone shares the machine, which is never copied.

    Args:
        machine: The kernel machine.
        kernel: ``"path"``, or ``"tangent"`` for the tangent kernel at ``node``.
        node: As in `KernelMachine.tangent_kernel`: 0 for the start of training, -1 for its end.
        target: Output that the kernel is about; None for the trace over outputs.
        input_shape: Shape of one input, such as ``(1, 8, 8)``; None for rows as they are.
        scaled: Divide by the mean of the diagonal of the fitted rows' Gram matrix, so that ``C`` and ``alpha`` mean the
            same for every kernel.

    Attributes:
        X_fit_: Rows of ``fit``, ``[n, features]``.
        scale_: What the kernel is divided by.
        n_features_in_: Number of columns of ``fit``'s rows.

    Examples:
        >>> import numpy as np
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.svm import SVC
        >>> from torch import nn
        >>> from lightning_pathkernel.sklearn import PathKernel
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> kernel = PathKernel(tiny_machine(nn.Linear(2, 3)), scaled=True)
        >>> x = np.array([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0], [0.1, 0.8]])
        >>> y = np.array([0, 0, 1, 1])
        >>> make_pipeline(kernel, SVC(kernel="precomputed")).fit(x, y).predict(x)
        array([0, 0, 1, 1])
    """

    def __init__(
        self,
        machine: KernelMachine | None = None,
        *,
        kernel: str = "path",
        node: int = -1,
        target: int | None = None,
        input_shape: Sequence[int] | None = None,
        scaled: bool = False,
    ) -> None:
        self.machine = machine
        self.kernel = kernel
        self.node = node
        self.target = target
        self.input_shape = input_shape
        self.scaled = scaled

    def fit(self, X: Any, y: Any = None) -> Self:
        """Keep the rows with which the kernel is taken.

        Args:
            X: Inputs, ``[n, features]``.
            y: Not used; for pipelines.

        Returns:
            The estimator.

        Raises:
            ValueError: If there is no machine, no such kernel, or X is no finite numeric matrix.

        Examples:
            >>> import numpy as np
            >>> from lightning_pathkernel.sklearn import PathKernel
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> PathKernel(tiny_machine()).fit(np.eye(2)).n_features_in_
            2
        """
        self._fitted(X, whole=self.scaled)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """Keep the rows and give their Gram matrix, ``[n, n]``, which is exactly symmetric.

        Args:
            X: Inputs, ``[n, features]``.
            y: Not used; for pipelines.

        Returns:
            As ``fit(X).transform(X)``, up to rounding, in less than half of the time.

        Raises:
            ValueError: As in `fit`.

        Examples:
            >>> import numpy as np
            >>> from lightning_pathkernel.sklearn import PathKernel
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> gram = PathKernel(tiny_machine()).fit_transform(np.eye(2))
            >>> gram.shape, bool((gram == gram.T).all())
            ((2, 2), True)
        """
        gram: Array = self._fitted(X, whole=True) / self.scale_
        return gram

    def _fitted(self, X: Any, whole: bool) -> Array:
        """The fitted rows' Gram matrix, where it is asked for."""
        self._machine()
        if self.kernel not in ("path", "tangent"):
            raise ValueError(f"kernel must be 'path' or 'tangent', found {self.kernel!r}")
        self.X_fit_ = self._checked(X, reset=True)
        self.scale_ = 1.0
        gram = self._gram(self.X_fit_, None) if whole else np.zeros((0, 0))
        if self.scaled:
            self.scale_ = float(np.mean(np.diagonal(gram)))
            if not self.scale_ > 0:
                raise ValueError("the kernel is 0 on all fitted rows and cannot be scaled: pass scaled=False")
        return gram

    def transform(self, X: Any) -> Array:
        """The kernel of each row with each fitted one, ``[n, n_fit]``, in float64.

        Args:
            X: Inputs, ``[n, features]``.

        Returns:
            The matrix; for the fitted rows themselves, the Gram matrix.

        Examples:
            >>> import numpy as np
            >>> from lightning_pathkernel.sklearn import PathKernel
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> PathKernel(tiny_machine()).fit(np.eye(2)).transform(np.ones((5, 2))).shape
            (5, 2)
        """
        check_is_fitted(self)
        rows = self._checked(X, reset=False)
        return self._gram(rows, self.X_fit_) / self.scale_

    def __call__(self, X: Any, Y: Any = None) -> Array:
        """The kernel of two sets of rows, for estimators that take a kernel function, such as `SVC`.

        Args:
            X: Inputs, ``[n, features]``.
            Y: Other inputs, ``[n2, features]``; None for X.

        Returns:
            The matrix ``[n, n2]``, in float64; never scaled.
        """
        first = np.asarray(X)
        return self._gram(first, None if Y is None or Y is X else np.asarray(Y))

    def _checked(self, X: Any, reset: bool) -> Array:
        rows: Array = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
        return rows

    def _tensor(self, rows: Array) -> Tensor:
        x = torch.tensor(np.ascontiguousarray(rows), dtype=self._machine().dtype)
        return x if self.input_shape is None else x.reshape(len(x), *self.input_shape)

    def _machine(self) -> KernelMachine:
        if not isinstance(self.machine, KernelMachine):
            raise ValueError(f"PathKernel needs machine=, a KernelMachine, found {type(self.machine).__name__}")
        return self.machine

    def _gram(self, rows: Array, others: Array | None) -> Array:
        x, x2 = self._tensor(rows), None if others is None else self._tensor(others)
        target = None if self.target is None else torch.full((len(x),), self.target)
        target2 = None if self.target is None or x2 is None else torch.full((len(x2),), self.target)
        machine = self._machine()
        if self.kernel == "path":
            found = machine.kernel(x, x2, target, target2, dtype=torch.float64)
        else:
            found = machine.tangent_kernel(x, x2, self.node, target, target2, dtype=torch.float64)
        gram: Array = found.cpu().numpy()
        return gram

    @property
    def _n_features_out(self) -> int:
        return len(self.X_fit_)

    def __sklearn_clone__(self) -> Self:
        """A clone has the same parameters, the machine itself among them."""
        return type(self)(**self.get_params(deep=False))
