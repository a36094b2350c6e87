"""One machine of digits, and its page, for all tests of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from lightning_pathkernel import KernelMachine
from tests.helpers import digits
from tests.report.pages import Node, digits_machine, read, validation_batch


@dataclass(frozen=True)
class Written:
    """A page, and what it was written from."""

    machine: KernelMachine
    path: Path
    page: Node
    batch: list[Tensor]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("report")
    machine = digits_machine(root)
    batch = validation_batch(14)
    path = machine.report(root / "report.html", batch, examples=digits()[0], title="Digits", top_k=5, max_queries=6)
    return Written(machine, path, read(path), batch)
