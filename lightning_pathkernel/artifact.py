"""Reading an artifact back: a private module with its constants, and the chords of its path."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lightning_pathkernel.chord import Chord
from lightning_pathkernel.fingerprint import CONSTANTS, check_module, check_state, load_constants
from lightning_pathkernel.packed_io import Node, read_packed
from lightning_pathkernel.store import ArtifactError, read_manifest, read_tensors

__all__ = ["read_machine"]


def read_machine(path: str | Path, module: nn.Module) -> tuple[nn.Module, list[Chord]]:
    """Read what a kernel machine is made of.

    Args:
        path: The artifact's directory.
        module: A module of the architecture that was trained; left as it is.

    Returns:
        A copy of the module with the artifact's constants, and the chords in the order of training.

    Raises:
        ArtifactError: If the artifact is damaged, of another format or not of this module.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    check_module(module, manifest["module"])
    private = _copy(module)
    for name, parameter in private.named_parameters():
        parameter.requires_grad_(bool(manifest["module"]["parameters"][name]["trainable"]))
    constants, _ = read_tensors(directory / CONSTANTS)
    load_constants(private, constants)
    chords: list[Chord] = []
    node: Node | None = None
    for name in manifest["chords"]:
        chord, node = read_packed(directory / name, node)
        chords.append(chord)
    chords = _with_frozen(chords)
    step = 0
    for name, chord in zip(manifest["chords"], chords, strict=True):
        rest = chord is chords[-1] and len(chords) > 1  # what moved after the last step has no step of its own
        if chord.first_step != step or chord.last_step < step or (chord.last_step == step and not rest):
            raise ArtifactError(f"{name}: steps {chord.first_step} to {chord.last_step}, expected from {step} on")
        step = chord.last_step
        check_state(private, chord.start, chord.start_buffers)
    return private, chords


def _with_frozen(chords: list[Chord]) -> list[Chord]:
    """Parameters that began to learn in a later chord stand in the earlier ones as they stood at its start."""
    out: list[Chord] = []
    later: dict[str, Tensor] = {}
    for chord in reversed(chords):
        out.append(replace(chord, start={**later, **chord.start}))
        later.update(chord.start)
    return out[::-1]


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy without a trainer behind it."""
    trainer = module.__dict__.pop("_trainer", None)
    try:
        return copy.deepcopy(module)
    finally:
        if trainer is not None:
            module.__dict__["_trainer"] = trainer
