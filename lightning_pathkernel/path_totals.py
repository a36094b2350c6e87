"""Totals of a path: what all chords and all examples together say of a query, and how queries are cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel import query
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import ChordPath, HeldPath
from lightning_pathkernel.ledger import LEDGER_TERMS, fidelity_metrics
from lightning_pathkernel.network import ForwardFn, Network, Tensors, batch_size, take_rows
from lightning_pathkernel.path import QuadratureRule, gauss_legendre

__all__ = ["PathTotals"]


class PathTotals:
    """A network and the path that led to it; `KernelMachine` explains the arguments."""

    def __init__(
        self,
        module: nn.Module,
        chords: Sequence[Chord] | ChordPath,
        forward_fn: ForwardFn | None = None,
        rtol: float | None = None,
        quadrature_points: int = 4,
        chunk_size: int = 256,
    ) -> None:
        if not len(chords):
            raise ValueError("a kernel machine needs at least one chord: the recording is empty")
        if quadrature_points < 1 or (rtol is not None and rtol <= 0):
            raise ValueError(f"quadrature_points and rtol must be positive, found {quadrature_points} and {rtol}")
        self._network = Network(module, plan_capture(module), forward_fn)
        self._path = HeldPath(chords) if isinstance(chords, Sequence) else chords
        self._rtol, self._points = rtol, quadrature_points
        self._chunk = chunk_size

    @cached_property
    def example_ids(self) -> Tensor:
        """Every training example that was ever visited, sorted, ``[N]``; read when it is first asked for."""
        found = torch.zeros(0, dtype=torch.long)
        for examples in self._path.examples:
            found = torch.unique(torch.cat([found, *(ids for ids, _ in examples.influences())]))
        return found

    def predict(self, x: Any) -> Tensor:
        """The network's outputs rebuilt from the bias and the stored examples, eq. (7), ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            Outputs of the machine.

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().predict(torch.eye(2)[:1])
            tensor([[ 0.6858,  0.0449, -0.4596]])
        """
        return self._over(x, lambda part: self._bias_and_examples(part)[0])

    def bias(self, x: Any) -> Tensor:
        """``b(x)``: the initial model, weight decay and buffers, ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            The bias.

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().bias(torch.eye(2)[:1])
            tensor([[ 0.6614,  0.0617, -0.4519]])
        """
        return self._over(x, lambda part: self._bias_and_examples(part)[1])

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights at the end of the path, which are computed when they are asked for."""
        return {name: value for name, value in self.__dict__.items() if name != "_end"}

    def _bias_and_examples(self, x: Any) -> tuple[Tensor, Tensor]:
        """Prediction and bias, ``[n, K]`` each."""
        first = next(iter(self._path))
        bias = self._network.outputs(x, first.start, first.start_buffers)
        examples = torch.zeros_like(bias)
        for chord, rule in zip(self._path, self._rules(x), strict=True):
            part, part_bias = query.sums(self._network, x, chord, rule)
            examples, bias = examples + part, bias + part_bias
        return bias + examples, bias

    def network_outputs(self, x: Any) -> Tensor:
        """Outputs of the network that the machine stands for, at the end of its path, ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            Outputs of the network.

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().network_outputs(torch.eye(2)[:1])
            tensor([[ 0.6858,  0.0449, -0.4596]])
        """
        return self._over(x, self._end_outputs)

    def fidelity(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """How well the machine reproduces its network on batches of inputs.

        Args:
            dataloader: Batches as in validation.

        Returns:
            ``fidelity``, ``agreement`` and the error budget ``error_quadrature``, ``error_sketch`` and
            ``error_unattributed``: norms relative to that of the learned change ``f_T - b``.

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> found = tiny_machine().fidelity([torch.eye(2)])
            >>> round(found["fidelity"], 3), found["agreement"]
            (1.0, 1.0)
        """
        ledgers, outputs = [], []
        for batch in dataloader:
            for part in self._chunks(batch):
                ledgers.append(query.ledger(self._network, part, self._path, self._rules(part))[0])
                outputs.append(self._end_outputs(part))
        terms = {name: torch.cat([found[name] for found in ledgers]) for name in LEDGER_TERMS}
        return fidelity_metrics(terms, torch.cat(outputs))

    def _end_outputs(self, x: Any) -> Tensor:
        return self._network.outputs(x, *self._end)

    @cached_property
    def _end(self) -> tuple[dict[str, Tensor], Tensors]:
        """Weights and buffers at the end of the path."""
        for chord in self._path:
            last = chord
        return last.weights(1.0), last.end_buffers

    # chunks

    def _rules(self, x: Any) -> list[QuadratureRule]:
        """A quadrature rule for every chord, on these inputs."""
        if self._rtol is None:
            return [gauss_legendre(self._points)] * len(self._path)
        return [query.rule_within(self._network, x, chord, self._rtol) for chord in self._path]

    def _targets(self, x: Any, target: Tensor | None) -> Tensor:
        if target is None:
            return self.network_outputs(x).argmax(1)
        if target.shape != (batch_size(x),):
            raise ValueError(f"target must have shape ({batch_size(x)},), found {tuple(target.shape)}")
        return target

    def _chunks(self, x: Any) -> Iterator[Any]:
        for start in range(0, batch_size(x), self._chunk):
            yield take_rows(x, slice(start, start + self._chunk))

    def _with_rows(self, x: Any, target: Tensor) -> Iterator[tuple[Any, Tensor]]:
        for part, start in zip(self._chunks(x), range(0, batch_size(x), self._chunk), strict=True):
            yield part, target[start : start + self._chunk]

    def _over(self, x: Any, answer: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([answer(part) for part in self._chunks(x)])
