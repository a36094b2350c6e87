"""One process' part of a recording in the making: a chain of segments, and beside it the states that checkpoints name.

Laid out as docs/recording.md says. Whatever comes of the file system is told to all processes before any of them goes
on, so that none waits for one that has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import chord_groups, rank_name
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording_files import (
    RECORDING,
    check_link,
    checked_chain,
    read_description,
    set_aside,
    with_identity,
)
from lightning_pathkernel.store import (
    ArtifactError,
    Head,
    HeldError,
    Segment,
    SegmentWriter,
    Stamp,
    StoreError,
    WriterLock,
    make_directory,
    pack_tree,
    publish_json,
    read_segment,
    remove_temporaries,
    segment_name,
    unpack_tree,
)

__all__ = ["Committed", "RecordingStore", "agreed"]

T = TypeVar("T")


@dataclass(frozen=True)
class Committed:
    """What a checkpoint says of one process' part.

    Attributes:
        segments: Links of the chain.
        head: sha256 of the last one.
        rows: Rows in them.
        open: File with the state of all that is open.
        open_sha256: Its sha256.
    """

    segments: int
    head: str
    rows: int
    open: str
    open_sha256: str


class RecordingStore:
    """Made by `begin` or `resume`; `close` gives the lock up.

    Args:
        directory: The recording.
        description: What it is of.
        writer: Writes this process' segments.
        lock: The right to do so.
        ranks: All processes.
        rows: Rows written so far.
        opened: Number of the last open segment.
    """

    def __init__(
        self, directory: Path, description: Mapping[str, Any], writer: SegmentWriter, lock: WriterLock, ranks: Ranks,
        rows: int = 0, opened: int = -1,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.description = description
        self.writer = writer
        self._lock = lock
        self._ranks = ranks
        self._rows = rows
        self._opened = opened
        self._steps = 0

    @classmethod
    def begin(
        cls, directory: Path, description: Mapping[str, Any], constants: Mapping[str, Tensor], ranks: Ranks
    ) -> RecordingStore:
        """Begin a recording where there is none.

        Args:
            directory: Where.
            description: What it will be of; the first process' counts.
            constants: State that training will not move.
            ranks: All processes; every one of them calls this.

        Returns:
            The store.

        Raises:
            HeldError: If somebody is writing there.
            FileExistsError: If there is a recording.
            StoreError: If the file system fails.
        """
        own = directory / rank_name(ranks.rank)

        def hold() -> WriterLock:
            make_directory(own)
            return WriterLock(own)

        def describe() -> None:
            if not ranks.rank:
                publish_json(directory / RECORDING, with_identity(description))

        def write() -> tuple[dict[str, Any], SegmentWriter]:
            found, root = read_description(directory)
            stamp = Stamp(found["run_id"], ranks.rank, found["configuration_sha256"])
            writer = SegmentWriter(own, stamp, Head(0, root))
            writer.put("begin", (0, 0), {}, {} if ranks.rank else {"constants": constants})
            writer.flush()
            return found, writer

        lock = agreed(ranks, hold, directory)
        try:
            agreed(ranks, describe, directory)
            found, writer = agreed(ranks, write, directory)
        except BaseException:
            lock.release()
            raise
        return cls(directory, found, writer, lock, ranks)

    @classmethod
    def resume(
        cls, directory: Path, committed: Committed, ranks: Ranks, device: Any
    ) -> tuple[RecordingStore, Any, dict[int, str]]:
        """Go on with a recording from where a checkpoint was written.

        Args:
            directory: The recording.
            committed: What the checkpoint says of this process' part.
            ranks: All processes; every one of them calls this.
            device: Where tensors go that were on a device.

        Returns:
            The store, the state that was saved, and the names of examples in the chain.

        Raises:
            HeldError: If somebody is writing there.
            ArtifactError: If a segment is missing or altered.
            StoreError: If the file system fails.
        """
        own = directory / rank_name(ranks.rank)

        def hold() -> WriterLock:
            if not own.is_dir():
                raise ArtifactError(f"{directory}: {own.name} is missing from the recording")
            return WriterLock(own)

        lock = agreed(ranks, hold, directory)

        def check() -> tuple[dict[str, Any], list[Segment], Segment, Any]:
            remove_temporaries(own)
            if not ranks.rank:
                remove_temporaries(directory)
            found: tuple[dict[str, Any], list[Segment], Segment, Any]
            found = _checked(directory, committed, ranks.rank, device)
            return found

        try:
            description, chain, opened, state = agreed(ranks, check, directory)
            agreed(ranks, lambda: set_aside(own, committed.segments, opened.header.index), directory)
        except BaseException:
            lock.release()
            raise
        stamp = Stamp(description["run_id"], ranks.rank, description["configuration_sha256"])
        writer = SegmentWriter(own, stamp, Head(committed.segments, committed.head))
        store = cls(directory, description, writer, lock, ranks, committed.rows, opened.header.index)
        store._steps = chain[-1].header.last_step
        names: dict[int, str] = {}
        for segment in chain:
            if "names" in segment.groups:
                names.update(decode_names(segment.groups["names"]["utf8"]))
        return store, state, names

    # what is written

    def chord(self, chord: Chord) -> None:
        """Hand a closed chord over.

        Raises:
            StoreError: If something handed over before could not be written, here or in another process.
        """
        groups, facts = chord_groups(chord, self._ranks.rank)
        steps = chord.first_step, chord.last_step

        def put() -> None:
            self.writer.put("chord", steps, facts, groups)

        agreed(self._ranks, put, self.directory)
        self._rows += len(chord.example_ids)
        self._steps = chord.last_step

    def save(self, state: Any, steps: int, names: Mapping[int, str]) -> Committed:
        """Write the state of what is open and wait until all is durable; the other processes are not asked.

        Args:
            state: A tree; it may change again afterwards.
            steps: Optimiser steps so far.
            names: Names of examples drawn since the last chord.

        Returns:
            What a checkpoint has to say of this process.

        Raises:
            StoreError: If something could not be written.
        """
        named = {"names": {"utf8": encode_names(names)}} if names else {}
        self._opened += 1
        self.writer.put("open", (self._steps, steps), {}, {"state": pack_tree(state), **named}, self._opened)
        head, (name, digest) = self.writer.flush()
        return Committed(head.segments, head.sha256, self._rows, name, digest)

    def end(self, steps: int, facts: Mapping[str, Any]) -> None:
        """Write that the recording ends here and wait until all is durable; the other processes are not asked.

        Raises:
            StoreError: If something could not be written.
        """
        self.writer.put("end", (self._steps, steps), facts, {})
        self.writer.flush()

    def close(self) -> None:
        """Let another writer in, once what waits is written or has failed."""
        with suppress(StoreError):
            self.writer.flush()
        self._lock.release()


def agreed(ranks: Ranks, do: Callable[[], T], directory: Path) -> T:
    """Do something in all processes; where it fails in one of them, all raise.

    Args:
        ranks: The processes.
        do: What.
        directory: For the message.

    Returns:
        What it gave.

    Raises:
        HeldError: If it did so anywhere.
        ArtifactError: If it did so anywhere.
        StoreError: If the file system failed anywhere.
    """
    result: T | None = None
    mine: Exception | None = None
    try:
        result = do()
    except (FileExistsError, HeldError, ArtifactError, StoreError) as error:
        mine = error
    except OSError as error:
        mine = StoreError.of(error, directory, 0)
    if ranks.world > 1:
        said = ranks.texts("" if mine is None else f"{type(mine).__name__}\n{mine}")
        for rank, text in enumerate(said):
            if text and mine is None:
                _raise_for(rank, *text.split("\n", 1))
    if mine is not None:
        raise mine
    return result  # type: ignore[return-value]


def _raise_for(rank: int, kind: str, message: str) -> None:
    text = f"process {rank}: {message}"
    if kind == "HeldError":
        raise HeldError(text)
    if kind in ("ArtifactError", "FileExistsError"):
        raise ArtifactError(text)
    raise StoreError(5, text)


def _checked(directory: Path, committed: Committed, rank: int, device: Any) -> Any:
    """Description, chain, open segment and its state, as far as a checkpoint goes."""
    description, root = read_description(directory)
    chain = checked_chain(directory, description, root, rank, committed.segments)
    if chain[-1].sha256 != committed.head:
        raise ArtifactError(
            f"{rank_name(rank)}/{segment_name('chord', committed.segments - 1)}: its sha256 is not the one that the "
            "checkpoint names: altered, or written after another resume from an earlier checkpoint"
        )
    name = f"{rank_name(rank)}/{committed.open}"
    if Path(committed.open).name != committed.open or not (directory / name).is_file():
        raise ArtifactError(
            f"{directory}: {name} is missing from the recording; a resume from an earlier checkpoint moves it to "
            "discarded/"
        )
    opened = read_segment(directory / name)
    if opened.sha256 != committed.open_sha256:
        raise ArtifactError(f"{name}: its sha256 is not the one that the checkpoint names: altered")
    check_link(name, opened, description, rank, opened.header.index, committed.head)
    try:
        state = unpack_tree(opened.groups["state"], device)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{name}: {error}") from error
    return description, chain, opened, state
