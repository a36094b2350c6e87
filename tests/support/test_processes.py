"""Two processes: the same training as without the callback, and each example's part of the averaged gradient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_pathkernel import KernelMachine
from tests.support.judge import POINTS
from tests.support.processes import DDP, QUERIES, TARGET

ROOT = Path(__file__).parents[2]


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.processes", str(tmp_path)]
    running = [
        subprocess.Popen([*command, side], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for side in ("plain", "recorded")
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    plain, weights = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "recorded.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in weights.items())
    module = DDP.learner()
    machine = KernelMachine.load(tmp_path / "run" / "machine", module, quadrature_points=POINTS)
    judged = load_file(tmp_path / "judged.safetensors")
    found, expected = machine.contributions(QUERIES, TARGET), judged["contributions"]
    assert machine.example_ids.tolist() == judged["ids"].tolist() == list(range(22))
    assert float((found - expected).abs().max() / expected.abs().max()) < DDP.feature.tolerance
    ledger = machine.explain(QUERIES, TARGET, top_k=1).ledger
    module.load_state_dict(weights)
    with torch.no_grad():
        output = module(QUERIES).gather(1, TARGET[:, None])[:, 0]
    assert float((sum(ledger.values()) - output).abs().max()) < 1e-8
    assert machine.chords[-1].last_step == DDP.feature.steps
