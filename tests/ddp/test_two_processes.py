"""Two processes make the machine that one process makes on the same global batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.store import ArtifactError
from tests.ddp.train import COUNT, network
from tests.helpers import Classifier, digits
from tests.resuming import chain_of, files_of

CASES = {
    "sgd": ["--optimizer=sgd"],
    "sgd, nodes by a tolerance": ["--optimizer=sgd", "--tolerance=0.05"],
    "adamw, clipping, accumulation": ["--optimizer=adamw", "--clip=1.0", "--accumulate=2"],
}


def run(root: Path, *options: str, fails: bool = False) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ddp.train", str(root), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if fails:
        return {"code": done.returncode, "said": done.stderr}
    assert done.returncode == 0, done.stderr[-4000:]
    found_result: dict[str, Any] = torch.load(root / "result.pt", weights_only=True)
    return found_result


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_machine_of_one(name: str, tmp_path: Path) -> None:
    two = run(tmp_path / "two", *CASES[name])
    plain = run(tmp_path / "plain", "--plain", *CASES[name])
    for key, value in plain["weights"].items():
        assert torch.equal(value, two["weights"][key]), f"{key}: training is not bit-identical"
    one = run(tmp_path / "one", "--processes=1", *CASES[name])
    machines = {}
    for side in ("one", "two"):
        verify(tmp_path / side / "run" / "machine")
        machines[side] = KernelMachine.load(tmp_path / side / "run" / "machine", Classifier())
    nodes = [[chord.last_step for chord in machine.chords] for machine in machines.values()]
    assert nodes[0] == nodes[1], nodes
    assert machines["one"].example_ids.tolist() == machines["two"].example_ids.tolist() == list(range(COUNT))
    x, y = digits()[1].tensors
    found = torch.stack([machines[side].contributions(x[:40], y[:40]).flatten() for side in ("one", "two")])
    assert float(torch.corrcoef(found)[0, 1]) > 0.9999
    fidelity = {side: machines[side].fidelity([x])["fidelity"] for side in machines}
    assert abs(fidelity["one"] - fidelity["two"]) < 1e-3, fidelity
    assert fidelity["two"] > 0.97
    influences = torch.stack([machines[side].self_influence() for side in ("one", "two")])
    assert float(torch.corrcoef(influences)[0, 1]) > 0.999
    logged = {side: result["logged"]["pathkernel/fidelity"] for side, result in (("one", one), ("two", two))}
    assert abs(logged["one"] - logged["two"]) < 1e-3, logged


def test_a_recording_by_two_processes_is_merged_at_export_or_its_gap_named(tmp_path: Path) -> None:
    run(tmp_path / "two", "--optimizer=sgd", "--network=batch norm", "--injected")
    recording = tmp_path / "two" / "run" / "recording"
    parts = sorted(p.name for p in (recording / "rank-0001").glob("segment-*"))
    assert parts == sorted(p.name for p in (recording / "rank-0000").glob("segment-*"))
    module = Classifier("sgd", network("batch norm"))
    machine = KernelMachine.load(KernelMachineExporter(recording).export(tmp_path / "again"), module)
    x = digits()[1].tensors[0]
    assert machine.fidelity([x])["fidelity"] > 0.9
    assert machine.example_ids.tolist() == list(range(COUNT))
    (recording / "rank-0001" / parts[2]).unlink()
    with pytest.raises(ArtifactError, match=f"rank-0001/{parts[2]} is missing from the recording"):
        KernelMachineExporter(recording).export(tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


def test_two_processes_resume_to_the_bytes_of_two_that_were_not_interrupted(tmp_path: Path) -> None:
    options = ["--optimizer=adamw", "--clip=1.0", "--accumulate=2"]
    run(tmp_path / "whole", *options)
    run(tmp_path / "broken", *options, "--stop=11", fails=True)  # in mid-accumulation
    rescued = KernelMachineExporter(tmp_path / "broken" / "run" / "recording").export(tmp_path / "rescued")
    verify(rescued)
    assert KernelMachine.load(rescued, Classifier()).chords[-1].last_step == 5
    run(tmp_path / "broken", *options, f"--resume={tmp_path / 'broken' / 'at.ckpt'}")
    whole, again = (tmp_path / name / "run" for name in ("whole", "broken"))
    assert chain_of(again / "recording") == chain_of(whole / "recording")
    assert any(name.startswith("rank-0001/segment-") for name in chain_of(again / "recording"))
    assert files_of(again / "machine") == files_of(whole / "machine")
    alone = run(
        tmp_path / "broken", *options, "--processes=1", f"--resume={tmp_path / 'broken' / 'at.ckpt'}", fails=True
    )
    assert "the checkpoint was written by 2, found 1" in alone["said"]


@pytest.mark.parametrize("choice", ["raise", "stop_recording"])
def test_a_full_disk_of_one_process_stops_all_of_them_alike(choice: str, tmp_path: Path) -> None:
    found = run(tmp_path / "full", "--optimizer=sgd", "--fail=3", f"--on-store-error={choice}", fails=True)
    assert "No space left on device" in found["said"]
    assert (found["code"] == 0) == (choice == "stop_recording"), found["said"][-3000:]
    assert (tmp_path / "full" / "result.pt").exists() == (choice == "stop_recording")
    machine = KernelMachineExporter(tmp_path / "full" / "run" / "recording").export(tmp_path / "out")
    verify(machine)
    assert [c.index for c in KernelMachine.load(machine, Classifier()).chords] == [0, 1]
