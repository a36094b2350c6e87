"""A small real recording and its machine, made in a child so that this process can go on forking."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from lightning_pathkernel import KernelMachine
from tests.reliability.forks import forked
from tests.reliability.training import DIGITS
from tests.store.artifacts import network, record

__all__ = ["QUERIES", "answers", "made"]

QUERIES = DIGITS[1].tensors[0][:2]


def made(root: Path) -> Path:
    """Recording and machine of `tests.store.artifacts`: frozen layers, integer buffers, a second stage.

    Args:
        root: Where; the directory is made.

    Returns:
        The directory that holds ``recording`` and ``machine``.

    Raises:
        RuntimeError: If that fails.
    """
    root.mkdir(parents=True)
    ended = forked(lambda: str(record(root, network())))
    if ended.value is None:
        raise RuntimeError(f"no machine to work on: {ended}")
    return Path(ended.value)


def answers(machine: Path, module: Any) -> str:
    """A digest of everything that a machine says of two images; all of its numbers take part."""
    loaded = KernelMachine.load(machine, module, quadrature_points=1)
    target = torch.tensor([0, 7])
    parts = [loaded.contributions(QUERIES, target), loaded.predict(QUERIES), loaded.self_influence()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().contiguous().numpy().tobytes())
    digest.update(repr((loaded.example_ids.tolist(), sorted(loaded.example_names.items()))).encode())
    return digest.hexdigest()
