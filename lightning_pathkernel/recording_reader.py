"""Reading a recording, finished or interrupted: every byte that is used is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.chord_io import MALFORMED, chord_of, merged_chord, rank_name
from lightning_pathkernel.names import decode_names
from lightning_pathkernel.recording.open_chord import OpenChord
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording_files import check_link, read_description, segments_of
from lightning_pathkernel.store import ArtifactError, Segment, read_segment, segment_name, unpack_tree

__all__ = ["Recording"]


class Recording:
    """What a fit left in its directory.

    Args:
        directory: The directory.

    Attributes:
        facts: What `recording.json` says.
        ranks: Number of processes that wrote it.
        closed: Chords that all of them closed.

    Raises:
        ArtifactError: If it is no recording, or a segment is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts, self._root = read_description(directory)
        self.ranks = int(self.facts["ranks"])
        lengths = [self._length(rank) for rank in range(self.ranks)]
        self._ended = self._last(0, lengths[0])
        closed = [n - 1 - (self._last(rank, n) is not None) for rank, n in enumerate(lengths)]
        self.closed = max(min(closed), 0)
        self._whole = len(set(closed)) == 1
        self._heads: list[str] = []

    def _length(self, rank: int) -> int:
        own = self.directory / rank_name(rank)
        found = segments_of(own, "chord")
        if missing := set(range(len(found))) - set(found):
            name = f"{rank_name(rank)}/{segment_name('chord', min(missing))}"
            raise ArtifactError(f"{self.directory}: {name} is missing from the recording")
        if not found:
            name = f"{rank_name(rank)}/{segment_name('chord', 0)}"
            raise ArtifactError(f"{self.directory}: {name} is missing from the recording")
        return len(found)

    def _last(self, rank: int, length: int) -> Segment | None:
        """The segment that says that the recording ended; None where it was cut off."""
        found = self._read(rank, length - 1)
        return found if found.header.kind == "end" else None

    def _read(self, rank: int, index: int) -> Segment:
        return read_segment(self.directory / rank_name(rank) / segment_name("chord", index))

    def _checked(self, rank: int, index: int) -> Segment:
        """A segment that is the next one after those read so far."""
        found = self._read(rank, index)
        name = f"{rank_name(rank)}/{segment_name('chord', index)}"
        check_link(name, found, self.facts, rank, index, self._heads[rank] if index else self._root)
        self._heads[rank] = found.sha256
        return found

    def chords(self, constants: dict[str, Tensor]) -> Iterator[Chord]:
        """All chords in order, the one that was open last if a checkpoint or an interrupt saved it.

        Args:
            constants: Filled in: state that training never moved.

        Yields:
            The chords, rows of all processes added up.

        Raises:
            ArtifactError: If a segment is damaged, or not the next one.
        """
        self._heads = [""] * self.ranks
        for rank in range(self.ranks):
            begun = self._checked(rank, 0)
            constants.update(begun.groups.get("constants", {}))
        for index in range(1, self.closed + 1):
            parts = [self._checked(rank, index) for rank in range(self.ranks)]
            called = f"{rank_name(0)}/{segment_name('chord', index)}"
            chord = chord_of(called, parts[0].groups, parts[0].header.facts)
            others = {f"{rank_name(r)}/{segment_name('chord', index)}": p.groups for r, p in enumerate(parts) if r}
            yield merged_chord(chord, others)
        if self._ended is not None:
            check_link("the end", self._ended, self.facts, 0, self._ended.header.index, self._heads[0])
        opened = self.open_chord() if self._ended is None else None
        if opened is not None:
            yield opened

    # what was open

    def open_chord(self) -> Chord | None:
        """The chord that was open when its state was saved last; None where there is none, or it is not finite.

        To be called after the closed ones were read.

        Returns:
            The chord, with first-stage rows.

        Raises:
            ArtifactError: If what was saved is damaged.
        """
        found = self._open_segments() if self._whole else None
        if found is None:
            return None
        states = [self._state(rank, segment) for rank, segment in enumerate(found)]
        try:
            return _offline_chord(states, [_names(segment) for segment in found])
        except (*MALFORMED, AssertionError, RuntimeError) as error:
            raise ArtifactError(f"{_called(0, found[0])}: not the state of a chord: {error!r}") from error

    def _open_segments(self) -> list[Segment] | None:
        """The latest open segments of all processes that continue their chains from the same optimiser step."""
        numbers = [list(segments_of(self.directory / rank_name(rank), "open")) for rank in range(self.ranks)]
        found: list[Segment | None] = [None] * self.ranks
        while True:
            for rank, own in enumerate(numbers):
                if found[rank] is None:
                    if not own:
                        return None
                    path = self.directory / rank_name(rank) / segment_name("open", own.pop())
                    found[rank] = read_segment(path)
            segments = [each for each in found if each is not None]
            if any(s.header.previous != self._heads[rank] for rank, s in enumerate(segments)):
                return None
            steps = [s.header.last_step for s in segments]
            if len(set(steps)) == 1:
                for rank, s in enumerate(segments):
                    check_link(_called(rank, s), s, self.facts, rank, s.header.index, self._heads[rank])
                return segments
            found[steps.index(max(steps))] = None

    @staticmethod
    def _state(rank: int, segment: Segment) -> Mapping[str, Any]:
        try:
            state: Mapping[str, Any] = unpack_tree(segment.groups["state"])["recorder"]
            return state
        except (*MALFORMED, ValueError) as error:
            raise ArtifactError(f"{_called(rank, segment)}: {error}") from error

    def history(self) -> list[dict[str, Any]]:
        """The metrics that were logged, validation by validation, as far as the recording says."""
        if self._ended is not None:
            return list(self._ended.header.facts.get("history", []))
        numbers = segments_of(self.directory / rank_name(0), "open")
        if not numbers:
            return []
        path = self.directory / rank_name(0) / segment_name("open", numbers[-1])
        try:
            return list(unpack_tree(read_segment(path).groups["state"])["history"])
        except (*MALFORMED, ValueError) as error:
            raise ArtifactError(f"{rank_name(0)}/{path.name}: {error}") from error


