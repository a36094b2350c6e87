"""The kernel machine: predictions, contributions and the ledger from an exported artifact, eq. (7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel import query
from lightning_pathkernel.artifact import read_machine
from lightning_pathkernel.artifact_writer import save_machine
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import ChordPath, HeldPath
from lightning_pathkernel.explanation import Explanation, OutputFn, joined
from lightning_pathkernel.ledger import bias
from lightning_pathkernel.names import merge_names, names_of
from lightning_pathkernel.network import ForwardFn, take_rows
from lightning_pathkernel.path_totals import Work
from lightning_pathkernel.progress import Progress, style_of
from lightning_pathkernel.query import Question
from lightning_pathkernel.query_options import QueryOptions
from lightning_pathkernel.ranking import strongest_contributions
from lightning_pathkernel.reporting import report
from lightning_pathkernel.store import Manifest
from lightning_pathkernel.workshop import Workshop

__all__ = ["KernelMachine"]


class KernelMachine(Workshop):
    """A trained network as ``b(x) + sum_i c_i(x)`` over its training examples.

    Queries may be on any device, of any number, and come back as answers on the CPU, where the examples' ids are. They
    are asked ``chunk_size`` at a time on the device of the module's weights, chord by chord; examples stay on the CPU
    or in their files, read ``example_chunk`` at a time. Answers do not depend on either beyond rounding.

    Args:
        module: The network's module; shared with its owner, never left changed.
        chords: The path: chords in memory, or those of an artifact, which stay in its files.
        forward_fn: ``(module, batch) -> outputs [n, K]``; default: the module called on the batch, or on its first
            element when the batch is a tuple or a list.
        rtol: As in `load`.
        quadrature_points: As in `load`.
        chunk_size: As in `load`.
        example_chunk: As in `load`.
        device: As in `load`; where the module is on another one, a copy of it is moved.
        progress: As in `load`.

    Raises:
        ValueError: If there are no chords, or a number is not positive.
        ArtifactError: If two chords call one example by different names.
    """

    def __init__(
        self,
        module: nn.Module,
        chords: Sequence[Chord] | ChordPath,
        forward_fn: ForwardFn | None = None,
        rtol: float | None = None,
        quadrature_points: int = 4,
        chunk_size: int = 256,
        example_chunk: int | None = None,
        device: str | torch.device | None = None,
        progress: Progress = None,
    ) -> None:
        options = QueryOptions(rtol, quadrature_points, chunk_size, example_chunk, progress)
        super().__init__(module, chords, forward_fn, options, device)
        self._manifest: Manifest | None = None
        if isinstance(self._path, HeldPath):
            merge_names(self._path.names())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._network.module).__name__}, chords={len(self._path)})"

    @classmethod
    def load(
        cls,
        path: str | Path,
        module: nn.Module,
        forward_fn: ForwardFn | None = None,
        rtol: float | None = None,
        quadrature_points: int = 4,
        expected_sha256: str | None = None,
        chunk_size: int = 256,
        example_chunk: int | None = None,
        device: str | torch.device | None = None,
        progress: Progress = None,
    ) -> KernelMachine:
        """Load an exported machine; its examples stay in its files, which must stay as they are.

        Args:
            path: The artifact's directory, or an fsspec URL of one (``s3://``, ``gs://``, ``hf://``, ``http://``,
                ``memory://``), which is downloaded to a temporary directory that the machine keeps.
            module: A module of the architecture that was trained; its weights do not matter and stay as they are.
            forward_fn: As in training, if one was given there.
            rtol: Tolerance of the quadrature along each chord: points are doubled, for each query by itself, until the
                embedded error estimate is below this share of the chord's change of its outputs, or 64 points are
                reached; a kernel takes the most that one of its queries needs. None for a fixed number of points, as in
                the metrics logged in training.
            quadrature_points: Gauss-Legendre points along each chord where there is no ``rtol``.
            expected_sha256: The sha256 that the manifest must have, if its author told you; then every byte is read
                and compared first, as `verify` does.
            chunk_size: Queries processed at once: memory grows with it, and with the network.
            example_chunk: Examples read at once, of one chord; None for about a megabyte of rows.
            device: Where queries are asked, such as ``"cuda"``; None for where the module is.
            progress: Whether a question shows a progress bar, on standard error: None for after two seconds, where that
                is a terminal or the process a notebook's; True or False; ``"tqdm"`` or ``"rich"`` for a kind of bar
                other than that of the module's Trainer.

        Returns:
            The machine.

        Raises:
            ArtifactError: If the artifact is damaged or of another format, or if the module's parameter names, shapes
                or dtypes differ from the manifest's; every difference is named. Of a large artifact, damage within
                examples and nodes is found when a question first touches it.
            ValueError: If ``expected_sha256`` is no sha256, or a number is not positive.
        """
        private, stored, manifest = read_machine(path, module, expected_sha256)
        placed = private if device is None else private.to(device)
        machine = cls(placed, stored, forward_fn, rtol, quadrature_points, chunk_size, example_chunk, None, progress)
        machine._manifest, machine._bar_style = manifest, style_of(module)
        return machine

    @property
    def directory(self) -> Path | None:
        """Where the artifact is that the machine was loaded from; None for a machine that was not loaded."""
        return None if self._manifest is None else self._manifest.directory

    def save(self, path: str | Path) -> str | Path:
        """Write the machine as an artifact again, as it is now: examples that `without` took out are gone from it.

        Of a loaded machine every other number stays as it is stored, to the last bit.

        Args:
            path: Where: a directory that does not exist or is empty, or an fsspec URL. All of it is there in the end,
                or nothing.

        Returns:
            ``path``.

        Raises:
            FileExistsError: If there is something at ``path``; nothing is overwritten.
            OSError: If it cannot be written.
        """
        return save_machine(path, self._path, self._network.module, self._manifest)

    @property
    def path(self) -> ChordPath:
        """The chords, in the order of training, each read when it is come to."""
        return self._path

    @property
    def chords(self) -> tuple[Chord, ...]:
        """The chords, in the order of training; asking for them reads all examples into memory."""
        return tuple(chord.held() for chord in self._path)

    @cached_property
    def example_names(self) -> dict[int, str]:
        """The user's string ids, by the integers that stand for them."""
        return merge_names(self._path.names())

    def names_of(self, ids: Tensor | Sequence[int]) -> list[Any]:
        """The user's string ids of examples, such as ``Explanation.example_ids``.

        Args:
            ids: Ids, ``[n]`` or ``[Q, n]``.

        Returns:
            Names, nested as the ids are; ``str(id)`` where the user gave no string.
        """
        return names_of(self.example_names, torch.as_tensor(ids))

    def without(self, example_ids: Tensor | Sequence[int]) -> KernelMachine:
        """The machine without some training examples: their rows are taken out of every chord.

        Predictions change by exactly the contributions of these examples. What the network learned from them moves
        from the ledger's ``examples`` to its ``unattributed``.

        Args:
            example_ids: Ids to leave out; those that were never visited change nothing.

        Returns:
            A machine that shares everything else with this one.
        """
        drop = torch.as_tensor(example_ids).reshape(-1)
        machine = self._along(self._path.without(drop))
        machine._manifest = self._manifest
        return machine

    def to(self, device: str | torch.device) -> KernelMachine:
        """The machine with its network on another device.

        Args:
            device: Where queries are to be asked, such as ``"cuda"``.

        Returns:
            A machine that shares everything else with this one; where the network is there already, the network too.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> machine = tiny_machine(nn.Linear(2, 3)).to("cuda" if torch.cuda.is_available() else "cpu")
            >>> machine.predict(torch.eye(2)).device  # answers are on the CPU
            device(type='cpu')
        """
        machine = self._along(self._path, device)
        machine._manifest = self._manifest
        return machine

    def _along(self, path: Sequence[Chord] | ChordPath, device: str | torch.device | None = None) -> KernelMachine:
        network = self._network
        machine = KernelMachine(network.module, path, network.forward_fn, device=device, **self._options.arguments())
        machine._bar_style = self._bar_style
        return machine

    report = report

    # parts

    def contributions(self, x: Any, target: Tensor | None = None, output_fn: OutputFn | None = None) -> Tensor:
        """``c_i(x)`` for every training example ever visited, ``[Q, N]``, in the order of ``example_ids``.

        Args:
            x: Queries.
            target: What is explained of each, ``[Q]``; None for the predicted class, or the only output.
            output_fn: ``(outputs [n, K], target [n]) -> [n]``; default: the output ``target``.

        Returns:
            Contributions, in the units of the scalar explained; positive ones speak for it.
        """
        target, count, parts = self._targets(x, target), self._count(x), []
        with self._work("contributions", count, count, count) as work:
            for part in self._questions(x, target, output_fn):
                shares = query.shares(self._network, part, work.chords(), self._rules(part.batch, work.chords()))
                parts.append(self._all_contributions(shares, work))
        return torch.cat(parts)

    def explain(
        self,
        x: Any,
        target: Tensor | None = None,
        top_k: int = 10,
        output_fn: OutputFn | None = None,
        complete: bool = True,
    ) -> Explanation:
        """The training examples most for and most against each prediction, and the ledger of all of it.

        Args:
            x: Queries.
            target: As in `contributions`.
            top_k: Examples on each side.
            output_fn: As in `contributions`.
            complete: Correct every contribution by the control variate of docs/theory.md section 4, chord by chord, so
                that all contributions add up to the ledger's ``examples + sketch``: the ledger's ``sketch`` term is
                what was shared out. Without it they add up to ``examples``.

        Returns:
            The explanation.
        """
        target, count = self._targets(x, target), self._count(x)
        with self._work("explain", 2 * count, count, count) as work:
            return joined(
                [self._explain(part, top_k, complete, work) for part in self._questions(x, target, output_fn)]
            )

    def _explain(self, question: Question, top_k: int, complete: bool, work: Work) -> Explanation:
        rules = self._rules(question.batch, work.chords())
        terms, gaps = query.ledger(self._network, question, work.chords(), rules)
        lost = [gap[:, 0] for gap in gaps] if complete else None
        shares = list(query.shares(self._network, question, work.chords(), rules, lost))
        ids, contributions = strongest_contributions(shares, top_k, self._options.example_chunk, work.passed)
        ledger = {name: value[:, 0].cpu() for name, value in terms.items()}
        return Explanation(bias(ledger) + ledger["examples"], ids, contributions, ledger)

    def coefficients(
        self, x: Any, x_train: Any, ids: Tensor, target: Tensor, target_train: Tensor | None = None
    ) -> Tensor:
        """The paper's ``a_i(x) = c_i(x) / K(x, x_i)``, ``[Q, len(ids)]``; NaN where the kernel is 0.

        Args:
            x: Queries.
            x_train: The inputs of the training examples ``ids``, row by row.
            ids: Their ids.
            target: Output of each query, ``[Q]``.
            target_train: Output of each training example in the kernel, ``[len(ids)]``; None for the query's target.

        Returns:
            The coefficients.

        Raises:
            KeyError: If an id was never visited in training.
        """
        ids, target = torch.as_tensor(ids).cpu(), target.cpu()
        columns = self._columns(ids)
        found = self.contributions(x, target)[:, columns]
        kernel = torch.empty_like(found)
        for value in target.unique():
            rows = (target == value).nonzero().flatten()
            other = torch.full((len(ids),), int(value)) if target_train is None else target_train
            kernel[rows] = self.kernel(take_rows(x, rows), x_train, target[rows], other)
        return torch.where(kernel == 0, torch.full_like(found, torch.nan), found / kernel)

    def self_influence(self) -> Tensor:
        """Each example's contribution to its own loss over training, ``[N]``, in the order of ``example_ids``.

        Negative: training on an example lowers its own loss. Taken in training, visit by visit, as
        ``-weight * <g_i, D g_i>`` with the gradient ``g_i`` as it reached the optimiser, as far as its chord's sketch
        keeps it, times the rows of the step, so that with a mean-reduced loss the unit is that of one example's loss.
        Large magnitudes mark examples that the network had to bend for: rare, hard or mislabelled ones.

        Returns:
            One number per example.
        """
        out = torch.zeros(len(self.example_ids), dtype=torch.float64)
        for examples in self._path.examples:
            for ids, values in examples.influences():
                out.index_add_(0, torch.searchsorted(self.example_ids, ids), values.double())
        return out.float()
