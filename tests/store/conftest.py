"""A recording and its machine, made once, and copies of them to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.store.artifacts import network, record


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real recording and its machine, of four chords; not to be changed."""
    return record(tmp_path_factory.mktemp("real"), network())


@pytest.fixture
def machine(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "machine", tmp_path / "machine"))


@pytest.fixture
def recording(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "recording", tmp_path / "recording"))
