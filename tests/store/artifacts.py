"""A real recording of a small network, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pathkernel import ArtifactError, PathKernelCallback
from lightning_pathkernel.chord_io import chord_name
from lightning_pathkernel.store import file_table
from tests.helpers import Classifier, fit

CONSTANTS, MANIFEST, MIDDLE = "constants.safetensors", "manifest.json", chord_name(1)
WEIGHT = "net.1.weight"
"""A parameter ``[12, 64]`` with a factor on its right only: 12 rows are kept exactly."""
DEEP = "[" * 100_000
"""JSON that no parser goes to the bottom of."""


def network(width: int = 12) -> Classifier:
    """With a frozen layer and an integer buffer: something for every file of the artifact."""
    torch.manual_seed(3)
    hidden = [nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 8).requires_grad_(False)]
    return Classifier("adamw", nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 10)), weight_decay=0.1)


def record(root: Path, module: Classifier) -> Path:
    path_kernel = PathKernelCallback(str(root / "run"), nodes=4, probes=50, sketch_dim=32)
    fit(module, [path_kernel], root, max_epochs=1)
    return root / "run"


def recorded(recording: Path, chord: int) -> Path:
    """The segment of a chord; the first one of a recording holds its constants."""
    return recording / "rank-0000" / f"segment-{chord + 1:06d}.safetensors"


def edit(machine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = machine / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def reseal(machine: Path) -> None:
    """Whoever made the change made the manifest too."""
    edit(machine, lambda manifest: manifest.update(files=file_table(machine)))


def flip(path: Path, position: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def refused(match: str | None = None) -> Any:
    return pytest.raises(ArtifactError, match=match)
