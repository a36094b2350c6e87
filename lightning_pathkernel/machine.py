"""The kernel machine: predictions, contributions and the ledger from an exported artifact, eq. (7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pathkernel.artifact import read_machine
from lightning_pathkernel.artifact_writer import save_machine
from lightning_pathkernel.attribution import Attribution
from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_path import ChordPath, HeldPath
from lightning_pathkernel.names import merge_names, names_of
from lightning_pathkernel.network import ForwardFn
from lightning_pathkernel.progress import Progress, style_of
from lightning_pathkernel.query_options import QueryOptions
from lightning_pathkernel.reporting import report
from lightning_pathkernel.store import Manifest

__all__ = ["KernelMachine"]


class KernelMachine(Attribution):
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

    Examples:
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

        Examples:
            >>> import tempfile
            >>> from torch import nn
            >>> from lightning_pathkernel import KernelMachine
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> directory = tiny_machine().save(tempfile.mkdtemp())
            >>> KernelMachine.load(directory, nn.Linear(2, 3))
            KernelMachine(Linear, chords=3)
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

        Examples:
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

        Examples:
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

        Examples:
            >>> from lightning_pathkernel.testing import tiny_machine
            >>> tiny_machine().without([0, 1]).example_ids
            tensor([2, 3, 4, 5])
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

        Examples:
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
