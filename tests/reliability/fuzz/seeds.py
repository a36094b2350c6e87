"""Where fuzzing begins: the files of a very small machine and of its recording."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lightning_pathkernel.packed_io import Node
from tests.helpers import Classifier
from tests.reliability.forks import forked
from tests.reliability.fuzz.doors import node_of
from tests.store.artifacts import record

__all__ = ["seeds"]

_LARGE = 24 << 10


def _tiny() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 10)]
    return Classifier("adamw", nn.Sequential(*layers), weight_decay=0.1)


def seeds(root: Path) -> tuple[dict[str, list[bytes]], Node]:
    """Sound inputs for each door, and where the second chord begins.

    Args:
        root: A directory that does not exist yet.

    Raises:
        RuntimeError: If they cannot be made.
    """
    root.mkdir(parents=True)
    ended = forked(lambda: str(record(root, _tiny())))
    if ended.value is None:
        raise RuntimeError(f"no machine to begin with: {ended}")
    machine, recording = Path(ended.value) / "machine", Path(ended.value) / "recording"
    chords = [path.read_bytes() for path in sorted(machine.glob("chord-*.safetensors"))]
    segments = [path.read_bytes() for path in sorted(recording.rglob("*.safetensors"))]
    segments = [data for data in segments if len(data) < _LARGE]
    manifest = (machine / "manifest.json").read_bytes()
    found = {
        "manifest": [manifest],
        "directory": [manifest],
        "tensors": [*chords[:2], (machine / "constants.safetensors").read_bytes()],
        "chord": chords[:1],
        "next chord": chords[1:2],
        "segment": segments,
        "sealed segment": segments,
        "description": [(recording / "recording.json").read_bytes()],
    }
    return found, node_of(safetensors.torch.load(chords[0]))
