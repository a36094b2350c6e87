"""Totals of a path: what all chords and all examples together say of a query, and how queries are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel import query
from lightning_pathkernel.capture import plan_capture
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import ChordPath, Chords, HeldPath, PlacedChords
from lightning_pathkernel.explanation import OutputFn
from lightning_pathkernel.ledger import LEDGER_TERMS, fidelity_metrics
from lightning_pathkernel.network import (
    ForwardFn,
    Network,
    Tensors,
    batch_size,
    detached_copy,
    in_parts,
    on_device,
)
from lightning_pathkernel.path import gauss_legendre
from lightning_pathkernel.progress import Advance, is_shown, progress_bar, style_of
from lightning_pathkernel.query import Question, RowRules
from lightning_pathkernel.query_options import QueryOptions

__all__ = ["PathTotals", "Work"]


@dataclass(frozen=True)
class Work:
    """A question under way.

    Attributes:
        path: The path.
        device: That of the network.
        rows: Rows of all examples.
        advance: Moves the bar on, by passes of a chord.
    """

    path: ChordPath
    device: torch.device
    rows: int
    advance: Advance

    def chords(self, weight: float = 1.0) -> PlacedChords:
        """The path's chords, on the network's device; each that is passed counts ``weight``."""
        return PlacedChords(self.path, self.device, lambda: self.advance(weight))

    def passed(self, rows: int) -> None:
        """So many rows of examples have been added up: all of them count as one pass of the path."""
        self.advance(rows * len(self.path) / self.rows)


class PathTotals:
    """A network and the path that led to it; `KernelMachine` explains the arguments."""

    def __init__(
        self,
        module: nn.Module,
        chords: Sequence[Chord] | ChordPath,
        forward_fn: ForwardFn | None,
        options: QueryOptions,
        device: str | torch.device | None,
    ) -> None:
        if not len(chords):
            raise ValueError("a kernel machine needs at least one chord: the recording is empty")
        placed = module if device is None else _moved(module, torch.device(device))
        self._network = Network(placed, plan_capture(placed), forward_fn)
        self._path = HeldPath(chords) if isinstance(chords, Sequence) else chords
        self._options = options
        self._bar_style = style_of(module)

    @property
    def device(self) -> torch.device:
        """Where queries are asked; answers come back on the CPU.

        Examples:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().device
            device(type='cpu')
        """
        return self._network.device

    @cached_property
    def example_ids(self) -> Tensor:
        """Every training example that was ever visited, sorted, ``[N]``; read when it is first asked for."""
        found = torch.zeros(0, dtype=torch.long)
        for examples in self._path.examples:
            found = torch.unique(torch.cat([found, *(ids for ids, _ in examples.influences())]))
        return found

    def _columns(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Places of some ids among ``example_ids``."""
        wanted = torch.as_tensor(ids).cpu().contiguous()
        unknown = wanted[~torch.isin(wanted, self.example_ids)]
        if len(unknown):
            raise KeyError(f"examples {unknown.tolist()[:10]} were never visited in training")
        return torch.searchsorted(self.example_ids, wanted)

    def predict(self, x: Any) -> Tensor:
        """The network's outputs rebuilt from the bias and the stored examples, eq. (7), ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            Outputs of the machine.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().predict(torch.eye(2)[:1])
            tensor([[ 0.6858,  0.0449, -0.4596]])
        """
        return self._bias_and_prediction("predict", x)[1]

    def bias(self, x: Any) -> Tensor:
        """``b(x)``: the initial model, weight decay and buffers, ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            The bias.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().bias(torch.eye(2)[:1])
            tensor([[ 0.6614,  0.0617, -0.4519]])
        """
        return self._bias_and_prediction("bias", x)[0]

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights at the end of the path, which are computed when they are asked for."""
        return {name: value for name, value in self.__dict__.items() if name != "_end"}

    def _bias_and_prediction(self, text: str, x: Any) -> tuple[Tensor, Tensor]:
        """``[Q, K]`` each."""
        found = []
        with self._work(text, self._count(x), self._count(x)) as work:
            for part in self._chunks(x):
                chords = work.chords()
                first = next(iter(chords))
                bias = self._network.outputs(part, first.start, first.start_buffers)
                examples = torch.zeros_like(bias)
                for chord, rules in zip(chords, self._rules(part, chords), strict=True):
                    shares, part_bias = query.sums(self._network, part, chord, rules)
                    examples, bias = examples + shares, bias + part_bias
                found.append((bias.cpu(), (bias + examples).cpu()))
        return torch.cat([bias for bias, _ in found]), torch.cat([prediction for _, prediction in found])

    def network_outputs(self, x: Any) -> Tensor:
        """Outputs of the network that the machine stands for, at the end of its path, ``[Q, K]``.

        Args:
            x: Inputs, as in training.

        Returns:
            Outputs of the network.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().network_outputs(torch.eye(2)[:1])
            tensor([[ 0.6858,  0.0449, -0.4596]])
        """
        return torch.cat([self._end_outputs(part).cpu() for part in self._chunks(x)])

    def fidelity(self, dataloader: Iterable[Any] | Tensor | Mapping[str, Any]) -> dict[str, float]:
        """How well the machine reproduces its network on batches of inputs.

        Args:
            dataloader: Batches as in validation; a tensor or a mapping is one batch.

        Returns:
            ``fidelity``, ``agreement`` and the error budget ``error_quadrature``, ``error_sketch`` and
            ``error_unattributed``: norms relative to that of the learned change ``f_T - b``.

        Examples:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> found = tiny_machine().fidelity([torch.eye(2)])
            >>> round(found["fidelity"], 3), found["agreement"]
            (1.0, 1.0)
        """
        ledgers, outputs = [], []
        if isinstance(dataloader, Tensor | Mapping):  # which would be gone through row by row, or key by key
            dataloader = [dataloader]
        batches = len(dataloader) if isinstance(dataloader, Sized) else None
        with self._work("fidelity", batches, batches) as work:
            for batch in dataloader:
                chords = work.chords(1 / self._count(batch))
                for part in self._chunks(batch):
                    rules = self._rules(part, chords)
                    found, _ = query.ledger(self._network, Question(part), chords, rules)
                    ledgers.append(on_device(found, torch.device("cpu")))
                    outputs.append(self._end_outputs(part).cpu())
        terms = {name: torch.cat([found[name] for found in ledgers]) for name in LEDGER_TERMS}
        return fidelity_metrics(terms, torch.cat(outputs))

    def _end_outputs(self, x: Any) -> Tensor:
        return self._network.outputs(on_device(x, self.device), *self._end)

    @cached_property
    def _end(self) -> tuple[dict[str, Tensor], Tensors]:
        """Weights and buffers at the end of the path."""
        for chord in self._path:
            last = chord
        return last.weights(1.0), last.end_buffers

    # how questions are answered

    @contextmanager
    def _work(self, text: str, passes: int | None, rules: int | None, examples: int = 0) -> Iterator[Work]:
        """A question under way, with its progress bar.

        Args:
            text: What the bar says.
            passes: How often the path is gone along, besides for quadrature rules; None where nobody knows.
            rules: How often for quadrature rules, where these depend on the inputs.
            examples: How often all examples are added up.

        Yields:
            The work.
        """
        rows, total = 1, None
        if is_shown(self._options.progress):
            rows = max(1, sum(map(len, self._path.examples)))
            wanted = 0 if self._options.rtol is None else rules
            total = None if passes is None or wanted is None else len(self._path) * (passes + wanted + examples)
        with progress_bar(text, total, self._options.progress, self._bar_style) as advance:
            yield Work(self._path, self.device, rows, advance)

    def _count(self, x: Any) -> int:
        """Number of chunks of queries."""
        return max(1, -(-batch_size(x) // self._options.chunk_size))

    def _rules(self, x: Any, chords: Chords) -> list[RowRules]:
        """Quadrature along every chord, on these inputs."""
        rtol = self._options.rtol
        if rtol is None:
            return [query.everywhere(gauss_legendre(self._options.quadrature_points))] * len(chords)
        return [query.rules_within(self._network, x, chord, rtol) for chord in chords]

    def _targets(self, x: Any, target: Tensor | None) -> Tensor:
        if target is None:
            return self.network_outputs(x).argmax(1)
        if target.shape != (batch_size(x),):
            raise ValueError(f"target must have shape ({batch_size(x)},), found {tuple(target.shape)}")
        return target.cpu()

    def _chunks(self, x: Any) -> Iterator[Any]:
        """Queries, some at a time, on the network's device."""
        for part in in_parts(x, self._options.chunk_size) or [x]:  # of no queries one chunk, which is empty
            yield on_device(part, self.device)

    def _questions(self, x: Any, target: Tensor, output_fn: OutputFn | None = None) -> Iterator[Question]:
        """Queries with their targets, some at a time."""
        rows = target.split(self._options.chunk_size)
        return (Question(part, own, output_fn) for part, own in zip(self._chunks(x), rows, strict=True))


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module where it is on the device already, else a copy there; its owner's stays where it is."""
    there = torch.empty(0, device=device).device
    held = [*module.parameters(), *module.buffers()]
    return module if all(value.device == there for value in held) else detached_copy(module).to(there)
