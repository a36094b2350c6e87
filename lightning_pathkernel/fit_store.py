"""The recording of one fit, and what becomes of the fit when it cannot be written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.fit_resume import as_text, checkpoint_state, stopped_state
from lightning_pathkernel.recording.ranks import Ranks
from lightning_pathkernel.recording_store import Committed, RecordingStore, agreed
from lightning_pathkernel.store import StoreError

__all__ = ["ON_STORE_ERROR", "FitStore"]

ON_STORE_ERROR = ("raise", "stop_recording")


class FitStore:
    """Stops the fit, or only its recording, when the file system fails: all processes the same.

    Args:
        ranks: All processes.
        on_error: One of `ON_STORE_ERROR`.

    Attributes:
        stopped: Why nothing is recorded any more; None while it is.
    """

    def __init__(self, ranks: Ranks, on_error: str) -> None:
        self._ranks = ranks
        self._on_error = on_error
        self._store: RecordingStore | None = None
        self._directory = Path()
        self._last: tuple[int, dict[str, Any]] | None = None
        self.stopped: str | None = None

    def begin(self, directory: Path, description: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
        """Begin a recording, as `RecordingStore.begin`."""
        self._directory = directory
        with self.guarded():
            self._store = RecordingStore.begin(directory, description, constants, self._ranks)

    def resume(self, directory: Path, committed: Committed, device: Any) -> tuple[Any, dict[int, str]]:
        """Go on with a recording.

        Args:
            directory: The recording.
            committed: What the checkpoint says of this process.
            device: Where tensors go that were on a device.

        Returns:
            The state that was saved, and the names of examples so far.
        """
        self._directory = directory
        self._store, state, names = RecordingStore.resume(directory, committed, self._ranks, device)
        return state, names

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What cannot be written within stops the recording, where the user chose so."""
        try:
            yield
        except StoreError as error:
            if self._on_error != "stop_recording":
                raise
            self._stop(error)

    def _stop(self, error: StoreError) -> None:
        self.stopped = str(error)
        self.close()
        warnings.warn(
            f"PathKernelCallback has stopped recording, training goes on: {error}. No more metrics are logged, and no "
            "machine is written when the fit ends.",
            stacklevel=2,
        )

    def check(self) -> None:
        """Raise what the writing thread met; several processes wait for their next common write.

        Raises:
            StoreError: If something could not be written.
        """
        if self._store is not None and self._ranks.world == 1:
            self._store.writer.check()

    def chord(self, chord: Chord) -> None:
        """Hand a closed chord over."""
        if self._store is not None:
            self._store.chord(chord)

    def save(self, moment: int, state: Callable[[], Any], steps: int, names: Mapping[int, str]) -> dict[str, Any]:
        """Make all durable.

        Args:
            moment: Changes whenever the state does: what was saved at the same one is not saved twice.
            state: Gives the state.
            steps: Optimiser steps so far.
            names: Names of examples drawn since the last chord.

        Returns:
            What a checkpoint has to say.
        """
        store = self._store
        if store is None:
            return self.silence()
        if self._last is None or self._last[0] != moment:
            committed = agreed(self._ranks, lambda: store.save(state(), steps, names), self._directory)
            processes = self._ranks.texts(as_text(committed))
            run_id = str(store.description["run_id"])
            self._last = moment, checkpoint_state(run_id, self._directory, steps, processes)
        return self._last[1]

    def silence(self) -> dict[str, Any]:
        """What a checkpoint has to say when nothing is recorded."""
        return stopped_state(self.stopped) if self.stopped else {}

    def save_alone(self, state: Any, steps: int, names: Mapping[int, str]) -> dict[str, Any]:
        """`save` without the other processes, which may have given up; they say nothing in what is returned."""
        assert self._store is not None
        committed = self._store.save(state, steps, names)
        if self._ranks.world > 1:
            return {}
        return checkpoint_state(self._store.description["run_id"], self._directory, steps, [as_text(committed)])

    def end(self, steps: int, facts: Mapping[str, Any], together: bool) -> None:
        """Write that the recording ends, with all processes or alone."""
        store = self._store
        if store is None:
            return
        if together:
            agreed(self._ranks, lambda: store.end(steps, facts), self._directory)
        else:
            store.end(steps, facts)

    def close(self) -> None:
        """Let another writer in."""
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def writing(self) -> bool:
        """Whether something is recorded."""
        return self._store is not None