def _called(rank: int, segment: Segment) -> str:
    return f"{rank_name(rank)}/{segment_name('open', segment.header.index)}"


def _names(segment: Segment) -> dict[int, str]:
    return decode_names(segment.groups["names"]["utf8"]) if "names" in segment.groups else {}


class _Standing:
    """Stands for the network at the moment when a state was saved."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.parameters: dict[str, Tensor] = dict(state["now"])
        self._buffers: dict[str, Tensor] = dict(state["buffers"])

    def weights(self) -> dict[str, Tensor]:
        return dict(self.parameters)

    def buffers(self) -> dict[str, Tensor]:
        return dict(self._buffers)


class _Absent(Ranks):
    """Processes that are not there: what they would add is known."""

    def __init__(self, world: int) -> None:
        super().__init__(world)
        self.added: Tensor | None = None

    def total(self, values: Tensor) -> Tensor:
        return values if self.added is None else values + self.added

    def first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)


def _offline_chord(states: list[Mapping[str, Any]], names: list[dict[int, str]]) -> Chord | None:
    """The open chord of all processes, with first-stage rows; None where nothing was learned or it is not finite."""
    ranks = _Absent(len(states))
    chords = []
    for state in states:
        chord = OpenChord(_Standing(state), ranks)  # type: ignore[arg-type]
        chord.restore(state["chord"], state["rows"])
        chords.append(chord)
    steps = int(states[0]["steps"])
    others = [chord.snapshot(steps, influences=True) for chord in chords[1:]]
    present = [chord.rows.sum(0) for chord in others if chord is not None]
    ranks.added = torch.stack(present).sum(0) if present else None
    found = chords[0].snapshot(steps, influences=True)
    if found is None or not all(bool(value.isfinite().all()) for value in found.delta.values()):
        return None
    groups = {
        f"process {i}": {"rows": {"example_ids": c.example_ids, "rows": c.rows, "self_inner": c.self_inner}}
        for i, c in enumerate(others, start=1)
        if c is not None
    }
    merged = merged_chord(found, groups)
    every = {key: name for table in names for key, name in table.items()}
    return Chord(**{**vars(merged), "total": None, "names": every})
