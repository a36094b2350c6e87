"""One process' part of a recording in the making: a chain of segments, and beside it the states that checkpoints name.

Laid out as docs/recording.md says. Whatever comes of the file system is told to all processes before any of them goes
on, so that none waits for one that has given up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import chord_groups, rank_name
from lightning_pathkernel.names import decode_names, encode_names
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.store import (
    ArtifactError,
    Head,
    HeldError,
    Segment,
    SegmentWriter,
    Stamp,
    StoreError,
    WriterLock,
    fsync_directory,
    pack_tree,
    publish_json,
    read_segment,
    remove_temporaries,
    segment_name,
    unpack_tree,
)

__all__ = ["RECORDING", "Committed", "RecordingStore", "checked_chain", "read_description", "with_identity"]

RECORDING = "recording.json"
FORMAT = "lightning_pathkernel.recording"
VERSION = [1, 0]
_LIMIT = 16 << 20
T = TypeVar("T")


def with_identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with format, fingerprint of its configuration, and a run id that says what the run began as.

    The id is made of all that is described, first weights included, and of nothing else: no clock, no random number. So
    a run that was interrupted and one that was not have the same id, and two runs that begin alike too; what tells
    their segments apart is the chain of hashes.
    """
    found = {"format": FORMAT, "version": VERSION, **description}
    found["configuration_sha256"] = _digest(found["configuration"])
    return {**found, "run_id": _digest(found)[:32]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_description(directory: Path) -> tuple[dict[str, Any], str]:
    """The description of a recording, and the sha256 of its file.

    Args:
        directory: The recording.

    Returns:
        Both.

    Raises:
        ArtifactError: If there is none, or it is malformed or altered.
    """
    path = directory / RECORDING
    if not path.is_file():
        raise ArtifactError(f"{directory} is not a recording: it has no {RECORDING}")
    try:
        if path.stat().st_size > _LIMIT:
            raise ArtifactError(f"{RECORDING}: larger than {_LIMIT} bytes")
        data = path.read_bytes()
        found = json.loads(data)
        needed = {"format", "version", "run_id", "configuration", "configuration_sha256", "ranks", "module",
                  "module_class", "optimizer", "settings"}  # fmt: skip
        missing = needed - set(found)
        if not isinstance(found, dict) or missing:
            raise ArtifactError(f"{RECORDING}: malformed: {', '.join(sorted(missing)) or 'no table'} missing")
        if found["format"] != FORMAT or found["version"][0] != VERSION[0]:
            raise ArtifactError(
                f"{RECORDING}: format {found['format']!r} {found['version']}, this version reads {FORMAT!r} {VERSION[0]}.x"
            )
        again = with_identity({k: v for k, v in found.items() if k not in ("configuration_sha256", "run_id")})
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ArtifactError(f"{RECORDING}: malformed: {error!r}") from error
    if again != found:
        raise ArtifactError(f"{RECORDING}: its run id is not that of what it says: damaged or altered")
    return found, hashlib.sha256(data).hexdigest()


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


def checked_chain(directory: Path, description: Mapping[str, Any], root: str, rank: int, count: int) -> list[Segment]:
    """The first segments of a chain, every byte of them checked, their tensors let go of but for names.

    Args:
        directory: The recording.
        description: Of the recording.
        root: sha256 of its file.
        rank: Whose chain.
        count: How many segments.

    Returns:
        The segments.

    Raises:
        ArtifactError: Naming the first one that is missing, altered, or of another run.
    """
    out: list[Segment] = []
    for index in range(count):
        name = f"{rank_name(rank)}/{segment_name('chord', index)}"
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory}: {name} is missing from the recording")
        found = read_segment(directory / name)
        check_link(name, found, description, rank, index, out[-1].sha256 if out else root)
        rows = {"rows": {"example_ids": found.groups["rows"]["example_ids"]}} if "rows" in found.groups else {}
        names = {"names": found.groups["names"]} if "names" in found.groups else {}
        out.append(Segment(found.header, found.sha256, {**rows, **names}))
    return out


def check_link(
    name: str, found: Segment, description: Mapping[str, Any], rank: int, index: int, previous: str
) -> None:  # fmt: skip
    """Refuse a segment that is not the next one of its chain.

    Args:
        name: What an error calls it.
        found: The segment.
        description: Of its recording.
        rank: Whose it must be.
        index: Its number.
        previous: sha256 of what it must follow.

    Raises:
        ArtifactError: If it is another.
    """
    header = found.header
    wanted = {"run_id": description["run_id"], "rank": rank, "index": index,
              "configuration": description["configuration_sha256"]}  # fmt: skip
    for key, value in wanted.items():
        if getattr(header, key) != value:
            raise ArtifactError(f"{name}: its {key} is {getattr(header, key)!r}, {value!r} expected: of another run")
    if header.previous != previous:
        raise ArtifactError(
            f"{name}: it follows a segment with the sha256 {header.previous[:16]}..., but the one before it has "
            f"{previous[:16]}...: one of them was altered or is of another run"
        )


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
        """  # noqa: DOC502
        own = directory / rank_name(ranks.rank)

        def hold() -> WriterLock:
            own.mkdir(parents=True, exist_ok=True)
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
        """  # noqa: DOC502
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
            return _checked(directory, committed, ranks.rank, device)

        try:
            description, chain, opened, state = agreed(ranks, check, directory)
            agreed(ranks, lambda: _discard(own, committed.segments, opened.header.index), directory)
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
        """  # noqa: DOC502
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
        """  # noqa: DOC502
        named = {"names": {"utf8": encode_names(names)}} if names else {}
        self._opened += 1
        self.writer.put("open", (self._steps, steps), {}, {"state": pack_tree(state), **named}, self._opened)
        head, (name, digest) = self.writer.flush()
        return Committed(head.segments, head.sha256, self._rows, name, digest)

    def end(self, steps: int, facts: Mapping[str, Any]) -> None:
        """Write that the recording ends here and wait until all is durable; the other processes are not asked.

        Raises:
            StoreError: If something could not be written.
        """  # noqa: DOC502
        self.writer.put("end", (self._steps, steps), facts, {})
        self.writer.flush()

    def close(self) -> None:
        """Let another writer in; what waits is written all the same."""
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
    result, mine = None, None
    try:
        result = do()
    except FileExistsError as error:
        mine = error
    except (HeldError, ArtifactError, StoreError) as error:
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


def _discard(own: Path, segments: int, opened: int) -> None:
    """Move what came after a checkpoint out of the way, the last first: what is left is a chain at every moment."""
    later = [p for p in own.glob("segment-*.safetensors") if _number(p) >= segments]
    later += [p for p in own.glob("open-*.safetensors") if _number(p) > opened]
    if not later:
        return
    attempts = own / "discarded"
    attempts.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=-1)
    target = attempts / f"{number:06d}"
    target.mkdir()
    fsync_directory(attempts)
    for path in sorted(later, key=lambda p: (_number(p), p.name), reverse=True):
        path.rename(target / path.name)
    fsync_directory(target)
    fsync_directory(own)


def _number(path: Path) -> int:
    digits = path.name.removesuffix(".safetensors").rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def segments_of(own: Path, kind: str) -> Sequence[int]:
    """Numbers of the segments of a kind in a process' folder, rising."""
    prefix = "open" if kind == "open" else "segment"
    return sorted(n for p in own.glob(f"{prefix}-*.safetensors") if (n := _number(p)) >= 0)
