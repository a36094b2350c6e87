"""The resident set does not grow with the number of steps."""

from __future__ import annotations

import subprocess
import sys

import pytest


def ranges(steps: int, warm_up: int, *networks: str) -> list[float]:
    """Range of the resident set after the warm-up, relative to it: each network without and with the callback."""
    command = [sys.executable, "-m", "benchmarks.memory", f"--steps={steps}", f"--warm-up={warm_up}"]
    command += ["--networks", *networks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| MLP", "| CNN"))]
    return [float(line.split("|")[7].strip().removesuffix("%")) / 100 for line in rows]


def test_three_hundred_steps() -> None:
    found = ranges(300, 100, "MLP")
    assert len(found) == 2
    assert max(found) <= 0.05, found


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_thousand_steps() -> None:
    found = ranges(2000, 500, "MLP", "CNN")
    assert len(found) == 4
    assert max(found) <= 0.05, found
