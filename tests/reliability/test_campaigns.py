"""Every campaign, by its command: a sample in the quick suite, the full figure with ``-m slow``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.counts import COUNTS

ROOT = Path(__file__).parents[2]
HOURS = 3600
FORKING = [name for name in COUNTS if name != "fuzz-atheris"]


SAMPLES = {
    "interrupted": ("kills", "kills-two-ranks", "writers"),
    "failing": ("faults-recording", "faults-stopping", "faults-exporting", "faults-resuming", "full-disk", "crashes"),
    "foreign": ("flips", "truncations", "hostile", "fuzz", "audit", "readers"),
}
"""What the quick suite runs in one process: most of the time goes into importing torch and Lightning."""


def run(names: Sequence[str], *options: str, timeout: float) -> list[dict[str, Any]]:
    """What campaigns report, run in a process that has run no backward pass."""
    command = [sys.executable, "-m", "tests.reliability", *names, "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=timeout
    )
    reports = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [report["name"] for report in reports] == list(names), ended.stderr[-3000:]
    return reports


def test_every_campaign_has_a_sample() -> None:
    assert sorted(name for names in SAMPLES.values() for name in names) == sorted(FORKING)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_finds_nothing(kind: str) -> None:
    reports = run(SAMPLES[kind], "--sample", timeout=280)
    assert {report["name"]: report["wrong"] for report in reports} == {name: [] for name in SAMPLES[kind]}
    assert [report["name"] for report in reports if not worked(report)] == []


@pytest.mark.slow
@pytest.mark.timeout(6 * HOURS)
@pytest.mark.parametrize("name", FORKING)
def test_the_full_count_finds_nothing(name: str) -> None:
    (report,) = run([name], timeout=6 * HOURS)
    assert report["wrong"] == []
    assert worked(report)
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


def worked(report: dict[str, Any]) -> bool:
    """Whether a campaign did what it was asked for: one that does nothing finds nothing."""
    name, count = report["name"], report["count"]
    if name.startswith("kills"):
        return bool(report["kills"] == count and report["runs"] > 0)
    if name.startswith(("faults", "crashes", "full")):
        return bool(report["sites"] > 0 and report["injected"] == count if count else report["injected"] > 0)
    if name in ("flips", "truncations"):
        return bool(report["verified"] == count and report["loaded"] > 0 and report["recordings"] > 0)
    if name == "hostile":
        return bool(report["kinds"] >= max(count, 8) and report["values"]["refused"] > 0)
    if name == "fuzz":
        return bool(report["inputs"] == count and 0 < report["let_in"] < count)
    if name == "audit":
        return bool(report["events"]["open"] > 0 and len(report["shown"]) > 5)
    if name == "readers":
        return bool(report["polls"] >= count and report["whole"] and report["nothing"])
    return bool(0 < report["polls"] <= count)
