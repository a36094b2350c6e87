"""Every campaign, by its command: a sample in the quick suite, the full figure with ``-m slow``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.counts import COUNTS

ROOT = Path(__file__).parents[2]
HOURS = 3600


def run(name: str, count: int, seed: int, timeout: int) -> dict[str, Any]:
    """What a campaign reports, run in a process that has run no backward pass."""
    command = [sys.executable, "-m", "tests.reliability", name, "--count", str(count), "--seed", str(seed), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=timeout
    )
    assert ended.stdout, ended.stderr[-3000:]
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("name", [n for n in COUNTS if n != "fuzz-atheris"])
def test_a_sample_finds_nothing(name: str) -> None:
    report = run(name, COUNTS[name].sample, seed=0, timeout=280)
    assert report["wrong"] == []
    assert worked(name, report, COUNTS[name].sample)


@pytest.mark.slow
@pytest.mark.timeout(6 * HOURS)
@pytest.mark.parametrize("name", [n for n in COUNTS if n != "fuzz-atheris"])
def test_the_full_count_finds_nothing(name: str) -> None:
    report = run(name, COUNTS[name].full, seed=0, timeout=6 * HOURS)
    assert report["wrong"] == []
    assert worked(name, report, COUNTS[name].full)
    if name == "kills":
        assert report["recovering"] >= 100
    if name == "hostile":
        assert report["kinds"] == report["refused"] >= 50


@pytest.mark.slow
@pytest.mark.timeout(6 * HOURS)
def test_coverage_leads_to_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="needs the extra `fuzz`")
    command = [
        sys.executable, "-m", "tests.reliability.fuzz", f"-runs={COUNTS['fuzz-atheris'].full}", "-seed=1",
        f"-artifact_prefix={tmp_path}/",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not list(tmp_path.iterdir())


def worked(name: str, report: dict[str, Any], count: int) -> bool:
    """Whether it did what it was asked for: a campaign that does nothing finds nothing."""
    if name.startswith("kills"):
        return bool(report["kills"] == count and report["runs"] > 0)
    if name.startswith(("faults", "crashes", "full")):
        everything = report["injected"] >= report["sites"] > 0
        return bool(report["injected"] == count if count else everything)
    if name in ("flips", "truncations"):
        return bool(report["verified"] == count and report["loaded"] > 0 and report["recordings"] > 0)
    if name == "hostile":
        return bool(report["kinds"] >= max(count, 8) and report["values"]["refused"] > 0)
    if name == "fuzz":
        return bool(report["inputs"] == count and 0 < report["let_in"] < count)
    if name == "audit":
        return bool(report["events"]["open"] > 0 and len(report["shown"]) > 5)
    if name == "readers":
        return bool(report["polls"] == count and report["whole"] and report["nothing"])
    return bool(0 < report["polls"] <= count and report["slowest"] < 30)
