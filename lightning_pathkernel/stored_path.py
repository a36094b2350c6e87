"""The path of an artifact: chords are read one after another, examples not before they are asked for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_pathkernel.chord_io import MALFORMED
from lightning_pathkernel.example_rows import ExampleRows, KeptRows
from lightning_pathkernel.names import decode_names
from lightning_pathkernel.packed_io import EXAMPLES, Node, read_parts
from lightning_pathkernel.store import ArtifactError, CheckedFile, TensorFile, facts_of
from lightning_pathkernel.stored_chord import StoredChord
from lightning_pathkernel.stored_rows import StoredRows

__all__ = ["ReducedPath", "StoredPath"]

_KEPT_BYTES = 512 << 20
"""Decoded chords, without their examples, stay in memory where all of them take no more; else each is read anew."""


class StoredPath:
    """Chords in the files of an artifact.

    Args:
        files: Their files, in the order of training.
        owner: What the files must not outlive: the temporary directory that they are in.

    Attributes:
        files: The chords' files.
        examples: The examples of each chord.

    Raises:
        ArtifactError: If a header is not that of a chord, or the chords do not follow one another; no tensor is read.
    """

    def __init__(self, files: Sequence[CheckedFile], owner: object = None) -> None:
        self._owner = owner
        self._close = weakref.finalize(self, _close, list(files))
        self.files = [TensorFile(file) for file in files]
        self.examples: Sequence[ExampleRows] = [_rows_of(file) for file in self.files]
        self._check_order()
        self._born = self._first_starts()
        self.keeps = sum(_decoded_bytes(file) for file in self.files) <= _KEPT_BYTES
        self._kept: list[tuple[StoredChord, Node]] = []
        self._thawed: dict[str, Tensor] = {}

    def _check_order(self) -> None:
        step = 0
        for index, file in enumerate(self.files):
            facts = facts_of(file)
            first, last, time = facts.get("first_step"), facts.get("last_step"), facts.get("learning_time")
            if type(facts.get("index")) is not int or facts["index"] != index:
                raise ArtifactError(f"{file.name}: not a chord: index {str(facts.get('index'))[:40]}, not {index}")
            if type(first) is not int or type(last) is not int or not 0 <= first < 2**62 or not 0 <= last < 2**62:
                raise ArtifactError(f"{file.name}: not a chord: steps that are no counts")
            if isinstance(time, bool) or not isinstance(time, int | float):
                raise ArtifactError(f"{file.name}: not a chord: a learning time that is no number")
            rest = 0 < index == len(self.files) - 1  # what moved after the last step has no step of its own
            if first != step or last < step or (last == step and not rest):
                raise ArtifactError(f"{file.name}: steps {first} to {last}, expected from {step} on")
            step = last

    def _first_starts(self) -> dict[str, int]:
        """Parameter -> the chord that stores where it started from; each is stored once."""
        born: dict[str, int] = {}
        for index, file in enumerate(self.files):
            for name in file.groups().get("start", []):
                if born.setdefault(name, index) != index:
                    raise ArtifactError(f"{file.name}: not a chord: a second start of {name[:80]!r}")
        return born

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[StoredChord]:
        node: Node | None = None
        for index in range(len(self)):
            if index < len(self._kept):
                chord, node = self._kept[index]
            else:
                chord, node = self._read(index, node)
                if self.keeps and index == len(self._kept):
                    self._kept.append((chord, node))
            yield chord

    def _read(self, index: int, before: Node | None) -> tuple[StoredChord, Node]:
        file = self.files[index]
        later = {name: self._start_of(name) for name, born in self._born.items() if born > index}
        return read_parts(file, before, self.examples[index], later, lambda: _names_of(file))

    def _start_of(self, name: str) -> Tensor:
        """Of a parameter that began to learn after the first chord: it stands there in the chords before."""
        if name not in self._thawed:
            self._thawed[name] = self.files[self._born[name]].get(f"start/{name}")
        return self._thawed[name]

    def names(self) -> Iterator[Mapping[int, str]]:
        """The string ids that each chord brings."""
        return (_names_of(file) for file in self.files)

    def without(self, gone: Tensor) -> ReducedPath:
        """The path without some examples."""
        return ReducedPath(self, gone)


class ReducedPath:
    """An artifact's path without some examples.

    Args:
        whole: The path.
        gone: Ids to leave out.
    """

    def __init__(self, whole: StoredPath, gone: Tensor) -> None:
        self.whole, self.gone = whole, gone
        self._reduced = [KeptRows(rows, gone) for rows in whole.examples]
        self.examples: Sequence[ExampleRows] = self._reduced
        self._kept: list[StoredChord] = []

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[StoredChord]:
        if len(self._kept) == len(self):
            yield from self._kept
            return
        for index, (chord, rows) in enumerate(zip(self.whole, self._reduced, strict=True)):
            reduced = chord.reduced(rows)
            if self.whole.keeps and index == len(self._kept):
                self._kept.append(reduced)
            yield reduced

    def names(self) -> Iterator[Mapping[int, str]]:
        """The string ids that each chord brings."""
        return self.whole.names()

    def without(self, gone: Tensor) -> ReducedPath:
        """The path without some more examples."""
        return ReducedPath(self.whole, torch.cat([self.gone, gone]))


def _close(files: list[CheckedFile]) -> None:
    for file in files:
        file.close()


def _rows_of(file: TensorFile) -> StoredRows:
    try:
        return StoredRows(file)
    except MALFORMED as error:
        raise ArtifactError(f"{file.name}: not a chord: {error!r}") from error


def _names_of(file: TensorFile) -> Mapping[int, str]:
    if "names" not in file.groups():
        return {}
    try:
        return decode_names(file.get("names/utf8"))
    except MALFORMED as error:
        raise ArtifactError(f"{file.name}: not a chord: {error!r}") from error


def _decoded_bytes(file: TensorFile) -> int:
    """What a chord takes in memory without its examples, at most."""
    apart = {f"rows/{name}" for name in EXAMPLES} | {"names/utf8"}
    sizes = (
        math.prod(entry.shape) * max(4, entry.dtype.itemsize) for n, entry in file.entries.items() if n not in apart
    )
    return sum(sizes)
