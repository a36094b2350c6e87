"""What a Lightning checkpoint says of a recording, and where the recording is that it speaks of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_pathkernel.recording_files import read_description
from lightning_pathkernel.recording_store import Committed
from lightning_pathkernel.store import ArtifactError
from lightning_pathkernel.trainer_checks import FitError

__all__ = ["as_text", "checkpoint_state", "committed_by", "recording_of", "stopped_state"]

_VERSION = 1


def checkpoint_state(run_id: str, directory: Path, steps: int, processes: list[str]) -> dict[str, Any]:
    """The callback's part of a checkpoint: plain values only.

    Args:
        run_id: The recording's.
        directory: The recording.
        steps: Optimiser steps so far.
        processes: `Committed` of each process, as JSON.

    Returns:
        The state.
    """
    return {
        "version": _VERSION,
        "run_id": run_id,
        "recording": str(directory.absolute()),
        "steps": steps,
        "processes": [json.loads(each) for each in processes],
    }


def stopped_state(why: str) -> dict[str, Any]:
    """The callback's part of a checkpoint written after the recording had stopped."""
    return {"version": _VERSION, "stopped": why}


def as_text(committed: Committed) -> str:
    """`Committed` as JSON."""
    return json.dumps(asdict(committed))


def committed_by(state: Mapping[str, Any], world: int, rank: int) -> Committed:
    """What a checkpoint says of one process.

    Args:
        state: The callback's part of the checkpoint.
        world: Number of processes now.
        rank: This one.

    Returns:
        What it says.

    Raises:
        FitError: If nothing can go on from it.
    """
    if state.get("stopped"):
        raise FitError(
            f"PathKernelCallback cannot resume from this checkpoint: the recording had stopped before it was written "
            f"({state['stopped']}). Begin a new recording: train without ckpt_path, or resume without the callback."
        )
    try:
        if state["version"] != _VERSION:
            raise FitError(f"the checkpoint's recording has version {state['version']}, expected {_VERSION}.")
        processes = [Committed(**each) for each in state["processes"]]
    except (KeyError, TypeError) as error:
        raise FitError(f"the checkpoint's state of PathKernelCallback is malformed: {error!r}.") from error
    if len(processes) != world:
        raise FitError(
            f"PathKernelCallback cannot go on with another number of processes: the checkpoint was written by "
            f"{len(processes)}, found {world}. Resume with devices={len(processes)}, or begin a new fit."
        )
    return processes[rank]


def recording_of(trainer: Any, state: Mapping[str, Any], dirpath: str | None) -> Path:
    """The recording that a checkpoint speaks of, the same on every rank.

    Args:
        trainer: The Trainer of the fit.
        state: The callback's part of the checkpoint.
        dirpath: The user's choice; None for where it was, or where a fit would write now.

    Returns:
        The recording.

    Raises:
        FitError: If it is not where it should be.
    """
    found = _look(trainer, state, dirpath) if trainer.is_global_zero else None
    path, wrong = trainer.strategy.broadcast(found)
    if wrong is not None:
        raise FitError(wrong)
    return Path(path)


def _look(trainer: Any, state: Mapping[str, Any], dirpath: str | None) -> tuple[str, str | None]:
    was = Path(str(state["recording"]))
    if dirpath is None:
        candidates = [was, Path(trainer.default_root_dir) / "pathkernel" / "recording"]
    else:
        base = Path(dirpath).absolute()
        candidates = [base / "recording"]
        if was.parent.parent == base.parent and was.parent.name.startswith(f"{base.name}-v"):
            candidates.append(was)
    seen = []
    for candidate in candidates:
        try:
            description = read_description(candidate)[0]
        except ArtifactError as error:
            seen.append(str(error))
            continue
        if description["run_id"] == state["run_id"]:
            return str(candidate), None
        seen.append(f"{candidate} has the run id {description['run_id']}")
    return str(was), (
        f"PathKernelCallback cannot find the recording that the checkpoint belongs to: run id {state['run_id']}, "
        f"written in {str(was)!r}. Found: {'; '.join(seen)}. Pass the directory that has it as dirpath=, or begin a "
        "new fit without ckpt_path."
    )
