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
from lightning_pathkernel.explanation import Explanation, OutputFn, functional_of, joined
from lightning_pathkernel.ledger import bias
from lightning_pathkernel.names import merge_names, names_of
from lightning_pathkernel.network import ForwardFn, take_rows
from lightning_pathkernel.ranking import all_contributions, strongest_contributions
from lightning_pathkernel.reporting import report
from lightning_pathkernel.store import Manifest
from lightning_pathkernel.workshop import Workshop

__all__ = ["KernelMachine"]


class KernelMachine(Workshop):
    """A trained network as ``b(x) + sum_i c_i(x)`` over its training examples.

    Args:
        module: The network's module; shared with its owner, never left changed.
        chords: The path: chords in memory, or those of an artifact, which stay in its files.
        forward_fn: ``(module, batch) -> outputs [n, K]``; default: the module called on the batch, or on its first
            element when the batch is a tuple or a list.
        rtol: As in `load`.
        quadrature_points: As in `load`.
        chunk_size: Queries processed at once.

    Raises:
        ValueError: If there are no chords, or a number is not positive.
        ArtifactError: If two chords call one example by different names.

    Example:
        >>> from lightning_pathkernel.testing import tiny_machine
        >>> machine = tiny_machine()  # in practice: KernelMachine.load(path_kernel.machine_dir, model)
        >>> machine
        KernelMachine(Linear, chords=3)
        >>> len(machine.path), len(machine.chords), machine.node_steps, machine.example_ids
        (3, 3, tensor([0, 1, 2, 3]), tensor([0, 1, 2, 3, 4, 5]))
        >>> machine.dtype, machine.directory, machine.example_names  # of no file, trained without string ids
        (torch.float32, None, {})
    """

    def __init__(
        self,
        module: nn.Module,
        chords: Sequence[Chord] | ChordPath,
        forward_fn: ForwardFn | None = None,
        rtol: float | None = None,
        quadrature_points: int = 4,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(module, chords, forward_fn, rtol, quadrature_points, chunk_size)
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
    ) -> KernelMachine:
        """Load an exported machine; its examples stay in its files, which must stay as they are.

        Args:
            path: The artifact's directory, or an fsspec URL of one (``s3://``, ``gs://``, ``hf://``, ``http://``,
                ``memory://``), which is downloaded to a temporary directory that the machine keeps.
            module: A module of the architecture that was trained; its weights do not matter and stay as they are.
            forward_fn: As in training, if one was given there.
            rtol: Tolerance of the quadrature along each chord: points are doubled, for each chunk of queries, until
                the embedded error estimate is below this share of the chord's change of the outputs, or 64 points are
                reached. None for a fixed number of points, as in the metrics logged in training.
            quadrature_points: Gauss-Legendre points along each chord where there is no ``rtol``.
            expected_sha256: The sha256 that the manifest must have, if its author told you; then every byte is read
                and compared first, as `verify` does.

        Returns:
            The machine.

        Raises:
            ArtifactError: If the artifact is damaged or of another format, or if the module's parameter names, shapes
                or dtypes differ from the manifest's; every difference is named. Of a large artifact, damage within
                examples and nodes is found when a question first touches it.
            ValueError: If ``expected_sha256`` is no sha256.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> from lightning_pathkernel import KernelMachine
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> directory = tiny_machine().save(tempfile.mkdtemp())
            >>> KernelMachine.load(directory, nn.Linear(2, 3))
            KernelMachine(Linear, chords=3)
        """
        private, stored, manifest = read_machine(path, module, expected_sha256)
        machine = cls(private, stored, forward_fn, rtol, quadrature_points)
        machine._manifest = manifest
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

        Example:
            >>> import tempfile
            >>> from lightning_pathkernel import verify
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> verify(tiny_machine().save(tempfile.mkdtemp()))
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

        Example:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().names_of([0, 1])
            ['0', '1']
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

        Example:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().without([0, 1]).example_ids
            tensor([2, 3, 4, 5])
        """
        drop = torch.as_tensor(example_ids).reshape(-1)
        machine = self._along(self._path.without(drop))
        machine._manifest = self._manifest
        return machine

    def _along(self, path: Sequence[Chord] | ChordPath) -> KernelMachine:
        network = self._network
        return KernelMachine(network.module, path, network.forward_fn, self._rtol, self._points, self._chunk)

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

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().contributions(torch.eye(2)[:1], torch.tensor([0]))
            tensor([[ 0.0451,  0.0044, -0.0036, -0.0276,  0.0110, -0.0048]])
        """
        target = self._targets(x, target)
        parts = []
        for part, rows in self._with_rows(x, target):
            functional = functional_of(output_fn, rows)
            shares = query.shares(self._network, part, self._path, self._rules(part), functional)
            parts.append(all_contributions(shares, self.example_ids))
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

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> why = tiny_machine().explain(torch.eye(2), top_k=1)
            >>> why.example_ids, why.contributions  # for and against each
            (tensor([[0, 3],
                    [3, 4]]), tensor([[ 0.0451, -0.0276],
                    [ 0.0521, -0.0084]]))
        """
        target = self._targets(x, target)
        pieces = [self._explain(part, rows, top_k, output_fn, complete) for part, rows in self._with_rows(x, target)]
        return joined(pieces)

    def _explain(self, x: Any, target: Tensor, top_k: int, output_fn: OutputFn | None, complete: bool) -> Explanation:
        functional = functional_of(output_fn, target)
        rules = self._rules(x)
        terms, gaps = query.ledger(self._network, x, self._path, rules, functional)
        lost = [gap[:, 0] for gap in gaps] if complete else None
        shares = query.shares(self._network, x, self._path, rules, functional, lost)
        ids, contributions = strongest_contributions(shares, top_k)
        ledger = {name: value[:, 0] for name, value in terms.items()}
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

        Example:
            >>> import torch
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> x, ids = torch.eye(2), torch.tensor([3, 5])
            >>> tiny_machine().coefficients(x, torch.eye(2), ids, target=torch.tensor([0, 1])).shape
            torch.Size([2, 2])
        """
        ids = torch.as_tensor(ids)
        unknown = ids[~torch.isin(ids, self.example_ids)]
        if len(unknown):
            raise KeyError(f"examples {unknown.tolist()[:10]} were never visited in training")
        found = self.contributions(x, target)[:, torch.searchsorted(self.example_ids, ids)]
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

        Example:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().self_influence()
            tensor([-0.0334, -0.2241, -0.2611, -0.0472, -0.0798, -0.0422])
        """
        out = torch.zeros(len(self.example_ids), dtype=torch.float64)
        for examples in self._path.examples:
            for ids, values in examples.influences():
                out.index_add_(0, torch.searchsorted(self.example_ids, ids), values.double())
        return out.float()
